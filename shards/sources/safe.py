"""Sentinel-2 products (`.SAFE`, folders or zips) as published: JPEG 2000 by band at 10, 20 and 60 m, metadata in XML.

The offset of processing baseline 04.00 and later is taken from the product's metadata, never from its date.
Sources: Sentinel-2 Products Specification Document 14.9 and 15.0, §4 (tree, MTD_MSIL1C.xml, MTD_MSIL2A.xml).
"""

import re
import zipfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.sensors import SENSORS
from swath.shards.sources.archive import BROKEN, open_zip, zip_members
from swath.shards.sources.cut import Scenes, stated
from swath.shards.sources.folder import Files, files_below
from swath.shards.sources.markup import MAX_BYTES, parse_xml, texts
from swath.shards.sources.rasters import RAW_RADAR
from swath.shards.sources.scene import Mask, Scene, iso_time, read_stack
from swath.shards.sources.source import Options

_SENSOR = SENSORS["sentinel2"]
_INNER = re.compile(r"^GRANULE/(?P<granule>[^/]+)/IMG_DATA/(?:R\d\dm/)?[^/]*_(?P<band>B\d\d|B8A|SCL)(?:_(?P<gsd>\d\d)m)?\.jp2$")
_IDS = tuple(_SENSOR.bands)  # the metadata count the 13 bands from 0 in this order: 8 is B8A, 9 is B09


@dataclass(frozen=True)
class _Product:
    """A `.SAFE`: its name, paths inside it, how GDAL opens them, and how their bytes are had."""

    name: str
    shown: str
    members: tuple[str, ...]
    opened: Callable[[str], str]
    read: Callable[[str], bytes]


class Safe(Scenes):
    """All Sentinel-2 products below a folder, or one: a `.SAFE` folder or a zip of it. A product is a scene for each granule."""

    def __init__(self, path: Path, options: Options) -> None:
        if path.is_file():
            products, files = _zipped(path, path.parent), [path]
        else:
            found = files_below(path)
            whole = is_safe(path)
            files = [p for p in found.paths if whole or safe_root(p, path) or is_safe_zip(p)]
            products = _folders(path, found) + [made for p in files if is_safe_zip(p) for made in _zipped(p, path)]
        for product in products:
            if not product.name.upper().startswith("S2"):
                what = RAW_RADAR if product.name.upper().startswith("S1") else "is not of Sentinel-2; give products of one kind"
                raise InputError(f"{product.shown} {what}")
        scenes, notes = [], []
        for product in sorted(products, key=lambda p: p.name):
            for scene, lacking in _scenes(product, options):
                scenes.append(scene)
                notes += [f"{scene.name} lacks {', '.join(lacking)}"] if lacking else []
        if not scenes:
            raise InputError(f"{path} holds no Sentinel-2 images (GRANULE/*/IMG_DATA/*.jp2)")
        folder = path.parent if path.is_file() else path
        super().__init__(path, options, "safe", scenes, stated(folder, files), tuple(notes))


def is_safe(folder: Path) -> bool:
    return folder.resolve().name.upper().endswith(".SAFE")


def safe_root(path: Path, folder: Path) -> Path | None:
    """The `.SAFE` folder between `folder` and a file below it."""
    parts = path.relative_to(folder).parts[:-1]
    depth = next((n for n, part in enumerate(parts, 1) if part.upper().endswith(".SAFE")), None)
    return None if depth is None else folder.joinpath(*parts[:depth])


def is_safe_zip(path: Path) -> bool:
    """By its name, or by what its first member is in: downloads are called after the product or by a number."""
    if path.suffix.lower() != ".zip":
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(".SAFE/" in f"{name.upper()}/" for name in archive.namelist()[:1])
    except (OSError, zipfile.BadZipFile):
        return bool(re.match(r"S[123][A-D]_", path.name))


