"""Pooled features of labelled samples, computed once; frozen probes see nothing else."""

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import swath
from swath.backbones.base import Context
from swath.hub.adapt import command
from swath.hub.load import Loaded
from swath.pretrain.objective import context
from swath.pretrain.precision import Precision, autocast
from swath.probes import cache
from swath.probes.task import Bench
from swath.shards.bands import InputContract
from swath.shards.draw import Draw
from swath.shards.errors import InputError
from swath.shards.prepare import Batch, prepare
from swath.shards.reader import Chips, ShardReader

_BATCH, _PIXELS = 256, 1 << 22  # images at once, of at most so many pixels together


@dataclass
class Features:
    """x (N, D) float32; label (N,) int64 into `classes`; block (N,) int64, -1 where a sample is in none; id (N,) int64.

    `unlabelled` samples were left out.
    """

    x: np.ndarray
    label: np.ndarray
    block: np.ndarray
    id: np.ndarray
    classes: tuple[str, ...]
    unlabelled: int = 0


def require_contract(loaded: Loaded, reader: ShardReader) -> InputContract:
    """The backbone's contract of the modality that both have, by the data's name of it. InputError, with both sides and the
    command that would adapt it, unless the data's bands are those of the backbone."""
    return matched(loaded, reader.contracts, f"data set {reader.manifest.dataset}", reader.place)


def matched(loaded: Loaded, contracts: Mapping[str, InputContract], theirs: str, place: str) -> InputContract:
    """As `require_contract`, for data of `contracts` at `place`."""
    shared = [name for name in contracts if name in loaded.contracts]
    if not shared and len(contracts) > 1:
        raise InputError(f"{theirs} has modalities {', '.join(contracts)}; the backbone's is {', '.join(loaded.contracts)}")
    given = contracts[shared[0]] if shared else next(iter(contracts.values()))
    contract = loaded.contracts[shared[0]] if shared else loaded.contract
    remedy = command(loaded, given, place) if len(loaded.contracts) == 1 else "data with these bands of this modality"
    contract.require(given, ours=f"backbone {loaded.name}", theirs=theirs, remedy=remedy)
    return contract.model_copy(update={"modality": given.modality})


