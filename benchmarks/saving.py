"""What saving costs: the mean step with a checkpoint every so many steps against without, and the time to restore one.

    python benchmarks/saving.py mae_vit_base --large mae_vit_large --out benchmarks/results/saving.json

One run of the trainer on made-up scenes goes through pairs of blocks of `--every` steps, one that begins with a save and one
without, in turning order. A block ends when its save is done, as the next save would wait for it. Restoring is of a checkpoint
of the large recipe's model and optimiser, just written, so that the page cache has it: its checksums, then its tensors.
"""

import argparse
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from swath.launch.recipes import find
from swath.pretrain import checkpoint
from swath.pretrain.build import model
from swath.pretrain.config import Recipe, read_recipe
from swath.pretrain.data import Data
from swath.pretrain.optimizer import adamw
from swath.pretrain.trainer import _device, _Trainer
from swath.pretrain.world import ALONE
from swath.shards.ingest import shard
from swath.shards.scenes import write_scenes


def recipe_of(name: str, folder: Path, args: argparse.Namespace) -> Recipe:
    text, name = find(name)
    overrides = [
        f"run.dir={folder / 'run'}", f"data.train={folder / 'shards'}", f"data.size={args.size}", f"train.device={args.device}",
        f"train.global_batch={args.batch}", f"train.micro_batch={args.batch}", f"train.precision={args.precision}",
        f"train.threads={args.threads}", "train.epochs=null", f"train.max_steps={(2 * args.pairs + 1) * args.every}",
        "checkpoint.keep=1",
    ]  # fmt: skip
    return read_recipe(text, overrides, name=name)


def measure_steps(recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step of every block, and what a save holds the training up for."""
    recipe.run.dir.mkdir()
    trainer = _Trainer(recipe, ALONE, _device(recipe.train.device))
    trainer._restore()
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
    return {
        "ratio": {"median": round(statistics.median(pairs), 4), "min": round(min(pairs), 4), "max": round(max(pairs), 4)},
        "seconds_a_step": {name: [round(one, 4) for one in many] for name, many in seconds.items()},
        "seconds_held_up_by_a_save": [round(one, 4) for one in held],
        "checkpoint_mib": size_mib(recipe.run.dir),
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--large", default="mae_vit_large", help="recipe of the model whose checkpoint is restored")
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--restores", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
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
            "every": args.every,
            "steps": measure_steps(recipe_of(args.recipe, folder, args), args),
            "restore": measure_restore(recipe_of(args.large, folder, args), args, folder / "large"),
        }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
