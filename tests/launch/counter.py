"""Stands in for training in tests of jobs: counts to train.max_steps over all ranks, saves and leaves as `swath pretrain` does.

    python -m swath.launch.jobs.local … tests.launch.counter RECIPE

A step is a tenth of a second and one all-reduce. Seed 13 is bad luck: the last rank fails in the first step.
"""

import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from swath.pretrain.config import Recipe, read_recipe
from swath.pretrain.owner import Owner
from swath.pretrain.record import JsonLines
from swath.shards.errors import InputError
from swath.shards.files import write_bytes, write_json


def main(recipe_path: Path) -> int:
    recipe = read_recipe(recipe_path.read_text(), [], name=str(recipe_path))
    run = recipe.run.dir
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: asked.append(number))
    with Owner(run) if rank == 0 else nullcontext():
        return count(recipe, run, rank, world, asked)


def count(recipe: Recipe, run: Path, rank: int, world: int, asked: list[int]) -> int:
    latest, total = run / "checkpoints" / "latest", recipe.train.max_steps or 0
    step = int(latest.read_text()[5:]) if latest.exists() else 0
    lines = JsonLines(run / "metrics.jsonl", step) if rank == 0 else None
    stop = False
    while step < total and not stop:
        began = time.perf_counter()
        time.sleep(0.1)
        if recipe.run.seed == 13 and rank == world - 1:
            raise RuntimeError("bad luck")
        told = torch.tensor([1, int(bool(asked))])
        dist.all_reduce(told)
        assert int(told[0]) == world
        stop, step, took = bool(told[1]), step + 1, time.perf_counter() - began
        if lines is not None:
            row = {
                "step": step,
                "loss": 1 / step,
                "seconds": took,
                "samples_per_second": 8 / took,
                "node": os.environ.get("SLURMD_NODENAME"),
            }
            lines.add(row)
            if stop or step == total or step % recipe.checkpoint.every == 0:
                folder = run / "checkpoints" / f"step-{step:08d}"
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / "state.json", {"step": step, "total_steps": total})
                write_bytes(latest, folder.name.encode())
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps({"step": step, "rank": rank, "token": "HF_TOKEN" in os.environ, "asked": asked}))
    return 85 if step < total else 0


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1])))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
