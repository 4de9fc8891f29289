"""One tar of samples, deterministic to the byte, and the index rows of what lies in it."""

import hashlib
import math
import os
import re
import sys
import tarfile
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np

from swath.shards.identity import hash_text
from swath.shards.index import FORMATS, MEMBER, NO_TIME, SAMPLE
from swath.shards.manifest import Shard

_LONGEST = 70  # key; with modality and extension a USTAR name has at most 100 characters


@dataclass
class Rows:
    """Index rows of one or more shards: `samples` (N,), `members` (N, M), and the keys end to end."""

    samples: np.ndarray
    members: np.ndarray
    keys: bytes

    @classmethod
    def join(cls, parts: list["Rows"]) -> "Rows":
        """One table of all; key positions move along."""
        start, samples = 0, []
        for part in parts:
            moved = part.samples.copy()
            moved["key_start"] += np.uint64(start)
            samples.append(moved)
            start += len(part.keys)
        return cls(np.concatenate(samples), np.concatenate([p.members for p in parts]), b"".join(p.keys for p in parts))


@dataclass
class Member:
    """One file of a sample: its name after the key and the dot, its column in the index, and its bytes."""

    suffix: str
    column: str
    data: bytes
    scale: float = 1.0
    add: float = 0.0


def member_row(number: int, offset: int, data: bytes | memoryview, kind: str, scale: float = 1.0, add: float = 0.0) -> np.ndarray:
    """The index row, () of MEMBER, of a member that starts at byte `offset` of shard `number`."""
    return np.array((offset, len(data), number, zlib.crc32(data), FORMATS.index(kind), scale, add), dtype=MEMBER)


@dataclass(frozen=True)
class Place:
    """Where and when, for the index: degrees, metres per pixel, UTC seconds since 1970."""

    lat: float = math.nan
    lon: float = math.nan
    gsd_m: float = math.nan
    time: int = NO_TIME

    @classmethod
    def of(cls, meta: dict[str, Any]) -> Self:
        """From a sample's JSON; what it lacks, or holds in another form, is unknown."""
        lat, lon, gsd_m = (_number(meta.get(name)) for name in ("lat", "lon", "gsd_m"))
        return cls(lat, lon, gsd_m, seconds(meta.get("time")))


def _number(value: Any) -> float:
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return float(value) if known else math.nan


def seconds(time: Any) -> int:
    """UTC seconds since 1970 of an ISO 8601 text, NO_TIME where it is none; a time without a zone is UTC."""
    if not isinstance(time, str):
        return NO_TIME
    try:
        read = datetime.fromisoformat(time)
    except ValueError:
        return NO_TIME
    return round((read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp())


@dataclass(frozen=True)
class Row:
    """One sample for the index; `members` (M,) of MEMBER. -1 stands for no label and no block."""

    key: str
    label: int
    block: int
    place: Place
    members: np.ndarray


def rows_of(dataset: str, samples: list[Row], columns: int) -> Rows:
    """The table of `samples`; the sample id is the hash of (data set, key)."""
    table, start = np.zeros(len(samples), SAMPLE), 0
    keys = [sample.key.encode() for sample in samples]
    for number, (sample, key) in enumerate(zip(samples, keys, strict=True)):
        row = table[number]
        row["id"], row["key_start"], row["key_length"] = hash_text(dataset, sample.key), start, len(key)
        row["label"], row["block"] = sample.label, sample.block
        for name in ("lat", "lon", "gsd_m", "time"):
            row[name] = getattr(sample.place, name)
        start += len(key)
    members = np.stack([sample.members for sample in samples]) if samples else np.zeros((0, columns), MEMBER)
    return Rows(table, members, b"".join(keys))


class ShardWriter:
    """Writes `folder/shard-<number>.tar`. It counts only once `close` has returned: until then it is a partial file."""

    def __init__(self, folder: Path, number: int, dataset: str, columns: tuple[str, ...]) -> None:
        self.name, self.number, self.dataset, self.columns = f"shard-{number:06d}.tar", number, dataset, columns
        self.bytes = 0
        self._path = folder / self.name
        self._file = self._path.open("wb")
        self._digest = hashlib.sha256()
        self._samples: list[Row] = []

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, key: str, members: list[Member], label: int, block: int, place: Place) -> None:
        """Append one sample."""
        row = np.zeros(len(self.columns), MEMBER)
        for member in members:
            head = tarfile.TarInfo(f"{key}.{member.suffix}")
            head.size, head.mode = len(member.data), 0o644  # owner, group and time stay 0
            self._write(head.tobuf(tarfile.USTAR_FORMAT))
            kind = member.suffix.rsplit(".", 1)[-1]
            row[self.columns.index(member.column)] = member_row(
                self.number, self.bytes, member.data, kind, member.scale, member.add
            )
            self._write(member.data + bytes(-len(member.data) % 512))
        self._samples.append(Row(key, label, block, place, row))

    def close(self) -> tuple[Shard, Rows]:
        """Finish the tar and make it durable."""
        self._write(bytes(-self.bytes % 10240 or 10240) if -self.bytes % 10240 >= 1024 else bytes(-self.bytes % 10240 + 10240))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        made = Shard(name=self.name, samples=len(self), bytes=self.bytes, sha256=self._digest.hexdigest())
        return made, rows_of(self.dataset, self._samples, len(self.columns))

    def abandon(self) -> None:
        """Let go of an unfinished tar."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)


def flat_keys(names: list[str]) -> list[str]:
    """Keys that WebDataset reads whole: no dots (it splits at the first), no folders, no two alike."""
    taken: set[str] = set()
    made = []
    for name in names:
        key = re.sub(r"[^A-Za-z0-9_-]", "_", name.replace("/", "__"))
        if len(key) > _LONGEST:
            key = f"{key[: _LONGEST - 17]}_{hash_text(name) & (1 << 64) - 1:016x}"
        unique, count = key, 1
        while unique in taken:
            count += 1
            unique = f"{key}_{count}"
        taken.add(unique)
        made.append(unique)
    return made
