"""From a list of jobs to full shards: read, check, count, write; continuing after what the journal has."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from swath.shards.codec import DecodeError, encode_npy
from swath.shards.errors import InputError
from swath.shards.index import MEMBER, SAMPLE, columns_of
from swath.shards.journal import Journal, Part
from swath.shards.manifest import Shard
from swath.shards.sources.source import Item, Sample, Source
from swath.shards.statistics import Statistics
from swath.shards.writer import Member, Rows, ShardWriter

MAX_SAMPLES = 4096  # in one shard, so that small data sets have several to shuffle


@dataclass(frozen=True)
class Job:
    """One sample to write: its key in the shard, its source item, its label by the split file and its block."""

    key: str
    item: Item
    label: str | None
    block: int


@dataclass(frozen=True)
class Limits:
    """When a shard is full, what share of a chip may be nodata, how many files may be undecodable."""

    shard_bytes: int
    max_nodata: float
    failures: int


class Progress(Protocol):
    """What tqdm has."""

    total: float | None

    def update(self, n: float | None = 1) -> bool | None: ...


@dataclass
class Packed:
    """All shards of one split, their index rows, statistics and sizes, what was skipped, how many were mostly nodata."""

    shards: list[Shard]
    rows: Rows
    statistics: Statistics
    sizes: set[tuple[int, int]]
    skipped: list[tuple[str, str]]
    left_out: int


class Packer:
    """Writes the shards of one split. `failed` is shared by the splits: the limit holds for all of them together."""

    def __init__(
        self, source: Source, classes: tuple[str, ...], folder: Path, journal: Path, limits: Limits,
        failed: list[tuple[str, str]], bar: Progress,
    ) -> None:  # fmt: skip
        self.source, self.folder, self.limits, self.failed, self.bar = source, folder, limits, failed, bar
        self.numbers = {name: number for number, name in enumerate(classes)}
        self.columns = columns_of([source.contract.modality])
        self.journal = Journal(journal, folder, len(self.columns))

    def run(self, jobs: list[Job]) -> Packed:
        """Write what the journal lacks of `jobs`, and sum up."""
        parts = self.journal.parts()
        position = parts[-1].end if parts else 0
        self.bar.update(position)
        self.failed.extend(entry for part in parts for entry in part.skipped)
        while position < len(jobs):
            part = self._fill(len(parts), jobs, position)
            if part.shard is not None:
                self.journal.record(len(parts), part)
            parts.append(part)
            position = part.end
        statistics = Statistics(len(self.source.contract.bands))
        for part in parts:
            statistics.merge(part.statistics)
        return Packed(
            shards=[part.shard for part in parts if part.shard is not None],
            rows=Rows.join([part.rows for part in parts]),
            statistics=statistics,
            sizes={size for part in parts for size in part.sizes},
            skipped=[entry for part in parts for entry in part.skipped],
            left_out=sum(part.left_out for part in parts),
        )

    def _fill(self, number: int, jobs: list[Job], position: int) -> Part:
        """Fill one shard from `position` on; only the last part can be without one."""
        writer = ShardWriter(self.folder, number, self.source.dataset, len(self.columns))
        statistics = Statistics(len(self.source.contract.bands))
        skipped: list[tuple[str, str]] = []
        sizes: set[tuple[int, int]] = set()
        left_out = 0
        try:
            while position < len(jobs) and len(writer) < MAX_SAMPLES and writer.bytes < self.limits.shard_bytes:
                job = jobs[position]
                position += 1
                self.bar.update()
                try:
                    sample = self.source.read(job.item)
                except DecodeError as error:
                    skipped.append((job.item.key, str(error)))
                    self._count_failure(job.item.lookup, str(error))
                    continue
                if sample.valid is not None and (sample.valid == 0).mean() > self.limits.max_nodata:
                    left_out += 1
                    continue
                clear = None if sample.valid is None else sample.valid == 1
                statistics.add(sample.pixels.astype(np.float64) * sample.scale + sample.add, clear)
                sizes.add((sample.pixels.shape[1], sample.pixels.shape[2]))
                self._add(writer, job, sample)
            if len(writer):
                made, rows = writer.close()
            else:
                writer.abandon()
                made, rows = None, Rows(np.zeros(0, SAMPLE), np.zeros((0, len(self.columns)), MEMBER), b"")
        except BaseException:
            writer.abandon()
            raise
        return Part(made, rows, position, statistics, skipped, left_out, sorted(sizes))

    def _add(self, writer: ShardWriter, job: Job, sample: Sample) -> None:
        label = job.label if job.label is not None else sample.label
        meta = {
            "key": job.item.key, "dataset": self.source.dataset, "label": label,
            "scale": sample.scale, "add": sample.add, "scale_source": sample.scale_source,
        }  # fmt: skip
        meta |= sample.meta | ({"block": job.block} if job.block >= 0 else {})
        modality = self.source.contract.modality
        members = [Member(f"{modality}.{sample.extension}", 0, sample.data, sample.scale, sample.add)]
        if sample.valid is not None and (sample.valid != 1).any():
            members.append(Member("valid.npy", self.columns.index("valid"), encode_npy(sample.valid)))
        text = json.dumps(meta, sort_keys=True, allow_nan=False).encode()
        members.append(Member("json", self.columns.index("json"), text))
        writer.add(job.key, members, -1 if label is None else self.numbers[label], job.block)

    def _count_failure(self, name: str, reason: str) -> None:
        self.failed.append((name, reason))
        if len(self.failed) <= self.limits.failures:
            return
        first = "; ".join(f"{n} ({r})" for n, r in self.failed[:3])
        total = int(self.bar.total or len(self.failed))
        raise InputError(
            f"{len(self.failed)} of {total} files ({len(self.failed) / total:.1%}) cannot be decoded, more than --max-failed "
            f"allows: {first}; repair or remove them, or raise --max-failed"
        )
