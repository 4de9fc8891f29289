"""EuroSAT RGB from the published zip to probes, on a split by spatial blocks: figures beside the references of the same split.

    python benchmarks/eurosat.py --zip EuroSAT_RGB.zip --split eurosat_rgb_split.csv --work out/eurosat

Shards are made; `recipes/eurosat_published.yaml` (the architecture and epochs of the published code's figures) and
`recipes/eurosat.yaml` (within an hour of two cores) are trained for three seeds each, on train only. How the second one's
features are pooled and at which size they are taken is chosen on val, with the first seed of the first recipe; every other
setting of the probes is chosen on val too. Then test is read, once per run, for random weights as well. Everything is continued
when the command is given again.
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

from swath.backbones.base import create
from swath.hub.load import load_backbone
from swath.pretrain.config import read_recipe
from swath.pretrain.record import read_lines
from swath.pretrain.trainer import pretrain
from swath.probes.features import Features, extract, match_classes
from swath.probes.knn import knn
from swath.probes.linear import linear
from swath.shards.ingest import shard
from swath.shards.reader import ShardReader

RECIPES = Path(__file__).parent / "recipes"
SEEDS = (0, 1, 2)
POOLS, SIZES = ("mean", "texture"), (64, 128)
# Same split and probes; the published MAE code after 10 of 10 epochs, and 138 hand-made statistics.
PUBLISHED = {"knn": 0.710, "linear": 0.783}
STATISTICS = {"knn": 0.784, "linear": 0.867}


def features(run: Path, shards: Path, parts: tuple[str, ...], pool: str, size: int) -> dict[str, Features]:
    """Of a run's latest weights, pooled and sized as asked."""
    loaded = load_backbone(run)
    pooled = create(loaded.name, **loaded.options | {"pool": pool})
    pooled.load_state_dict(loaded.backbone.state_dict())
    loaded.backbone, loaded.size = pooled.eval().requires_grad_(False), (size, size)
    found = {part: extract(loaded, ShardReader(shards / part)) for part in parts}
    return {part: one if part == "train" else match_classes(found["train"], one) for part, one in found.items()}


def once(path: Path, make: Any) -> dict[str, Any]:
    """What `make()` gives, kept at `path`."""
    if not path.exists():
        path.write_text(json.dumps(make(), indent=1) + "\n")
    return json.loads(path.read_text())


def on_val(run: Path, shards: Path, pool: str, size: int) -> dict[str, float]:
    """kNN and linear accuracy on val, C chosen there too; no test sample is read."""
    parts = features(run, shards, ("train", "val"), pool, size)
    return {
        "knn": knn(parts["train"], parts["val"]).accuracy,
        "linear": linear(parts["train"], parts["val"], parts["val"]).accuracy,
    }


def on_test(run: Path, shards: Path, pool: str, size: int) -> dict[str, Any]:
    parts = features(run, shards, ("train", "val", "test"), pool, size)
    scores = {"knn": knn(parts["train"], parts["test"]), "linear": linear(parts["train"], parts["test"], parts["val"])}
    return {
        task: {"accuracy": round(s.accuracy, 4), "block_bootstrap_95": [round(x, 4) for x in s.interval]}
        for task, s in scores.items()
    } | {"C": scores["linear"].settings["C"]}


def trained(recipe: str, run: Path, shards: Path, overrides: list[str]) -> dict[str, Any]:
    """Train, or continue."""
    given = [f"run.dir={run}", f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", *overrides]
    pretrain(read_recipe((RECIPES / f"{recipe}.yaml").read_text(), given, name=recipe))
    rows = read_lines(run / "metrics.jsonl")
    seconds = sum(row["seconds"] for row in rows)
    return {
        "steps": len(rows),
        "minutes_of_steps": round(seconds / 60, 1),
        "images_per_second": round(rows[-1]["samples"] / seconds),
    }


def means(rows: dict[int, dict[str, Any]]) -> dict[str, float]:
    return {task: round(statistics.mean(row[task]["accuracy"] for row in rows.values()), 4) for task in PUBLISHED}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zip", type=Path, required=True)
    parser.add_argument("--split", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("out/eurosat"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/eurosat.json"))
    parser.add_argument("overrides", nargs="*", help="key=value for every run, for instance train.threads=1")
    args = parser.parse_args()
    work, shards = args.work, args.work / "shards"
    shard(args.zip, shards, split=args.split)
    published: dict[int, dict[str, Any]] = {}
    for seed in SEEDS:
        run = work / f"published_{seed}"
        row = trained("eurosat_published", run, shards, [f"run.seed={seed}", *args.overrides])
        published[seed] = row | once(run / "test.json", lambda run=run: on_test(run, shards, "mean", 64))
    choice = {
        f"{pool} at {size}": once(
            work / f"val_{pool}_{size}.json", lambda p=pool, s=size: on_val(work / "published_0", shards, p, s)
        )
        for pool in POOLS
        for size in SIZES
    }
    chosen = max(choice, key=lambda name: sum(choice[name].values()))
    pool, _, size = chosen.split()
    hour: dict[int, dict[str, Any]] = {}
    for seed in SEEDS:
        run = work / f"hour_{seed}"
        row = trained("eurosat", run, shards, [f"run.seed={seed}", *args.overrides])
        hour[seed] = row | once(run / f"test_{pool}_{size}.json", lambda run=run: on_test(run, shards, pool, int(size)))
    # the first step of a warm-up has a learning rate of 0
    trained("eurosat", work / "random", shards, ["train.max_steps=1", *args.overrides])
    random = once(work / "random" / f"test_{pool}_{size}.json", lambda: on_test(work / "random", shards, pool, int(size)))
    result = {
        "command": " ".join(["python", "benchmarks/eurosat.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "data": "EuroSAT RGB, 64 px; 18,665 train, 2,717 val, 5,618 test, split by half-degree blocks",
        "equal_architecture_10_epochs": {"seeds": published, "mean_of_seeds": means(published), "published_code": PUBLISHED},
        "chosen_on_val": {"accuracy_on_val": choice, "with": "published_0", "chosen": chosen},
        "within_an_hour": {
            "seeds": hour,
            "mean_of_seeds": means(hour),
            "random_weights": random,
            "hand_made_statistics": STATISTICS,
        },
    }
    print(json.dumps(result, indent=1))
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
