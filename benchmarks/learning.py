"""Does each objective learn? Frozen features after a few CPU minutes, beside the random weights that the same run began with.

    python -m benchmarks.learning --rgb EuroSAT_RGB.zip --split eurosat_rgb_split.csv --hsi hsi --scene s2_scene \
        --work out/learning train.threads=1

Every case is a recipe, `recipes/learning_<case>.yaml`, trained on the train part of its data for three seeds; kNN and a linear
probe then read test once. Settings are chosen on val, whose figures are printed; with `--val` the table is left as it is. What
is there is continued or kept when the command is given again; `--only` names some of the cases, and may run beside others.

A small budget shows that an objective learns and is not worse than its published form. It does not rank objectives: the
data, the backbones and what an epoch costs differ from row to row.
"""

import argparse
import hashlib
import json
import math
import platform
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.learning_data import DATA, make
from benchmarks.plain import PlainMAE
from benchmarks.step import swath_step
from swath.backbones.base import create
from swath.hub.load import Loaded, load_backbone
from swath.pretrain.config import read_recipe
from swath.pretrain.objective import register
from swath.pretrain.objectives.mae import MAEConfig
from swath.pretrain.precision import Precision
from swath.pretrain.record import read_lines
from swath.pretrain.trainer import pretrain
from swath.probes.features import Features, extract, match_classes, resolve
from swath.probes.knn import knn
from swath.probes.linear import linear
from swath.probes.metrics import interval
from swath.shards.files import write_json
from swath.shards.reader import ShardReader

RECIPES = Path(__file__).parent / "recipes"
SEEDS = (0, 1, 2)
TASKS = ("knn", "linear")
POINTS, SHARE = 0.03, 0.25  # of kNN accuracy gained, or of the linear probe's error removed: the median over seeds
DEGREES = (30, 60, 90)  # of turned tests; RoMA turns windows by up to 45
HEALTH = ("loss", "pooled_rank", "tokens_rank", "pooled_std", "positional")


@dataclass(frozen=True)
class Case:
    """A recipe on a data set. `points`: how much kNN accuracy it must gain; `labelled` data are probed, others only looked at."""

    name: str
    data: str
    points: float = POINTS
    seeds: tuple[int, ...] = SEEDS
    labelled: bool = True
    turned: bool = False  # probed on turned test images too


CASES = (
    Case("mae", "rgb", 0.06),
    Case("selective_mae", "rgb", 0.06),
    Case("plain_mae", "rgb", seeds=(0,)),
    Case("latent", "rgb"),
    Case("roma", "rgb", turned=True),
    Case("arm", "rgb", turned=True),
    Case("spectralgpt", "scenes12"),
    Case("satmae", "scenes10"),
    Case("satmae_pp", "scenes10"),
    Case("satmae_pp_single", "scenes10"),
    Case("satmae_pp_rgb", "rgb", seeds=(0,)),
    Case("hyper_mae", "salinas"),
    Case("hyper_mae_jasper", "jasper"),
    Case("spectralgpt_scene", "scene", seeds=(0,), labelled=False),
)
NOTES = (
    "One small budget shows that an objective learns and is not worse than its published form. It is no ranking of objectives: "
    "data, backbones, epochs and what an epoch costs differ from case to case.",
    "before: the random weights that the same seed began with; difference: paired, after minus before on the same test samples. "
    "Each is [mean, lower, upper] with a 95 % block bootstrap; difference_over_seeds: of each sample's mean over seeds. "
    "held_out: at the start and at the end, on val.",
    "A case of an earlier date has the recipe and the data of that date.",
    "plain_mae is the published graph written plainly (plain.py), for the processor time of mae; step_over_mae: a step's.",
    "cpu_minutes are of a shared machine: the same work of other seeds took up to twice as long.",
)


# --- one run ---


