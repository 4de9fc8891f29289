"""Where a run stands, from the files in its folder, and from SLURM where there is one."""

import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from swath.launch.jobs.slurm import job_name
from swath.pretrain.checkpoint import FOLDER, LATEST
from swath.pretrain.owner import STALE
from swath.shards.errors import InputError

RECENT = 50  # steps whose median speed is shown
TAIL = 1 << 16  # bytes of metrics.jsonl that are read


def status(run: Path) -> str:
    """A few lines: queue, step of total, speed, last checkpoint, starts, last error. InputError if `run` is no run folder."""
    if not (run / "recipe.yaml").exists() and not (run / "launch").is_dir():
        raise InputError(f"{run} is not a run folder: it has neither recipe.yaml nor launch/")
    rows = _last_rows(run / "metrics.jsonl")
    saved, total = _saved(run)
    told = {
        "run": str(run),
        "queue": _queue(run),
        "process": _process(run),
        "step": _step(rows, saved, total),
        "speed": _speed(rows, total),
        "checkpoint": _checkpoint(run, saved),
        "starts": _starts(run, saved),
        "error": _error(run),
    }
    return "\n".join(f"{name:12}{value}" for name, value in told.items() if value)


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines in the last part of a file of JSON lines that may be long; a torn last line is not one."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - TAIL)
        file.seek(start)
        lines = file.read().split(b"\n")
    return [json.loads(line) for line in lines[1 if start else 0 : -1]]


def _ask(*command: str) -> list[list[str]]:
    """Rows and columns of what SLURM answers, [] where it does not."""
    if shutil.which(command[0]) is None:
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return []
    return [line.split("|") for line in done.stdout.splitlines() if "|" in line] if done.returncode == 0 else []


def _queue(run: Path) -> str:
    if shutil.which("squeue") is None:
        return "no SLURM here"
    name = job_name(run)
    rows = _ask("squeue", "--noheader", "--name", name, "--format", "%i|%T|%M|%L|%R")
    if rows:
        return "; ".join(f"job {i} {state}, {ran} of its time gone, {left} left {where}" for i, state, ran, left, where in rows)
    past = _ask("sacct", "--noheader", "--allocations", "--parsable2", "--name", name, "--format", "JobID,State,ExitCode,End")
    return "no job" + (f"; the last, {past[-1][0]}, was {past[-1][1]} at {past[-1][3]}" if past else "")


def _process(run: Path) -> str:
    try:
        owner = json.loads((run / "owner.json").read_text())
    except (OSError, ValueError):
        return ""
    age = time.time() - float(owner["beat"])
    return f"{owner['pid']} on {owner['host']}, " + (f"heard of {age:.0f} s ago" if age < STALE else f"silent for {_span(age)}")


def _saved(run: Path) -> tuple[int | None, int | None]:
    """(step of the latest checkpoint, steps in all) as far as they are known."""
    folder = run / FOLDER
    try:
        state = json.loads((folder / (folder / LATEST).read_text().strip() / "state.json").read_text())
        return state["step"], state["total_steps"]
    except (OSError, ValueError, KeyError):
        pass
    try:
        train = yaml.safe_load((run / "recipe.yaml").read_text())["train"]
        return None, train["max_steps"] if train["epochs"] is None else None
    except (OSError, KeyError, yaml.YAMLError):
        return None, None


def _step(rows: list[dict[str, Any]], saved: int | None, total: int | None) -> str:
    done = rows[-1]["step"] if rows else saved or 0
    share = "" if total is None else f" of {total} ({done / total:.0%})"
    loss = f", loss {rows[-1]['loss']:.4f}" if rows and rows[-1].get("loss") is not None else ""
    return f"{done}{share}{loss}"


def _speed(rows: list[dict[str, Any]], total: int | None) -> str:
    recent = rows[-RECENT:]
    if not recent:
        return ""
    each = median(row["seconds"] for row in recent)
    left = "" if total is None or rows[-1]["step"] >= total else f", {_span(each * (total - rows[-1]['step']))} of training left"
    return f"{median(row['samples_per_second'] for row in recent):.0f} samples/s, {each:.3g} s a step{left}"


def _checkpoint(run: Path, saved: int | None) -> str:
    if saved is None:
        return "none yet"
    return f"of step {saved}, {_span(time.time() - (run / FOLDER / LATEST).stat().st_mtime)} ago"


def _starts(run: Path, saved: int | None) -> str:
    """How often jobs have started since the run was submitted, and how many in a row have saved nothing new."""
    path = run / "launch" / "starts"
    steps = [int(line.split()[2]) for line in path.read_text().splitlines()] if path.exists() else []
    idle = 0
    while idle < len(steps) and steps[-1 - idle] == (saved or 0):
        idle += 1
    return f"{len(steps)}, the last {idle} without a new checkpoint so far" if idle else str(len(steps) or "")


def _error(run: Path) -> str:
    """What the latest start ended with: the rank that failed first."""
    starts = sorted((run / "launch" / "logs").glob("*/"), key=lambda folder: folder.stat().st_mtime)
    told = [json.loads(path.read_text()) for folder in starts[-1:] for path in folder.glob("failure-*.json")]
    if not told:
        return _submission(run) if not starts else ""
    first = min(told, key=lambda one: one["time"])
    log = starts[-1] / f"rank-{first['rank']:05d}.log"
    return f"rank {first['rank']} on {first['node']}: {first['message']} (exit code {first['exit_code']}; {log})"


def _submission(run: Path) -> str:
    """Where no process has started: the last words of the job's own log that look like an error."""
    logs = sorted((run / "launch").glob("job-*.log"), key=lambda path: path.stat().st_mtime)
    lines = [line for path in logs[-1:] for line in path.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if re.search("error|giving up", line, re.IGNORECASE)), "")


def _span(seconds: float) -> str:
    minutes = round(seconds / 60)
    days, hours = minutes // 1440, minutes // 60 % 24
    return f"{days} d {hours} h" if days else f"{hours} h {minutes % 60} min" if hours else f"{max(minutes, 0)} min"
