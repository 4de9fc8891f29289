"""`swath index`: rebuild index and manifest of a folder of shards from its tars; a foreign WebDataset gains them."""

import hashlib
import logging
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pydantic import ValidationError

from swath.shards.bands import Band, InputContract
from swath.shards.codec import DecodeError, decode, describe
from swath.shards.errors import InputError
from swath.shards.files import disk_errors
from swath.shards.index import MEMBER, VALID, Index, columns_of
from swath.shards.ingest import contract_with
from swath.shards.layouts.layout import RGB
from swath.shards.manifest import NAME, Manifest, ManifestDamaged, Shard, read_manifest
from swath.shards.sources.planned import contract
from swath.shards.sources.webdataset import (
    TEXTS,
    Cut,
    at_first_dot,
    band_names,
    cut_of,
    is_text,
    kind_of,
    label_of,
    modality_of,
    plain_json,
    radiometry,
    sorted_classes,
)
from swath.shards.statistics import Statistics
from swath.shards.writer import Place, Row, Rows, member_row, rows_of

MAX_BYTES = 1 << 30  # of one member
_ASIDE = "manifest.damaged.json"
_log = logging.getLogger(__name__)


def reindex(folder: Path, max_failed: float = 0.0) -> Manifest:
    """Write index.bin, keys.bin and manifest.json anew from the tars; contract and classes stay where there is a manifest.

    Without one the folder is a foreign WebDataset (docs/webdataset.md): images are told by their content, and keys that come in
    several tars get the tar's name before them. A damaged manifest is set aside. A share of `max_failed` of the samples may be
    impossible to index: they are listed in the manifest, and are not part of the data set. Raises InputError.
    """
    tars = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if not tars:
        packed = sorted(folder.glob("*.tar.*")) if folder.is_dir() else []
        remedy = f"unpack {packed[0].name} to a .tar" if packed else "name the folder that does"
        raise InputError(f"{folder} holds no .tar files; {remedy}")
    known, damage = _known(folder)
    ours = known is not None and known.made_by == "swath shard"
    cut = at_first_dot if ours else cut_of(_names(tars[0]))
    scan, parts, shards = _Scan(known), [], []
    skipped: list[tuple[str, str]] = []
    for number, path in enumerate(tars):
        parts.append(samples := [])
        for key, members in read_samples(path, cut):
            try:
                samples.append(scan.sample(path, number, key, members))
            except _Bad as error:
                skipped.append((key, str(error)))
                if not max_failed:
                    raise InputError(str(error)) from None
        if not samples:
            raise InputError(f"{path} holds no samples{' that can be indexed' if skipped else ''}; remove it")
        shards.append(_shard(path, len(samples)))
    total = sum(map(len, parts)) + len(skipped)
    if len(skipped) > max_failed * total:
        raise InputError(f"{len(skipped)} of {total} samples cannot be indexed, more than --max-failed allows: {skipped[0][1]}")
    _rekey(tars, parts)
    dataset = known.dataset if known else scan.dataset or folder.resolve().name
    labels = {found.label for samples in parts for found in samples if found.label is not None}
    classes = known.classes if known else sorted_classes(labels)
    columns = columns_of(scan.modalities, known.maps if known else ())
    tables = []
    for path, samples in zip(tars, parts, strict=True):
        rows = [Row(f.key, _number(path, f.key, f.label, classes), f.block, f.place, _members(f, columns)) for f in samples]
        tables.append(rows_of(dataset, rows, len(columns)))
    table = Rows.join(tables)
    changed: dict[str, Any] = {"samples": len(table.samples), "shards": tuple(shards)}
    if known:
        _tell_changes(known, shards)
        manifest = known.model_copy(update=changed | {"skipped": tuple(dict.fromkeys((*known.skipped, *skipped)))})
    else:
        changed |= {"made_by": "swath index", "skipped": tuple(skipped)}
        manifest = Manifest(dataset=dataset, contracts=scan.contracts(), classes=classes, **changed)
    if skipped:
        _log.warning("%d of %d samples are left out of the index: %s", len(skipped), total, skipped[0][1])
    with disk_errors("writing the index", folder):
        if damage is not None:
            (folder / NAME).replace(folder / _ASIDE)
            _log.warning(
                "%s; it is now %s, and the new one knows neither bands nor units: making the shards again would", damage, _ASIDE
            )
        index = Index(table.samples, table.members, np.frombuffer(table.keys, np.uint8), columns)
        manifest = manifest.model_copy(update={"files": index.write(folder)})
        manifest.write(folder)
    return manifest


