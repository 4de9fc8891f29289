"""Do the probes agree on EuroSAT RGB, and do they give the same bits twice?

    python -m benchmarks.eurosat_probes --rgb EuroSAT_RGB.zip --split eurosat_rgb_split.csv --work out/learning

Three backbones of `recipes/learning_mae.yaml`: its random weights, one epoch, and its own eight. Each is judged by kNN, a linear
probe, few labels and fine-tuning, which settings are given for or chosen on val; each task must put them in the same order.
Everything is computed twice without a cache, of fine-tuning the first seed; the two results must be equal in every bit. The work
folder may be that of `benchmarks.learning`, whose shards and first run are the same.
"""

import argparse
import platform
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning import Case, make, trained
from swath.probes.run import probe, probes
from swath.shards.files import write_json

FROZEN = ("knn", "linear", "fewshot")
BACKBONES = {"random weights": ("mae_random_0", ["train.max_steps=1"]), "1 epoch": ("mae_short_0", ["train.epochs=1"]),
             "8 epochs": ("mae_0", [])}  # fmt: skip
SHOTS = (5, 50)


def parts(shards: Path) -> dict[str, Path]:
    return {part: shards / part for part in ("train", "test", "val")}


def frozen(run: Path, shards: Path) -> list[dict[str, Any]]:
    """Each task's JSON, less what a clock says."""
    made = probes(FROZEN, run, **parts(shards), shots=SHOTS, cache=False, progress=False)
    return [{key: value for key, value in one.items() if key != "seconds"} for one in made]


def tuned(run: Path, shards: Path, epochs: int, seeds: int, scratch: bool) -> dict[str, Any]:
    how = {"epochs": epochs, "batch": 128, "lr": (1e-3,), "seeds": seeds, "from_scratch": scratch}
    return probe("finetune", run, **parts(shards), **how, cache=False, progress=False)


def accuracies(row: dict[str, Any]) -> dict[str, list[float]]:
    """[accuracy, lower, upper] by metric."""
    return {name: [round(value, 4) for value in (row["metrics"][name], *ends)] for name, ends in row["interval"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rgb", type=Path, required=True, help="EuroSAT_RGB.zip")
    parser.add_argument("--split", type=Path, required=True, help="CSV with columns file,class,split,block of it")
    parser.add_argument("--work", type=Path, default=Path("out/learning"))
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning (3)")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "eurosat_probes.json")
    parser.add_argument("overrides", nargs="*", help="key=value for every run, for instance train.threads=1")
    args = parser.parse_args()
    started = time.process_time()
    shards = make("rgb", args)
    rows: dict[str, dict[str, list[float]]] = {}
    same: dict[str, bool] = {}
    for name, (folder, more) in BACKBONES.items():
        run = args.work / folder
        trained(Case("mae", "rgb"), run, shards, 0, [*more, *args.overrides])
        first, again = frozen(run, shards), frozen(run, shards)
        rows[name] = {}
        for one, other in zip(first, again, strict=True):
            rows[name] |= {f"{one['task']}, {metric}": value for metric, value in accuracies(one["rows"][0]).items()}
            same[f"{one['task']} of {name}"] = one == other
        print(name, rows[name], flush=True)
    whole = tuned(args.work / BACKBONES["8 epochs"][0], shards, args.epochs, 3, scratch=True)
    short = tuned(args.work / BACKBONES["1 epoch"][0], shards, args.epochs, 3, scratch=False)
    again = tuned(args.work / BACKBONES["8 epochs"][0], shards, args.epochs, 1, scratch=False)
    same["finetune of 8 epochs, seed 0"] = (whole["seeds"]["0"], whole["confusion"]) == (again["seeds"]["0"], again["confusion"])
    by_name = {row["name"]: row for row in whole["rows"]}
    for name, row in {
        "random weights": by_name["from scratch"],
        "1 epoch": short["rows"][0],
        "8 epochs": whole["rows"][0],
    }.items():
        rows[name] |= {f"finetune, {metric}": value for metric, value in accuracies(row).items()}
    orders = {task: sorted(rows, key=lambda name: rows[name][task][0]) for task in rows["8 epochs"]}
    agree = all(order == list(BACKBONES) for order in orders.values())
    result = {
        "command": " ".join(["python -m benchmarks.eurosat_probes --rgb … --split …", *args.overrides]),
        "data": "EuroSAT RGB, 64 px; 18,665 train, 2,717 val, 5,618 test, split by half-degree blocks",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}",
        "note": "[accuracy on test, lower, upper], 95 % block bootstrap; of fine-tuning, the mean of three seeds",
        "rows": rows,
        "statistics": {row["name"]: accuracies(row) for row in first_of(whole, "statistics")},
        "settings": {"finetune": whole["settings"]},
        "orders, worst first": orders,
        "equal twice, in every bit": same,
        "cpu_minutes": round((time.process_time() - started) / 60, 1),
        "verdict": f"{'reached' if agree and all(same.values()) else 'not reached'}: tasks {'agree' if agree else 'disagree'} "
        f"on the order; {sum(same.values())} of {len(same)} results equal twice",
    }  # fmt: skip
    write_json(args.json, result)
    print(result["verdict"])


def first_of(result: dict[str, Any], start: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["name"].startswith(start)]


if __name__ == "__main__":
    main()
