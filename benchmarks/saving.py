"""What saving costs, how long a checkpoint takes to restore, and what the trainer itself takes of a step.

    python benchmarks/saving.py --out benchmarks/results/saving.json

`overhead` (of `mae_vit_base`, batch 16): the trainer's own loop, with clocks around the model's forward pass, `backward`, and
the optimiser; everything else of a step, the gradients' norm among it, is overhead. What runs beside (decoding) is in it as far
as a step waits for it. Steps that save or look at health are not in it.

`steps`: one run goes through pairs of blocks of `--every` steps, one that begins with a save and one without, in turning order.
A block ends when its save is done, as the next save would wait for it. The mean step is that of all blocks of a kind. The model
is `--smaller`, so that 13 blocks take minutes; what counts is the bytes that are saved for each second of training, and they are
told beside those of the recipe itself at the speed that `overhead` has found. `--smaller` without anything is the recipe.

`restore`: of a checkpoint of the large recipe's model and optimiser, just written, so that the page cache has it: its checksums,
then its tensors.

The exit code is 1 where a bound is not met.
"""

import argparse
import gc
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from swath.launch.recipes import find
from swath.pretrain import checkpoint
from swath.pretrain.build import model
from swath.pretrain.config import Recipe, read_recipe
from swath.pretrain.data import Data
from swath.pretrain.optimizer import adamw
from swath.pretrain.record import Record
from swath.pretrain.trainer import _device, _Trainer
from swath.pretrain.world import ALONE
from swath.shards.ingest import shard
from swath.shards.scenes import write_scenes

PARTS = ("overhead", "steps", "restore")
SMALLER = (
    "backbone.name=vit_small_patch16",
    "objective.decoder_width=256",
    "objective.decoder_depth=4",
    "objective.decoder_heads=8",
)
BOUNDS = {"overhead": 0.02, "steps": 1.05, "restore": 30.0}  # share of a step; ratio; seconds


def recipe_of(name: str, run: Path, args: argparse.Namespace, precision: str, *more: str) -> Recipe:
    text, name = find(name)
    overrides = [
        f"run.dir={run}", f"data.train={run.parent / 'shards'}", f"data.size={args.size}", f"train.device={args.device}",
        f"train.global_batch={args.batch}", f"train.micro_batch={args.batch}", f"train.precision={precision}",
        f"train.threads={args.threads}", "train.epochs=null", "train.max_steps=1000000", "checkpoint.every=1000000",
        "checkpoint.keep=1", "health.every=1000000", *more,
    ]  # fmt: skip
    return read_recipe(text, overrides, name=name)


def started(recipe: Recipe) -> _Trainer:
    recipe.run.dir.mkdir()
    trainer = _Trainer(recipe, ALONE, _device(recipe.train.device))
    trainer._restore()
    return trainer


class Enough(Exception):
    """All steps that were asked for are done."""


