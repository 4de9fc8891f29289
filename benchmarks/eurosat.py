"""EuroSAT RGB from the published zip to probes, on a split by spatial blocks: figures beside the references of the same split.

    python benchmarks/eurosat.py --zip EuroSAT_RGB.zip --split eurosat_rgb_split.csv --work out/eurosat

Shards are made, `recipes/eurosat_published.yaml` is trained for three seeds (the architecture and epochs of the published code's
figures) and `recipes/eurosat.yaml` once (within an hour of two cores). Both are probed train → test; settings are chosen on val,
and pretraining sees train only. Everything is continued when the command is given again.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from swath.pretrain.config import read_recipe
from swath.pretrain.record import read_lines
from swath.pretrain.trainer import pretrain
from swath.probes.run import TASKS, probes
from swath.shards.ingest import shard

RECIPES = Path(__file__).parent / "recipes"
# Same split and probes; the published MAE code after 10 of 10 epochs, and 138 hand-made statistics.
PUBLISHED = {"knn": 0.710, "linear": 0.783}
STATISTICS = {"knn": 0.784, "linear": 0.867}


def trained(recipe: str, run: Path, shards: Path, overrides: list[str], size: int | None = None) -> dict[str, Any]:
    """Train (or continue) a recipe and probe it on test, with chips resized to `size`."""
    given = [f"run.dir={run}", f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", *overrides]
    pretrain(read_recipe((RECIPES / f"{recipe}.yaml").read_text(), given, name=recipe))
    rows = read_lines(run / "metrics.jsonl")
    seconds = sum(row["seconds"] for row in rows)
    made: dict[str, Any] = {"minutes_of_steps": round(seconds / 60, 1), "images_per_second": round(rows[-1]["samples"] / seconds)}
    stored = [run / "probes" / f"{task}.json" for task in TASKS]
    if not all(path.exists() for path in stored):
        probes(TASKS, run, shards / "train", shards / "test", val=shards / "val", size=size)
    for task, path in zip(TASKS, stored, strict=True):
        result = json.loads(path.read_text())
        made[task] = {"accuracy": round(result["accuracy"], 4), "block_bootstrap_95": [round(x, 4) for x in result["interval"]]}
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zip", type=Path, required=True)
    parser.add_argument("--split", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("out/eurosat"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/eurosat.json"))
    parser.add_argument("overrides", nargs="*", help="key=value for every run, for instance train.threads=1")
    args = parser.parse_args()
    shards = args.work / "shards"
    shard(args.zip, shards, split=args.split)
    seeds = {
        seed: trained("eurosat_published", args.work / f"published_{seed}", shards, [f"run.seed={seed}", *args.overrides])
        for seed in (0, 1, 2)
    }
    hour = trained("eurosat", args.work / "hour", shards, args.overrides, size=128)
    means = {task: statistics.mean(made[task]["accuracy"] for made in seeds.values()) for task in PUBLISHED}
    result = {
        "command": " ".join(["python", "benchmarks/eurosat.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "equal_architecture_10_epochs": {
            "seeds": seeds,
            "mean_of_seeds": {task: round(mean, 4) for task, mean in means.items()},
            "published_code": PUBLISHED,
        },
        "within_an_hour": {**hour, "hand_made_statistics": STATISTICS},
    }
    print(json.dumps(result, indent=1))
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
