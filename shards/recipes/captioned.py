"""Images with captions: a list of records somewhere in a folder, and image files that the records name."""

import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from swath.shards.bands import InputContract
from swath.shards.codec import DecodeError, decode, describe
from swath.shards.errors import InputError
from swath.shards.layouts.layout import RGB, Facts, Table
from swath.shards.layouts.store import Store, open_store
from swath.shards.layouts.tables import read_table
from swath.shards.sensors import SENSORS, band
from swath.shards.sources import tars
from swath.shards.sources.archive import MAX_BYTES
from swath.shards.sources.planned import Planned, contract
from swath.shards.sources.source import Item, Options, Part, Sample
from swath.shards.sources.webdataset import plain_json

IMAGES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
_SPLIT = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HELD_OUT = ("test", "val")  # of an image that stands in several splits


@dataclass(frozen=True, slots=True)
class Record:
    """What a published list says of one image. `image` is its file: a name, with as many folders above as the list gives."""

    image: str
    captions: tuple[str, ...]
    split: str | None = None
    lat: float | None = None
    lon: float | None = None
    meta: dict[str, Any] = field(default_factory=dict)


class Pile:
    """A folder with the zips and tars in it (or one zip) as a single tree: `images2.zip` stands for a folder `images2/`.

    Names are paths in that tree; where an archive and its unpacked copy are there, one of them. Archives whose file name is
    `unread`, a regular expression, are not opened.
    """

    def __init__(self, path: Path, unread: str = "") -> None:
        self.path = path
        top = open_store(path)
        self._mounts: list[tuple[str, Store]] = [("", top)]
        self._owner: dict[str, int] = {}
        digest = hashlib.sha256()
        for name, stamp in top.walk():
            digest.update(repr((name, stamp)).encode())
            end = name[-4:].lower()
            if re.fullmatch(unread, name.rpartition("/")[2]):
                continue
            if path.is_dir() and end in (".zip", ".tar"):
                self._mount(name[:-4] + "/", open_store(path / name) if end == ".zip" else _Tar(path / name))
            else:
                self._owner.setdefault(name, 0)
        self.names, self.links, self.digest = sorted(self._owner), top.links, digest.hexdigest()

    def __contains__(self, name: str) -> bool:
        return name in self._owner

    def read(self, name: str, limit: int = MAX_BYTES) -> bytes:
        """All bytes. Raises DecodeError."""
        mount, store = self._mounts[self._owner[name]]
        data = store.read(name[len(mount) :], limit)
        if data is None:
            raise DecodeError(f"{name} is not there any more")
        return data

    def json(self, name: str) -> Any:
        """A published list; InputError where it is no JSON."""
        try:
            return plain_json(self.read(name))
        except DecodeError as error:
            raise InputError(f"{self.path / name} cannot be read ({error}); download it again") from None

    def rows(self, name: str, table: Table) -> Iterator[tuple[str, Facts]]:
        """Of a published CSV. Raises InputError."""
        mount, store = self._mounts[self._owner[name]]
        return read_table(store, name[len(mount) :], table, {})

    def _mount(self, mount: str, store: Store) -> None:
        self._mounts.append((mount, store))
        for name, _ in store.walk():
            self._owner.setdefault(mount + name, len(self._mounts) - 1)


