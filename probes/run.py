"""`swath probe`: a backbone and labelled shards → one JSON of every setting and result, a table, pictures."""

import dataclasses
import io
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

import swath
from swath.backbones.base import nearest
from swath.hub.card import without_paths
from swath.hub.load import Loaded, load_backbone
from swath.probes.cache import default
from swath.probes.features import require_contract, resolve
from swath.probes.metrics import REPLICATES, SEED
from swath.probes.protocol import TOUCHED, overlap, transductive
from swath.probes.task import Bench, Result, Row, Task, task_called
from swath.shards.errors import InputError
from swath.shards.files import disk_errors, write_bytes, write_json
from swath.shards.reader import ShardReader

PROTOCOL = (
    "Settings are chosen on val, else on a part of train; test is read once, by the settings that were chosen. A row is "
    "transductive where its weights or statistics have seen test samples."
)


def probe(
    task: str,
    backbone: Path | str,
    train: Path | str,
    test: Path | str,
    *,
    val: Path | str | None = None,
    json_path: Path | str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Run a probe, write its JSON to `json_path`, pictures beside it, and for a run folder into its `probes/`; return the JSON
    (`table` shows it). `more`: see `probes`.

    Raises InputError for another input contract, missing labels, test classes that train lacks, a single class.
    """
    return _run([task], backbone, train, test, val=val, json_path=json_path, **more)[0]


def probes(tasks: Sequence[str], backbone: Path | str, train: Path | str, test: Path | str, **more: Any) -> list[dict[str, Any]]:
    """Several probes of the same features, which are computed once; otherwise as `probe`.

    `more` are val; size, the side in pixels that chips are resized to (what the backbone was trained at); precision, "auto",
    "fp32" or "bf16"; seed; cache, the folder of features, True for ~/.cache/swath/features, False for none; pretrained_on, shards
    that the backbone saw; progress; and the tasks' own options (one goes to each task that has it).
    """
    return _run(tasks, backbone, train, test, **more)


def _run(
    tasks: Sequence[str],
    backbone: Path | str,
    train: Path | str,
    test: Path | str,
    *,
    val: Path | str | None = None,
    json_path: Path | str | None = None,
    size: int | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    seed: int = 0,
    cache: Path | str | bool = True,
    pretrained_on: Sequence[Path | str] = (),
    progress: bool = True,
    **options: Any,
) -> list[dict[str, Any]]:
    chosen = _configured([task_called(name) for name in tasks], options)
    if not -(2**63) <= seed < 2**63:
        raise InputError(f"--seed must be a whole number of 64 bits, not {seed}")
    if json_path is not None and Path(json_path).is_dir():
        raise InputError(f"--json {Path(json_path)} is a folder; name a file")
    bench = _bench([task for task, _ in chosen], backbone, {"train": train, "test": test, "val": val}, size)
    bench.seed, bench.progress, bench.cache = seed, progress, _cache(cache)
    bench.precision = resolve(precision, next(bench.loaded.backbone.parameters()).device)
    seen = transductive(bench.loaded, bench.readers["test"], pretrained_on)
    made = []
    for task, values in chosen:
        started, before = time.perf_counter(), dict(bench.seconds)
        result = task.run(bench, values)
        seconds = {what: spent - before[what] for what, spent in bench.seconds.items()}
        seconds["probe"] = time.perf_counter() - started - sum(seconds.values())
        told = _told(task, values, bench, result, seen) | {"seconds": seconds}
        if json_path is not None:
            _write(told, result, Path(json_path))
        if (Path(backbone) / "checkpoints").is_dir():  # a run: its report shows what lies there
            _write(told, result, Path(backbone) / "probes" / f"{task.name}.json")
        made.append(told)
    return made


def _cache(folder: Path | str | bool) -> Path | None:
    if isinstance(folder, bool):
        return default() if folder else None
    return Path(folder)


def _configured(tasks: list[Task], options: dict[str, Any]) -> list[tuple[Task, Any]]:
    """Each task with its options; InputError for one that none has, and for what the options themselves refuse."""
    known = {task.name: [f.name for f in dataclasses.fields(task.options)] for task in tasks}
    for name in options:
        if not any(name in names for names in known.values()):
            every = sorted({one for names in known.values() for one in names})
            raise InputError(f"probe {', '.join(known)} has no option {name!r}{nearest(name, every)}; it has {', '.join(every)}")
    try:
        return [(t, t.options(**{name: value for name, value in options.items() if name in known[t.name]})) for t in tasks]
    except ValueError as error:
        raise InputError(str(error)) from None


def _bench(tasks: list[Task], backbone: Path | str, folders: dict[str, Path | str | None], size: int | None) -> Bench:
    """All that can be refused is, before the first long computation."""
    loaded = load_backbone(backbone)
    loaded.backbone.to("cuda" if torch.cuda.is_available() else "cpu")
    readers = {part: ShardReader(folder) for part, folder in folders.items() if folder is not None}
    for task, reader in product(tasks, readers.values()):
        (task.require or require_contract)(loaded, reader)
    trained_at = loaded.size
    if size is not None:
        if size < 1:
            raise InputError(f"--size must be at least 1 pixel, not {size}")
        loaded.size = (size, size)
        try:
            loaded.backbone.grid(size, size)
        except ValueError as error:
            raise InputError(str(error)) from None
    return Bench(loaded, readers, trained_at=trained_at)


def _told(task: Task, values: Any, bench: Bench, result: Result, seen: tuple[bool | None, str]) -> dict[str, Any]:
    """The JSON: rows and details, and every setting."""
    loaded, readers = bench.loaded, bench.readers
    contract = (task.require or require_contract)(loaded, readers["train"])
    device = next(loaded.backbone.parameters()).device.type
    for row in result.rows:
        row.transductive = seen[0] if row.name.startswith(TOUCHED) else False
    others = [part for part in readers if part != "test" and not result.within]
    first = result.rows[0]
    metric = next(iter(first.metrics))
    return {
        "task": task.name,
        "metric": metric,
        **first.metrics,
        "interval": list(first.interval[metric]) if metric in first.interval else None,
        "interval_method": result.settings.get("interval_method", "95 % block bootstrap")
        + f", {REPLICATES} replicates, seed {SEED}",
        "rows": [_row(row) for row in result.rows],
        **result.details,
        "settings": {
            **without_paths(dataclasses.asdict(values)),
            **result.settings,
            "size": list(loaded.size),
            "normalisation": "of the backbone's contract",
            "precision": bench.precision,
            "seed": bench.seed,
        },
        "protocol": PROTOCOL,
        "transductive": seen[0],
        "transductive_because": seen[1],
        "test_samples_also_in": {part: overlap(readers[part], readers["test"]) for part in others},
        "datasets": {part: reader.manifest.dataset for part, reader in readers.items()},
        "bands": list(contract.names),
        "backbone": {"name": loaded.name, **_origin(loaded)},
        "pictures": sorted(result.pictures),
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {"swath": swath.__version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "numpy", "scikit-learn")},
    }


def _row(row: Row) -> dict[str, Any]:
    interval = {name: list(ends) for name, ends in row.interval.items()}
    return {"name": row.name, "metrics": row.metrics, "interval": interval, "transductive": row.transductive}


def _origin(loaded: Loaded) -> dict[str, Any]:
    """What the JSON says of where the weights come from; the resolved recipe stays with them."""
    origin = loaded.origin
    return without_paths({key: origin[key] for key in ("step", "samples", "recipe", "versions") if key in origin})


def _write(told: dict[str, Any], result: Result, path: Path) -> None:
    with disk_errors("writing the probe's result", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        for name, picture in result.pictures.items():
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG")
            write_bytes(path.with_name(f"{path.stem}-{name}.png"), buffer.getvalue())
        write_json(path, told)


def table(result: dict[str, Any]) -> str:
    """The result as a few lines of text."""
    metric, value = result["metric"], result[result["metric"]]
    head = f"{result['task']}  {metric} {_share(value)}"
    if result["interval"]:
        low, high = result["interval"]
        head += f"  (95 % interval {low:.3f} to {high:.3f})"
    lines = [head, f"{result['backbone']['name']}, {result['settings']['precision']}; {_counts(result)}", "", *_rows(result)]
    if result["transductive"] is not False:
        lines += [
            "",
            f"{'transductive' if result['transductive'] else 'transductive or not is unknown'}: {result['transductive_because']}",
        ]
    for part, count in result["test_samples_also_in"].items():
        if count:
            lines += [f"{count:,} samples of test are in {part} too: these figures say little"]
    if "preprocessing" in result:
        rows = preprocessing_rows(result["preprocessing"], "size \\ normalisation")
        lines += ["", *_aligned(rows), "* as the backbone's contract says"]
    if isinstance(result.get("recall"), dict):  # by class; where one class matters it is a metric
        wide = max(len(name) for name in result["recall"])
        lines += ["", "recall", *(f"  {name:<{wide}}  {_share(share)}" for name, share in result["recall"].items())]
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _counts(result: dict[str, Any]) -> str:
    counts = [f"{result[f'n_{part}']:,} {part}" for part in ("train", "val", "test") if f"n_{part}" in result]
    return ", ".join(counts) or ", ".join(result["datasets"].values())


def _rows(result: dict[str, Any]) -> list[str]:
    """Metrics of every row, their intervals beside them."""
    metrics = list(dict.fromkeys(name for row in result["rows"] for name in row["metrics"]))
    cells = [["", *metrics]]
    for row in result["rows"]:
        shown = [row["name"] + (" (transductive)" if row["transductive"] else "")]
        for name in metrics:
            ends = row["interval"].get(name)
            shown.append(_share(row["metrics"].get(name)) + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else ""))
        cells.append(shown)
    return _aligned(cells)


def preprocessing_rows(cells: list[dict[str, Any]], corner: str) -> list[list[str]]:
    """The table of sizes (rows) and normalisations, its head first, with `corner` in it; the contract's cell is marked."""
    names = list(dict.fromkeys(cell["normalisation"] for cell in cells))
    found = {(cell["size"], cell["normalisation"]): cell for cell in cells}
    rows = [[corner, *names]]
    for size in dict.fromkeys(cell["size"] for cell in cells):
        pixels = found[size, names[0]]["pixels"]
        shown = [f"{size} ({pixels[0]} × {pixels[1]})" if pixels else size]
        rows.append(shown + [_share(found[size, n]["value"]) + " *" * found[size, n]["contract"] for n in names])
    return rows


def _aligned(cells: list[list[str]]) -> list[str]:
    wide = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, wide, strict=True)).rstrip() for row in cells]