def trained(case: Case, run: Path, shards: Path, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Train, or continue; what the run says of itself. CPU time is of this process, so one run at a time."""
    name = f"learning_{case.name}"
    given = [f"run.dir={run}", f"run.seed={seed}", f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", *overrides]
    started = time.process_time()
    stopped = pretrain(read_recipe((RECIPES / f"{name}.yaml").read_text(), given, name=name)).stopped
    cpu = run / "cpu.json"
    minutes = (time.process_time() - started) / 60 + (json.loads(cpu.read_text()) if cpu.exists() else 0)
    write_json(cpu, minutes)
    if stopped:
        raise SystemExit("asked to stop; the same command continues")
    rows, looks = read_lines(run / "metrics.jsonl"), read_lines(run / "health.jsonl")
    choices = json.loads((run / "choices.json").read_text())
    return {
        "steps": len(rows),
        "epochs": round(rows[-1]["epoch"], 2),
        "cpu_minutes": round(minutes, 1),
        "precision": choices["precision"],
        "gflop_per_sample": [round(count / 1e9, 3) for count in choices["flops_per_sample"]],
        "skipped_steps": sum(line["skipped"] for line in rows),
        "held_out": {name: [round_(look[name]) for look in (looks[0], looks[-1])] for name in HEALTH},
        "warnings": sorted({sign for look in looks for sign in look["warnings"]}),
    }


def step_ratio(precision: Precision, alternations: int = 20) -> dict[str, float]:
    """Processor time of a step of plain_mae over that of mae, alternating: by how much fewer epochs the former may have."""
    torch.set_num_threads(1)
    ratios = []
    given = ["run.dir=unused", "data.train=unused"]
    recipes = [read_recipe((RECIPES / f"learning_{name}.yaml").read_text(), given, name=name) for name in ("mae", "plain_mae")]
    steps = [swath_step(recipe, 3, 64, recipe.train.global_batch)(precision) for recipe in recipes]
    for number in range(alternations + 2):
        seconds = []
        for step in steps:
            started = time.process_time()
            step()
            seconds.append(time.process_time() - started)
        if number >= 2:  # the first ones warm up
            ratios.append(seconds[1] / seconds[0])
    return {"median": round(statistics.median(ratios), 3), "min": round(min(ratios), 3), "max": round(max(ratios), 3)}


def round_(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def fresh(loaded: Loaded, seed: int) -> Loaded:
    """The backbone that a run of this seed began with."""
    torch.manual_seed(seed)
    backbone = create(loaded.name, **loaded.options).eval().requires_grad_(False)
    return replace(loaded, backbone=backbone)


def judged(loaded: Loaded, shards: Path, path: Path, moved: bool) -> dict[str, np.ndarray]:
    """Which samples of test each probe gets right, (N,) bool, and their blocks; the accuracies on val; kept at `path`. With
    `moved` kNN too where the samples of test, and not those of train, are turned by each of DEGREES."""
    if not path.exists():
        parts = {part: features(loaded, shards / part) for part in ("train", "val", "test")}
        train = parts["train"]
        val, test = (match_classes(train, parts[part]) for part in ("val", "test"))
        regression = linear(train, test, val)
        made: dict[str, Any] = {"block": test.block, "knn": knn(train, test).correct, "linear": regression.correct}
        made |= {"val_knn": knn(train, val).accuracy}
        made |= {"val_linear": max(step["val_accuracy"] for step in regression.settings["path"])}
        for degrees in DEGREES if moved else ():
            turned_test = match_classes(train, features(loaded, shards / "test", degrees))
            made[f"knn_{degrees}"] = knn(train, turned_test).correct
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **made)
        partial.replace(path)
    with np.load(path) as kept:
        return dict(kept)


def features(loaded: Loaded, shards: Path, degrees: int = 0) -> Features:
    """Of the images turned by so many degrees, in bf16 where the machine multiplies in it, before and after alike."""
    hook = loaded.backbone.register_forward_pre_hook(lambda _, given: (turned(given[0], degrees), *given[1:]))
    try:
        return extract(loaded, ShardReader(shards), batch=64, precision=resolve("auto", torch.device("cpu")), progress=False)
    finally:
        hook.remove()


def turned(images_bchw: Tensor, degrees: int) -> Tensor:
    """Quarter turns move pixels; others are bilinear, and mirror what lies beyond the edge."""
    if degrees % 90 == 0:
        return torch.rot90(images_bchw, degrees // 90, (2, 3))
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = torch.tensor([[[cos, -sin, 0.0], [sin, cos, 0.0]]]).expand(len(images_bchw), -1, -1)
    where = F.affine_grid(matrix, list(images_bchw.shape), align_corners=False)
    return F.grid_sample(images_bchw, where, mode="bilinear", padding_mode="reflection", align_corners=False)


def one_run(case: Case, seed: int, args: argparse.Namespace) -> None:
    """Train and judge; all that the table needs lies in the work folder afterwards."""
    shards, run = make(case.data, args), args.work / f"{case.name}_{seed}"
    said = trained(case, run, shards, seed, args.overrides)
    if case.name == "plain_mae":
        said["step_over_mae"] = step_ratio(said["precision"])
    loaded = load_backbone(run)
    if case.labelled:
        options = hashlib.sha256(json.dumps([loaded.name, loaded.options, loaded.size], sort_keys=True).encode()).hexdigest()
        before = args.work / "before" / f"{case.data}_{options[:12]}_{seed}{'_turned' * case.turned}.npz"
        said["before"] = str(before.relative_to(args.work))
        old, new = judged(fresh(loaded, seed), shards, before, case.turned), judged(loaded, shards, run / "test.npz", case.turned)
        figures = ", ".join(f"{task} {old[f'val_{task}']:.3f} → {new[f'val_{task}']:.3f}" for task in TASKS)
        print(f"{case.name} {seed} on val: {figures}", flush=True)
        if args.val:
            return
    write_json(run / "said.json", said)


# --- the table ---


def compared(before: Path, after: Path, task: str) -> dict[str, Any]:
    """Accuracy before and after, and the paired difference on the same samples; 95 % block bootstrap of each."""
    with np.load(before) as a, np.load(after) as b:
        x, y, block = a[task], b[task], a["block"]
    return {
        "before": with_interval(x, block),
        "after": with_interval(y, block),
        "difference": with_interval(y.astype(float) - x, block),
    }


def with_interval(value_n: np.ndarray, block_n: np.ndarray) -> list[float]:
    """Mean of a number per sample and the ends of its interval."""
    return [round(float(x), 4) for x in (value_n.mean(), *interval(value_n, block_n))]


def row(case: Case, work: Path) -> dict[str, Any] | None:
    """What is there of a case: its seeds, the medians over them, and whether the target is reached."""
    seeds: dict[str, Any] = {}
    pairs = []
    for seed in case.seeds:
        run = work / f"{case.name}_{seed}"
        if (run / "said.json").exists():
            said = json.loads((run / "said.json").read_text())
            if before := said.pop("before", None):
                pair = (work / before, run / "test.npz")
                pairs.append(pair)
                said |= {task: compared(*pair, task) for task in TASKS}
            seeds[str(seed)] = said
    if not seeds:
        return None
    made: dict[str, Any] = {"recipe": f"benchmarks/recipes/learning_{case.name}.yaml", "data": DATA[case.data]}
    made |= {"date": time.strftime("%Y-%m-%d"), "seeds": seeds}
    if case.labelled:
        made |= {"difference_over_seeds": {task: over_seeds(pairs, task) for task in TASKS}}
        made |= verdict(case, list(seeds.values()))
    return made


def over_seeds(pairs: list[tuple[Path, Path]], task: str) -> list[float]:
    """The paired difference of a sample is its mean over seeds. All were tested on the same samples."""
    differences = []
    for before, after in pairs:
        with np.load(before) as a, np.load(after) as b:
            differences.append(b[task].astype(float) - a[task])
    with np.load(pairs[0][0]) as first:
        return with_interval(np.mean(differences, axis=0), first["block"])


def verdict(case: Case, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """The target is reached by a probe whose paired difference is above 0 (95 %) for every seed and whose median is enough."""
    gained = statistics.median(seed["knn"]["difference"][0] for seed in seeds)
    removed = statistics.median(seed["linear"]["difference"][0] / (1 - seed["linear"]["before"][0]) for seed in seeds)
    surely = {task: sum(seed[task]["difference"][1] > 0 for seed in seeds) for task in TASKS}
    by_knn = surely["knn"] == len(seeds) and gained >= case.points
    by_linear = surely["linear"] == len(seeds) and removed >= SHARE and case.points <= POINTS
    sure = {task: f"above 0 in {count} of {len(seeds)} seeds" for task, count in surely.items()}
    figures = f"kNN {100 * gained:+.1f} points ({sure['knn']}), linear error {-100 * removed:+.0f} % ({sure['linear']})"
    said = verdict_of(by_knn or by_linear, figures)
    return {
        "median_knn_points": round(100 * gained, 1),
        "median_linear_error_removed": round(removed, 3),
        "verdict": said if len(seeds) == len(case.seeds) else f"{len(seeds)} of {len(case.seeds)} seeds have run; so far {said}",
    }


def beside(work: Path, first: str, second: str) -> dict[str, Any]:
    """Accuracy on test of one case minus that of another, on the same samples, seed by seed; 95 % block bootstrap."""
    found: dict[str, Any] = {}
    for seed in SEEDS:
        paths = [work / f"{name}_{seed}" / "test.npz" for name in (first, second)]
        if all(path.exists() for path in paths):
            with np.load(paths[0]) as a, np.load(paths[1]) as b:
                found[str(seed)] = {task: with_interval(a[task].astype(float) - b[task], a["block"]) for task in TASKS}
    return found


def lost(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """How much of kNN accuracy turning takes away from each sample of test by each of DEGREES, (D, N), and their blocks."""
    with np.load(path) as kept:
        return np.stack([kept["knn"].astype(float) - kept[f"knn_{degrees}"] for degrees in DEGREES]), kept["block"]


def falls(work: Path, name: str) -> dict[str, Any]:
    """kNN accuracy lost when the test images are turned, by seed and angle, of the run and of the random weights that it began
    with; 95 % block bootstrap."""
    found: dict[str, Any] = {}
    for seed in SEEDS:
        if (said := work / f"{name}_{seed}" / "said.json").exists():
            paths = {"before": work / json.loads(said.read_text())["before"], "after": said.with_name("test.npz")}
            found[str(seed)] = {when: _by_angle(*lost(path)) for when, path in paths.items()}
    return found


def _by_angle(lost_dn: np.ndarray, block_n: np.ndarray) -> dict[str, list[float]]:
    every = {str(degrees): with_interval(lost_n, block_n) for degrees, lost_n in zip(DEGREES, lost_dn, strict=True)}
    return every | {"mean": with_interval(lost_dn.mean(axis=0), block_n)}


def turning(work: Path) -> dict[str, Any]:
    """Does RoMA lose less than ARM where the test images are turned?"""
    made: dict[str, Any] = {"kNN lost on turned tests": {name: falls(work, name) for name in ("roma", "arm")}}
    differences: dict[str, list[float]] = {}
    for seed in SEEDS:
        paths = [work / f"{name}_{seed}" / "test.npz" for name in ("roma", "arm")]
        if all(path.exists() for path in paths):
            (roma_dn, block_n), (arm_dn, _) = (lost(path) for path in paths)
            differences[str(seed)] = with_interval((roma_dn - arm_dn).mean(axis=0), block_n)
    made["kNN lost by roma minus by arm, mean over angles"] = differences
    if len(differences) == len(SEEDS):
        median = statistics.median(difference[0] for difference in differences.values())
        below = sum(upper < 0 for _, _, upper in differences.values())
        made["roma falls less than arm"] = verdict_of(
            median < 0, f"median {median:+.4f}, below 0 (95 %) in {below} of {len(SEEDS)} seeds"
        )
    return made


def claims(work: Path) -> dict[str, Any]:
    """Small ones, out of the same runs. Each difference is [mean, lower, upper] in shares of 1."""
    made: dict[str, Any] = {
        "selective_mae minus mae, equal epochs": beside(work, "selective_mae", "mae"),
        "mae minus plain_mae, equal processor time": beside(work, "mae", "plain_mae"),
        "satmae_pp minus satmae_pp_single": beside(work, "satmae_pp", "satmae_pp_single"),
    }
    if (selective := made["selective_mae minus mae, equal epochs"]) and len(selective) == len(SEEDS):
        median = {task: statistics.median(seed[task][0] for seed in selective.values()) for task in TASKS}
        made["selective_mae within one point of mae"] = verdict_of(
            min(median.values()) >= -0.01, f"medians {', '.join(f'{task} {x:+.3f}' for task, x in median.items())}"
        )
    for found in made["mae minus plain_mae, equal processor time"].values():  # of one seed
        figures = ", ".join(f"{task} {found[task][0]:+.3f} ({found[task][1]:+.3f} … {found[task][2]:+.3f})" for task in TASKS)
        made["plain_mae not better than mae"] = verdict_of(all(found[task][2] >= 0 for task in TASKS), figures)
    made |= turning(work)
    return made


def verdict_of(holds: bool, figures: str) -> str:
    return f"{'reached' if holds else 'not reached'}: {figures}"


def table(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All that lies in the work folder; cases that are not there stay as an earlier table had them, with their date."""
    earlier = json.loads(args.out.read_text()) if args.out.exists() else {"cases": {}, "claims": {}}
    rows = {case.name: found for case in CASES if (found := row(case, work) or earlier["cases"].get(case.name)) is not None}
    return {
        # where the data lie is this machine's affair
        "command": " ".join(["python -m benchmarks.learning --rgb … --split … --hsi … --scene …", *args.overrides]),
        "note": list(NOTES),
        "machine": f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}",
        "target": "paired difference to its own random weights above 0 (95 %); median over seeds at least "
        f"{100 * POINTS:g} points of kNN or {SHARE} of the linear error removed; mae and selective_mae at least 6 points of kNN",
        "cases": rows,
        "claims": earlier["claims"] | {name: found for name, found in claims(work).items() if found},
    }  # fmt: skip


