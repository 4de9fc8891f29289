"""`swath probe retrieve`: test images ask, training images are what is found."""

from dataclasses import dataclass, field

import numpy as np

from swath.probes.frozen import FrozenOptions, Judged, Parts, frozen
from swath.probes.knn import neighbours
from swath.probes.metrics import interval
from swath.probes.task import Bench, Result, task


@dataclass(frozen=True)
class Options(FrozenOptions):
    k: tuple[int, ...] = field(default=(1, 5, 10), metadata={"help": "R@k for each of these (1,5,10)"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.k or min(self.k) < 1:
            raise ValueError(f"--k must be numbers from 1, not {', '.join(map(str, self.k)) or 'none'}")


@task("retrieve", Options, "image to image: is one of the k nearest training images of the same class (R@k)")
def run(bench: Bench, options: Options) -> Result:
    """R@k: the share of test samples of whose k nearest training samples, by cosine of standardised features, at least one is of
    the same class. Nothing is fitted."""

    def judge(parts: Parts) -> Judged:
        train, test = parts["train"], parts["test"]
        near_mk, _ = neighbours(train, test, max(options.k))
        same_mk = train.label[near_mk] == test.label[:, None]
        hit = {f"R@{k}": same_mk[:, :k].any(axis=1) for k in options.k}
        metrics: dict[str, float | None] = {name: float(np.mean(right)) for name, right in hit.items()}
        return Judged(metrics, {name: interval(right, test.block) for name, right in hit.items()})

    return frozen(bench.without_val(), options, judge)
