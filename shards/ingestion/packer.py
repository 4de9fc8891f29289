"""From a list of jobs to full shards, continuing after what the journal has."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from swath.shards.errors import InputError
from swath.shards.index import MEMBER, SAMPLE, columns_of
from swath.shards.ingestion.journal import Journal, Stretch
from swath.shards.ingestion.quality import Duplicates, LeftOut
from swath.shards.ingestion.work import Chunk, Job, Made, Seen, seen_again
from swath.shards.manifest import Shard
from swath.shards.sources.source import Source, maps_of
from swath.shards.writer import Rows, ShardWriter

MAX_SAMPLES = 4096  # in one shard, so that small data sets have several to shuffle
_CHUNK, _CHUNKS, _VALUES = 32, 64, 1 << 22  # jobs in a chunk, at most; chunks in a split, at least; pixel values in a chunk
_ENOUGH = 256  # samples from which it is seen early that numbers are not what they are said to be
_SIDE = 128  # px of a chip whose size is not known beforehand


@dataclass(frozen=True)
class Limits:
    """When a shard is full, and how many files may be undecodable."""

    shard_bytes: int
    failures: int


class Progress(Protocol):
    """What tqdm has."""

    total: float | None

    def update(self, n: float | None = 1) -> bool | None: ...


@dataclass
class Packed:
    """All shards of one split and the index rows of each; what was seen, sizes by modality; what was skipped, and left out
    after decoding."""

    shards: list[Shard]
    rows: list[Rows]
    seen: Seen
    sizes: dict[str, set[tuple[int, int]]]
    skipped: list[tuple[str, str]]
    left_out: LeftOut

    def add(self, stretch: Stretch) -> None:
        """Take in the next stretch."""
        if stretch.shard is not None:
            self.shards.append(stretch.shard)
            self.rows.append(stretch.rows)
        self.seen.merge(stretch.seen)
        for name, found in stretch.sizes.items():
            self.sizes[name].update(found)
        self.skipped.extend(stretch.skipped)
        self.left_out.merge(stretch.left_out)


def chunk_length(source: Source, jobs: int, chip: int | None) -> int:
    """Jobs in a chunk: statistics are taken per chunk, so this depends on the plan alone, and not on the workers.

    Counting costs as much for a chunk as for a small chip, which is why there are not fewer; memory, why there are not more.
    """
    values = sum(contract.channels for contract in source.contracts.values()) * (chip or _SIDE) ** 2
    return max(1, min(_CHUNK, jobs // _CHUNKS, _VALUES // values, MAX_SAMPLES))


class Packer:
    """Writes the shards of one split out of chunks of `length` jobs, which `work` does; a shard holds whole chunks.

    `failed` and `duplicates` are shared by the splits: the limit holds for all of them together, and the first stays.
    """

    def __init__(
        self, source: Source, classes: tuple[str, ...], folder: Path, journal: Path, limits: Limits, length: int,
        work: Callable[[Sequence[Sequence[Job]]], Iterator[Chunk]], failed: list[tuple[str, str]], duplicates: Duplicates | None,
        bar: Progress,
    ) -> None:  # fmt: skip
        self.source, self.folder, self.limits, self.length, self.work = source, folder, limits, length, work
        self.failed, self.duplicates, self.bar = failed, duplicates, bar
        self.numbers = {name: number for number, name in enumerate(classes)}
        self.columns = columns_of(list(source.contracts), maps_of(source))
        self.journal = Journal(journal, folder, len(self.columns), source.contracts)

    def run(self, jobs: list[Job], look: Callable[[Seen], object]) -> Packed:
        """Write what the journal lacks of `jobs`, and sum up. `look` sees what the first shard holds, and may raise."""
        packed = Packed([], [], Seen(self.source.contracts), {name: set() for name in self.source.contracts}, [], LeftOut())
        number = position = 0
        for number, stretch in enumerate(self.journal.stretches(), 1):
            self.failed.extend(stretch.skipped)
            if self.duplicates is not None:
                self.duplicates.restore(_keys(stretch.rows), stretch.digests)
            self.bar.update(stretch.end - position)
            packed.add(stretch)
            position = stretch.end
            if number == 1:
                self._look(stretch, jobs, look)
        starts = [*range(position, len(jobs), self.length), len(jobs)]
        chunks = [jobs[start:end] for start, end in pairwise(starts)]
        results = zip(chunks, self.work(chunks), strict=True)
        while position < len(jobs):
            stretch = self._fill(number, results, position, len(jobs))
            packed.add(stretch)
            position = stretch.end
            if stretch.shard is not None:
                self.journal.record(number, stretch)
                number += 1
                if number == 1:
                    self._look(stretch, jobs, look)
        return packed

    @staticmethod
    def _look(first: Stretch, jobs: list[Job], look: Callable[[Seen], object]) -> None:
        """A large archive is not read for hours before it is said that its numbers cannot be; a small one is judged whole."""
        if first.end < len(jobs) and len(first.rows.samples) >= _ENOUGH:
            look(first.seen)

    def _fill(self, number: int, results: Iterator[tuple[list[Job], Chunk]], position: int, end: int) -> Stretch:
        """Fill one shard from `position` on; only the last stretch can be without one."""
        writer = ShardWriter(self.folder, number, self.source.dataset, self.columns)
        seen, skipped, left_out, digests = Seen(self.source.contracts), [], LeftOut(), bytearray()
        sizes: dict[str, set[tuple[int, int]]] = {name: set() for name in self.source.contracts}
        try:
            while position < end and len(writer) + self.length <= MAX_SAMPLES and writer.bytes < self.limits.shard_bytes:
                jobs, chunk = next(results)
                position += len(jobs)
                self.bar.update(len(jobs))
                kept = []
                for job, one in zip(jobs, chunk.made, strict=True):
                    if one.failure is not None:
                        skipped.append((job.item.key, one.failure))
                        self._count_failure(job.item.lookup, one.failure)
                    elif (reason := one.left_out or self._repeats(job, one)) is not None:
                        left_out.add(reason, job.item.key)
                    else:
                        kept.append(one)
                        for name, size in one.sizes.items():
                            sizes[name].add(size)
                        digests += one.digest
                        label = -1 if one.label is None else self.numbers[one.label]
                        writer.add(job.key, one.members, label, job.block, one.place)
                repeated = len(kept) < sum(bool(one.members) for one in chunk.made)
                seen.merge(seen_again(self.source.contracts, kept) if repeated else chunk.seen)
            if len(writer):
                shard, rows = writer.close()
            else:
                writer.abandon()
                shard, rows = None, Rows(np.zeros(0, SAMPLE), np.zeros((0, len(self.columns)), MEMBER), b"")
        except BaseException:
            writer.abandon()
            raise
        found = {name: sorted(each) for name, each in sizes.items()}
        return Stretch(shard, rows, position, seen, skipped, left_out, found, bytes(digests))

    def _repeats(self, job: Job, made: Made) -> str | None:
        if self.duplicates is None or self.duplicates.earlier(job.key, made.digest) is None:
            return None
        return "the same pixels as a sample before it"

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


def _keys(rows: Rows) -> list[str]:
    starts, lengths = rows.samples["key_start"].tolist(), rows.samples["key_length"].tolist()
    return [rows.keys[start : start + length].decode() for start, length in zip(starts, lengths, strict=True)]
