"""What an unfinished ingest has done: its partial folder, and a record of each shard that is whole (DESIGN §2.2)."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from swath.shards.bands import InputContract
from swath.shards.errors import InputError
from swath.shards.files import write_bytes, write_json
from swath.shards.index import MEMBER, SAMPLE
from swath.shards.ingestion.quality import DIGEST, LeftOut
from swath.shards.ingestion.work import Seen
from swath.shards.manifest import Shard
from swath.shards.writer import Rows

FOLDER = "journal"  # inside the partial folder; gone when that becomes the result


class Unfinished(InputError):
    """The ingest stops, and what it has done is kept: the same command continues it."""


@dataclass
class Stretch:
    """One stretch of jobs, up to position `end`, and the shard that it filled; none where no sample of it was left.

    `digests` of its samples, one after the other, where duplicates are looked for.
    """

    shard: Shard | None
    rows: Rows
    end: int
    seen: Seen
    skipped: list[tuple[str, str]]
    left_out: LeftOut
    sizes: dict[str, list[tuple[int, int]]]
    digests: bytes


class Journal:
    """The finished stretches of one split: `folder` holds the records, `shards` the tars."""

    def __init__(self, folder: Path, shards: Path, columns: int, contracts: Mapping[str, InputContract]) -> None:
        self.folder, self.shards, self.columns, self.contracts = folder, shards, columns, contracts
        for place in (folder, shards):
            place.mkdir(parents=True, exist_ok=True)

    def record(self, number: int, stretch: Stretch) -> None:
        """Rows first, the record last: a shard without its record is written again."""
        assert stretch.shard is not None
        rows = stretch.rows
        write_bytes(self.folder / f"{number:06d}.rows", rows.samples.tobytes() + rows.members.tobytes() + rows.keys)
        record = {
            "shard": stretch.shard.model_dump(),
            "end": stretch.end,
            "seen": stretch.seen.state(),
            "skipped": stretch.skipped,
            "left_out": stretch.left_out.state(),
            "sizes": stretch.sizes,
            "digests": stretch.digests.hex(),
        }
        write_json(self.folder / f"{number:06d}.json", record)

    def stretches(self) -> Iterator[Stretch]:
        """The finished ones, in order, up to the first that is missing or not whole."""
        for number in count():
            path = self.folder / f"{number:06d}.json"
            try:
                stretch = self._read(path)
            except (OSError, ValueError, KeyError, TypeError):
                return  # not there, or torn by whatever ended the run: written again
            yield stretch

    def _read(self, path: Path) -> Stretch:
        record: dict[str, Any] = json.loads(path.read_text())
        made = Shard.model_validate(record["shard"])
        if (self.shards / made.name).stat().st_size != made.bytes:
            raise ValueError(f"{made.name} is not whole")
        raw = path.with_suffix(".rows").read_bytes()
        middle = made.samples * SAMPLE.itemsize
        end = middle + made.samples * self.columns * MEMBER.itemsize
        members = np.frombuffer(raw[middle:end], MEMBER).reshape(made.samples, -1)
        digests = bytes.fromhex(record["digests"])
        if len(digests) not in (0, made.samples * DIGEST):
            raise ValueError(f"{path.name} has not one digest for each sample")
        return Stretch(
            shard=made,
            rows=Rows(np.frombuffer(raw[:middle], SAMPLE), members, raw[end:]),
            end=int(record["end"]),
            seen=Seen(self.contracts).restore(record["seen"]),
            skipped=[(key, reason) for key, reason in record["skipped"]],
            left_out=LeftOut.from_state(record["left_out"]),
            sizes={name: [(height, width) for height, width in found] for name, found in record["sizes"].items()},
            digests=digests,
        )


@contextmanager
def building(partial: Path, plan: str) -> Iterator[None]:
    """Own `partial` for this plan: emptied if it belongs to another, removed when the input turns out to be unusable.

    What is `Unfinished`, or ended by anything else than the input, stays for the next time.
    """
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
        except Unfinished:
            raise
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
