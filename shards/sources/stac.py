"""STAC items on disk (1.0 with `eo:bands` and `raster:bands`, 1.1 with `bands`), by themselves or through catalogs.

Assets must lie below the folder; of remote ones sources/remote.py makes such. Sources: the STAC specification 1.1.0, and its
extensions eo 2.0.0 and raster 2.0.0 with their earlier fields.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from swath.shards.bands import Band, Unit
from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.sensors import SENSORS, Sensor, band, sensor_of
from swath.shards.sources.cut import Scenes, stated
from swath.shards.sources.folder import files_below
from swath.shards.sources.scene import UNSCALED, Scene, iso_time, read_stack
from swath.shards.sources.source import Options

MAX_BYTES = 1 << 26
RASTERS = (".tif", ".tiff", ".jp2")
NOT_DATA = {"thumbnail", "overview", "visual", "metadata"}


class Stac(Scenes):
    """All items of a folder, or those that a catalog, a collection or a collection of features leads to."""

    def __init__(self, path: Path, options: Options) -> None:
        folder = path.parent if path.is_file() else path
        found = files_below(folder)
        files = frozenset(found.paths)
        texts = [path] if path.is_file() else found.of(".json", ".geojson")
        items = [item for text in texts for item in _items(text, files, folder, follow=path.is_file())]
        unique = {(item.path, item.value["id"]): item for item in items}
        scenes, used = [], set()
        for item in sorted(unique.values(), key=lambda item: item.value["id"]):
            scene, assets = _scene(item, files, folder, options)
            scenes.append(scene)
            used |= {item.path, *assets}
        if not scenes:
            raise InputError(f"{path} holds no STAC items; name the folder or the catalog that does")
        super().__init__(path, options, "stac", scenes, stated(folder, used), found.notes)


@dataclass(frozen=True)
class _Item:
    path: Path
    value: dict[str, Any]


def read_json(path: Path) -> dict[str, Any] | None:
    """The object of a file that speaks of STAC, else None; InputError for one that cannot be read."""
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path}: {path.stat().st_size} bytes of JSON are beyond the limit of {MAX_BYTES}")
    return parse_json(path.read_bytes(), path)


def parse_json(data: bytes, shown: object) -> dict[str, Any] | None:
    """The same of its bytes."""
    if b'"stac_version"' not in data:
        return None
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{shown} cannot be read as JSON ({error}); repair it or remove it") from None
    return value if isinstance(value, dict) else None


def _items(path: Path, files: frozenset[Path], folder: Path, *, follow: bool) -> Iterator[_Item]:
    """Items in a file, and with `follow` in the local files it links to."""
    waiting, seen = [path], set()
    while waiting:
        here = waiting.pop()
        if here in seen or (value := read_json(here)) is None:
            continue
        seen.add(here)
        features = value.get("features") if value.get("type") == "FeatureCollection" else [value]
        for item in features if isinstance(features, list) else []:
            if isinstance(item, dict) and item.get("type") == "Feature":
                if not isinstance(item.get("id"), str) or not isinstance(item.get("assets"), dict):
                    raise InputError(f"{here}: a STAC item has an id (text) and assets (an object)")
                yield _Item(here, item)
        if follow and isinstance(links := value.get("links"), list):
            hrefs = [link.get("href") for link in links if isinstance(link, dict) and link.get("rel") in ("item", "child")]
            waiting += [_local(str(href), here, files, folder, "links to") for href in reversed(hrefs)]


def _shown(href: str) -> str:
    """Without what may be a secret."""
    return href.partition("?")[0].rpartition("@")[2][:120]


def _local(href: str, base: Path, files: frozenset[Path], folder: Path, how: str) -> Path:
    """The file below `folder` that a reference in `base` means; InputError for any other."""
    if "://" in href or href.startswith("/vsi"):
        remedy = "download it and write its relative path, or give one document alone whose assets are all remote"
        raise InputError(f"{base} {how} {_shown(href)}, which is not here; {remedy}")
    inner = PurePosixPath(unquote(href))
    parts = list(base.parent.relative_to(folder).parts)
    for part in inner.parts:
        if part != "..":
            parts.append(part)
        elif not parts:
            parts = [".."]  # above the folder: no file of it
            break
        else:
            parts.pop()
    target = folder.joinpath(*parts)
    if inner.is_absolute() or target not in files:
        raise InputError(f"{base} {how} {href[:120]!r}, which is no file below {folder}")
    return target


def _scene(item: _Item, files: frozenset[Path], folder: Path, options: Options) -> tuple[Scene, list[Path]]:
    name, lookup = item.value["id"], item.path.relative_to(folder).as_posix()
    properties = item.value.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    known = sensor_of(" ".join(str(properties.get(key, "")) for key in ("platform", "constellation")) + f" {name}")
    if options.sensor is not None:
        known = SENSORS.get(options.sensor)
    chosen = _chosen(item, known, options)
    paths = [_local(asset.href, item.path, files, folder, "has an asset at") for asset in chosen]
    values = {(asset.scale, asset.add) for asset in chosen}
    nodata = {asset.nodata for asset in chosen} - {None}
    if len(values) > 1 or len(nodata) > 1:
        raise InputError(f"{item.path}: bands have different scales, offsets or nodata values, which one sample cannot carry")
    bands = tuple(b for asset in chosen for b in asset.bands)
    if len({b.name for b in bands}) < len(bands):
        raise InputError(f"{item.path}: band names repeat ({', '.join(b.name for b in bands)}); give --bands")
    try:
        stack = read_stack(
            [str(p) for p in paths], [p.relative_to(folder).as_posix() for p in paths], tuple(b.name for b in bands)
        )
    except DecodeError as error:
        return Scene(name, lookup, broken=str(error)), paths
    (scale, add), said = values.pop(), "file metadata: scale and offset of the STAC item"
    if (scale, add) == (None, 0.0):
        scale, add, said = stack.scale, stack.add, UNSCALED if stack.scale is None else "file tag: scale and offset"
    if options.scale is not None or options.add is not None:
        scale, add, said = options.scale or scale or 1.0, add if options.add is None else options.add, "--scale and --add"
    level = str(properties.get("processing:level") or properties.get("landsat:correction") or "unknown")
    unit: Unit = "reflectance" if scale is not None and known is not None and known.unit != "dB" else "digital number"
    unit = "dB" if known is not None and known.unit == "dB" else unit
    empty = nodata.pop() if nodata else stack.nodata
    stack = replace(
        stack, bands=bands, modality=known.name if known else "optical",
        sensor=options.sensor or (known.name if known else "unknown"),
        level=options.level or level, unit=options.unit or unit, nodata=empty if options.nodata is None else options.nodata,
        scale=scale, add=add, said=said,
    )  # fmt: skip
    cloud = _number(properties.get("eo:cloud_cover"))
    cloud = None if cloud is None else min(max(round(cloud / 100, 6), 0.0), 1.0)
    time = iso_time(properties.get("datetime") or properties.get("start_datetime"))
    meta = {"product": name} | ({"platform": str(properties["platform"])} if "platform" in properties else {})
    return Scene(name, lookup, (stack,), time=time, cloud=cloud, meta=meta), paths


@dataclass(frozen=True)
class _Asset:
    href: str
    bands: tuple[Band, ...]
    scale: float | None
    add: float
    nodata: float | None


def _chosen(item: _Item, known: Sensor | None, options: Options) -> list[_Asset]:
    """The raster assets with bands, in the sensor's order, or those that --bands names, in its order."""
    assets = [made for key, value in item.value["assets"].items() if (made := _asset(item, key, value, known)) is not None]
    if not assets:
        raise InputError(f"{item.path} has no assets of {', '.join(RASTERS)} with bands or eo:bands")
    if options.bands is None:
        order = list(known.bands) if known else []
        return sorted(assets, key=lambda a: order.index(a.bands[0].name) if a.bands[0].name in order else len(order))
    by_name = {name: a for a in reversed(assets) for name in tuple(b.name for b in a.bands)}
    by_name |= {b.common_name: a for a in reversed(assets) for b in a.bands if b.common_name and b.common_name not in by_name}
    lacking = [name for name in options.bands if name not in by_name]
    if lacking:
        raise InputError(f"{item.path} has no band {', '.join(lacking)}; it has {', '.join(str(n) for n in by_name)}")
    wanted = list(dict.fromkeys(by_name[name] for name in options.bands))
    if sum(len(a.bands) for a in wanted) != len(options.bands):
        raise InputError(
            f"{item.path}: --bands must name all bands of an asset: {', '.join(b.name for a in wanted for b in a.bands)}"
        )
    return wanted


