"""Micro-batches in the exact order, decoded ahead of the step that needs them.

    for source, chips in Loader(reader, order, global_batch=256, micro_batch=64): ...
    for source, chips in Loader([optical, radar], Mixture([a, b], weights=[2, 1]), global_batch=256, micro_batch=64): ...

`source` is the number of the data set in the list (0 where there is one): a global batch, hence a micro-batch, holds one input
contract, and all ranks come to the same one at the same step.

Decoders release the interpreter lock, so workers are threads: they share one mapping of the shards, and a batch reaches the
trainer without a copy between processes. Which thread decodes what never shows in the result.
"""

import mmap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from torch import Tensor

from swath.shards.mixture import Mixture
from swath.shards.order import SampleOrder
from swath.shards.reader import Chips, ShardReader

RELEASE = 1 << 14  # samples after which the pages of the index that they touched are let go


class MicroBatch(NamedTuple):
    """Chips of one data set, and which one of the loader's readers it is."""

    source: int
    chips: Chips


class Loader:
    """Iterates over the micro-batches of `rank`, from global batch `step` on, forever.

    Global batch b is a run of positions of one data set's order; rank r takes its r-th share of them, cut into micro-batches.
    `workers` threads decode at most `depth` micro-batches ahead (default: two for each); 0 decodes when asked. With `pin` they
    lie in page-locked memory, for which there must be a GPU. `upcoming(source, names)` is told, `ahead` steps before each step,
    which shards this rank will need, in the order of need; a shard is named again for every step that needs it.

    An error while decoding (InputError for damaged data) is raised in the place of its micro-batch, without waiting for what
    the other threads are doing. Closing the iterator ends the threads.
    """

    def __init__(
        self,
        readers: ShardReader | Sequence[ShardReader],
        stream: SampleOrder | Mixture,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        step: int = 0,
        workers: int = 1,
        depth: int | None = None,
        pin: bool = False,
        upcoming: Callable[[int, list[str]], None] | None = None,
        ahead: int = 8,
    ) -> None:
        self.readers = (readers,) if isinstance(readers, ShardReader) else tuple(readers)
        self.mixture = stream if isinstance(stream, Mixture) else Mixture([stream])
        if [len(r) for r in self.readers] != [o.samples for o in self.mixture.orders]:
            raise ValueError("the orders are not those of the readers")
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.share = rank, global_batch // world_size
        self.step, self.workers = step, workers
        self.depth = 2 * workers if depth is None else depth
        self.pin, self.upcoming, self.ahead = pin, upcoming, ahead

    def __iter__(self) -> Iterator[MicroBatch]:
        if self.workers == 0:
            yield from (self._load(*work) for work in self._work())
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="swath-decode")
        waiting: deque[Future[MicroBatch]] = deque()
        try:
            for work in self._work():
                waiting.append(pool.submit(self._load, *work))
                if len(waiting) > self.depth:
                    yield waiting.popleft().result()
        except GeneratorExit:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:  # an error or Ctrl-C goes up at once; the threads end with the micro-batch they are at
            pool.shutdown(wait=False, cancel_futures=True)

    def _work(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(data set, sample numbers, visits) of each micro-batch."""
        step, told, seen = self.step, self.step, 0
        while True:
            while self.upcoming is not None and told <= step + self.ahead:
                self._tell(told)
                told += 1
            source, numbers, visits = self._samples(step)
            for first in range(0, self.share, self.micro_batch):
                rows = slice(first, first + self.micro_batch)
                yield source, numbers[rows], visits[rows]
            step, seen = step + 1, seen + self.share
            if seen >= RELEASE:
                seen = 0
                for reader in self.readers:
                    release(reader.index.samples)

    def _samples(self, step: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(data set, sample numbers, visits) of this rank's share of a global batch."""
        source, first = self.mixture.batch(step, self.global_batch)
        order = self.mixture.orders[source]
        mine = order.batch(first, self.global_batch)[self.rank * self.share : (self.rank + 1) * self.share]
        return source, *order.find(mine)

    def _tell(self, step: int) -> None:
        assert self.upcoming is not None
        source, numbers, _ = self._samples(step)
        shards = self.readers[source].manifest.shards
        self.upcoming(source, [shards[s].name for s in self.mixture.orders[source].shards(numbers)])

    def _load(self, source: int, numbers: np.ndarray, visits: np.ndarray) -> MicroBatch:
        chips = self.readers[source].chips(numbers, visits)
        return MicroBatch(source, chips.each(Tensor.pin_memory) if self.pin else chips)


def release(rows: np.ndarray) -> None:
    """Unmap the pages of the file that `rows` is a view of; they stay in the system's cache, and come back when looked at.

    Else a rank that has gone through a long epoch has the whole index mapped, and is charged for it (RSS).
    """
    owner = rows
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, mmap.mmap):
        owner.madvise(mmap.MADV_DONTNEED)
