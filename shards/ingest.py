"""`swath shard`: imagery → tar shards, index, statistics and manifest (DESIGN §2.2), atomically and restartably.

Everything is built in a sibling folder `.<out>.partial` and appears in one rename. Samples lie in the order of the hash of
their key, so that a shard is not one class and shuffling inside windows mixes well.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from swath.shards.bands import InputContract, Normalisation
from swath.shards.codec import DecodeError, encode_npy
from swath.shards.draw import hash_text
from swath.shards.errors import InputError
from swath.shards.files import disk_errors, sync_folder, write_bytes, write_json
from swath.shards.index import MEMBER, SAMPLE, Index, columns_of
from swath.shards.manifest import NAME, Manifest, Shard, read_manifest
from swath.shards.sources.open import open_source
from swath.shards.sources.source import Item, Sample, Source
from swath.shards.sources.split import assign
from swath.shards.statistics import Statistics
from swath.shards.writer import Member, Rows, ShardWriter, flat_keys

MAX_SAMPLES = 4096  # in one shard, so that small data sets have several to shuffle
_VERSION = 1  # of what is written for one plan; a change makes unfinished ingests start over


@dataclass(frozen=True)
class Job:
    """One sample to write: its key in the shard, its source item, its label by the split file and its block."""

    key: str
    item: Item
    label: str | None
    block: int


@dataclass(frozen=True)
class Limits:
    """When a shard is full, and what a chip may lack."""

    shard_bytes: int
    max_nodata: float
    allowed_failures: float


def shard(
    source: Path,
    out: Path,
    *,
    split: Path | None = None,
    chip: int | None = None,
    stride: int | None = None,
    bands: Sequence[str] | None = None,
    sensor: str | None = None,
    level: str | None = None,
    max_failed: float = 0.01,
    max_nodata: float = 0.5,
    shard_bytes: int = 256 << 20,
    progress: bool = True,
) -> dict[str, Manifest]:
    """Make shards of `source` in `out`; with a split file one folder per split, keyed by its name, else the key is "".

    `chip` and `stride` (pixels) cut GeoTIFF scenes; by default files are taken whole where none exceeds 256 px, else cut
    at 64. Chips with more than `max_nodata` of their pixels invalid are left out. Files that cannot be decoded are listed
    in the manifest, and more than `max_failed` of all stop the run. A killed run continues when called again; a finished
    one is only checked. Raises InputError.
    """
    source, out = Path(source), Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow a link at `out`
    _check_numbers(chip, stride, max_failed, max_nodata, shard_bytes)
    opened = open_source(source, chip=chip, stride=stride, bands=tuple(bands) if bands else None, sensor=sensor, level=level)
    jobs, classes, unlisted = _jobs(opened, split)
    options = {"chip": chip, "stride": stride, "shard_bytes": shard_bytes, "max_nodata": max_nodata}
    plan = _fingerprint(opened, jobs, classes, options)
    if (finished := _finished(out, plan, list(jobs))) is not None:
        return finished
    partial = out.with_name(f".{out.name}.partial")
    total = sum(len(part) for part in jobs.values())
    limits = Limits(shard_bytes, max_nodata, max_failed * total)
    with disk_errors("writing shards", out.parent), _building(partial, plan):
        with tqdm(total=total, unit="chip", desc="swath shard", disable=not progress) as bar:
            made = {}
            failed: list[tuple[str, str]] = []
            for name, part in jobs.items():
                maker = _Maker(opened, part, classes, partial / name, partial / "journal" / (name or "all"), limits, failed, bar)
                made[name] = maker.run()
        for name, (shards, _, _, skipped, empty) in made.items():
            if not shards:
                raise InputError(f"no samples are left{f' for split {name}' if name else ''}: {empty} are mostly nodata "
                                 f"(--max-nodata {max_nodata}) and {len(skipped)} cannot be decoded")  # fmt: skip
        manifests = {
            name: _manifest(opened, classes, plan, {**options, "not_in_split": unlisted}, result)
            for name, result in made.items()
        }
        for name, manifest in manifests.items():
            _, rows, *_ = made[name]
            keys = np.frombuffer(rows.keys, np.uint8)
            Index(rows.samples, rows.members, keys, columns_of([opened.contract.modality])).write(partial / name)
            manifest.write(partial / name)
        shutil.rmtree(partial / "journal")
        if out.exists():
            out.rmdir()  # `_finished` has seen that it is empty
        partial.rename(out)
        sync_folder(out.parent)
    return manifests


@dataclass
class _Part:
    """What one finished shard adds: the journal's record of it."""

    shard: Shard
    end: int
    statistics: Statistics
    skipped: list[tuple[str, str]]
    left_out: int
    sizes: list[tuple[int, int]]


_Result = tuple[list[Shard], Rows, "_Totals", list[tuple[str, str]], int]


@dataclass
class _Totals:
    statistics: Statistics
    sizes: set[tuple[int, int]]


