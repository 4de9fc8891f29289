"""What a run folder tells of a backbone's training: curves, health, cost, probes. Numbers and cleaned words only, for the card.

It becomes part of the export's `origin`, so an export of an export, or of a Hub id, has the same card.
"""

import json
import logging
import math
import re
from pathlib import Path
from statistics import median
from typing import Any

from swath.hub.card import without_paths
from swath.pretrain.checkpoint import FOLDER
from swath.pretrain.exported import CONFIG
from swath.pretrain.record import read_lines

log = logging.getLogger(__name__)
POINTS = 200  # of a curve
_CURVES = ("loss", "lr", "grad_norm", "samples_per_second")
_LOOKS = (
    "loss", "pooled_std", "pooled_cosine", "pooled_rank", "tokens_std", "tokens_cosine", "tokens_rank", "positional",
)  # fmt: skip


def history(path: Path | str, origin: dict[str, Any]) -> dict[str, Any]:
    """{"training": …, "probes": […]} of the run that `path` is, or is a checkpoint of; nothing for anything else.

    Only what was there at the checkpoint's step counts; a probe of another step says so. A file that cannot be understood is
    named in the log and left out.
    """
    path = Path(path).absolute()
    run = path.parent.parent if path.parent.name == FOLDER else path
    if not (run / FOLDER).is_dir() or (path / CONFIG).is_file():
        return {}
    made: dict[str, Any] = {}
    try:
        if training := _training(run, int(origin.get("step", 0))):
            made["training"] = training
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s tells no training curves (%s: %s)", run, type(error).__name__, error)
    probes = []
    for file in sorted((run / "probes").glob("*.json")):
        try:
            probes.append(_probe(json.loads(file.read_text())))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            log.warning("%s is not understood as a probe's result (%s: %s)", file, type(error).__name__, error)
    return made | ({"probes": probes} if probes else {})


def _training(run: Path, step: int) -> dict[str, Any]:
    metrics = [row for row in read_lines(run / "metrics.jsonl") if row["step"] <= step]
    looks = [row for row in read_lines(run / "health.jsonl") if row["step"] <= step]
    if not metrics:
        return {}
    choices = json.loads((run / "choices.json").read_text()) if (run / "choices.json").is_file() else {}
    spent = sum(row["mfu"] * row["seconds"] for row in metrics if row["mfu"] is not None) * choices.get("peak_flops", 0)
    return {
        "curves": _thinned(metrics),
        "looks": {"step": [int(row["step"]) for row in looks], **{key: [_number(r.get(key)) for r in looks] for key in _LOOKS}},
        "held_out": bool(looks and looks[-1].get("held_out")),
        "warnings": sorted({_words(sign) for row in looks for sign in row.get("warnings", [])}),
        "epochs": _number(metrics[-1]["epoch"]),
        "hours": _number(sum(row["seconds"] for row in metrics) / 3600),
        "flops": _number(spent),
        "samples_per_second": _number(median(row["samples_per_second"] for row in metrics)),
        "device": _words(choices.get("device", "")),
        "precision": _words(choices.get("precision", "")),
        "skipped_steps": sum(bool(row["skipped"]) for row in metrics),
    }


def _thinned(metrics: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """At most POINTS points per curve: means of equally many steps, None where no step has a number."""
    each = math.ceil(len(metrics) / POINTS)
    groups = [metrics[i : i + each] for i in range(0, len(metrics), each)]

    def mean(group: list[dict[str, Any]], key: str) -> float | None:
        values = [row[key] for row in group if row[key] is not None]
        return _number(sum(values) / len(values)) if values else None

    return {"step": [int(g[-1]["step"]) for g in groups], **{key: [mean(g, key) for g in groups] for key in _CURVES}}


def _probe(result: dict[str, Any]) -> dict[str, Any]:
    """The table of one probe: {"task", "step", "n_train", "n_test", "datasets", "rows": [{"name", "metrics", "interval"}]}."""
    rows = result.get("rows")
    if rows is None:
        rows = [{"name": "backbone", "metrics": {"accuracy": result["accuracy"]}, "interval": result.get("interval")}]
    datasets = result.get("datasets", {})
    return {
        "task": _words(result["task"]),
        "step": result.get("backbone", {}).get("step"),
        "datasets": {part: _words(datasets[part]) for part in ("train", "test") if part in datasets},
        **{key: int(result[key]) for key in ("n_train", "n_test") if key in result},
        "rows": [_row(row) for row in rows],
    }


def _row(row: dict[str, Any]) -> dict[str, Any]:
    metrics = {_words(name): _number(value) for name, value in row["metrics"].items()}
    interval = row.get("interval") or {}
    if not isinstance(interval, dict):  # of the first metric
        interval = {next(iter(metrics)): interval}
    ends = {_words(name): [_number(end) for end in both] for name, both in interval.items() if both}
    seen = row.get("transductive", False)
    told = None if seen is None else bool(seen)
    return {"name": _words(row["name"]), "metrics": metrics, "interval": ends, "transductive": told}


def _number(value: Any) -> float | None:
    """Six digits; None for None and what is not finite. Raises ValueError for what is no number."""
    if value is None or not math.isfinite(float(value)):
        return None
    return float(f"{float(value):.6g}")


def _words(text: Any) -> str:
    """Short, of one line, without folders, and nothing that Markdown or HTML would take for its own."""
    return " ".join(re.sub(r"[^\w .,:;%+@()=-]", " ", without_paths(str(text))).split())[:120]
