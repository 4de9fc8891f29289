"""WebDataset tars by whoever wrote them: what their members are, and as a source that becomes shards of ours."""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from swath.shards.bands import InputContract
from swath.shards.codec import DecodeError, decode, describe
from swath.shards.errors import InputError
from swath.shards.index import VALID
from swath.shards.layouts.layout import iso_time
from swath.shards.layouts.raster import Raster, degrees, read_raster
from swath.shards.manifest import NAME as MANIFEST
from swath.shards.sensors import SENSORS, band
from swath.shards.sources import tars
from swath.shards.sources.cube import clear
from swath.shards.sources.folder import files_below
from swath.shards.sources.planned import Planned, contract, fingerprint
from swath.shards.sources.source import Item, Options, Part, Sample

TEXTS = ("txt", "text", "caption", "captions")  # members that are captions
_NAMES = ("img_name",)  # members that name the image, kept as metadata
_MAX_TEXT = 1 << 20  # bytes of a JSON or a text
_EXAMPLES = 8  # of a kind of member that are looked at to find out whether it is an image
_SUFFIXES = 24  # no sample has so many members
_OURS = ("key", "dataset", "label", "radiometry", "block", "captions", "caption")  # of a sample's JSON: not copied as they are
_MAGIC = {
    b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"\x93NUMPY": "npy", b"II*\0": "tif", b"MM\0*": "tif", b"II+\0": "tif",
    b"MM\0+": "tif",
}  # fmt: skip
_EXTENSIONS = {"jpg": "jpg", "jpeg": "jpg", "png": "png", "npy": "npy", "tif": "tif", "tiff": "tif"}
_SPLIT = re.compile(r"(?:^|[/_.-])(train|val|test)(?=[/_.-])")

Cut = Callable[[str], tuple[str, str]]


def at_first_dot(name: str) -> tuple[str, str]:
    """(key, suffix) of a member, as WebDataset cuts it: at the first dot behind the last slash."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, suffix


def at_last_dot(name: str) -> tuple[str, str]:
    """(key, suffix) of a member whose key has dots."""
    stem, _, suffix = name.rpartition(".")
    return (stem, suffix) if suffix and "/" not in suffix else at_first_dot(name)


def cut_of(names: Iterable[str]) -> Cut:
    """At the first dot, unless that leaves hardly two members the same suffix: then the keys themselves have dots."""
    suffixes = Counter(at_first_dot(name)[1] for name in names)
    return at_last_dot if len(suffixes) > max(_SUFFIXES, suffixes.total() / 2) else at_first_dot


def is_text(name: str) -> bool:
    """Not so for names in a tar that are no UTF-8."""
    return name.isascii() or not any("\ud800" <= c <= "\udfff" for c in name)


def kind_of(suffix: str, data: bytes) -> str | None:
    """'jpg', 'png', 'npy' or 'tif': by content, or by suffix where the content is nothing that is known; None for no image."""
    found = next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)
    return found or _EXTENSIONS.get(suffix.rpartition(".")[2].lower())


def modality_of(suffix: str, bare: str) -> str:
    """What an image member is called: the part before its extension, `bare` where there is none."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", suffix.rpartition(".")[0]).lstrip("_-")[:18] or bare


def band_names(count: int) -> tuple[str, ...]:
    """Of bands that nobody has named."""
    return ("red", "green", "blue") if count == 3 else tuple(f"band_{n}" for n in range(1, count + 1))


def sorted_classes(labels: set[str]) -> tuple[str, ...]:
    """As numbers where all are."""
    return tuple(sorted(labels, key=int if all(re.fullmatch(r"\d{1,9}", label) for label in labels) else None))


def plain_json(data: bytes) -> Any:
    """JSON that can be written again: NaN and infinities become None. Raises DecodeError."""
    try:
        return json.loads(data, parse_constant=lambda _: None, parse_float=_finite, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"its JSON is damaged ({error})") from None


def radiometry(meta: dict[str, Any], modality: str) -> tuple[float, float]:
    """Scale and offset of a modality in a sample's JSON; 1 and 0 where it has none. Raises DecodeError."""
    told = meta.get("radiometry")
    told = told.get(modality) if isinstance(told, dict) else None
    told = told if isinstance(told, dict) else {}
    values = told.get("scale", 1.0), told.get("add", 0.0)
    if not all(type(v) in (int, float) and math.isfinite(v) for v in values) or not values[0]:
        raise DecodeError(f"scale {values[0]!r} and add {values[1]!r} in its JSON are no numbers to decode with")
    return float(values[0]), float(values[1])


def label_of(meta: dict[str, Any], number: bytes | None) -> str | None:
    """The label in a sample's JSON, else that of its `cls` member."""
    label = meta.get("label")
    if label is None and number is not None:
        label = number.decode(errors="replace").strip()
    return str(label) if isinstance(label, int | str) and not isinstance(label, bool) else None


