"""Do the probes agree on EuroSAT RGB, and do they give the same bits twice?

    python -m benchmarks.eurosat_probes --rgb EuroSAT_RGB.zip --split eurosat_rgb_split.csv --work out/learning

Three backbones of `recipes/learning_mae.yaml`: its random weights, four epochs, its own eight. Each is judged by kNN, a linear
probe, few labels and fine-tuning, whose settings are given or chosen on val; each task must put them in the same order. What the
last backbone gets is computed twice without a cache, of fine-tuning the first seed, and must be equal in every bit. The work
folder may be that of `benchmarks.learning`, whose shards and first run are the same.
"""

import argparse
import platform
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning import Case, trained
from benchmarks.learning_data import make
from swath.probes.run import probe, probes
from swath.shards.files import write_json

FROZEN = ("knn", "linear", "fewshot")
SHORT, LONG = "4 epochs", "8 epochs"
RUNS = {SHORT: ("mae_half_0", ["train.epochs=4"]), LONG: ("mae_0", [])}
ORDER = ["random weights", SHORT, LONG]
SHOTS = (5, 50)
FEW_EPOCHS = {"lr": (4e-3,), "layer_decay": 0.9, "mixup": 0.0, "cutmix": 0.0}  # of fine-tuning: mixed images want many (on val)


def parts(shards: Path) -> dict[str, Path]:
    return {part: shards / part for part in ("train", "test", "val")}


def frozen(run: Path, shards: Path) -> list[dict[str, Any]]:
    """Each task's JSON, less what a clock says."""
    made = probes(FROZEN, run, **parts(shards), shots=SHOTS, from_scratch=0, cache=False, progress=False)
    return [{key: value for key, value in one.items() if key != "seconds"} for one in made]


def tuned(run: Path, shards: Path, epochs: int, seeds: int, scratch: bool) -> dict[str, Any]:
    how = {"epochs": epochs, "batch": 64, "seeds": seeds, "from_scratch": scratch, **FEW_EPOCHS}
    return probe("finetune", run, **parts(shards), **how, cache=False, progress=False)


def of_row(tables: list[dict[str, Any]], name: str) -> dict[str, list[float]]:
    """[accuracy, lower, upper] of the row of that name, by task and metric."""
    found = {}
    for one in tables:
        (row,) = (row for row in one["rows"] if row["name"] == name)
        for metric, ends in row["interval"].items():
            found[f"{one['task']}, {metric}"] = [round(value, 4) for value in (row["metrics"][metric], *ends)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rgb", type=Path, required=True, help="EuroSAT_RGB.zip")
    parser.add_argument("--split", type=Path, required=True, help="CSV with columns file,class,split,block of it")
    parser.add_argument("--work", type=Path, default=Path("out/learning"))
    parser.add_argument("--epochs", type=int, default=2, help="of fine-tuning (2)")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "eurosat_probes.json")
    parser.add_argument("overrides", nargs="*", help="key=value for every run, for instance train.threads=1")
    args = parser.parse_args()
    started = time.process_time()
    shards = make("rgb", args)
    tables: dict[str, list[dict[str, Any]]] = {}
    for name, (folder, more) in RUNS.items():
        trained(Case("mae", "rgb"), args.work / folder, shards, 0, [*more, *args.overrides])
        tables[name] = frozen(args.work / folder, shards)
    short, long = (args.work / folder for folder, _ in RUNS.values())
    again = zip(tables[LONG], frozen(long, shards), strict=True)
    same = {one["task"]: one == other for one, other in again}
    fine = {SHORT: tuned(short, shards, args.epochs, 3, scratch=False), LONG: tuned(long, shards, args.epochs, 3, scratch=True)}
    once = tuned(long, shards, args.epochs, 1, scratch=False)
    same["finetune, seed 0"] = (fine[LONG]["seeds"]["0"], fine[LONG]["confusion"]) == (once["seeds"]["0"], once["confusion"])
    rows = {
        ORDER[0]: of_row(tables[LONG], "random initialisation") | of_row([fine[LONG]], "from scratch"),
        SHORT: of_row([*tables[SHORT], fine[SHORT]], "backbone"),
        LONG: of_row([*tables[LONG], fine[LONG]], "backbone"),
    }
    orders = {task: sorted(rows, key=lambda name: rows[name][task][0]) for task in rows[LONG]}
    agree = all(order == ORDER for order in orders.values())
    result = {
        "command": " ".join(["python -m benchmarks.eurosat_probes --rgb … --split …", *args.overrides]),
        "data": "EuroSAT RGB, 64 px; 18,665 train, 2,717 val, 5,618 test, split by half-degree blocks",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}",
        "note": "[accuracy on test, lower, upper], 95 % block bootstrap; of fine-tuning, the mean of three seeds",
        "rows": rows,
        "statistics": of_row(tables[LONG], "statistics"),
        "settings": {one["task"]: one["settings"] for one in [*tables[LONG], fine[LONG]]},
        "orders, worst first": orders,
        "equal twice, in every bit": same,
        "cpu_minutes": round((time.process_time() - started) / 60, 1),
        "verdict": f"{'reached' if agree and all(same.values()) else 'not reached'}: tasks {'agree' if agree else 'disagree'} "
        f"on the order; {sum(same.values())} of {len(same)} results equal twice",
    }  # fmt: skip
    write_json(args.json, result)
    print(result["verdict"])


if __name__ == "__main__":
    main()