def _asset(item: _Item, key: str, value: object, known: Sensor | None) -> _Asset | None:
    if not isinstance(value, dict) or not isinstance(href := value.get("href"), str):
        raise InputError(f"{item.path}: asset {key!r} has no href")
    roles = value.get("roles") or []
    rows = value.get("bands") or value.get("eo:bands")
    if not href.lower().split("?")[0].endswith(RASTERS) or not isinstance(rows, list) or not isinstance(roles, list):
        return None
    if NOT_DATA & {str(role) for role in roles}:
        return None
    raster = value.get("raster:bands")
    raster = raster if isinstance(raster, list) and len(raster) == len(rows) else [{}] * len(rows)
    bands, radiometry = [], set()
    for number, (row, more) in enumerate(zip(rows, raster, strict=True), 1):
        if not isinstance(row, dict) or not isinstance(more, dict):
            raise InputError(f"{item.path}: asset {key!r} has bands that are no objects")
        name = str(row.get("name") or (key if len(rows) == 1 else f"{key}_{number}"))
        common = row.get("eo:common_name") or row.get("common_name")
        bands.append(_band(name, None if common is None else str(common), row, known))
        values = {**value, **row, **more}
        scale, add = (_number(values.get(f"raster:{k}", more.get(k, row.get(k)))) for k in ("scale", "offset"))
        radiometry.add((scale if (scale, add or 0) != (1, 0) else None, add or 0.0, _number(values.get("nodata"))))
    if len(radiometry) > 1:
        raise InputError(f"{item.path}: the bands of asset {key!r} have different scales, offsets or nodata values")
    return _Asset(href, tuple(bands), *radiometry.pop())


def _band(name: str, common: str | None, row: dict[str, Any], known: Sensor | None) -> Band:
    """As the sensor knows it, by name or else by common name; else with the wavelengths (µm) of the item."""
    for said in (name, common):
        if said and known and (made := band(said, known)).name in known.bands:
            return made
    centre, width = (_number(row.get(f"eo:{k}", row.get(k))) for k in ("center_wavelength", "full_width_half_max"))
    return Band(
        name=name, common_name=common, wavelength_nm=round(centre * 1000, 3) if centre and centre > 0 else None,
        width_nm=round(width * 1000, 3) if width and width > 0 else None,
    )  # fmt: skip


def _number(value: object) -> float | None:
    """A finite number, else None: `nodata` may be the text "nan"."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
