"""Segmentation, change, pixels and abundances by small backbones that see no test pixel, for a few CPU minutes.

    python -m benchmarks.dense --hsi hsi --work out/dense

Scenes are synthetic: some for pretraining and the heads' training, others for val and test. Each split of a hyperspectral scene
has a backbone of its own, pretrained on chips that lie wholly in its train blocks. What is in the work folder is kept. `--only`
names some of segment, change, pixel, abundances, and the others' figures stay, with their date; `--splits`, `--steps` and what
follows (overrides of recipes) make it smaller.
"""

import argparse
import csv
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swath.hub.load import Loaded, load_backbone
from swath.pretrain.config import read_recipe
from swath.pretrain.trainer import pretrain
from swath.probes.metrics import interval
from swath.probes.scene import Scene, read_scene, splits
from swath.probes.task import Bench, Result
from swath.probes.tasks import change, pixel, segment
from swath.shards.files import write_json
from swath.shards.ingest import shard
from swath.shards.reader import ShardReader
from swath.shards.scenes import write_scenes
from swath.shards.sources.match import Dates
from swath.shards.sources.source import Options

RECIPES = Path(__file__).parent / "recipes"
PARTS = {"train": range(8), "val": range(8, 11), "test": range(11, 16)}
SIZE, CHIP, PATCH = 256, 32, 8
CASES = {
    "pixel": ("SalinasA", "salinas_a", "SalinasA_corrected.mat", "oa_5", 1),
    "abundances": ("JasperRidge", "jasper_ridge", "jasperRidge2_R198.mat", "rmse", -1),
}  # folder, recipe, file, metric, and 1 where more is better


def listed(path: Path, rows: list[tuple[str, str, str, int]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("file", "class", "split", "block"), *rows])
    return path


def trained(name: str, run: Path, shards: Path, overrides: list[str]) -> Loaded:
    """The backbone of a run on `shards`, trained now unless it is there."""
    given = [f"run.dir={run}", f"data.train={shards}", *overrides]
    if pretrain(read_recipe((RECIPES / f"{name}.yaml").read_text(), given, name=name)).stopped:
        raise SystemExit("asked to stop; the same command continues")
    return load_backbone(run)


def scenes(work: Path) -> tuple[Path, Path]:
    """Shards of single dates, and of pairs; a scene is a block."""
    given = work / "scenes"
    if not (given / "scenes.json").exists():
        write_scenes(given, count=16, size=SIZE, seed=8, dates=2)
    made = []
    for name, dates, join in (("single", ("", "_d1"), None), ("pairs", ("",), Dates(2, 2, None, 0.5))):
        rows = [(f"scene_{n:04d}{date}.tif", "", part, n) for part, some in PARTS.items() for n in some for date in dates]
        made.append(work / "shards" / name)
        shard(given, made[-1], split=listed(work / f"{name}.csv", rows), options=Options(chip=CHIP, join=join))
    return made[0], made[1]


def told(result: Result) -> dict[str, Any]:
    """The table, and what it rests on."""
    rows = {row.name: {"metrics": row.metrics, "interval": row.interval} for row in result.rows}
    return {"rows": rows, "settings": result.settings, "details": result.details}