class _Maker:
    """Writes the shards of one split, continuing after those that the journal has."""

    def __init__(
        self, source: Source, jobs: list[Job], classes: tuple[str, ...], folder: Path, journal: Path,
        limits: Limits, failed: list[tuple[str, str]], bar: Any,
    ) -> None:  # fmt: skip
        self.source, self.jobs, self.folder, self.journal = source, jobs, folder, journal
        self.numbers = {name: number for number, name in enumerate(classes)}
        self.limits, self.failed, self.bar = limits, failed, bar
        self.columns = columns_of([source.contract.modality])
        for place in (folder, journal):
            place.mkdir(parents=True, exist_ok=True)

    def run(self) -> _Result:
        parts, rows = self._done()
        position = parts[-1].end if parts else 0
        self.bar.update(position)
        self.failed.extend(entry for part in parts for entry in part.skipped)
        while position < len(self.jobs):
            part, part_rows = self._write(len(rows), position)
            position = part.end
            parts.append(part)
            if part_rows is not None:
                rows.append(part_rows)
        statistics = Statistics(len(self.source.contract.bands))
        for part in parts:
            statistics.merge(part.statistics)
        sizes = {size for part in parts for size in part.sizes}
        skipped = [entry for part in parts for entry in part.skipped]
        shards = [part.shard for part in parts[: len(rows)]]
        empty = Rows(np.zeros(0, SAMPLE), np.zeros((0, len(self.columns)), MEMBER), b"")
        table = Rows.join(rows) if rows else empty
        return shards, table, _Totals(statistics, sizes), skipped, sum(part.left_out for part in parts)

    def _write(self, number: int, position: int) -> tuple[_Part, Rows | None]:
        """Fill one shard from `position` on. Without a sample left there is no shard, and no rows."""
        writer = ShardWriter(self.folder, number, self.source.dataset, len(self.columns))
        statistics = Statistics(len(self.source.contract.bands))
        skipped: list[tuple[str, str]] = []
        sizes: set[tuple[int, int]] = set()
        left_out = 0
        try:
            while position < len(self.jobs) and len(writer) < MAX_SAMPLES and writer.bytes < self.limits.shard_bytes:
                job = self.jobs[position]
                position += 1
                self.bar.update()
                try:
                    sample = self.source.read(job.item)
                except DecodeError as error:
                    skipped.append((job.item.key, str(error)))
                    self._failed(job.item.lookup, str(error))
                    continue
                clear = None if sample.valid is None else sample.valid == 1
                if sample.valid is not None and (sample.valid == 0).mean() > self.limits.max_nodata:
                    left_out += 1
                    continue
                statistics.add(sample.pixels.astype(np.float64) * sample.scale + sample.add, clear)
                sizes.add((sample.pixels.shape[1], sample.pixels.shape[2]))
                self._add(writer, job, sample)
            if not len(writer):
                writer.abandon()
                blank = Shard(name="none.tar", samples=1, bytes=0, sha256="0" * 64)
                return _Part(blank, position, statistics, skipped, left_out, []), None
            made, rows = writer.close()
        except BaseException:
            writer.abandon()
            raise
        part = _Part(made, position, statistics, skipped, left_out, sorted(sizes))
        self._record(number, part, rows)
        return part, rows

    def _add(self, writer: ShardWriter, job: Job, sample: Sample) -> None:
        label = job.label if job.label is not None else sample.label
        meta = {"key": job.item.key, "dataset": self.source.dataset, "label": label, "scale": sample.scale, "add": sample.add}
        meta |= sample.meta | ({"block": job.block} if job.block >= 0 else {})
        modality = self.source.contract.modality
        members = [Member(f"{modality}.{sample.extension}", 0, sample.data, sample.scale, sample.add)]
        if sample.valid is not None and (sample.valid != 1).any():
            members.append(Member("valid.npy", self.columns.index("valid"), encode_npy(sample.valid)))
        text = json.dumps(meta, sort_keys=True, allow_nan=False).encode()
        members.append(Member("json", self.columns.index("json"), text))
        writer.add(job.key, members, -1 if label is None else self.numbers[label], job.block)

    def _failed(self, name: str, reason: str) -> None:
        self.failed.append((name, reason))
        if len(self.failed) <= self.limits.allowed_failures:
            return
        first = "; ".join(f"{n} ({r})" for n, r in self.failed[:3])
        share = len(self.failed) / self.bar.total
        raise InputError(
            f"{len(self.failed)} of {self.bar.total} files ({share:.1%}) cannot be decoded, more than --max-failed allows: "
            f"{first}; repair or remove them, or raise --max-failed"
        )

    def _record(self, number: int, part: _Part, rows: Rows) -> None:
        """Rows first, the record last: a shard without its record is written again."""
        write_bytes(self.journal / f"{number:06d}.rows", rows.samples.tobytes() + rows.members.tobytes() + rows.keys)
        record = {**vars(part), "shard": part.shard.model_dump(), "statistics": part.statistics.state()}
        write_json(self.journal / f"{number:06d}.json", record)

    def _done(self) -> tuple[list[_Part], list[Rows]]:
        """The finished shards, in order."""
        parts, rows = [], []
        while (path := self.journal / f"{len(parts):06d}.json").exists():
            record = json.loads(path.read_text())
            made = Shard.model_validate(record["shard"])
            tar = self.folder / made.name
            if not tar.exists() or tar.stat().st_size != made.bytes:
                break
            raw = path.with_suffix(".rows").read_bytes()
            middle = made.samples * SAMPLE.itemsize
            end = middle + made.samples * len(self.columns) * MEMBER.itemsize
            members = np.frombuffer(raw[middle:end], MEMBER).reshape(made.samples, -1)
            rows.append(Rows(np.frombuffer(raw[:middle], SAMPLE), members, raw[end:]))
            skipped = [(key, reason) for key, reason in record["skipped"]]
            sizes = [(height, width) for height, width in record["sizes"]]
            state = Statistics.from_state(record["statistics"])
            parts.append(_Part(made, record["end"], state, skipped, record["left_out"], sizes))
        return parts, rows


