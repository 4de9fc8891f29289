"""What a file of this folder offers to `run.py`: checks against the reference, and timings of ways to do the same thing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch


@dataclass
class Check:
    """`error()` is the largest difference from the reference in units of the tolerance: at most 1 passes."""

    name: str
    error: Callable[[], float]


@dataclass
class Timing:
    """`ways` maps a label to a function that makes the inputs and gives the call to time; the first way is ours.

    `floor_us` is the least time that the arithmetic or the bytes allow, `target_us` what is asked for, and `ratios` how many
    times as fast as another way ours is to be; `memory` the share of another way's peak that ours may take at most.
    """

    name: str
    ways: dict[str, Callable[[], Callable[[], object]]]
    floor_us: float | None = None
    target_us: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)


class Cases(Protocol):
    """A module with the cases of one operator."""

    def checks(self, device: torch.device) -> Iterator[Check]: ...

    def timings(self, device: torch.device) -> Iterator[Timing]: ...
