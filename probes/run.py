"""`swath probe`: a backbone, labelled shards for train and test, one table and one JSON of settings and results."""

import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

import swath
from swath.hub.card import without_paths
from swath.hub.load import Loaded, load_backbone
from swath.probes.features import Features, extract, match_classes, require_classes, require_contract
from swath.probes.knn import knn
from swath.probes.linear import linear
from swath.probes.metrics import REPLICATES, SEED, Scores
from swath.shards.errors import InputError
from swath.shards.files import disk_errors, write_json
from swath.shards.reader import ShardReader

Task = Literal["knn", "linear"]
TASKS: tuple[Task, ...] = ("knn", "linear")


def probe(
    task: Task,
    backbone: Path | str,
    train: Path | str,
    test: Path | str,
    *,
    val: Path | str | None = None,
    json_path: Path | str | None = None,
    size: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Run a probe, write its JSON to `json_path` and, for a run folder, into its `probes/`; return it (`table` shows it).

    `size` is the side in pixels that chips are resized to, by default what the backbone was trained at.

    Raises InputError for another input contract, missing labels, test classes that train lacks, a single class.
    """
    (result,) = probes([task], backbone, train, test, val=val, size=size, progress=progress)
    if json_path is not None:
        _write(result, Path(json_path))
    return result


def probes(
    tasks: Sequence[Task],
    backbone: Path | str,
    train: Path | str,
    test: Path | str,
    *,
    val: Path | str | None = None,
    size: int | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Several probes of the same features, which are computed once; otherwise as `probe`."""
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"no probe is called {task!r}; there are {', '.join(TASKS)}")
    started = time.perf_counter()
    loaded = load_backbone(backbone)
    loaded.backbone.to("cuda" if torch.cuda.is_available() else "cpu")
    folders = {"train": train, "test": test} | ({"val": val} if val is not None and "linear" in tasks else {})
    readers = {part: ShardReader(Path(folder)) for part, folder in folders.items()}
    for reader in readers.values():  # all of them before the first long computation
        require_contract(loaded, reader)
    if size is not None:
        loaded.size = (size, size)
        try:
            loaded.backbone.grid(size, size)
        except ValueError as error:
            raise InputError(str(error)) from None
    parts = {part: extract(loaded, reader, progress=progress) for part, reader in readers.items()}
    require_classes(parts["train"])
    parts = {part: features if part == "train" else match_classes(parts["train"], features) for part, features in parts.items()}
    extracting = time.perf_counter() - started
    made = [_judge(task, parts, loaded, readers, extracting) for task in tasks]
    if (Path(backbone) / "checkpoints").is_dir():  # a run: its report shows what lies there
        for result in made:
            _write(result, Path(backbone) / "probes" / f"{result['task']}.json")
    return made


def _judge(
    task: Task, parts: dict[str, Features], loaded: Loaded, readers: dict[str, ShardReader], extracting: float
) -> dict[str, Any]:
    """One probe on features that are there: its scores and every setting."""
    started = time.perf_counter()
    if task == "knn":
        parts = {part: features for part, features in parts.items() if part != "val"}
        scores = knn(parts["train"], parts["test"])
    else:
        scores = linear(parts["train"], parts["test"], parts.get("val"))
    classes = parts["train"].classes
    result: dict[str, Any] = {
        "task": task,
        **_scores(scores, classes),
        "settings": scores.settings | {"size": list(loaded.size), "precision": "fp32", "standardised_on": "train"},
        **{f"n_{part}": len(features.label) for part, features in parts.items()},
        "feature_width": loaded.backbone.pooled_width,
        "unlabelled": {part: features.unlabelled for part, features in parts.items()},
        "datasets": {part: readers[part].manifest.dataset for part in parts},
        "bands": list(require_contract(loaded, readers["train"]).names),
        "backbone": {"name": loaded.name, **_origin(loaded.origin)},
        "seconds": {"features": extracting, "probe": time.perf_counter() - started},
        "device": next(loaded.backbone.parameters()).device.type,
        "threads": torch.get_num_threads(),
        "versions": {"swath": swath.__version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "numpy", "scikit-learn")},
    }
    return result


def _scores(scores: Scores, classes: tuple[str, ...]) -> dict[str, Any]:
    recall = {name: None if share != share else float(share) for name, share in zip(classes, scores.recall, strict=True)}
    return {
        "accuracy": scores.accuracy,
        "interval": list(scores.interval),
        "interval_method": f"95 % block bootstrap, {REPLICATES} replicates, seed {SEED}",
        "classes": list(classes),
        "recall": recall,
        "confusion": scores.confusion.tolist(),
    }


def _origin(origin: dict[str, Any]) -> dict[str, Any]:
    """What the JSON says of where the weights come from; the resolved recipe stays with them."""
    return without_paths({key: origin[key] for key in ("step", "samples", "recipe", "versions") if key in origin})


def _write(result: dict[str, Any], path: Path) -> None:
    with disk_errors("writing the probe's result", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)


def table(result: dict[str, Any]) -> str:
    """The result as a few lines of text."""
    low, high = result["interval"]
    settings = result["settings"]
    chosen = (
        f"k = {settings['k']}, T = {settings['temperature']}"
        if result["task"] == "knn"
        else f"C = {settings['C']:.3g}, chosen on {settings['chosen_on']}"
        + ("" if settings["converged"] else f", not converged after {settings['iterations']} iterations")
    )
    wide = max(len(name) for name in result["classes"])
    rows = [f"  {name:<{wide}}  {'–' if share is None else f'{share:.3f}'}" for name, share in result["recall"].items()]
    head = f"{result['task']}  accuracy {result['accuracy']:.3f}  (95 % interval {low:.3f} to {high:.3f})  {chosen}"
    backbone = f"{result['backbone']['name']}, {result['feature_width']} features"
    samples = f"{result['n_train']:,} train, {result['n_test']:,} test"
    return "\n".join([head, f"{backbone}; {samples}", "recall", *rows])
