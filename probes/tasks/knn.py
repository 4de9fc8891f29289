"""`swath probe knn`."""

from dataclasses import dataclass, field

from swath.probes.frozen import FrozenOptions, classified, frozen
from swath.probes.knn import knn
from swath.probes.task import Bench, Result, task


@dataclass(frozen=True)
class Options(FrozenOptions):
    k: int = field(default=20, metadata={"help": "how many neighbours vote (20; 5 as torchgeo-bench)"})
    temperature: float = field(default=0.07, metadata={"help": "of their votes, exp(cosine / temperature) (0.07)"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1 or not self.temperature > 0:
            raise ValueError(f"--k must be at least 1 and --temperature above 0, not {self.k} and {self.temperature:g}")


@task("knn", Options, "k nearest neighbours by cosine on frozen features")
def run(bench: Bench, options: Options) -> Result:
    return frozen(
        bench.without_val(),
        options,
        lambda parts: classified(
            knn(parts["train"], parts["test"], k=options.k, temperature=options.temperature), parts["train"].classes
        ),
    )
