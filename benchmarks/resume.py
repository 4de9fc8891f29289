"""Kill a run at arbitrary moments, continue it each time, and compare every loss and every weight with the uninterrupted run.

    python benchmarks/resume.py --kills 10 --out benchmarks/results/resume.json

Moments are drawn from the given seed; every third one waits for a checkpoint that is just being written.
"""

import argparse
import json
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from swath.pretrain.checkpoint import read_checkpoint
from swath.pretrain.record import read_lines
from swath.shards.ingest import shard
from swath.shards.scenes import write_scenes

STEPS = 240


def command(folder: Path, run: str) -> list[str]:
    overrides = [
        f"run.dir={folder / run}", f"data.train={folder / 'shards'}", "train.epochs=null", f"train.max_steps={STEPS}",
        "train.global_batch=32", "train.micro_batch=16", "train.precision=fp32", "checkpoint.every=7", "health.every=100",
        "health.samples=32",
    ]  # fmt: skip
    return [sys.executable, "-m", "swath.launch.cli", "pretrain", "mae_vit_tiny", *overrides]


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_scenes(folder / "scenes", count=1, size=512)
        shard(folder / "scenes", folder / "shards", progress=False)
        subprocess.run(command(folder, "whole"), check=True, capture_output=True)
        run, moments = folder / "killed", []
        for number in range(args.kills):
            process = subprocess.Popen(command(folder, "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            reach = steps_done(run) + draw.randrange(0, 2 * STEPS // args.kills)
            saving = number % 3 == 2
            while process.poll() is None:
                partial = any((run / "checkpoints").glob(".*.partial"))
                if min(reach, STEPS - 8) <= steps_done(run) and (partial or not saving):
                    break
                time.sleep(0.0005)
            process.send_signal(signal.SIGKILL)
            process.wait()
            moments.append({"after_step": steps_done(run), "during_a_save": saving})
            print(f"kill {number + 1}: {moments[-1]}", file=sys.stderr)
        subprocess.run(command(folder, "killed"), check=True, capture_output=True)
        whole, killed = (read_lines(folder / r / "metrics.jsonl") for r in ("whole", "killed"))
        (_, a), (_, b) = (read_checkpoint(folder / r) for r in ("whole", "killed"))
        result = {
            "command": " ".join(["python", "benchmarks/resume.py", *(sys.argv[1:] if argv is None else argv)]),
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
            "steps": STEPS,
            "kills": moments,
            "every_step_once": [row["step"] for row in killed] == list(range(1, STEPS + 1)),
            "losses_equal_bit_for_bit": [r["loss"] for r in whole] == [r["loss"] for r in killed],
            "weights_equal_bit_for_bit": a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a),
        }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["losses_equal_bit_for_bit"] and result["weights_equal_bit_for_bit"] else 1


if __name__ == "__main__":
    sys.exit(main())
