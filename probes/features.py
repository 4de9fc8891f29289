"""Pooled features of every labelled sample, computed once; the probes see nothing else."""

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from swath.hub.adapt import command
from swath.hub.load import Loaded
from swath.pretrain.objective import context
from swath.shards.bands import InputContract
from swath.shards.draw import Draw
from swath.shards.errors import InputError
from swath.shards.prepare import prepare
from swath.shards.reader import Chips, ShardReader


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


def extract(
    loaded: Loaded,
    reader: ShardReader,
    *,
    batch: int = 256,
    size: tuple[int, int] | None = None,
    progress: bool = True,
) -> Features:
    """Features of the labelled samples of `reader`, in the order of its index, in fp32.

    Values are normalised by the backbone's contract, never by the probe data's own statistics, and resized to `size`
    (height, width), by default the one that the backbone was trained at. Raises InputError for another contract, and where
    no sample has a label.
    """
    contract = require_contract(loaded, reader)
    numbers = np.flatnonzero(reader.labels >= 0)
    if len(numbers) == 0:
        raise InputError(f"data set {reader.manifest.dataset} has no labels; probes need them")
    size = size or loaded.size
    device = next(loaded.backbone.parameters()).device
    x = np.empty((len(numbers), loaded.backbone.pooled_width), dtype=np.float32)
    modality, done = contract.modality, 0
    with torch.inference_mode(), tqdm(total=len(numbers), desc="features", unit="img", disable=not progress) as bar:
        for chips in _decoded_ahead(reader, numbers, batch):
            prepared = prepare(chips.to(device), {modality: contract}, size)
            pooled = loaded.backbone(
                prepared.images[modality], context(prepared, modality, loaded.backbone, Draw(0, chips.id, chips.visit))
            ).pooled
            x[done : done + len(pooled)] = pooled.float().cpu().numpy()
            done += len(pooled)
            bar.update(len(pooled))
    if not np.isfinite(x).all():
        raise InputError(f"backbone {loaded.name} gives features that are not finite; its run has diverged")
    samples = reader.index.samples[numbers]
    return Features(
        x=x,
        label=samples["label"].astype(np.int64),
        block=samples["block"].astype(np.int64),
        id=samples["id"].astype(np.int64),
        classes=tuple(reader.manifest.classes),
        unlabelled=len(reader) - len(numbers),
    )


def _decoded_ahead(reader: ShardReader, numbers: np.ndarray, batch: int) -> Iterator[Chips]:
    """Batches in order, up to two of them decoded in a thread while the backbone works."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="swath-decode")
    waiting: deque[Future[Chips]] = deque()
    try:
        for first in range(0, len(numbers), batch):
            waiting.append(pool.submit(reader.chips, numbers[first : first + batch]))
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
