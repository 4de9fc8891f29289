"""manifest.json: what a folder of shards holds (DESIGN §2.2). It is written last, so a folder with one is complete."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from swath.shards.bands import InputContract, Strict
from swath.shards.errors import InputError
from swath.shards.files import write_json

NAME = "manifest.json"
SCHEMA_VERSION = 2


class ManifestDamaged(InputError):
    """The manifest is there and is not one."""


class Shard(Strict):
    """One tar: file name, number of samples, bytes, SHA-256 in hex."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.tar$")
    samples: int = Field(ge=1)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class FileState(Strict):
    """Bytes and SHA-256 in hex of the index's files, so that a copy of them can be checked."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class BandStatistics(Strict):
    """Of one modality, a value per band each: `percentiles` by number ("50" is the median; the contract's unit, off by at most
    0.4 %, None for a band without values), `nodata_share` of all its pixels."""

    percentiles: dict[str, tuple[float | None, ...]]
    nodata_share: tuple[float, ...]


class LabelMap(Strict):
    """What a raster of labels beside the images says, which is no input: `classes` by code (0, and codes without a name, are no
    label), or the names of its bands where these are `shares` between 0 and 1."""

    classes: dict[int, str] = Field(default_factory=dict)
    shares: tuple[str, ...] = ()


class Manifest(Strict):
    """`maps` are the label maps by the name of their member, `<key>.<name>.npy`; `skipped` lists what could not be decoded;
    `plan` is the fingerprint of the command that made the shards; `licence` is that of the imagery, "" where none is stated."""

    schema_version: Literal[2] = 2
    dataset: str
    licence: str = ""
    samples: int = Field(ge=1)
    contracts: dict[str, InputContract]
    statistics: dict[str, BandStatistics] = Field(default_factory=dict)
    classes: tuple[str, ...] = ()
    maps: dict[str, LabelMap] = Field(default_factory=dict)
    shards: tuple[Shard, ...]
    files: dict[str, FileState] = Field(default_factory=dict)
    skipped: tuple[tuple[str, str], ...] = ()
    plan: str = ""
    made_by: str = ""
    source: dict[str, Any] = Field(default_factory=dict)

    def contract(self, modality: str | None = None) -> InputContract:
        """The contract of `modality`, or of the only one."""
        if modality is None and len(self.contracts) == 1:
            return next(iter(self.contracts.values()))
        if modality not in self.contracts:
            raise InputError(f"data set {self.dataset} has modalities {', '.join(self.contracts)}; name one of them")
        return self.contracts[modality]

    def write(self, folder: Path) -> None:
        # without label maps it is as it was before there were any, for older readers
        write_json(folder / NAME, self.model_dump(mode="json", exclude=None if self.maps else {"maps"}))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`; InputError where there is none or it is not understood."""
    path = folder / NAME
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        hint = ""
        inside = sorted(p.parent.name for p in folder.glob(f"*/{NAME}")) if folder.is_dir() else []
        if inside:
            hint = f"; it has {', '.join(inside)} inside: name one of them"
        raise InputError(f"{folder} is not a folder of shards (no {NAME}){hint or '; `swath shard` makes one'}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    return parse_manifest(data, str(folder))


def parse_manifest(data: bytes, place: str) -> Manifest:
    """The manifest of `place` from its bytes; ManifestDamaged where they are none."""
    path, remedy = f"{place}/{NAME}", f"`swath index {place}` makes one from the shards alone"
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ManifestDamaged(f"{path} is damaged ({error}); {remedy}") from None
    version = value.get("schema_version") if isinstance(value, dict) else None
    if isinstance(version, int) and version != SCHEMA_VERSION:
        raise InputError(f"{path} has schema version {version}, this swath reads {SCHEMA_VERSION}; use the swath that made it")
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(str(p) for p in first['loc']) or 'all of it'}: {first['msg']}"
        raise ManifestDamaged(f"{path} is damaged ({what}); {remedy}") from None
