"""What a probe task is: a function that registers itself, what it is given, and what it returns.

A task is one file in `probes/tasks/`, found by itself; `swath probe NAME` and the flags of its options follow from it.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from swath.backbones.base import nearest
from swath.hub.load import Loaded
from swath.pretrain.precision import Precision
from swath.shards.bands import InputContract
from swath.shards.errors import InputError
from swath.shards.reader import ShardReader


@dataclass
class Bench:
    """What a task works on: the frozen backbone, and readers of "train", "test" and, where it is given, "val", whose contracts
    have been compared with the backbone's. `trained_at` is the size of its contract, where another was asked for. `seed` is of
    every random choice, `precision` of the backbone; `context` says whether a backbone is told where and when. Features are kept
    in `cache`, where there is one, and in `memory`; `seconds` that they and training took."""

    loaded: Loaded
    readers: dict[str, ShardReader]
    seed: int = 0
    progress: bool = True
    precision: Precision = "fp32"
    context: bool = False
    cache: Path | None = None
    trained_at: tuple[int, int] | None = None
    memory: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"features": 0.0, "training": 0.0})

    def without_val(self) -> "Bench":
        """The same for a task that chooses nothing."""
        return replace(self, readers={part: reader for part, reader in self.readers.items() if part != "val"})


@dataclass
class Row:
    """One line of the table. metrics: shares of 1, None where undefined; interval: 95 %, of those metrics that have one;
    transductive: whether its weights or statistics have seen test samples, None where that is not known."""

    name: str
    metrics: dict[str, float | None]
    interval: dict[str, tuple[float, float]] = field(default_factory=dict)
    transductive: bool | None = False


@dataclass
class Result:
    """rows: the backbone first (named "backbone"), then what it must be compared with ("random initialisation", "statistics",
    "from scratch", …); the first metric is the task's own. settings: what was chosen or given; details: JSON of what more there
    is (confusion, recall); pictures: by file name without its ending; `within`: the task itself split the samples of train, which
    are those of test too."""

    rows: list[Row]
    settings: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Image] = field(default_factory=dict)
    within: bool = False


Require = Callable[[Loaded, ShardReader], InputContract]


@dataclass(frozen=True)
class Task:
    """`options` is a dataclass with defaults; each field's metadata has "help", and becomes a flag of `swath probe NAME`.
    `require` is what to compare a reader's data with the backbone by, where these are not to be of its own contract: it raises
    InputError, and returns the backbone's contract of them."""

    name: str
    run: Callable[[Bench, Any], Result]
    options: type
    help: str
    require: Require | None = None


_tasks: dict[str, Task] = {}


def task(
    name: str, options: type, help: str, require: Require | None = None
) -> Callable[[Callable[[Bench, Any], Result]], Callable[[Bench, Any], Result]]:
    """Decorator of a function (bench, options) → Result."""

    def add(run: Callable[[Bench, Any], Result]) -> Callable[[Bench, Any], Result]:
        _tasks[name] = Task(name, run, options, help, require)
        return run

    return add


def tasks() -> dict[str, Task]:
    """All of them, by name."""
    from swath.probes import tasks as folder

    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{folder.__name__}.{module.name}")
    return dict(sorted(_tasks.items()))


def task_called(name: str) -> Task:
    """InputError, with the nearest name, where there is none."""
    if (found := tasks().get(name)) is None:
        raise InputError(f"no probe is called {name!r}{nearest(name, sorted(_tasks))}; there are {', '.join(sorted(_tasks))}")
    return found
