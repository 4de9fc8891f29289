"""`swath pretrain` itself, overheard: each rank writes down which samples it trains on, and takes as long as a test wants.

    python -m tests.launch.heard RECIPE [key=value …]

A step lasts HEARD_PACE seconds at least, since what a cluster does takes it minutes. Seed 13 is bad luck: the last rank fails
in the first step.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from swath.launch.cli import main
from swath.pretrain.record import read_lines
from swath.pretrain.trainer import _Trainer

FOLDER = "heard"
SMALL = (
    "backbone.width=24", "backbone.depth=1", "objective.decoder_width=24", "objective.decoder_depth=1", "health.samples=8",
    "train.global_batch=8", "train.precision=fp32", "train.device=cpu", "train.threads=1", "train.epochs=null",
)  # fmt: skip


def listen() -> None:
    one_step, pace = _Trainer._one_step, float(os.environ.get("HEARD_PACE", "0"))

    def heard(self: _Trainer, batches: Any) -> dict[str, Any]:
        began = time.monotonic()
        if self.recipe.run.seed == 13 and self.world.rank == self.world.size - 1:
            raise RuntimeError("bad luck")
        row = one_step(self, batches)
        line = {"step": row["step"], "ids": torch.cat(row["ids"]).tolist()}
        (self.run / FOLDER).mkdir(exist_ok=True)
        with (self.run / FOLDER / f"{self.world.rank:05d}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        time.sleep(max(0.0, pace - (time.monotonic() - began)))
        return row

    _Trainer._one_step = heard  # type: ignore[method-assign]


def train(words: list[str]) -> None:
    """As `swath pretrain` does. For tests.ranks.run."""
    listen()
    os._exit(main(["pretrain", *words]))


def losses(run: Path) -> list[float]:
    """Of a run that did every step once, in order."""
    rows = read_lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "every step once, in order"
    return [row["loss"] for row in rows]


def samples(run: Path, count: int) -> list[list[int]]:
    """Of each step, from what all ranks wrote down; of `count` in the data set each came once in every epoch.

    A step that was done again, after the loss of what no checkpoint had yet, was done on the same samples.
    """
    given: dict[tuple[int, int], list[int]] = {}
    for rank, path in enumerate(sorted((run / FOLDER).iterdir())):
        for line in read_lines(path):
            assert given.setdefault((line["step"], rank), line["ids"]) == line["ids"], "the same step, other samples"
    ranks, last = 1 + max(rank for _, rank in given), max(step for step, _ in given)
    steps = [[one for rank in range(ranks) for one in given[step, rank]] for step in range(1, last + 1)]
    stream = [one for step in steps for one in step]
    epochs = [stream[first : first + count] for first in range(0, len(stream) - count + 1, count)]
    assert epochs and all(len(set(epoch)) == count for epoch in epochs), "every sample once in every epoch"
    return steps


if __name__ == "__main__":
    listen()
    code = main(["pretrain", *sys.argv[1:]])
    print(json.dumps({"rank": int(os.environ["RANK"]), "token": "HF_TOKEN" in os.environ}))
    sys.exit(code)