def show(made: dict[str, Any]) -> None:
    print("one small budget: it learns, and is not worse than published; no ranking of objectives")
    for name, found in made["cases"].items():
        seeds = found["seeds"].values()
        losses = ", ".join(f"{seed['held_out']['loss'][0]:.3g} → {seed['held_out']['loss'][1]:.3g}" for seed in seeds)
        print(f"{name}: {found.get('verdict', 'no labels')}\n  held-out loss {losses}")
        for task in TASKS if "verdict" in found else ():
            print(f"  {task:7}" + "   ".join("{before[0]:.3f} → {after[0]:.3f} ({difference[1]:+.3f} … {difference[2]:+.3f})"
                                             .format(**seed[task]) for seed in seeds))  # fmt: skip
    print(json.dumps(made["claims"], indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rgb", type=Path, required=True, help="EuroSAT_RGB.zip")
    parser.add_argument("--split", type=Path, required=True, help="CSV with columns file,class,split,block of it")
    parser.add_argument("--hsi", type=Path, required=True, help="folder with SalinasA and JasperRidge")
    parser.add_argument("--scene", type=Path, required=True, help="folder of one Sentinel-2 scene")
    parser.add_argument("--work", type=Path, default=Path("out/learning"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/learning.json"))
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], metavar="CASE", help="some of the cases")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    parser.add_argument("--val", action="store_true", help="print figures on val, to choose settings; the table is left as it is")
    parser.add_argument("overrides", nargs="*", help="key=value for every run, for instance train.threads=1")
    args = parser.parse_args()
    register(MAEConfig, {"plain_mae": {}})(PlainMAE)
    for seed in args.seeds:
        for case in CASES:
            if seed in case.seeds and (args.only is None or case.name in args.only):
                one_run(case, seed, args)
                if not args.val:
                    write_json(args.out, table(args.work, args))
    made = table(args.work, args)
    show(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