class _Tar:
    """A tar as a store."""

    links = 0

    def __init__(self, path: Path) -> None:
        self._path = path
        self._members = {f"{member.key}.{member.suffix}": member for member in tars.members(path)}

    def walk(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from ((name, (member.size,)) for name, member in sorted(self._members.items()))

    def open(self, name: str) -> BinaryIO:
        return io.BytesIO(self.read(name) or b"")

    def read(self, name: str, limit: int = MAX_BYTES) -> bytes | None:
        member = self._members.get(name)
        if member is not None and member.size > limit:
            raise DecodeError(f"{name} is larger than the limit of {limit} bytes")
        return None if member is None else tars.read(self._path, member)


@dataclass(kw_only=True)
class Captioned(Planned):
    """Items are images that have a record; `place` is (name in the pile, metadata)."""

    pile: Pile

    def read(self, item: Item) -> Sample:
        name, meta = item.place
        data, pixels = _decoded(self.pile, name)
        ((modality, made),) = self.contracts.items()
        if len(pixels) != len(made.bands) or str(pixels.dtype) != made.dtype:
            raise DecodeError(f"{name} has {describe(pixels)}, the others {len(made.bands)} of {made.dtype}")
        kept = (None, "npy") if name.lower().endswith((".tif", ".tiff")) else (data, _extension(name))
        about = {key: value for key, value in (("lat", item.lat), ("lon", item.lon), ("gsd_m", made.gsd_m)) if value is not None}
        return Sample({modality: Part(pixels, *kept)}, meta={"source": name, **about, **meta})


def captioned(
    path: Path, options: Options, *, name: str, looks: str, records: Callable[[Pile], Iterable[Record]],
    sensor: str = "unknown", level: str = "unknown", gsd_m: float | None = None, notes: tuple[str, ...] = (),
    unread: str = "",
) -> Captioned:  # fmt: skip
    """Joins `records` to the images below `path`. Records without an image, and images without one, are counted.

    `looks` shows people what is expected. Raises InputError where nothing meets.
    """
    for fixed in ("chip", "stride", "sensor", "level", "unit", "scale", "add", "nodata", "gsd_m"):
        if getattr(options, fixed) is not None:
            raise InputError(f"recipe {name} fixes --{fixed.replace('_', '-').removesuffix('-m')}; leave it out")
    pile = Pile(path, unread)
    images = _Images(pile.names)
    said = list(notes) + ([f"{pile.links} symbolic links are left out"] if pile.links else [])
    found: dict[str, Record] = {}
    missing, twice, example = 0, 0, ""
    for record in _checked(name, path, records(pile)):
        image, several = images.find(record.image)
        if image is None:
            missing, example = missing + 1, example or record.image
            continue
        twice += several
        found[image] = _merged(found[image], record) if image in found else record
    if not found:
        why = f"none of its {missing} records has an image, such as {example}" if missing else "no record of an image"
        raise InputError(f"{path} is not {name}, such as {looks}: {why}")
    if missing:
        said.append(f"{missing} records have no image, such as {example}")
    if twice:
        said.append(f"{twice} images are there several times by the same name, the first is taken")
    if len(found) < images.count:
        said.append(f"{images.count - len(found)} images have no record, and are left out")
    items = [_item(image, record) for image, record in sorted(found.items())]
    mark = hashlib.sha256(repr((pile.digest, [(item.key, item.split, item.place) for item in items], options)).encode())
    return Captioned(
        dataset=name, kind="captions", items=items, notes=tuple(said), pile=pile,
        contracts={(made := _contract(pile, items, name, options, sensor, level, gsd_m)).modality: made},
        fingerprint=mark.hexdigest(),
    )  # fmt: skip


def karpathy(list_name: str) -> Callable[[Pile], Iterator[Record]]:
    """Reads `{"images": [{"filename", "split", "sentences": [{"raw"}]}]}`."""

    def records(pile: Pile) -> Iterator[Record]:
        for name in named(pile, re.escape(list_name), list_name):
            for image in pile.json(name)["images"]:
                meta = {"keywords": image["keywords"]} if image.get("keywords") else {}
                yield Record(image["filename"], texts([s["raw"] for s in image["sentences"]]), image.get("split"), meta=meta)

    return records


def named(pile: Pile, pattern: str, looks: str) -> list[str]:
    """Files of the pile whose last part is `pattern`, such as `looks`; InputError where there are none."""
    found = [name for name in pile.names if re.fullmatch(pattern, name.rpartition("/")[2], re.IGNORECASE)]
    if not found:
        raise InputError(f"{pile.path} holds no {looks}; download it there")
    return found


def texts(value: Any) -> tuple[str, ...]:
    """The captions in a text or a list of texts, each once, in their order."""
    listed = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(text.strip() for text in listed if isinstance(text, str) and text.strip()))