def _folders(folder: Path, files: Files) -> list[_Product]:
    inside: dict[Path, list[str]] = defaultdict(list)
    whole = is_safe(folder)
    for path in files.paths:
        if (root := folder if whole else safe_root(path, folder)) is not None:
            inside[root].append(path.relative_to(root).as_posix())
    return [
        _Product(
            root.resolve().name.removesuffix(".SAFE"),
            (root.relative_to(folder) if root != folder else Path(root.resolve().name)).as_posix(), tuple(members),
            lambda name, root=root: str(root / name), lambda name, root=root: _bytes(root / name),
        )
        for root, members in inside.items()
    ]  # fmt: skip


def _bytes(path: Path) -> bytes:
    if path.stat().st_size > MAX_BYTES:
        raise DecodeError(f"{path.name}: {path.stat().st_size} bytes of XML are beyond the limit of {MAX_BYTES}")
    return path.read_bytes()


def _zipped(path: Path, folder: Path) -> list[_Product]:
    """The products in a zip, whose member list is checked first."""
    with open_zip(path) as archive:
        sizes = zip_members(path, archive)
    if any(c in str(path) for c in "{}"):
        raise InputError(f"{path}: GDAL cannot open a zip with braces in its path; rename it")
    inside: dict[str, list[str]] = defaultdict(list)
    for name in sizes:
        root, mark, inner = name.partition(".SAFE/")
        if mark:
            inside[f"{root}.SAFE"].append(inner)

    def read(name: str) -> bytes:
        if sizes.get(name, (0,))[0] > MAX_BYTES:
            raise DecodeError(f"{path.name}: {name} is beyond the limit of {MAX_BYTES} bytes of XML")
        try:
            with zipfile.ZipFile(path) as archive:
                return archive.read(name)
        except (KeyError, *BROKEN) as error:
            raise DecodeError(f"{path.name}: {name} cannot be read ({error})") from None

    return [
        _Product(
            root.rpartition("/")[2].removesuffix(".SAFE"), f"{path.relative_to(folder).as_posix()}/{root}", tuple(members),
            lambda name, root=root: f"/vsizip/{{{path.resolve()}}}/{root}/{name}", lambda name, root=root: read(f"{root}/{name}"),
        )
        for root, members in inside.items()
    ]  # fmt: skip


@dataclass(frozen=True)
class _Metadata:
    level: str
    baseline: str
    scale: float
    add_dn: float
    said: str
    time: str | None
    cloud: float | None


def _scenes(product: _Product, options: Options) -> list[tuple[Scene, list[str]]]:
    """(scene, bands that it lacks) of each granule; what is damaged is a broken scene."""
    granules: dict[str, dict[str, str]] = defaultdict(dict)
    for member in sorted(product.members):
        if (found := _INNER.match(member)) is None:
            continue
        native = _SENSOR.bands[found["band"]].gsd_m if found["band"] in _SENSOR.bands else 20
        files = granules[found["granule"]]
        if found["band"] not in files or found["gsd"] == f"{native:g}":  # L2A has most bands at coarser sizes too
            files[found["band"]] = member
    try:
        metadata = _read_metadata(product)
    except DecodeError as error:
        return [(Scene(product.name, product.shown, broken=str(error)), [])]
    made = []
    for granule, files in sorted(granules.items()):
        name = product.name if len(granules) == 1 else f"{product.name}/{granule}"
        expected = [b for b in _IDS if b != "B10" or metadata.level == "L1C"]
        wanted = options.bands or tuple(b for b in expected if b in files)
        unknown = [b for b in wanted if b not in expected]
        if unknown:
            raise InputError(f"--bands names {', '.join(unknown)}; Sentinel-2 {metadata.level} has {', '.join(expected)}")
        lacking = [b for b in (options.bands or expected) if b not in files]
        try:
            if not wanted or (options.bands and lacking):
                raise DecodeError(f"lacks {', '.join(lacking)}")
            members = [files[b] for b in wanted]
            stack = read_stack([product.opened(m) for m in members], [f"{product.shown}/{m}" for m in members], wanted)
        except DecodeError as error:
            made.append((Scene(name, product.shown, broken=str(error)), []))
            continue
        stack = replace(
            stack, modality="sentinel2", sensor=options.sensor or "sentinel2", level=options.level or metadata.level,
            unit=options.unit or "reflectance", bands=tuple(_SENSOR.bands[b] for b in wanted),
            nodata=0.0 if options.nodata is None else options.nodata,
            scale=metadata.scale if options.scale is None else options.scale,
            add=metadata.add_dn * metadata.scale if options.add is None else options.add,
            said=metadata.said if options.scale is None and options.add is None else f"--scale and --add, over {metadata.said}",
            mask=Mask(product.opened(files["SCL"]), "SCL") if "SCL" in files else None,
        )  # fmt: skip
        tile = re.search(r"_T(\d\d[A-Z]{3})_", f"{product.name}_{granule}_")
        meta = {"product": product.name, "baseline": metadata.baseline} | ({"tile": tile[1]} if tile else {})
        made.append((Scene(name, product.shown, (stack,), time=metadata.time, cloud=metadata.cloud, meta=meta), lacking))
    return made or [(Scene(product.name, product.shown, broken="has no GRANULE/*/IMG_DATA/*.jp2"), [])]