def measure_overhead(recipe: Recipe, steps: int) -> dict[str, Any]:
    """Seconds of each part of a step, from the beginning of one to that of the next; the first one is not counted."""
    trainer = started(recipe)
    inside: dict[str, float] = defaultdict(float)
    marks: list[dict[str, float]] = []

    def now() -> float:
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def clocked(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            began = now()
            try:
                return call(*given, **named)
            finally:
                inside[part] += now() - began

        return timed

    one_step = trainer._one_step

    def marked(batches: Any) -> dict[str, Any]:
        marks.append({"step": now(), **{part: inside[part] for part in ("forward", "backward", "optimiser")}})
        if len(marks) > steps + 1:
            raise Enough
        return one_step(batches)

    with (
        Record(recipe.run.dir, 0, trainer.total) as record,
        patch.object(trainer, "_one_step", marked),
        patch.object(trainer.strategy, "forward", clocked("forward", trainer.strategy.forward)),
        patch.object(torch.Tensor, "backward", clocked("backward", torch.Tensor.backward)),
        patch.object(trainer.strategy, "update", clocked("optimiser", trainer.strategy.update)),
    ):
        try:
            with trainer.watch, trainer.saver:
                trainer._steps(record)
        except Enough:
            pass
    trainer.data.close()
    rows = [{part: b[part] - a[part] for part in a} for a, b in pairwise(marks[1:])]
    shares = [1 - (row["forward"] + row["backward"] + row["optimiser"]) / row["step"] for row in rows]
    print(f"overhead in {recipe.train.precision}: " + ", ".join(f"{share:.2%}" for share in shares), file=sys.stderr)
    return {
        "share": round(
            sum(share * row["step"] for share, row in zip(shares, rows, strict=True)) / sum(r["step"] for r in rows), 5
        ),
        "shares": [round(share, 5) for share in shares],
        "seconds": [{part: round(value, 4) for part, value in row.items()} for row in rows],
        "checkpoint_mib": round(12 * sum(p.numel() for p in trainer.model.parameters()) / 2**20, 1),
    }


def measure_steps(recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step of every block, and what a save holds the training up for."""
    trainer = started(recipe)
    batches = trainer.data.batches(
        global_batch=args.batch, micro_batch=args.batch, step=0, device=trainer.device, world=ALONE
    )  # fmt: skip
    seconds: dict[str, list[float]] = {"saving": [], "without": []}
    held: list[float] = []

    def block(saving: bool) -> float:
        began = time.perf_counter()
        if saving:
            trainer._save()
            held.append(time.perf_counter() - began)
        for _ in range(args.every):
            trainer._one_step(batches)
            trainer.step += 1
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        trainer.saver.wait()
        return (time.perf_counter() - began) / args.every

    with trainer.saver:
        print(f"warm-up: {block(True):.3f} s a step", file=sys.stderr)
        held.clear()
        for number in range(args.pairs):
            order = [("saving", True), ("without", False)]
            for name, saving in order if number % 2 == 0 else order[::-1]:
                seconds[name].append(block(saving))
            print(f"pair {number + 1}: " + ", ".join(f"{n} {s[-1]:.3f} s" for n, s in seconds.items()), file=sys.stderr)
    batches.close()  # type: ignore[attr-defined]
    trainer.data.close()
    pairs = [a / b for a, b in zip(seconds["saving"], seconds["without"], strict=True)]
    mean = {name: statistics.fmean(many) for name, many in seconds.items()}
    return {
        "ratio": round(mean["saving"] / mean["without"], 4),
        "ratio_of_pairs": {
            "median": round(statistics.median(pairs), 4),
            "min": round(min(pairs), 4),
            "max": round(max(pairs), 4),
        },
        "seconds_a_step": {name: [round(one, 4) for one in many] for name, many in seconds.items()},
        "seconds_held_up_by_a_save": [round(one, 4) for one in held],
        "checkpoint_mib": size_mib(recipe.run.dir),
        "mib_a_second": round(size_mib(recipe.run.dir) / args.every / mean["without"], 2),
    }


def measure_restore(recipe: Recipe, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds to find, verify and load a checkpoint; of several times, since the first one may wait for the writing."""
    folder.mkdir()
    data = Data(recipe.data, recipe.run.seed)
    made = model(recipe, data, (args.size, args.size), (args.size, args.size)).to(_device(recipe.train.device))
    data.close()
    optimizer = adamw(made, weight_decay=0.05, betas=(0.9, 0.95))
    checkpoint.start_optimizer(optimizer)
    tensors = checkpoint.tensors_of(made, optimizer)
    checkpoint.save(folder, 1, tensors, {"step": 1}, keep=1, permanent_every=None)
    verify, load = [], []
    for number in range(args.restores):
        began = time.perf_counter()
        latest = checkpoint.find_latest(folder, mend=True)
        assert latest is not None
        verify.append(time.perf_counter() - began)
        began = time.perf_counter()
        checkpoint.load_into(latest, tensors)
        load.append(time.perf_counter() - began)
        print(f"restore {number + 1}: verified in {verify[-1]:.2f} s, loaded in {load[-1]:.2f} s", file=sys.stderr)
    return {
        "seconds": round(statistics.median(map(sum, zip(verify, load, strict=True))), 3),
        "verify_seconds": [round(one, 3) for one in verify],
        "load_seconds": [round(one, 3) for one in load],
        "parameters": sum(p.numel() for p in made.parameters()),
        "checkpoint_mib": size_mib(folder),
    }


def size_mib(run: Path) -> float:
    return round(sum(p.stat().st_size for p in (run / checkpoint.FOLDER).glob("step-*/tensors/*")) / 2**20, 1)


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if "overhead" in args.parts:
        made["overhead"] = {
            precision: measure_overhead(recipe_of(args.recipe, folder / precision, args, precision), args.steps)
            for precision in args.precision
        }
        gc.collect()
    if "steps" in args.parts:
        made["steps"] = measure_steps(recipe_of(args.recipe, folder / "run", args, args.precision[0], *args.smaller), args)
        if "overhead" in made:  # the recipe itself, at the same precision
            whole = made["overhead"][args.precision[0]]
            step = statistics.fmean(row["step"] for row in whole["seconds"])
            made["steps"]["mib_a_second_of_the_recipe"] = round(whole["checkpoint_mib"] / args.every / step, 2)
        gc.collect()
    if "restore" in args.parts:
        made["restore"] = measure_restore(recipe_of(args.large, folder / "large", args, "fp32"), args, folder / "large")
    return made


def unmet(made: dict[str, Any]) -> list[str]:
    found = {f"overhead in {name}": (row["share"], BOUNDS["overhead"]) for name, row in made.get("overhead", {}).items()}
    if "steps" in made:
        found["a step with saving, of one without"] = made["steps"]["ratio"], BOUNDS["steps"]
    if "restore" in made:
        found["seconds to restore"] = made["restore"]["seconds"], BOUNDS["restore"]
    return [f"{name}: {value}, at most {bound} was wanted" for name, (value, bound) in found.items() if value > bound]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="mae_vit_base")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--smaller", nargs="*", default=SMALLER, metavar="KEY=VALUE", help="of the recipe, for `steps`")
    parser.add_argument("--large", default="mae_vit_large", help="recipe of the model whose checkpoint is restored")
    parser.add_argument("--steps", type=int, default=4, help="for `overhead`, after one that is not counted")
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--restores", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument(
        "--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"], help="`steps` uses the first"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scenes", type=int, default=1)
    parser.add_argument("--where", type=Path, help="folder on the disk to save to; the system's temporary one by default")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    logging.getLogger("swath").setLevel(logging.WARNING)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.where) as name:
        folder = Path(name)
        write_scenes(folder / "scenes", count=args.scenes, size=512)
        shard(folder / "scenes", folder / "shards", progress=False)
        result = {
            "command": " ".join(["python", "benchmarks/saving.py", *(sys.argv[1:] if argv is None else argv)]),
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, {args.device}",
            "batch": args.batch,
            "every": args.every,
            **measure(folder, args),
        }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    missed = unmet(result)
    print("\n".join(missed), file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
