"""`swath index`: rebuild index and manifest of a folder of shards from its tars; a foreign WebDataset gains them."""

import hashlib
import json
import logging
import math
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from swath.shards.bands import Band, InputContract, Normalisation
from swath.shards.codec import DecodeError, decode, describe
from swath.shards.errors import InputError
from swath.shards.files import disk_errors
from swath.shards.index import MEMBER, VALID, Index, columns_of
from swath.shards.ingest import contract_with
from swath.shards.manifest import NAME, Manifest, ManifestDamaged, Shard, read_manifest
from swath.shards.statistics import Statistics
from swath.shards.writer import Place, Row, Rows, member_row, rows_of

MAX_BYTES = 1 << 30  # of one member
_ASIDE = "manifest.damaged.json"
_log = logging.getLogger(__name__)
_EXTENSIONS = {"jpg": "jpg", "jpeg": "jpg", "png": "png", "npy": "npy"}


def reindex(folder: Path) -> Manifest:
    """Write index.bin, keys.bin and manifest.json anew from the tars; contract and classes stay where there is a manifest.

    A damaged manifest is set aside, and the folder taken as any other WebDataset. Raises InputError.
    """
    tars = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if not tars:
        raise InputError(f"{folder} holds no .tar files; name the folder that does")
    known, damage = _known(folder)
    scan = _Scan(known)
    parts, shards = [], []
    for number, path in enumerate(tars):
        samples = [scan.sample(path, number, key, members) for key, members in read_samples(path)]
        if not samples:
            raise InputError(f"{path} holds no samples; remove it")
        parts.append(samples)
        shards.append(_shard(path, len(samples)))
    dataset = known.dataset if known else scan.dataset or folder.resolve().name
    classes = known.classes if known else _classes(scan.labels)
    tables = []
    for path, samples in zip(tars, parts, strict=True):
        rows = [replace(row, label=_number(path, row.key, label, classes)) for row, label in samples]
        tables.append(rows_of(dataset, rows, len(scan.columns)))
    table = Rows.join(tables)
    changed: dict[str, Any] = {"samples": len(table.samples), "shards": tuple(shards)}
    if known:
        _tell_changes(known, shards)
        manifest = known.model_copy(update=changed)
    else:
        manifest = Manifest(dataset=dataset, contracts=scan.contracts(), classes=classes, made_by="swath index", **changed)
    with disk_errors("writing the index", folder):
        if damage is not None:
            (folder / NAME).replace(folder / _ASIDE)
            _log.warning(
                "%s; it is now %s, and the new one knows neither bands nor units: making the shards again would", damage, _ASIDE
            )
        index = Index(table.samples, table.members, np.frombuffer(table.keys, np.uint8), scan.columns)
        manifest = manifest.model_copy(update={"files": index.write(folder)})
        manifest.write(folder)
    return manifest


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