def of_scenes(task: str, args: argparse.Namespace) -> dict[str, Any]:
    """Segmentation with both heads, or change."""
    single, pairs = scenes(args.work)
    loaded = trained("dense_scenes", args.work / "scenes_run", single / "train", args.overrides)
    folder = single if task == "segment" else pairs
    bench = Bench(loaded, {part: ShardReader(folder / part) for part in PARTS})
    if task == "change":
        return {"linear": told(change.run(bench, change.Options(steps=args.steps, scratch_steps=args.steps)))}
    linear = segment.run(bench, segment.Options(steps=args.steps, scratch_steps=args.steps))
    upernet = segment.run(bench, segment.Options(head="upernet", steps=args.steps // 4, scratch_steps=0))
    return {"linear": told(linear), "upernet": told(upernet)}


def of_pixels(task: str, args: argparse.Namespace) -> dict[str, Any]:
    """Every split by a backbone of its own, and the paired differences over the splits."""
    folder, recipe, file, metric, sign = CASES[task]
    whole, work = args.work / "shards" / task, args.work / task
    shard(args.hsi / folder, whole, recipe=recipe, options=Options(chip=1024))
    reader = ShardReader(whole)
    contract = next(iter(reader.contracts.values()))
    nobody = Loaded(torch.nn.Identity(), {contract.modality: contract}, (PATCH, PATCH), "", {}, {})  # type: ignore[arg-type]
    labels = known(read_scene(nobody, reader))
    found: dict[str, list[float]] = {}
    for number, split in enumerate(splits(labels, PATCH // 2, args.splits, 0, first=args.first), args.first):
        rows = [
            (f"{file}/y{y:04d}_x{x:04d}", "", "train", -1)
            for y in range(0, labels.shape[0] - PATCH + 1, 2)
            for x in range(0, labels.shape[1] - PATCH + 1, 2)
            if split.train[y : y + PATCH, x : x + PATCH].all()
        ]
        chips = work / f"chips{number}"
        options = Options(chip=PATCH, stride=2)
        shard(args.hsi / folder, chips, recipe=recipe, split=listed(work / f"{number}.csv", rows), options=options)
        loaded = trained("dense_pixels", work / f"run{number}", chips / "train", args.overrides)
        bench = Bench(loaded, {"train": reader, "test": reader})
        made = pixel.run(bench, pixel.Options(splits=1, first=number, scratch_steps=args.steps // 10))
        for name, by in made.details["by_split"].items():
            found.setdefault(name, []).extend(by[metric] if isinstance(by, dict) else by)
    alone = np.full(args.splits, -1)
    values = {name: np.array(some) for name, some in found.items()}
    paired = {name: sign * (values["backbone"] - some) for name, some in values.items() if name != "backbone"}
    raw = [name for name in paired if name.startswith("raw")]
    below = [name for name in raw if interval(paired[name], alone)[1] < 0]
    above = interval(paired["random initialisation"], alone)[0] > 0
    return {
        "metric": metric,
        "rows": {name: [float(some.mean()), *interval(some, alone)] for name, some in values.items()},
        "better_by": {name: [float(some.mean()), *interval(some, alone)] for name, some in paired.items()},
        "by_split": found,
        "verdict": f"{'reached' if above and not below else 'not reached'}: "
        f"{'' if above else 'not '}above random initialisation, {'below' if below else 'not below'} raw spectra (95 %, paired)",
    }


def known(scene: Scene) -> np.ndarray:
    """Labels as `splits` takes them; of a scene of shares, whether they are known."""
    return scene.labels if scene.shares is None else np.where(np.isfinite(scene.shares).all(axis=0), 0, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hsi", type=Path, help="folder with SalinasA and JasperRidge")
    parser.add_argument("--work", type=Path, default=Path("out/dense"))
    parser.add_argument("--only", nargs="+", choices=["segment", "change", *CASES], default=["segment", "change", *CASES])
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="number of the first split; recipes were chosen on those from 10 on")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "dense.json")
    args, args.overrides = parser.parse_known_args()
    if args.hsi is None and set(args.only) & set(CASES):
        parser.error("--hsi is needed for pixel and abundances")
    cases: dict[str, Any] = json.loads(args.json.read_text())["cases"] if args.json.exists() else {}
    for task in args.only:
        started = time.process_time()
        cases[task] = (of_pixels if task in CASES else of_scenes)(task, args)
        how = [f"--only {task}", f"--steps {args.steps}", f"--splits {args.splits}", *args.overrides]
        cases[task] |= {
            "command": " ".join(["python -m benchmarks.dense --hsi …", *how]),
            "date": time.strftime("%Y-%m-%d"),
            "cpu_minutes": round((time.process_time() - started) / 60, 1),
        }
        write_json(
            args.json,
            {
                "note": "Synthetic scenes: figures show that the probes work, not how good a backbone is. Intervals are 95 %.",
                "machine": f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}",
                "cases": cases,
            },
        )  # fmt: skip


if __name__ == "__main__":
    main()