def _read_metadata(product: _Product) -> _Metadata:
    member = next((m for m in product.members if re.fullmatch(r"MTD_MSIL(1C|2A)\.xml", m)), None)
    if member is None:
        raise DecodeError("has no MTD_MSIL1C.xml or MTD_MSIL2A.xml, which say what its numbers mean")
    level, shown = f"L{member[8:10]}", f"{product.shown}/{member}"
    root = parse_xml(product.read(member), shown)
    divisor = "QUANTIFICATION_VALUE" if level == "L1C" else "BOA_QUANTIFICATION_VALUE"
    tag = "RADIO_ADD_OFFSET" if level == "L1C" else "BOA_ADD_OFFSET"
    quantification = _number(root, divisor, shown)
    baseline = next((text for _, text in texts(root, "PROCESSING_BASELINE")), "")
    offsets = {text for _, text in texts(root, tag)}
    if not re.fullmatch(r"\d\d\.\d\d", baseline):
        raise DecodeError(f"{shown}: PROCESSING_BASELINE is {baseline[:20]!r}")
    if not offsets and baseline >= "04.00" and baseline != "99.99":
        raise DecodeError(f"{shown}: baseline {baseline} has a {tag} for each band, and there is none")
    if len(offsets) > 1:
        raise InputError(f"{shown}: bands have different {tag} ({', '.join(sorted(offsets))}), which one sample cannot carry")
    add = _number(root, tag, shown) if offsets else 0.0
    if quantification <= 0:
        raise DecodeError(f"{shown}: {divisor} is {quantification:g}")
    clouds = [float(t) for _, t in texts(root, "Cloud_Coverage_Assessment") if re.fullmatch(r"\d{1,3}(\.\d*)?", t)]
    said = f"file metadata: (DN {add:+g}) / {quantification:g}, {divisor} and {tag if offsets else f'no {tag}'}, {baseline}"
    return _Metadata(
        level, baseline, 1 / quantification, add, said,
        next((iso_time(text) for _, text in texts(root, "PRODUCT_START_TIME")), None),
        min(round(clouds[0] / 100, 6), 1.0) if clouds else None,
    )  # fmt: skip


def _number(root: ElementTree.Element, name: str, shown: str) -> float:
    found = [text for _, text in texts(root, name)]
    if not found or not re.fullmatch(r"[-+]?\d{1,9}(\.\d*)?", found[0]):
        raise DecodeError(f"{shown}: {name} is {found[0][:20] if found else 'not there'!r}, not a number")
    return float(found[0])
