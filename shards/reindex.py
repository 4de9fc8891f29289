"""`swath index`: rebuild index and manifest of a folder of shards from its tars; a foreign WebDataset gains them."""

import hashlib
import json
import logging
import math
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from swath.shards.bands import Band, InputContract, Normalisation
from swath.shards.codec import DecodeError, decode, describe
from swath.shards.errors import InputError
from swath.shards.files import disk_errors
from swath.shards.index import MEMBER, Index, columns_of
from swath.shards.ingest import contract_with
from swath.shards.manifest import NAME, Manifest, ManifestDamaged, Shard, read_manifest
from swath.shards.statistics import Statistics
from swath.shards.writer import Rows, member_row, rows_of

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
        rows = [(key, _number(path, key, label, classes), block, members) for key, label, block, members in samples]
        tables.append(rows_of(dataset, rows, len(scan.columns)))
    table = Rows.join(tables)
    changed: dict[str, Any] = {"samples": len(table.samples), "shards": tuple(shards)}
    if known:
        _tell_changes(known, shards)
        manifest = known.model_copy(update=changed)
    else:
        contract = scan.contract()
        manifest = Manifest(
            dataset=dataset, contracts={contract.modality: contract}, classes=classes, made_by="swath index", **changed
        )
    with disk_errors("writing the index", folder):
        if damage is not None:
            (folder / NAME).replace(folder / _ASIDE)
            _log.warning(
                "%s; it is now %s, and the new one knows neither bands nor units: making the shards again would", damage, _ASIDE
            )
        Index(table.samples, table.members, np.frombuffer(table.keys, np.uint8), scan.columns).write(folder)
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
    """Turns members into index rows; without a manifest, gathers what its contract needs on the way."""

    def __init__(self, known: Manifest | None) -> None:
        self.modality = known.contract().modality if known else ""
        self.known = known
        self.columns = columns_of([self.modality])
        self.labels: set[str] = set()
        self.dataset: str | None = None
        self.statistics: Statistics | None = None
        self.sizes: set[tuple[int, int]] = set()
        self._first = ("", "", "")

    def sample(
        self, path: Path, number: int, key: str, members: dict[str, tuple[int, bytes]]
    ) -> tuple[str, str | None, int, np.ndarray]:
        """(key, label, block, member rows) of one sample."""
        meta: dict[str, Any] = {}
        row = np.zeros(len(self.columns), MEMBER)
        pixels: tuple[int, bytes, str] | None = None
        for suffix, (offset, data) in members.items():
            extension = suffix.rsplit(".", 1)[-1].lower()
            if suffix == "json":
                meta = _json(path, key, data)
                row[2] = member_row(number, offset, data, "json")
            elif suffix == "valid.npy":
                row[1] = member_row(number, offset, data, "npy")
            elif extension in _EXTENSIONS and (not self.known or suffix.rsplit(".", 1)[0] == self.modality):
                if pixels is not None:
                    raise InputError(f"{path}: sample {key} has more than one image; one modality is indexed at a time")
                pixels = (offset, data, suffix)
        if pixels is None:
            raise InputError(f"{path}: sample {key} has no image (jpg, png or npy)")
        offset, data, suffix = pixels
        kind = _EXTENSIONS[suffix.rsplit(".", 1)[-1].lower()]
        where = f"{path}: sample {key}"
        scale, add = _radiometry(where, meta)
        row[0] = member_row(number, offset, data, kind, scale, add)
        label = meta.get("label")
        if label is None and "cls" in members:
            label = members["cls"][1].decode(errors="replace").strip()
        if isinstance(label, int | str) and not isinstance(label, bool):
            label = str(label)
            self.labels.add(label)
        else:
            label = None
        if self.known is None:
            self._look(where, suffix, data, kind, scale, add, members.get("valid.npy", (0, None))[1])
            if isinstance(meta.get("dataset"), str):
                self.dataset = self.dataset or meta["dataset"]
        block = meta.get("block", -1)
        return key, label, block if type(block) is int else -1, row

    def _look(self, where: str, suffix: str, data: bytes, kind: str, scale: float, add: float, mask: bytes | None) -> None:
        array = _decoded(where, data, kind)
        modality = suffix.rsplit(".", 1)[0] if "." in suffix else "rgb" if len(array) == 3 else "image"
        seen = (modality, describe(array))
        if self.statistics is None:
            self.statistics, self.modality = Statistics(len(array)), modality
            self._first, self._dtype = (where, *seen), str(array.dtype)
        if self._first[1:] != seen:
            first, *was = self._first
            raise InputError(f"samples differ: {first} is {' '.join(was)}, {where} is {' '.join(seen)}")
        clear = np.ones(array.shape[1:], bool)
        if mask is not None:
            codes = _decoded(where, mask, "npy")[0]
            if codes.shape != clear.shape:
                raise InputError(f"{where} is of {clear.shape}, its validity mask of {codes.shape}; remove the sample")
            clear &= codes == 1
        if array.dtype.kind == "f":
            clear &= np.isfinite(array).all(axis=0)
        self.statistics.add(array.astype(np.float64) * scale + add, clear)
        self.sizes.add((array.shape[1], array.shape[2]))

    def contract(self) -> InputContract:
        assert self.statistics is not None  # there is at least one sample
        count = self.statistics.bands
        names = ("red", "green", "blue") if count == 3 else tuple(f"band_{n}" for n in range(1, count + 1))
        none = tuple(0.0 for _ in names)
        made = InputContract(
            modality=self.modality, sensor="unknown", level="unknown", unit="digital number", dtype=self._dtype,
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


def _radiometry(where: str, meta: dict[str, Any]) -> tuple[float, float]:
    """Scale and offset of a sample's JSON; 1 and 0 where it has none."""
    values = meta.get("scale", 1.0), meta.get("add", 0.0)
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
