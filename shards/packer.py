"""From a list of jobs to full shards: read, check, count, write; continuing after what the journal has."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from swath.shards.bands import InputContract
from swath.shards.codec import DecodeError, encode_npy
from swath.shards.errors import InputError
from swath.shards.index import MEMBER, SAMPLE, VALID, columns_of
from swath.shards.journal import Journal, Stretch
from swath.shards.manifest import Shard
from swath.shards.sources.source import Item, Part, Sample, Source
from swath.shards.statistics import Statistics
from swath.shards.writer import Member, Place, Rows, ShardWriter

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
    """All shards of one split, their index rows; statistics and sizes by modality; what was skipped, how many mostly nodata."""

    shards: list[Shard]
    rows: Rows
    statistics: dict[str, Statistics]
    sizes: dict[str, set[tuple[int, int]]]
    skipped: list[tuple[str, str]]
    left_out: int


@dataclass
class Made:
    """What one job came to: `members` to write (none if it is left out as mostly nodata), or why it cannot be decoded."""

    members: list[Member]
    label: str | None
    place: Place
    statistics: dict[str, Statistics]
    sizes: dict[str, tuple[int, int]]
    failure: str | None = None


def make(source: Source, job: Job, max_nodata: float) -> Made:
    """Read and encode one job."""
    try:
        sample = source.read(job.item)
    except DecodeError as error:
        return Made([], None, Place(), {}, {}, str(error))
    contracts = source.contracts
    if not sample.parts or _nodata(sample, contracts) > max_nodata:
        return Made([], None, Place(), {}, {})
    label = job.label if job.label is not None else sample.label
    return Made(
        _members(source, job, sample, label), label, Place.of(sample.meta),
        {name: _statistics(part, contracts[name]) for name, part in sample.parts.items()},
        {name: (part.pixels.shape[1], part.pixels.shape[2]) for name, part in sample.parts.items()},
    )  # fmt: skip


def _nodata(sample: Sample, contracts: Mapping[str, InputContract]) -> float:
    """The share of nodata in the part that has least of it: what one modality lacks, another may show."""
    return min(0.0 if part.valid is None else float((part.valid == 0).mean()) for part in sample.parts.values())


def _statistics(part: Part, contract: InputContract) -> Statistics:
    """Of the physical values of clear pixels, over all dates."""
    made = Statistics(len(contract.bands))
    physical = part.pixels.astype(np.float64) * part.scale + part.add
    dates_tchw = physical.reshape(contract.dates, len(contract.bands), *physical.shape[1:])
    for date, values_chw in enumerate(dates_tchw):
        clear_hw = None if part.valid is None else np.broadcast_to(part.valid == 1, dates_tchw[:, 0].shape)[date]
        made.add(values_chw, clear_hw)
    return made


def _members(source: Source, job: Job, sample: Sample, label: str | None) -> list[Member]:
    radiometry = {
        name: {"scale": part.scale, "add": part.add, "scale_source": part.scale_source} for name, part in sample.parts.items()
    }
    meta = {"key": job.item.key, "dataset": source.dataset, "label": label, "radiometry": radiometry}
    meta |= sample.meta | ({"block": job.block} if job.block >= 0 else {})
    members = []
    for name in source.contracts:
        if (part := sample.parts.get(name)) is None:
            continue
        data = encode_npy(part.pixels) if part.data is None else part.data
        members.append(Member(f"{name}.{part.extension}", name, data, part.scale, part.add))
        if part.valid is not None and (part.valid != 1).any():
            members.append(Member(f"{name}{VALID}.npy", name + VALID, encode_npy(part.valid)))
    members.append(Member("json", "json", json.dumps(meta, sort_keys=True, allow_nan=False).encode()))
    return members


class Packer:
    """Writes the shards of one split. `failed` is shared by the splits: the limit holds for all of them together."""

    def __init__(
        self, source: Source, classes: tuple[str, ...], folder: Path, journal: Path, limits: Limits,
        failed: list[tuple[str, str]], bar: Progress,
    ) -> None:  # fmt: skip
        self.source, self.folder, self.limits, self.failed, self.bar = source, folder, limits, failed, bar
        self.numbers = {name: number for number, name in enumerate(classes)}
        self.columns = columns_of(list(source.contracts))
        self.journal = Journal(journal, folder, len(self.columns))

    def run(self, jobs: list[Job]) -> Packed:
        """Write what the journal lacks of `jobs`, and sum up."""
        done = self.journal.stretches()
        position = done[-1].end if done else 0
        self.bar.update(position)
        self.failed.extend(entry for stretch in done for entry in stretch.skipped)
        made = self._made(jobs[position:])
        while position < len(jobs):
            stretch = self._fill(len(done), made, jobs, position)
            if stretch.shard is not None:
                self.journal.record(len(done), stretch)
            done.append(stretch)
            position = stretch.end
        statistics = self._empty()
        sizes: dict[str, set[tuple[int, int]]] = {name: set() for name in self.source.contracts}
        for stretch in done:
            for name in self.source.contracts:
                statistics[name].merge(stretch.statistics[name])
                sizes[name] |= set(stretch.sizes[name])
        return Packed(
            shards=[stretch.shard for stretch in done if stretch.shard is not None],
            rows=Rows.join([stretch.rows for stretch in done]),
            statistics=statistics,
            sizes=sizes,
            skipped=[entry for stretch in done for entry in stretch.skipped],
            left_out=sum(stretch.left_out for stretch in done),
        )

    def _empty(self) -> dict[str, Statistics]:
        return {name: Statistics(len(contract.bands)) for name, contract in self.source.contracts.items()}

    def _made(self, jobs: list[Job]) -> Iterator[Made]:
        """What each job comes to, in order."""
        return (make(self.source, job, self.limits.max_nodata) for job in jobs)

    def _fill(self, number: int, made: Iterator[Made], jobs: list[Job], position: int) -> Stretch:
        """Fill one shard from `position` on; only the last stretch can be without one."""
        writer = ShardWriter(self.folder, number, self.source.dataset, self.columns)
        statistics = self._empty()
        skipped: list[tuple[str, str]] = []
        sizes: dict[str, set[tuple[int, int]]] = {name: set() for name in self.source.contracts}
        left_out = 0
        try:
            while position < len(jobs) and len(writer) < MAX_SAMPLES and writer.bytes < self.limits.shard_bytes:
                job, one = jobs[position], next(made)
                position += 1
                self.bar.update()
                if one.failure is not None:
                    skipped.append((job.item.key, one.failure))
                    self._count_failure(job.item.lookup, one.failure)
                elif not one.members:
                    left_out += 1
                else:
                    for name, seen in one.statistics.items():
                        statistics[name].merge(seen)
                        sizes[name].add(one.sizes[name])
                    writer.add(job.key, one.members, -1 if one.label is None else self.numbers[one.label], job.block, one.place)
            if len(writer):
                shard, rows = writer.close()
            else:
                writer.abandon()
                shard, rows = None, Rows(np.zeros(0, SAMPLE), np.zeros((0, len(self.columns)), MEMBER), b"")
        except BaseException:
            writer.abandon()
            raise
        return Stretch(shard, rows, position, statistics, skipped, left_out, {n: sorted(found) for n, found in sizes.items()})

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