def _names(path: Path) -> list[str]:
    """Of the members of a tar, as far as it can be read: whoever reads it next says what is wrong with it."""
    try:
        with tarfile.open(path, "r:") as tar:
            return [info.name for info in tar if info.isreg()]
    except (tarfile.TarError, OSError, EOFError):
        return []


def _rekey(tars: list[Path], parts: list[list["_Found"]]) -> None:
    """Sample ids are made of keys, so no two may be alike: where any are, all get their tar's name."""
    if len({found.key for samples in parts for found in samples}) == sum(map(len, parts)):
        return
    _log.warning("keys come several times, and get the name of their tar before them, as in %s/%s", tars[0].stem, parts[0][0].key)
    for path, samples in zip(tars, parts, strict=True):
        seen: set[str] = set()
        for found in samples:
            if found.key in seen:
                raise InputError(f"{path}: sample {found.key} stands twice; members of one sample must follow each other")
            seen.add(found.key)
            found.key = f"{path.stem}/{found.key}"


def _members(found: "_Found", columns: tuple[str, ...]) -> np.ndarray:
    """(M,) of MEMBER."""
    row = np.zeros(len(columns), MEMBER)
    for name, member in found.columns.items():
        row[columns.index(name)] = member
    return row


def _known(folder: Path) -> tuple[Manifest | None, str | None]:
    """The manifest, if there is one that can be read, and what is wrong with it if not."""
    if not (folder / NAME).exists():
        return None, None
    try:
        return read_manifest(folder), None
    except ManifestDamaged as error:
        return None, str(error)


def _tell_changes(known: Manifest, shards: list[Shard]) -> None:
    """Say which shards are not what the manifest had, since somebody may have lost data."""
    before, now = ({s.name: s for s in listed} for listed in (known.shards, shards))
    for name in sorted(before | now):
        had, has = (f"{s.samples} samples" if s else "nothing" for s in (before.get(name), now.get(name)))
        if had != has:
            _log.warning("%s: %s, where the manifest had %s", name, has, had)


class _Bad(Exception):
    """A sample that cannot be indexed: which one, and why."""


@dataclass
class _Found:
    """A sample of which everything is in order: its index rows by column, and what is numbered at the end."""

    key: str
    columns: dict[str, np.ndarray]
    label: str | None
    block: int
    place: Place


