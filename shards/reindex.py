"""`swath index`: rebuild index and manifest of a folder of shards from its tars; a foreign WebDataset gains them."""

import hashlib
import json
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
from swath.shards.manifest import NAME, Manifest, Shard, read_manifest
from swath.shards.statistics import Statistics
from swath.shards.writer import Rows, member_row, rows_of

MAX_BYTES = 1 << 30  # of one member
_EXTENSIONS = {"jpg": "jpg", "jpeg": "jpg", "png": "png", "npy": "npy"}


def reindex(folder: Path) -> Manifest:
    """Write index.bin, keys.bin and manifest.json anew from the tars; contract and classes stay where there is a manifest."""
    known = read_manifest(folder) if (folder / NAME).exists() else None
    tars = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if not tars:
        raise InputError(f"{folder} holds no .tar files; name the folder that does")
    dataset = known.dataset if known else folder.resolve().name
    scan = _Scan(known)
    parts, shards = [], []
    for number, path in enumerate(tars):
        samples = [scan.sample(path, number, key, members) for key, members in _samples(path)]
        if not samples:
            raise InputError(f"{path} holds no samples; remove it")
        parts.append((samples, path))
        shards.append(_shard(path, len(samples)))
    classes = known.classes if known else tuple(sorted(scan.labels))
    tables = []
    for samples, _ in parts:
        rows = [(key, _number(label, classes), block, members) for key, label, block, members in samples]
        tables.append(rows_of(dataset, rows, len(scan.columns)))
    table = Rows.join(tables)
    changed: dict[str, Any] = {"samples": len(table.samples), "shards": tuple(shards)}
    if known:
        manifest = known.model_copy(update=changed)
    else:
        contract = scan.contract()
        manifest = Manifest(
            dataset=dataset, contracts={contract.modality: contract}, classes=classes, made_by="swath index", **changed
        )
    with disk_errors("writing the index", folder):
        Index(table.samples, table.members, np.frombuffer(table.keys, np.uint8), scan.columns).write(folder)
        manifest.write(folder)
    return manifest


class _Scan:
    """Turns members into index rows; without a manifest, gathers what its contract needs on the way."""

    def __init__(self, known: Manifest | None) -> None:
        self.modality = known.contract().modality if known else ""
        self.known = known
        self.columns = columns_of([self.modality])
        self.labels: set[str] = set()
        self.statistics: Statistics | None = None
        self.sizes: set[tuple[int, int]] = set()
        self._first = ("", "", "")

    def sample(
        self, path: Path, number: int, key: str, members: dict[str, tuple[int, bytes]]
    ) -> tuple[str, str | int | None, int, np.ndarray]:
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
        scale, add = float(meta.get("scale", 1.0)), float(meta.get("add", 0.0))
        row[0] = member_row(number, offset, data, kind, scale, add)
        label = meta.get("label")
        if label is None and "cls" in members:
            label = members["cls"][1].decode(errors="replace").strip()
        if label is not None:
            self.labels.add(str(label))
        if self.known is None:
            self._look(f"{path.name}:{key}", suffix, data, kind, scale, add)
        block = meta.get("block", -1)
        return key, None if label is None else str(label), block if isinstance(block, int) else -1, row

    def _look(self, where: str, suffix: str, data: bytes, kind: str, scale: float, add: float) -> None:
        try:
            array = decode(data, kind)
        except DecodeError as error:
            raise InputError(f"{where}: {error}; remove the sample") from None
        modality = suffix.rsplit(".", 1)[0] if "." in suffix else "rgb" if len(array) == 3 else "image"
        seen = (modality, describe(array))
        if self.statistics is None:
            self.statistics, self.modality = Statistics(len(array)), modality
            self._first, self._dtype = (where, *seen), str(array.dtype)
        if self._first[1:] != seen:
            first, *was = self._first
            raise InputError(f"samples differ: {first} is {' '.join(was)}, {where} is {' '.join(seen)}")
        finite = np.isfinite(array).all(axis=0) if array.dtype.kind == "f" else None
        self.statistics.add(array.astype(np.float64) * scale + add, finite)
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


def _samples(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, bytes]]]]:
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
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{path} cannot be read as a tar ({error}); copy it again") from None
    if current is not None:
        yield current, members


def _json(path: Path, key: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise InputError(f"{path}: the JSON of sample {key} is damaged ({error})") from None
    return value if isinstance(value, dict) else {}


def _number(label: str | int | None, classes: tuple[str, ...]) -> int:
    if label is None:
        return -1
    if label not in classes:
        raise InputError(f"label {label!r} of a sample is not among the manifest's classes")
    return classes.index(str(label))


def _shard(path: Path, samples: int) -> Shard:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(name=path.name, samples=samples, bytes=path.stat().st_size, sha256=digest)
