"""What an unfinished ingest has done: its partial folder, and a record of each shard that is whole (DESIGN §2.2)."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swath.shards.errors import InputError
from swath.shards.files import write_bytes, write_json
from swath.shards.index import MEMBER, SAMPLE
from swath.shards.manifest import Shard
from swath.shards.statistics import Statistics
from swath.shards.writer import Rows

FOLDER = "journal"  # inside the partial folder; gone when that becomes the result


@dataclass
class Stretch:
    """One stretch of jobs, up to position `end`, and the shard that it filled; none where no sample of it was left."""

    shard: Shard | None
    rows: Rows
    end: int
    statistics: dict[str, Statistics]
    skipped: list[tuple[str, str]]
    left_out: int
    sizes: dict[str, list[tuple[int, int]]]


class Journal:
    """The finished stretches of one split: `folder` holds the records, `shards` the tars."""

    def __init__(self, folder: Path, shards: Path, columns: int) -> None:
        self.folder, self.shards, self.columns = folder, shards, columns
        for place in (folder, shards):
            place.mkdir(parents=True, exist_ok=True)

    def record(self, number: int, stretch: Stretch) -> None:
        """Rows first, the record last: a shard without its record is written again."""
        assert stretch.shard is not None
        rows = stretch.rows
        write_bytes(self.folder / f"{number:06d}.rows", rows.samples.tobytes() + rows.members.tobytes() + rows.keys)
        rest = {"end": stretch.end, "skipped": stretch.skipped, "left_out": stretch.left_out, "sizes": stretch.sizes}
        write_json(
            self.folder / f"{number:06d}.json",
            {"shard": stretch.shard.model_dump(), "statistics": {name: s.state() for name, s in stretch.statistics.items()}, **rest},
        )

    def stretches(self) -> list[Stretch]:
        """The finished ones, in order, up to the first that is missing or not whole."""
        done: list[Stretch] = []
        while (path := self.folder / f"{len(done):06d}.json").exists():
            try:
                done.append(self._read(path))
            except (OSError, ValueError, KeyError, TypeError):
                break  # torn by whatever ended the run: written again
        return done

    def _read(self, path: Path) -> Stretch:
        record: dict[str, Any] = json.loads(path.read_text())
        made = Shard.model_validate(record["shard"])
        if (self.shards / made.name).stat().st_size != made.bytes:
            raise ValueError(f"{made.name} is not whole")
        raw = path.with_suffix(".rows").read_bytes()
        middle = made.samples * SAMPLE.itemsize
        end = middle + made.samples * self.columns * MEMBER.itemsize
        members = np.frombuffer(raw[middle:end], MEMBER).reshape(made.samples, -1)
        return Stretch(
            shard=made,
            rows=Rows(np.frombuffer(raw[:middle], SAMPLE), members, raw[end:]),
            end=int(record["end"]),
            statistics={name: Statistics.from_state(state) for name, state in record["statistics"].items()},
            skipped=[(key, reason) for key, reason in record["skipped"]],
            left_out=int(record["left_out"]),
            sizes={name: [(height, width) for height, width in found] for name, found in record["sizes"].items()},
        )


@contextmanager
def building(partial: Path, plan: str) -> Iterator[None]:
    """Own `partial` for this plan: emptied if it belongs to another, removed when the input turns out to be unusable."""
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another `swath shard` is writing {partial}; wait for it or stop it") from None
        record = partial / FOLDER / "plan.json"
        if _plan(record) != plan:
            for path in partial.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            record.parent.mkdir()
            write_json(record, plan)
        try:
            yield
        except InputError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def _plan(record: Path) -> str | None:
    try:
        return json.loads(record.read_text())
    except (OSError, ValueError):
        return None