def number(value: Any, limit: float) -> float | None:
    """Degrees; None for what is none."""
    try:
        read = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return read if abs(read) <= limit else None


class _Images:
    """Image files by the last part of their name, without extension: lists may name another one, or none."""

    def __init__(self, names: Iterable[str]) -> None:
        self._by_stem: dict[str, list[str]] = {}
        self.count = 0
        for name in names:
            if name.lower().endswith(IMAGES):
                self.count += 1
                self._by_stem.setdefault(PurePosixPath(name).stem, []).append(name)

    def find(self, image: str) -> tuple[str | None, bool]:
        """The file of that name below folders of those names; and whether there are several."""
        asked = PurePosixPath(image)
        stem = asked.stem if asked.suffix.lower() in IMAGES else asked.name
        folders = asked.parent.parts
        fit = [
            name for name in self._by_stem.get(stem, [])
            if not folders or PurePosixPath(name).parent.parts[-len(folders) :] == folders
        ]  # fmt: skip
        exact = [name for name in fit if name.endswith(asked.name)] or fit
        return (exact[0], len(exact) > 1) if exact else (None, False)


def _checked(name: str, path: Path, records: Iterable[Record]) -> Iterator[Record]:
    """Those with captions; a list of another form is an InputError, and a split's name becomes a folder's."""
    try:
        for record in records:
            if not isinstance(record.image, str) or not record.image:
                raise ValueError(f"an image is named {record.image!r}")
            if record.split is not None and not _SPLIT.fullmatch(record.split):
                raise ValueError(f"a split is named {record.split!r}")
            if record.captions:
                yield record
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: the list of {name} is not as published ({type(error).__name__}: {error})") from None


def _merged(one: Record, other: Record) -> Record:
    """An image in two lists has the captions of both; in two splits it is held out."""
    splits = [one.split, other.split]
    split = next((held for held in _HELD_OUT if held in splits), one.split)
    captions = tuple(dict.fromkeys(one.captions + other.captions))
    return Record(one.image, captions, split, one.lat, one.lon, other.meta | one.meta)


def _item(image: str, record: Record) -> Item:
    """Its key has as many folders as the list gives, however the archives are unpacked."""
    parts = PurePosixPath(image).with_suffix("").parts
    key = "/".join(parts[-len(PurePosixPath(record.image).parts) :])
    place = (image, record.meta | {"captions": list(record.captions)})
    return Item(key, image, place=place, split=record.split, lat=record.lat, lon=record.lon)


def _decoded(pile: Pile, name: str) -> tuple[bytes, np.ndarray]:
    data = pile.read(name)
    try:
        return data, decode(data, _extension(name))
    except DecodeError as error:
        raise DecodeError(f"{name}: {error}") from None


def _extension(name: str) -> str:
    """'jpg', or 'png' for all that Pillow decodes."""
    return "jpg" if name.lower().endswith((".jpg", ".jpeg")) else "png"


def _contract(
    pile: Pile, items: list[Item], name: str, options: Options, sensor: str, level: str, gsd_m: float | None
) -> InputContract:
    """RGB, or the bands that the user has named; images of another number are bad, as grey ones among colour."""
    names, reason = options.bands or RGB, ""
    for item in items:
        try:
            pixels = _decoded(pile, item.place[0])[1]
        except DecodeError as error:
            reason = reason or str(error)
            continue
        if len(names) == len(pixels):
            bands = [band(n, SENSORS.get(sensor) if options.bands else None) for n in names]
            return contract(
                "rgb" if len(pixels) == 3 else "image", bands, str(pixels.dtype), sensor=sensor, level=level,
                unit="digital number", gsd_m=gsd_m,
            )  # fmt: skip
        reason = reason or f"{item.place[0]} has {describe(pixels)}; --bands would name them"
    raise InputError(f"{pile.path}: none of the {len(items)} images of {name} can be decoded to {len(names)} bands ({reason})")