def captions_of(meta: dict[str, Any], members: Iterable[bytes]) -> list[str]:
    """Each once: those in a sample's JSON (`captions`, `caption`), then those of its text members."""
    told = [text for name in ("captions", "caption") for text in _listed(meta.get(name))]
    told += [data.decode("utf-8-sig", errors="replace") for data in members]
    return list(dict.fromkeys(text.strip() for text in told if text.strip()))


@dataclass(kw_only=True)
class WebDataset(Planned):
    """`images`: suffix → modality; an item's `place` is (number of the tar, its members)."""

    files: tuple[Path, ...]
    images: dict[str, str]
    options: Options

    def read(self, item: Item) -> Sample:
        number, found = item.place
        path, sample = self.files[number], Sample({}, item.label)
        members = {member.suffix: member for member in found}
        told = _meta(path, members)
        texts = [_small(path, member) for suffix, member in members.items() if suffix.rpartition(".")[2] in TEXTS]
        for suffix, member in members.items():
            if (modality := self.images.get(suffix)) is not None:
                if modality in sample.parts:
                    raise DecodeError(f"{path.name}: sample {item.key} has two images that are {modality}")
                mask = members.get(f"{modality}{VALID}.npy")
                sample.parts[modality] = self._part(path, modality, member, mask, told, sample.meta)
        sample.meta |= {name: value for name, value in told.items() if name not in _OURS}
        sample.meta |= {name: _small(path, members[name]).decode(errors="replace") for name in _NAMES if name in members}
        if captions := captions_of(told, texts):
            sample.meta["captions"] = captions
        sample.meta["source"] = item.lookup
        return sample

    def _part(
        self, path: Path, modality: str, member: tars.Member, mask: tars.Member | None, told: dict[str, Any], meta: dict[str, Any]
    ) -> Part:
        data, kind, raster = _image(path, member)
        made, options = self.contracts[modality], self.options
        if len(raster.pixels) != len(made.bands) or str(raster.pixels.dtype) != made.dtype:
            raise DecodeError(f"{modality} is {describe(raster.pixels)}, of the others {len(made.bands)} of {made.dtype}")
        valid = clear(raster.pixels, made.nodata)
        if mask is not None:
            codes = decode(tars.read(path, mask), "npy")[0]
            if codes.dtype != np.uint8 or codes.shape != raster.pixels.shape[1:]:
                raise DecodeError(f"{modality} is {raster.pixels.shape[1:]}, its mask {codes.shape} of {codes.dtype}")
            valid = codes if valid is None else codes * valid
        if raster.crs is not None and raster.bounds is not None and "crs" not in meta:
            lat, lon = degrees(raster.crs, raster.bounds)
            meta |= {"crs": raster.crs, "bounds": list(raster.bounds), "lat": lat, "lon": lon}
        scale, add = radiometry(told, modality)
        source = "the sample's JSON" if isinstance(told.get("radiometry"), dict) else Part.scale_source
        if options.scale is not None or options.add is not None:
            scale, add, source = 1.0 if options.scale is None else options.scale, options.add or 0.0, "given by hand"
        form = (None, "npy") if kind == "tif" else (data, kind)
        return Part(raster.pixels, *form, valid, scale, add, source)


def open_webdataset(path: Path, options: Options, dataset: str | None = None) -> WebDataset:
    """A tar, or all tars below a folder; jpg, png and npy members stay as they came, GeoTIFFs become npy.

    A folder or a name with train, val or test in it is the split. Raises InputError.
    """
    root = path if path.is_dir() else path.parent
    listed = files_below(path) if path.is_dir() else None
    files = tuple(listed.of(".tar")) if listed else (path,)
    if not files:
        raise InputError(f"{path} holds no .tar files; name the folder that does")
    if (path / MANIFEST).exists():
        raise InputError(f"{path} is a folder of shards already ({MANIFEST}): train from it as it is, or remove that file")
    samples = _samples(files)
    images, contracts, unused = _kinds(path, files, samples, options)
    items = [_item(files[number], root, number, key, members) for number, key, members in samples]
    notes = [f"members .{suffix} are no images, captions or JSON, and are left out" for suffix in unused]
    return WebDataset(
        dataset=dataset or path.resolve().stem, kind="webdataset", contracts=contracts, items=items, files=files, images=images,
        options=options, classes=sorted_classes({item.label for item in items if item.label is not None}),
        fingerprint=fingerprint(root, files, options), notes=(*notes, *(listed.notes if listed else ())),
    )  # fmt: skip


def _samples(files: tuple[Path, ...]) -> list[tuple[int, str, list[tars.Member]]]:
    """(number of the tar, key, members): neighbours with one key."""
    found: list[tuple[int, str, list[tars.Member]]] = []
    cut: Cut | None = None
    for number, path in enumerate(files):
        listed = tars.members(path)
        cut = cut or cut_of(f"{member.key}.{member.suffix}" for member in listed)
        if odd := next((member.key for member in listed if not is_text(member.key)), None):
            raise InputError(f"{path}: the name of {odd!r} is no UTF-8; write the tar again")
        again = [tars.Member(*cut(f"{member.key}.{member.suffix}"), member.offset, member.size) for member in listed]
        found += [(number, key, list(members)) for key, members in groupby(again, key=lambda member: member.key)]
    return found


