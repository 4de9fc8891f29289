"""Micro-batches in the exact order, decoded ahead of the step that needs them.

Decoders release the interpreter lock, so workers are threads: they share one mapping of the shards, and a batch reaches the
trainer without a copy between processes. Which thread decodes what never shows in the result.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from swath.shards.order import SampleOrder
from swath.shards.reader import Chips, ShardReader


class Loader:
    """Iterates over the micro-batches of `rank`, from `step` on, forever.

    Global batch b is positions [b·GB, (b+1)·GB) of the order; rank r takes its r-th share of them, cut into micro-batches.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: SampleOrder,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        step: int = 0,
        workers: int = 1,
    ) -> None:
        self.reader, self.order = reader, order
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.share = rank, global_batch // world_size
        self.step, self.workers = step, workers

    def __iter__(self) -> Iterator[Chips]:
        if self.workers == 0:
            yield from (self._load(first) for first in self._positions())
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="swath-decode")
        waiting: deque[Future[Chips]] = deque()
        try:
            for first in self._positions():
                waiting.append(pool.submit(self._load, first))
                if len(waiting) > 2 * self.workers:
                    yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _positions(self) -> Iterator[int]:
        step = self.step
        while True:
            start = step * self.global_batch + self.rank * self.share
            yield from range(start, start + self.share, self.micro_batch)
            step += 1

    def _load(self, first: int) -> Chips:
        samples, visits = self.order.at(first, self.micro_batch)
        return self.reader.chips(samples, visits)
