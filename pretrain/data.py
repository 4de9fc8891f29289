"""What a run trains on: its data sets, the input contract of each modality, and the stream of global batches (DESIGN §2.3)."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from swath.pretrain import config
from swath.pretrain.world import ALONE, World
from swath.shards.bands import InputContract
from swath.shards.errors import InputError
from swath.shards.loader import Loader, MicroBatch
from swath.shards.mixture import Mixture
from swath.shards.order import SampleOrder
from swath.shards.reader import VALID_CLEAR, VALID_CLOUD, VALID_SHADOW, Chips, ShardReader
from swath.shards.skips import Skips
from swath.shards.stores.cache import CacheOptions
from swath.shards.stores.remote import is_remote


class Data:
    """The data sets of `recipe.data`. A modality has one contract in a run: that of the first data set that has it.

    `clear` are the validity codes that count as seen. Raises InputError where two data sets give a modality other bands.
    """

    def __init__(self, data: config.Data, seed: int) -> None:
        self.data, self.seed = data, seed
        self.skips = Skips(data.skip_damaged)
        self.readers = [self._open(one.path) for one in data.train]
        self.held_out = [self._open(path) for path in data.val] or self.readers
        self.contracts: dict[str, InputContract] = {}
        for reader in (*self.readers, *self.held_out):
            for name, contract in reader.contracts.items():
                known = self.contracts.setdefault(name, contract)
                ours, remedy = self.data.train[0].path, "data sets of the same bands, or another name for this modality"
                known.require(contract, ours=ours, theirs=str(reader.place), remedy=remedy)
        # radar last, as a backbone has it that sees several modalities as one image
        self.contracts = dict(sorted(self.contracts.items(), key=lambda item: item[1].is_radar))
        if new := self.contracts.keys() - {name for reader in self.readers for name in reader.contracts}:
            raise InputError(f"data.val has modality {', '.join(sorted(new))}, which data.train has not; leave it out")
        self.clear = (VALID_CLEAR, VALID_CLOUD, VALID_SHADOW) if data.clouds else (VALID_CLEAR,)
        self.samples = sum(len(reader) for reader in self.readers)

    @property
    def _cache(self) -> CacheOptions:
        return CacheOptions(self.data.cache_dir, None if self.data.cache_gb is None else int(self.data.cache_gb * 1e9))

    def _open(self, path: str) -> ShardReader:
        return ShardReader(
            path, self.data.modalities, cache=self._cache,
            skips=self.skips if self.skips.limit else None,
        )  # fmt: skip

    @property
    def contract(self) -> InputContract:
        """Of the first modality: what pictures and rehearsals use."""
        return next(iter(self.contracts.values()))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) that the backbone sees; InputError where neither recipe nor chips have one."""
        if self.data.size is not None:
            return self.data.size, self.data.size
        sizes = {(contract.height, contract.width) for contract in self.contracts.values()}
        height, width = sizes.pop()
        if sizes or height is None or width is None:
            raise InputError("the chips have several sizes; say which to train at: data.size=…")
        return height, width

    @property
    def shards(self) -> list[list[Any]]:
        """What the order rests on: each shard's data set, name, samples and checksum."""
        return [
            [number, shard.name, shard.samples, shard.sha256]
            for number, reader in enumerate(self.readers)
            for shard in reader.manifest.shards
        ]

    @property
    def datasets(self) -> list[dict[str, Any]]:
        """What a model card says of each: name, samples, licence."""
        manifests = [reader.manifest for reader in self.readers]
        return [{"name": one.dataset, "samples": one.samples, "licence": one.licence} for one in manifests]

    def stream(self) -> Mixture:
        orders = [
            SampleOrder(reader.shard_sizes, seed=self.seed, window=self.data.window, lanes=self.data.lanes)
            for reader in self.readers
        ]
        weights = [one.weight for one in self.data.train]
        if all(weight is None for weight in weights):
            return Mixture(orders)
        if any(weight is None for weight in weights):
            raise InputError("data.train: either all data sets have a weight, or none has")
        return Mixture(orders, [weight for weight in weights if weight is not None])

    def batches(
        self, *, global_batch: int, micro_batch: int, step: int, device: torch.device, world: World = ALONE
    ) -> Iterator[MicroBatch]:
        """This rank's micro-batches from global batch `step` on, for ever; closing it ends its threads."""
        cached = self.data.stage or any(is_remote(one.path) for one in self.data.train)
        stream = self.stream()
        if self.data.stage:
            self._stage(stream, step, global_batch, world)
        loader = Loader(
            self.readers, stream, global_batch=global_batch, micro_batch=micro_batch, step=step,
            rank=world.rank, world_size=world.size, workers=self.data.workers, pin=device.type == "cuda",
            # shards of the next window are fetched while this one is trained on
            upcoming=self._prefetch if cached else None, ahead=-(-self.data.window // global_batch),
        )  # fmt: skip
        return iter(loader)

    def _stage(self, stream: Mixture, step: int, global_batch: int, world: World) -> None:
        """Have each node's ranks copy, between them, what the node reads in the rest of this epoch and in the next one, in that
        order, as far as there is room. They train meanwhile: who needs a shard that is not here yet copies it or waits."""
        of_node = world.size // world.nodes
        node = world.rank // of_node
        lanes = range(node * self.data.lanes // world.nodes, -(-(node + 1) * self.data.lanes // world.nodes))
        for reader in self.readers:
            reader.stage(self._cache, speaks=world.local == 0)
        first: dict[int, int] = {}  # position of each data set's next batch
        for number in range(step, step + 2 * stream.cycle_length(global_batch)):
            source, position = stream.batch(number, global_batch)
            first.setdefault(source, position)
            if len(first) == len(self.readers):
                break
        wanted = {}
        for source, position in first.items():
            order = stream.orders[source]
            following = (position // order.samples + 1) * order.samples
            wanted[source] = dict.fromkeys([*order.needed(position, lanes), *order.needed(following, lanes)])
        sizes = {source: [shard.bytes for shard in self.readers[source].manifest.shards] for source in wanted}
        total = sum(sizes[source][number] for source in wanted for number in wanted[source])
        room = min(reader.store.capacity for reader in self.readers)
        for source, numbers in wanted.items():
            ends = np.cumsum([sizes[source][number] for number in numbers])
            fits = int(np.searchsorted(ends, ends[-1] * min(1.0, room / total), side="right"))
            self.readers[source].fill(list(numbers)[:fits][world.local :: of_node])

    def _prefetch(self, source: int, names: list[str]) -> None:
        self.readers[source].prefetch(names)

    def close(self) -> None:
        """End downloads that go on in the background."""
        for reader in {*self.readers, *self.held_out}:
            reader.close()

    def contracts_of(self, chips: Chips) -> dict[str, InputContract]:
        """Of the modalities that a batch has."""
        return {name: self.contracts[name] for name in chips.stored}