class _Scan:
    """Turns members into index rows; without a manifest, finds modalities in the first sample and gathers what contracts need."""

    def __init__(self, known: Manifest | None) -> None:
        self.known = known
        self.modalities = list(known.contracts) if known else []
        self._bare = self.modalities[0] if len(self.modalities) == 1 else ""  # what an image without a name is called
        self.labels: set[str] = set()
        self.dataset: str | None = None
        self.seen: dict[str, _Seen] = {}

    def sample(self, path: Path, number: int, key: str, members: dict[str, tuple[int, bytes]]) -> tuple[Row, str | None]:
        """The index row of one sample, its label still to be numbered, and that label."""
        where = f"{path}: sample {key}"
        meta = _json(path, key, members["json"][1]) if "json" in members else {}
        found = self._images(where, members)
        row = np.zeros(len(self.columns), MEMBER)
        if "json" in members:
            row[-1] = member_row(number, *members["json"], "json")
        if not found.keys() & set(self.modalities):
            raise InputError(f"{where} has no image (jpg, png or npy)")
        if self.known is None and found.keys() - set(self.modalities):
            raise InputError(f"{where} has {', '.join(sorted(found))}, the first sample {', '.join(self.modalities)}")
        for column, name in enumerate(self.modalities):
            if name not in found:
                continue
            kind, (offset, data) = found[name]
            scale, add = _radiometry(where, meta, name)
            row[column] = member_row(number, offset, data, kind, scale, add)
            mask = members.get(f"{name}{VALID}.npy")
            if mask is not None:
                row[len(self.modalities) + column] = member_row(number, *mask, "npy")
            if self.known is None:
                self._look(where, name, _decoded(where, data, kind), scale, add, mask[1] if mask else None)
        label = meta.get("label")
        if label is None and "cls" in members:
            label = members["cls"][1].decode(errors="replace").strip()
        label = str(label) if isinstance(label, int | str) and not isinstance(label, bool) else None
        if label is not None:
            self.labels.add(label)
        if isinstance(meta.get("dataset"), str):
            self.dataset = self.dataset or meta["dataset"]
        block = meta.get("block", -1)
        return Row(key, -1, block if type(block) is int else -1, Place.of(meta), row), label

    @property
    def columns(self) -> tuple[str, ...]:
        return columns_of(self.modalities)

    def _images(self, where: str, members: dict[str, tuple[int, bytes]]) -> dict[str, tuple[str, tuple[int, bytes]]]:
        """{modality: (format, member)} of the members that are images; those of the first sample say which there are."""
        found: dict[str, tuple[str, tuple[int, bytes]]] = {}
        for suffix, member in members.items():
            stem, _, extension = suffix.rpartition(".")
            kind = _EXTENSIONS.get(extension.lower())
            if kind is None or stem.endswith(VALID):
                continue
            if not stem and not self._bare:
                self._bare = "rgb" if len(_decoded(where, member[1], kind)) == 3 else "image"
            name = re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:18] or self._bare
            if name in found:
                raise InputError(f"{where} has two images that would be called {name}; rename one")
            found[name] = (kind, member)
        self.modalities = self.modalities or sorted(found)
        return found

    def _look(self, where: str, name: str, array: np.ndarray, scale: float, add: float, mask: bytes | None) -> None:
        seen = self.seen.setdefault(name, _Seen(where, describe(array), str(array.dtype), Statistics(len(array))))
        if seen.shape != describe(array):
            raise InputError(f"samples differ: {seen.where} is {name} {seen.shape}, {where} is {name} {describe(array)}")
        clear = np.ones(array.shape[1:], bool)
        if mask is not None:
            codes = _decoded(where, mask, "npy")[0]
            if codes.shape != clear.shape:
                raise InputError(f"{where} is of {clear.shape}, its validity mask of {codes.shape}; remove the sample")
            clear &= codes == 1
        if array.dtype.kind == "f":
            clear &= np.isfinite(array).all(axis=0)
        seen.statistics.add(array.astype(np.float64) * scale + add, clear)
        seen.sizes.add((array.shape[1], array.shape[2]))

    def contracts(self) -> dict[str, InputContract]:
        return {name: seen.contract(name) for name, seen in self.seen.items()}


@dataclass
class _Seen:
    """One modality of a foreign data set: the first sample and its `shape` in words, and what all samples had."""

    where: str
    shape: str
    dtype: str
    statistics: Statistics
    sizes: set[tuple[int, int]] = field(default_factory=set)

    def contract(self, modality: str) -> InputContract:
        count = self.statistics.bands
        names = ("red", "green", "blue") if count == 3 else tuple(f"band_{n}" for n in range(1, count + 1))
        none = tuple(0.0 for _ in names)
        made = InputContract(
            modality=modality, sensor="unknown", level="unknown", unit="digital number", dtype=self.dtype,
            bands=tuple(Band(name=n, common_name=n if count == 3 else None) for n in names),
            normalisation=Normalisation(mean=none, std=none, pixels=tuple(0 for _ in names)),
        )  # fmt: skip
        return contract_with(made, self.statistics, self.sizes)


def read_samples(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, bytes]]]]:
    """(key, {suffix: (offset of its data, data)}) in the order of the tar; neighbours with one key are one sample."""
    current, members = None, {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.isdir():
                    continue
                name = PurePosixPath(info.name)
                if not info.isreg() or info.sparse or name.is_absolute() or ".." in name.parts or info.size > MAX_BYTES:
                    raise InputError(f"{path}: member {info.name!r} is no plain file with a plain path and size")
                stem, _, suffix = name.name.partition(".")
                key = str(name.with_name(stem)) if stem else ""
                if not suffix or not key:
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
        raise InputError(f"{where} cannot be decoded ({error}); repair or remove the sample") from None


def _radiometry(where: str, meta: dict[str, Any], modality: str) -> tuple[float, float]:
    """Scale and offset of a modality in a sample's JSON; 1 and 0 where it has none."""
    told = meta.get("radiometry")
    told = told.get(modality) if isinstance(told, dict) else None
    told = told if isinstance(told, dict) else {}
    values = told.get("scale", 1.0), told.get("add", 0.0)
    if not all(type(v) in (int, float) and math.isfinite(v) for v in values) or not values[0]:
        raise InputError(f"{where}: scale {values[0]!r} and add {values[1]!r} in its JSON are no numbers to decode with")
    return float(values[0]), float(values[1])


def _classes(labels: set[str]) -> tuple[str, ...]:
    """Sorted; as numbers where all are."""
    return tuple(sorted(labels, key=int if all(re.fullmatch(r"\d{1,9}", label) for label in labels) else None))


def _json(path: Path, key: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise InputError(f"{path}: the JSON of sample {key} is damaged ({error})") from None
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
    return Shard(name=path.name, samples=samples, bytes=path.stat().st_size, sha256=digest)
