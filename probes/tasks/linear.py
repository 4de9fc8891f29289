"""`swath probe linear`."""

from dataclasses import dataclass, field

from swath.probes.frozen import FrozenOptions, classified, frozen
from swath.probes.linear import STRENGTHS, linear, require_strengths
from swath.probes.task import Bench, Result, task


@dataclass(frozen=True)
class Options(FrozenOptions):
    c: tuple[float, ...] = field(
        default=STRENGTHS, metadata={"help": "values of C to choose from, on --val or a fifth of train (ten from 1e-4 to 100)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_strengths(self.c)


@task("linear", Options, "logistic regression on frozen features, C chosen on --val")
def run(bench: Bench, options: Options) -> Result:
    return frozen(
        bench,
        options,
        lambda parts: classified(
            linear(parts["train"], parts["test"], parts.get("val"), strengths=options.c), parts["train"].classes
        ),
    )
