"""What a run writes down as it goes: metrics.jsonl, health.jsonl, TensorBoard events, and one line for the person watching."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter


class JsonLines:
    """Append-only lines; opened at a step, it first drops what was written after it, a torn last line too."""

    def __init__(self, path: Path, step: int) -> None:
        self._file = path.open("a+b")
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            whole += len(line)
        self._file.truncate(whole)

    def add(self, row: dict[str, Any]) -> None:
        self._file.write((json.dumps(row, allow_nan=False) + "\n").encode())
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines, [] where there is none; a torn last line is not one."""
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines() if line]


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


class Record:
    """metrics.jsonl holds one line per step, counted from 1, each step once, whatever happened in between."""

    def __init__(self, run: Path, step: int, total: int) -> None:
        self._metrics = JsonLines(run / "metrics.jsonl", step)
        self._health = JsonLines(run / "health.jsonl", step)
        self.looks = read_lines(run / "health.jsonl")  # at health, from initialisation on
        self._events = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self._total, self._shown, self._first = total, 0.0, (time.monotonic(), step)

    def step(self, row: dict[str, Any]) -> None:
        self._metrics.add(row)
        for key in ("loss", "lr", "grad_norm", "samples_per_second", "data_wait"):
            if row.get(key) is not None:
                self._events.add_scalar(f"train/{key}", row[key], row["step"])
        self._show(row)

    def check(self, row: dict[str, Any]) -> None:
        self._health.add(row)
        self.looks.append(row)
        for key, value in row.items():
            if isinstance(value, float):
                self._events.add_scalar(f"health/{key}", value, row["step"])

    def _show(self, row: dict[str, Any]) -> None:
        """A line a second on a terminal, one every half minute in a log."""
        terminal = sys.stderr.isatty()
        now, last = time.monotonic(), row["step"] == self._total
        if not last and now - self._shown < (1.0 if terminal else 30.0):
            return
        self._shown = now
        start, first = self._first
        left = (now - start) / max(1, row["step"] - first) * (self._total - row["step"])
        loss = "skipped" if row["loss"] is None else f"{row['loss']:.4f}"
        mfu = "" if row["mfu"] is None else f"  mfu {row['mfu']:.0%}"
        line = (
            f"step {row['step']}/{self._total}  loss {loss}  {row['samples_per_second']:.0f} samples/s{mfu}  "
            f"data wait {row['data_wait']:.1%}  left {time.strftime('%H:%M:%S', time.gmtime(left))}"
        )
        print(line, end="\r" if terminal and not last else "\n", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for part in (self._metrics, self._health, self._events):
            part.close()
