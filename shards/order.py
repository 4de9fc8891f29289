"""The order of samples (DESIGN §2.3): an endless stream that is a pure function of (seed, shard sizes, window, lanes).

Epoch e is positions [e·N, (e+1)·N). Within it the shuffled shards are laid end to end, the line is cut into `lanes` equal
runs, and each run is permuted inside windows of `window` samples. Neither ranks nor workers nor batch sizes appear, so a
position means the same sample however a run is cut.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from swath.shards.draw import hashes
from swath.shards.errors import InputError


class SampleOrder:
    """Maps positions of the stream to (sample, visit). Memory: one window per lane and one row per shard."""

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, window: int = 65536, lanes: int = 1) -> None:
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.samples = int(self.sizes.sum())
        if self.samples < 1:
            raise InputError("the data set holds no samples; make shards from at least one")
        if window < 1 or lanes < 1 or lanes > self.samples:
            raise InputError(f"data.window and data.lanes must be at least 1, lanes at most {self.samples} samples")
        self.seed, self.window, self.lanes = seed, window, lanes
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])  # of each shard, in the manifest's numbering
        self._shards_of = lru_cache(maxsize=2)(self._shards)
        self._window_of = lru_cache(maxsize=2 * lanes + 2)(self._window)

    def at(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(sample numbers, visits), each (count,) int64, of positions first .. first + count - 1."""
        position = np.arange(first, first + count, dtype=np.int64)
        epoch, index = position // self.samples, position % self.samples
        lane, place = index % self.lanes, index // self.lanes
        window = place // self.window
        sample = np.empty(count, dtype=np.int64)
        where = np.stack([epoch, lane, window], axis=1)
        for key in np.unique(where, axis=0):
            rows = (where == key).all(axis=1)
            sample[rows] = self._window_of(*(int(k) for k in key))[place[rows] % self.window]
        return sample, epoch

    def _shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shuffled shard list, and where each of them starts on the epoch's line."""
        shuffled = torch.argsort(hashes(self.seed, f"shards/{epoch}", 0, len(self.sizes)), stable=True).numpy()
        return shuffled, np.concatenate([[0], np.cumsum(self.sizes[shuffled])])

    def _lane(self, lane: int) -> tuple[int, int]:
        """Start and length of a lane's run; the first N mod lanes lanes are one sample longer."""
        base, extra = divmod(self.samples, self.lanes)
        return lane * base + min(lane, extra), base + (lane < extra)

    def _window(self, epoch: int, lane: int, window: int) -> np.ndarray:
        """The samples of one window in the order in which they are visited."""
        start, length = self._lane(lane)
        first = start + window * self.window
        count = min(self.window, start + length - first)
        shuffled, starts = self._shards_of(epoch)
        line = first + torch.argsort(hashes(self.seed, f"samples/{epoch}", first, count), stable=True).numpy()
        row = np.searchsorted(starts, line, side="right") - 1
        return self._starts[shuffled[row]] + line - starts[row]


def cut(global_batch: int, world_size: int, micro_batch: int | None) -> tuple[int, int]:
    """(micro-batch, micro-steps) of each rank; raises InputError with the sizes that fit unless they divide exactly."""
    share, rest = divmod(global_batch, world_size)
    if rest or not share:
        low, high = share * world_size, (share + 1) * world_size
        fits = " or ".join(str(n) for n in (low, high) if n)
        raise InputError(f"train.global_batch {global_batch} does not divide by world size {world_size}; {fits} would")
    micro = share if micro_batch is None else micro_batch
    if micro < 1 or share % micro:
        fits = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
        raise InputError(
            f"train.micro_batch {micro} does not divide train.global_batch / world size = {share}; sizes that fit: {fits}"
        )
    return micro, share // micro