def resolve(asked: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """`auto` is bf16 where the device multiplies in it: by what it is, never by a measurement, so that it is the same again."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def labelled(reader: ShardReader) -> np.ndarray:
    """(N,) the samples that have a class. InputError where none has."""
    numbers = np.flatnonzero(reader.labels >= 0)
    if len(numbers) == 0:
        raise InputError(f"data set {reader.manifest.dataset} has no labels; probes need them")
    return numbers


def with_labels(x: np.ndarray, reader: ShardReader, numbers: np.ndarray) -> Features:
    """`x` (N, D) of the samples `numbers` with what the index says of them."""
    samples = reader.index.samples[numbers]
    label, block, identity = (samples[name].astype(np.int64) for name in ("label", "block", "id"))
    return Features(x, label, block, identity, tuple(reader.manifest.classes), len(reader) - len(numbers))


def extract(
    loaded: Loaded,
    reader: ShardReader,
    *,
    numbers: np.ndarray | None = None,
    batch: int | None = None,
    size: tuple[int, int] | None = None,
    precision: Precision = "fp32",
    told: bool = False,
    progress: bool = True,
) -> Features:
    """Features of the samples `numbers` of `reader`, by default of all that have a label, in the order of its index.

    Values are normalised by the backbone's contract, never by the probe data's own statistics, and resized to `size`
    (height, width), by default the one that the backbone was trained at. `told` gives it place and time too. Raises InputError
    for another contract, and where no sample has a label.
    """
    contract = require_contract(loaded, reader)
    numbers = labelled(reader) if numbers is None else numbers
    device = next(loaded.backbone.parameters()).device

    def pooled(prepared: Batch) -> Tensor:
        return loaded.backbone(prepared.images[contract.modality], known(loaded, prepared, contract.modality, told)).pooled

    with autocast(precision, device):
        x = over(reader, numbers, contract, size or loaded.size, device, pooled, batch=batch, progress=progress)
    if not np.isfinite(x).all():
        raise InputError(f"backbone {loaded.name} gives features that are not finite; its run has diverged")
    return with_labels(x, reader, numbers)


def known(loaded: Loaded, prepared: Batch, modality: str, told: bool) -> Context:
    """What the backbone is told besides pixels: wavelengths and GSD always, place and time where `told`."""
    ctx = context(prepared, modality, loaded.backbone, Draw(0, prepared.id, prepared.visit))
    return ctx if told else replace(ctx, lat=None, lon=None, time=None)


def over(
    reader: ShardReader,
    numbers: np.ndarray,
    contract: InputContract,
    size: tuple[int, int],
    device: torch.device,
    made_of: Callable[[Batch], Tensor],
    *,
    batch: int | None = None,
    progress: bool = True,
) -> np.ndarray:
    """(N, D) float32: `made_of` each batch of the samples `numbers`, prepared by `contract` at `size`."""
    batch = batch or max(1, min(_BATCH, _PIXELS // (size[0] * size[1])))
    rows: list[np.ndarray] = []
    parts = ((numbers[first : first + batch], None) for first in range(0, len(numbers), batch))
    with torch.inference_mode(), tqdm(total=len(numbers), desc="features", unit="img", disable=not progress) as bar:
        for chips in decoded_ahead(reader, parts):
            rows.append(made_of(prepare(chips.to(device), {contract.modality: contract}, size)).float().cpu().numpy())
            bar.update(len(rows[-1]))
    return np.concatenate(rows)


def features(bench: Bench, part: str, *, loaded: Loaded | None = None, numbers: np.ndarray | None = None) -> Features:
    """As `extract`, of a part of the bench ("train", "val", "test"), by its backbone or another; computed once, see `cache`."""
    loaded, reader = loaded or bench.loaded, bench.readers[part]
    numbers = labelled(reader) if numbers is None else numbers

    def make() -> np.ndarray:
        return extract(
            loaded, reader, numbers=numbers, precision=bench.precision, told=bench.context, progress=bench.progress
        ).x  # fmt: skip

    shape = (len(numbers), loaded.backbone.pooled_width)
    return with_labels(kept(bench, key_of(loaded, reader, numbers, bench), shape, make), reader, numbers)


def kept(bench: Bench, key: str, shape: tuple[int, int], make: Callable[[], np.ndarray], spent: str = "features") -> np.ndarray:
    """What `make` gives, float32 of this `shape`, computed once: from memory, else from the cache, by the hash of all that
    decides it. `spent`: which of the bench's `seconds` it counts among."""
    x = bench.memory[key] if key in bench.memory else cache.load(bench.cache, key, shape)
    if x is None:
        started = time.perf_counter()
        x = make()
        bench.seconds[spent] += time.perf_counter() - started
        cache.keep(bench.cache, key, x)
    bench.memory[key] = x
    return x


def key_of(loaded: Loaded, reader: ShardReader, numbers: np.ndarray, bench: Bench, *more: str | int | bool) -> str:
    """A hash of all that decides the numbers: weights, contracts with their normalisation, samples, size, precision, context,
    and what `more` a task has."""
    said = [
        swath.__version__, torch.__version__, loaded.name, loaded.options, loaded.size, bench.precision, bench.context, more,
        {name: contract.model_dump(mode="json") for name, contract in loaded.contracts.items()},
        [shard.sha256 for shard in reader.manifest.shards], list(reader.index.columns),
        next(loaded.backbone.parameters()).device.type,
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode())
    for rows in (reader.index.samples[numbers], reader.index.members[numbers]):
        digest.update(np.ascontiguousarray(rows).tobytes())
    for name, tensor in sorted(loaded.backbone.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def decoded_ahead(reader: ShardReader, batches: Iterable[tuple[np.ndarray, np.ndarray | None]]) -> Iterator[Chips]:
    """Batches of (sample numbers, visits) in order, up to two of them decoded in a thread while the backbone works."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="swath-decode")
    waiting: deque[Future[Chips]] = deque()
    try:
        for numbers, visits in batches:
            waiting.append(pool.submit(reader.chips, numbers, visits))
            if len(waiting) > 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def match_classes(train: Features, test: Features) -> Features:
    """`test` with its labels renumbered by class name into those of `train`.

    Raises InputError where samples of `test` are of classes that no sample of `train` has.
    """
    present = {train.classes[label] for label in np.unique(train.label)}
    asked = {test.classes[label] for label in np.unique(test.label)}
    if unknown := sorted(asked - present):
        raise InputError(f"no training sample is of class {', '.join(unknown)}; train has {', '.join(sorted(present))}")
    number = np.array([train.classes.index(name) if name in asked else -1 for name in test.classes])
    return Features(test.x, number[test.label], test.block, test.id, train.classes, test.unlabelled)


def require_classes(train: Features) -> None:
    if len(np.unique(train.label)) < 2:
        raise InputError(f"all training samples are of class {train.classes[train.label[0]]}; a probe needs at least two")


def standardised(train: Features, *others: Features) -> list[np.ndarray]:
    """x of `train` and of the others, (x - mean) / std with the statistics of `train`; a constant feature becomes 0."""
    mean, std = train.x.mean(axis=0, dtype=np.float64), train.x.std(axis=0, dtype=np.float64)
    std[std == 0] = 1
    return [((part.x - mean) / std).astype(np.float32) for part in (train, *others)]
