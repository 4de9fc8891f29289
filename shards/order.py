"""The order of samples (DESIGN §2.3): an endless stream that is a pure function of (seed, shard sizes, window, lanes).

Epoch e is positions [e·N, (e+1)·N). Within it the shuffled shards are laid end to end, the line is cut into `lanes` equal
runs, and each run is permuted inside windows of `window` samples; the runs are dealt from in turn. Neither ranks nor
workers nor batch sizes appear, so a position means the same sample however a run is cut.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from swath.shards.draw import hashes
from swath.shards.errors import InputError


class SampleOrder:
    """Maps positions of the stream to (sample, visit), each at once, without replaying those before.

    Memory: two rows per shard and epoch in use, and 8 bytes per sample of at most 2·lanes + 2 windows.
    """

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, window: int = 65536, lanes: int = 1) -> None:
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.samples = int(self.sizes.sum())
        if self.samples < 1:
            raise InputError("the data set holds no samples; make shards from at least one")
        if window < 1 or lanes < 1 or lanes > self.samples:
            raise InputError(f"data.window and data.lanes must be at least 1, lanes at most {self.samples} samples")
        self.seed, self.window, self.lanes = seed, window, lanes
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])  # of each shard, in the manifest's numbering
        self._windows = -(-self._lane(0)[1] // window)  # of the longest lane
        self._shards_of = lru_cache(maxsize=2)(self._shards)
        self._window_of = lru_cache(maxsize=2 * lanes + 2)(self._window)

    def at(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(sample numbers, visits), each (count,) int64, of positions first .. first + count - 1."""
        return self.find(np.arange(first, first + count, dtype=np.int64))

    def find(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(sample numbers, visits), each (P,) int64, of `positions` (P,) int64."""
        epoch, index = positions // self.samples, positions % self.samples
        lane, place = index % self.lanes, index // self.lanes
        where = (epoch * self.lanes + lane) * self._windows + place // self.window
        sample = np.empty(len(positions), dtype=np.int64)
        for key in np.unique(where).tolist():
            rows = where == key
            run, window = divmod(key, self._windows)
            sample[rows] = self._window_of(*divmod(run, self.lanes), window)[place[rows] % self.window]
        return sample, epoch

    def batch(self, first: int, count: int) -> np.ndarray:
        """(count,) int64: positions first .. first + count - 1, those of a lane together.

        Ranks take equal contiguous shares of it, so that a node touches only the shards of its own lanes.
        """
        positions = np.arange(first, first + count, dtype=np.int64)
        return positions[np.argsort(positions % self.samples % self.lanes, kind="stable")]

    def shards(self, samples: np.ndarray) -> list[int]:
        """The shards that hold `samples`, in the order in which they are first needed: what to fetch ahead."""
        shard = np.searchsorted(self._starts, samples, side="right") - 1
        return shard[np.sort(np.unique(shard, return_index=True)[1])].tolist()

    def needed(self, first: int, lanes: range) -> list[int]:
        """The shards that `lanes` read from the window of position `first` to the end of its epoch, in the order in which they
        are first needed."""
        epoch, index = divmod(first, self.samples)
        begun = index // self.lanes // self.window * self.window
        shuffled, starts = self._shards_of(epoch)
        rows = [np.empty(0, np.int64)]
        places = [np.empty(0, np.int64)]  # where in its lane each is met
        for start, length in map(self._lane, lanes):
            if begun < length:
                low, high = np.searchsorted(starts, [start + begun, start + length - 1], side="right") - 1
                rows.append(np.arange(low, high + 1))
                places.append(starts[rows[-1]] - start)
        row = np.concatenate(rows)[np.argsort(np.concatenate(places), kind="stable")]
        return shuffled[row[np.sort(np.unique(row, return_index=True)[1])]].tolist()

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


def cut(global_batch: int, world_size: int, micro_batch: int | None, *, lanes: int = 1, nodes: int = 1) -> tuple[int, int]:
    """(micro-batch, micro-steps) of each rank; raises InputError with the sizes that fit unless they divide exactly.

    Several lanes must divide among the nodes, or a node would fetch its neighbour's shards; a single one is everybody's.
    """
    if lanes > 1 and lanes % nodes:
        fits = ", ".join(str(n) for n in sorted({1, lanes // nodes * nodes, (lanes // nodes + 1) * nodes}) if n)
        raise InputError(f"data.lanes {lanes} does not divide by {nodes} nodes; sizes that fit: {fits}")
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
