"""The stages of a run: which step sees images of which size at which rate, as a function of the step alone."""

import math
from dataclasses import dataclass

from swath.pretrain import config
from swath.pretrain.data import Data
from swath.pretrain.optimizer import Schedule
from swath.shards.errors import InputError


@dataclass(frozen=True)
class Stage:
    """Steps `first` … `last` - 1, counted from 0, see images of `size` (height, width) pixels, and warm up and cool down by
    themselves, as runs of their own would: `schedule` counts from `first`. No step where max_steps ends the run before."""

    number: int
    size: tuple[int, int]
    first: int
    last: int
    schedule: Schedule

    def __str__(self) -> str:
        return f"lr {self.schedule.peak:.3g} at {self.size[0]}×{self.size[1]} pixels to step {self.last}"

    def lr(self, step: int) -> float:
        """The rate of step `step` of the run."""
        return self.schedule.lr(step - self.first)


def plan(train: config.Train, data: Data) -> tuple[Stage, ...]:
    """All stages of a recipe, one of them where it names none. A stage ends after floor(epochs · N / global batch) steps, epochs
    counted from the begin of the run; the last one that is reached, where max_steps says so.

    Raises InputError where no length is given, and for epochs that are less than a step.
    """
    if train.stages:
        parts = [((one.size, one.size), one.epochs, one.lr_per_256 or train.lr_per_256) for one in train.stages]
    elif train.epochs is None and train.max_steps is None:
        raise InputError("train.epochs or train.max_steps: one of them is needed")
    else:
        parts = [(data.size, math.inf if train.epochs is None else train.epochs, train.lr_per_256)]
    limit = math.inf if train.max_steps is None else train.max_steps
    rate, stages, begin = train.global_batch / 256, [], 0
    for number, (size, epochs, lr_per_256) in enumerate(parts):
        through = math.fsum(part[1] for part in parts[: number + 1])
        end = limit if through == math.inf else int(through * data.samples / train.global_batch)
        if end <= begin:
            where = f"train.stages.{number}.epochs" if train.stages else "train.epochs"
            raise InputError(
                f"{where} {epochs:g} of {data.samples} samples are less than one step of train.global_batch "
                f"{train.global_batch}; more epochs, or a batch of at most {max(1, int(epochs * data.samples))}, would do"
            )
        first, last = (int(min(step, limit)) for step in (begin, end))
        schedule = Schedule(
            peak=lr_per_256 * rate,
            final=train.min_lr_per_256 * rate,
            warmup=min(train.warmup_epochs * data.samples / train.global_batch, last - first),
            steps=last - first,
        )
        stages.append(Stage(number, size, first, last, schedule))
        begin = int(end)
    return tuple(stages)