def _jobs(source: Source, split: Path | None) -> tuple[dict[str, list[Job]], tuple[str, ...], int]:
    """Per split the jobs in the order of the hash of their key; the classes; how many items the split file lacks."""
    keys = flat_keys([item.key for item in source.items])
    classes = source.classes
    if split is None:
        parts, unlisted = {"": [Job(k, i, i.label, -1) for k, i in zip(keys, source.items, strict=True)]}, 0
    else:
        rows = assign(split, source.items)
        parts = {}
        for key, item, row in zip(keys, source.items, rows, strict=True):
            if row is not None:
                parts.setdefault(row.split, []).append(Job(key, item, row.label or item.label, row.block))
        unlisted = sum(row is None for row in rows)
        given = {row.label for row in rows if row is not None and row.label}
        classes = classes if given <= set(classes) else tuple(sorted(given | set(classes)))
    for part in parts.values():
        part.sort(key=lambda job: (hash_text(source.dataset, job.key), job.key))
    return dict(sorted(parts.items())), classes, unlisted


def _manifest(
    source: Source, classes: tuple[str, ...], plan: str, options: dict[str, Any], result: _Result
) -> Manifest:  # fmt: skip
    shards, rows, totals, skipped, left_out = result
    return Manifest(
        dataset=source.dataset,
        samples=len(rows.samples),
        contracts={source.contract.modality: contract_with(source.contract, totals.statistics, totals.sizes)},
        classes=classes,
        shards=tuple(shards),
        skipped=tuple(skipped),
        plan=plan,
        made_by="swath shard",
        source={"kind": source.kind, **options, "left_out_nodata": left_out},
    )


def contract_with(contract: InputContract, statistics: Statistics, sizes: set[tuple[int, int]]) -> InputContract:
    """The contract with its normalisation filled in, and height and width where all samples have the same."""
    if not (statistics.count > 0).all():
        raise InputError(f"{contract.modality}: no valid pixels, so there are no statistics")
    rows = {name: tuple(float(x) for x in getattr(statistics, name)) for name in ("mean", "std", "minimum", "maximum")}
    normalisation = Normalisation(pixels=tuple(int(n) for n in statistics.count), **rows)
    height, width = next(iter(sizes)) if len(sizes) == 1 else (None, None)
    return contract.model_copy(update={"normalisation": normalisation, "height": height, "width": width})


def _fingerprint(source: Source, jobs: dict[str, list[Job]], classes: tuple[str, ...], options: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([_VERSION, MAX_SAMPLES, source.fingerprint, classes, options]).encode())
    digest.update(source.contract.model_dump_json().encode())
    for name, part in jobs.items():
        for job in part:
            digest.update(repr((name, job.key, job.label, job.block)).encode())
    return digest.hexdigest()


def _finished(out: Path, plan: str, names: list[str]) -> dict[str, Manifest] | None:
    """The manifests if `out` is already what would be made, None if it is free; else InputError."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if out.is_dir() and all((out / name / NAME).exists() for name in names):
        manifests = {name: read_manifest(out / name) for name in names}
        if all(manifest.plan == plan for manifest in manifests.values()):
            return manifests
    raise InputError(f"{out} exists and was not made by this command; remove it or choose another --out")


@contextmanager
def _building(partial: Path, plan: str) -> Iterator[None]:
    """Own `partial` for this plan: emptied if it belongs to another, removed when the input turns out to be unusable."""
    if not partial.parent.exists():
        partial.parent.mkdir(parents=True)
    partial.mkdir(exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another `swath shard` is writing {partial}; wait for it or stop it") from None
        record = partial / "journal" / "plan.json"
        if not record.exists() or json.loads(record.read_text()) != plan:
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


def _check_numbers(chip: int | None, stride: int | None, max_failed: float, max_nodata: float, shard_bytes: int) -> None:
    for name, value in (("--chip", chip), ("--stride", stride), ("--shard-bytes", shard_bytes)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    for name, share in (("--max-failed", max_failed), ("--max-nodata", max_nodata)):
        if not 0 <= share <= 1:
            raise InputError(f"{name} is a share between 0 and 1, not {share}")