class _Scan:
    """Turns members into index rows; without a manifest it finds the modalities, and gathers what contracts need."""

    def __init__(self, known: Manifest | None) -> None:
        self.known = known
        self._bare = next(iter(known.contracts)) if known and len(known.contracts) == 1 else ""  # an image without a name
        self.dataset: str | None = None
        self.seen: dict[str, _Seen] = {}

    def sample(self, path: Path, number: int, key: str, members: dict[str, tuple[int, bytes]]) -> _Found:
        """What the index has of one sample. Raises _Bad."""
        where = f"{path}: sample {key}"
        meta = _json(path, key, members["json"][1]) if "json" in members else {}
        images = self._images(where, members)
        if not images:
            hint = "; `swath shard` converts tif" if any(kind_of(s, data) == "tif" for s, (_, data) in members.items()) else ""
            raise _Bad(f"{where} has no image (jpg, png or npy){hint}")
        columns = {
            name: member_row(number, *member, "npy")
            for name in (self.known.maps if self.known else ())
            if (member := members.get(f"{name}.npy")) is not None
        }
        looks = []
        for name, (kind, (offset, data)) in images.items():
            try:
                scale, add = radiometry(meta, name)
            except DecodeError as error:
                raise _Bad(f"{where}: {error}") from None
            columns[name] = member_row(number, offset, data, kind, scale, add)
            mask = members.get(f"{name}{VALID}.npy")
            if mask is not None:
                columns[name + VALID] = member_row(number, *mask, "npy")
            if self.known is None:
                looks.append((name, *self._look(where, name, data, kind, mask[1] if mask else None, meta), scale, add))
        if "json" in members:
            columns["json"] = member_row(number, *members["json"], "json")
        elif text := next((member for suffix, member in members.items() if suffix.rpartition(".")[2] in TEXTS), None):
            columns["json"] = member_row(number, *text, "txt")
        for name, seen, pixels, codes, scale, add in looks:  # only now, so that a bad sample leaves no trace
            self.seen[name] = seen
            seen.sizes.add((pixels.shape[1], pixels.shape[2]))
            seen.statistics.add(pixels, codes, scale=scale, add=add)
        if isinstance(meta.get("dataset"), str):
            self.dataset = self.dataset or meta["dataset"]
        block = meta.get("block", -1)
        label = label_of(meta, members["cls"][1] if "cls" in members else None)
        return _Found(key, columns, label, block if type(block) is int else -1, Place.of(meta))

    @property
    def modalities(self) -> list[str]:
        return list(self.known.contracts) if self.known else sorted(self.seen)

    def _images(self, where: str, members: dict[str, tuple[int, bytes]]) -> dict[str, tuple[str, tuple[int, bytes]]]:
        """{modality: (format, member)} of the members that are images, by content; with a manifest, those that it knows."""
        found: dict[str, tuple[str, tuple[int, bytes]]] = {}
        for suffix, member in members.items():
            kind = kind_of(suffix, member[1])
            if kind in (None, "tif") or suffix.endswith(f"{VALID}.npy"):
                continue
            if "." not in suffix and not self._bare:
                self._bare = "rgb" if len(_decoded(where, member[1], kind)) == 3 else "image"
            name = modality_of(suffix, self._bare)
            if name in found:
                raise _Bad(f"{where} has two images that would be called {name}; rename one")
            found[name] = (kind, member)
        return {name: image for name, image in found.items() if self.known is None or name in self.known.contracts}

    def _look(
        self, where: str, name: str, data: bytes, kind: str, mask: bytes | None, meta: dict[str, Any]
    ) -> tuple["_Seen", np.ndarray, np.ndarray | None]:
        """What was seen of the modality, pixels (C, H, W) and validity codes, which are as those of the samples before."""
        pixels = _decoded(where, data, kind)
        codes = None if mask is None else _decoded(where, mask, "npy")
        if codes is not None and codes.shape[1:] != pixels.shape[1:]:
            raise _Bad(f"{where} is of {pixels.shape[1:]}, its validity mask of {codes.shape[1:]}; remove the sample")
        seen = self.seen.get(name)
        if seen is None:
            dates = _dates(meta, name, len(pixels)) if codes is None or len(codes) == 1 else len(codes)
            if len(pixels) % dates:
                raise _Bad(f"{where} has {len(pixels)} channels and a validity mask of {dates} dates; remove the sample")
            statistics = Statistics(len(pixels) // dates)
            seen = _Seen(where, describe(pixels), str(pixels.dtype), dates, statistics)
        if seen.shape != describe(pixels):
            raise _Bad(f"samples differ: {seen.where} is {name} {seen.shape}, {where} is {name} {describe(pixels)}")
        if codes is not None and len(codes) not in (1, seen.dates):
            raise _Bad(f"{where} has a validity mask of {len(codes)} dates, others of {seen.dates}; remove the sample")
        if pixels.dtype.kind == "f":  # a pixel that is not finite in one band is nodata in all
            finite = np.asarray(np.isfinite(pixels.reshape(seen.dates, -1, *pixels.shape[1:])).all(axis=1))
            codes = finite.astype(np.uint8) if codes is None else np.where(finite, codes, 0)
        return seen, pixels, codes

    def contracts(self) -> dict[str, InputContract]:
        return {name: seen.contract(name) for name, seen in sorted(self.seen.items())}


@dataclass
class _Seen:
    """One modality of a foreign data set: the first sample and its `shape` in words, and what all samples had."""

    where: str
    shape: str
    dtype: str
    dates: int
    statistics: Statistics
    sizes: set[tuple[int, int]] = field(default_factory=set)

    def contract(self, modality: str) -> InputContract:
        bands = [Band(name=n, common_name=n if n in RGB else None) for n in band_names(self.statistics.bands)]
        made = contract(modality, bands, self.dtype, sensor="unknown", level="unknown", unit="digital number", dates=self.dates)
        return contract_with(made, self.statistics, self.sizes)


def _dates(meta: dict[str, Any], modality: str, channels: int) -> int:
    """Of a series, as a sample's JSON tells them."""
    times = meta.get("times")
    told = times.get(modality) if isinstance(times, dict) else None
    return len(told) if isinstance(told, list) and told and channels % len(told) == 0 else 1


def read_samples(path: Path, cut: Cut = at_first_dot) -> Iterator[tuple[str, dict[str, tuple[int, bytes]]]]:
    """(key, {suffix: (offset of its data, data)}) in the order of the tar; neighbours with one key are one sample."""
    current, members = None, {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.isdir():
                    continue
                name = PurePosixPath(info.name)
                plain = (
                    info.isreg() and not info.sparse and not name.is_absolute() and ".." not in name.parts and is_text(info.name)
                )
                if not plain or info.size > MAX_BYTES:
                    raise InputError(f"{path}: member {info.name!r} is no plain file with a plain path and size")
                key, suffix = cut(str(name))
                if not suffix or not key or key.endswith("/"):
                    continue
                if key != current:
                    if current is not None:
                        yield current, members
                    current, members = key, {}
                file = tar.extractfile(info)
                data = file.read() if file else b""
                if len(data) != info.size:
                    raise InputError(f"{path} is cut short in {info.name}; copy it again")
                members[suffix] = (info.offset_data, data)
            end = tar.offset
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{path} cannot be read as a tar ({error}); copy it again") from None
    with path.open("rb") as file:  # tarfile takes a header that it cannot read for the end
        file.seek(end)
        block = file.read(512)
        if not block:
            _log.warning("%s has no end mark, so it may be cut short behind sample %s", path, current)
        if block.strip(b"\0"):
            after = f"after sample {current}" if current else "at its start"
            raise InputError(f"{path} is damaged {after} (byte {end} is no tar header); copy it again")
    if current is not None:
        yield current, members


def _decoded(where: str, data: bytes, kind: str) -> np.ndarray:
    try:
        return decode(data, kind)
    except DecodeError as error:
        raise _Bad(f"{where} cannot be decoded ({error}); repair or remove the sample") from None


def _json(path: Path, key: str, data: bytes) -> dict[str, Any]:
    try:
        value = plain_json(data)
    except DecodeError as error:
        raise _Bad(f"{path}: the JSON of sample {key} is damaged ({error})") from None
    return value if isinstance(value, dict) else {}


def _number(path: Path, key: str, label: str | None, classes: tuple[str, ...]) -> int:
    if label is None:
        return -1
    if label not in classes:
        raise InputError(f"{path}: label {label!r} of sample {key} is not among the manifest's classes")
    return classes.index(label)


def _shard(path: Path, samples: int) -> Shard:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        return Shard(name=path.name, samples=samples, bytes=path.stat().st_size, sha256=digest)
    except ValidationError:
        raise InputError(f"{path}: a shard's name is made of letters, digits, '.', '_' and '-'; rename it") from None