def _kinds(
    path: Path, files: tuple[Path, ...], samples: list[tuple[int, str, list[tars.Member]]], options: Options
) -> tuple[dict[str, str], dict[str, InputContract], list[str]]:
    """Suffix → modality of those that are images; the contracts; suffixes of members that are not used."""
    examples: dict[str, list[tuple[Path, tars.Member]]] = defaultdict(list)
    for number, _, members in samples:
        for member in members:
            if len(seen := examples[member.suffix]) < _EXAMPLES:
                seen.append((files[number], member))
    images: dict[str, str] = {}
    kinds: dict[str, tuple[int, str]] = {}
    unused = []
    for suffix, seen in sorted(examples.items()):
        if suffix in ("json", "cls", *_NAMES) or suffix.rpartition(".")[2] in TEXTS or suffix.endswith(f"{VALID}.npy"):
            continue
        if (pixels := _first(seen)) is None:
            unused.append(suffix)
            continue
        images[suffix] = modality_of(suffix, "rgb" if len(pixels) == 3 else "image")
        kinds.setdefault(images[suffix], (len(pixels), str(pixels.dtype)))
    if not images:
        raise InputError(
            f"{path}: members .{', .'.join(unused) or '(none)'} are no images (jpg, png, npy, tif) that can be decoded"
        )
    return images, {name: _contract(path, name, *kind, options, len(kinds)) for name, kind in kinds.items()}, unused


def _first(seen: list[tuple[Path, tars.Member]]) -> np.ndarray | None:
    for path, member in seen:
        try:
            return _image(path, member)[2].pixels
        except DecodeError:
            continue
    return None


def _contract(path: Path, modality: str, count: int, dtype: str, options: Options, modalities: int) -> InputContract:
    for fixed in ("chip", "stride", "gsd_m"):
        if getattr(options, fixed) is not None:
            raise InputError(f"{path} is a WebDataset, whose samples stay as they are; leave --{fixed.removesuffix('_m')} out")
    given = [n for n in ("bands", "sensor", "level", "unit", "scale", "add", "nodata") if getattr(options, n) is not None]
    if given and modalities > 1:
        raise InputError(f"{path} has {modalities} modalities, so it is not clear which one --{given[0]} is of; leave it out")
    names = options.bands or band_names(count)
    if len(names) != count:
        raise InputError(f"{path}: {modality} has {count} bands, --bands names {len(names)}")
    return contract(
        modality, [band(name, SENSORS.get(options.sensor or "")) for name in names], dtype, sensor=options.sensor or "unknown",
        level=options.level or "unknown", unit=options.unit or "digital number", nodata=options.nodata,
    )  # fmt: skip


def _item(path: Path, root: Path, number: int, key: str, members: list[tars.Member]) -> Item:
    by_suffix = {member.suffix: member for member in members}
    try:
        told = _meta(path, by_suffix)
        label = label_of(told, _small(path, by_suffix["cls"]) if "cls" in by_suffix else None)
    except DecodeError:  # it is told when the sample's turn comes
        told, label = {}, None
    tar = path.relative_to(root).as_posix()
    split = _SPLIT.findall(tar)
    lat, lon = (value if type(value := told.get(name)) in (int, float) else None for name in ("lat", "lon"))
    time = iso_time(told["time"]) if isinstance(told.get("time"), str) else None
    return Item(key, f"{tar}/{key}", label, (number, tuple(members)), split[-1] if split else None, lat, lon, time)


def _image(path: Path, member: tars.Member) -> tuple[bytes, str, Raster]:
    """Bytes, kind and pixels of a member. Raises DecodeError."""
    data = tars.read(path, member)
    kind = kind_of(member.suffix, data)
    name = f"{path.name}: {member.key}.{member.suffix}"
    if kind is None:
        raise DecodeError(f"{name} is no image")
    if kind == "tif":
        return data, kind, read_raster(data, f"{name}.tif")
    try:
        return data, kind, Raster(decode(data, kind))
    except DecodeError as error:
        raise DecodeError(f"{name}: {error}") from None


def _meta(path: Path, members: dict[str, tars.Member]) -> dict[str, Any]:
    """The sample's JSON, empty where there is none or it is no object."""
    value = plain_json(_small(path, members["json"])) if "json" in members else {}
    return value if isinstance(value, dict) else {}


def _small(path: Path, member: tars.Member) -> bytes:
    if member.size > _MAX_TEXT:
        raise DecodeError(f"{path.name}: {member.key}.{member.suffix} has {member.size} bytes, beyond the limit of {_MAX_TEXT}")
    return tars.read(path, member)


def _listed(value: Any) -> Iterator[str]:
    yield from (text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str))


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _whole(text: str) -> int | None:
    return int(text) if len(text) < 300 else None  # beyond the range of a float
