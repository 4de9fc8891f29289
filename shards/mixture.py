"""Several data sets in one run (DESIGN §2.3): which one each global batch is drawn from, and from where in its order.

Batches come in cycles. The first c cycles together hold each data set's share of their batches by largest remainder (Hamilton's
method), so what is lost by rounding in one cycle is made up for in the next; inside a cycle the batches are arranged by a
stable argsort of our hash of (seed, cycle). Ranks, workers and micro-batches do not appear, and nothing is replayed.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch

from swath.shards.draw import hashes
from swath.shards.errors import InputError
from swath.shards.order import SampleOrder

LONGEST = 1 << 18  # batches in a cycle; its tables take 12 bytes a batch


class Mixture:
    """One stream of global batches from several orders, by `weights` (of batches; default: the numbers of samples).

    An epoch is as many samples as all data sets have together. A cycle is the whole batches of an epoch, so the mixture is exact
    over it: no data set is further than one batch from its share. It is several epochs where one would hold no batch of the
    smallest share, and an equal part of an epoch where that has more than LONGEST batches. Raises InputError for weights that
    are not positive, or less than 1 / LONGEST of their sum.
    """

    def __init__(self, orders: Sequence[SampleOrder], weights: Sequence[float] | None = None) -> None:
        self.orders = tuple(orders)
        self.samples = sum(order.samples for order in self.orders)
        given = [order.samples for order in self.orders] if weights is None else list(weights)
        if not self.orders or len(given) != len(self.orders):
            raise InputError(f"{len(given)} weights for {len(self.orders)} data sets; give one weight for each")
        for number, weight in enumerate(given, start=1):
            if not (weight > 0 and math.isfinite(weight)):
                raise InputError(f"the weight of data set {number} is {weight}; weights are positive numbers")
        exact = [Fraction(str(weight)) for weight in given]  # 0.1 means a tenth
        scale = math.lcm(*(weight.denominator for weight in exact))
        self._weights = [int(weight * scale) for weight in exact]
        self._total = sum(self._weights)
        least = min(range(len(given)), key=self._weights.__getitem__)
        if self._weights[least] * LONGEST < self._total:
            raise InputError(
                f"the weight of data set {least + 1}, {given[least]}, is less than 1/{LONGEST} of all weights together; "
                "leave it out or give it more"
            )
        self._cycle_of = lru_cache(maxsize=2)(self._cycle)

    def batch(self, number: int, global_batch: int) -> tuple[int, int]:
        """(data set, first position in its order) of global batch `number` of `global_batch` samples."""
        cycle, place = divmod(number, self.cycle_length(global_batch))
        source, nth = self._cycle_of(cycle, global_batch)
        return int(source[place]), int(nth[place]) * global_batch

    def cycle_length(self, global_batch: int) -> int:
        """Global batches after which the mixture is exact."""
        epoch = max(1, self.samples // global_batch)
        part = epoch // -(-epoch // LONGEST)
        needed = -(-self._total // min(self._weights))  # gives every data set a batch, which keeps `_shares` from falling
        return part * -(-needed // part)

    def _shares(self, batches: int) -> np.ndarray:
        """(data sets,) int64: the first `batches` batches by largest remainder, ties to the data set named first."""
        whole, rest = zip(*(divmod(batches * weight, self._total) for weight in self._weights), strict=True)
        shares = np.array(whole, dtype=np.int64)
        largest = sorted(range(len(rest)), key=lambda source: -rest[source])
        shares[largest[: batches - int(shares.sum())]] += 1
        return shares

    def _cycle(self, cycle: int, global_batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each batch of a cycle: its data set, and how many batches of that data set the run had before."""
        length = self.cycle_length(global_batch)
        before, after = self._shares(cycle * length), self._shares((cycle + 1) * length)
        sources = np.repeat(np.arange(len(self.orders), dtype=np.int32), after - before)
        nth = np.concatenate([np.arange(a, b) for a, b in zip(before, after, strict=True)])
        seed = self.orders[0].seed
        # which place each row of the list gets; within a data set places ascend, so that its order is kept
        place = torch.argsort(hashes(seed, f"mixture/{cycle}", 0, length), stable=True).numpy()
        arranged = sources[place]
        counted = np.empty(length, dtype=np.int64)
        counted[np.argsort(arranged, kind="stable")] = nth
        return arranged, counted
