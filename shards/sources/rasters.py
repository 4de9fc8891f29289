"""GeoTIFF scenes, multi-band or one file per band, cut into chips by windowed reads.

Bands of a coarser grid are repeated onto the finest one (nearest neighbour), so that every DN stays as published.
"""

import hashlib
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from swath.shards.bands import Band, InputContract, Normalisation, Unit
from swath.shards.codec import MAX_VALUES, DecodeError, encode_npy
from swath.shards.errors import InputError
from swath.shards.sensors import SENSORS, band, level_of, sensor_of, split_band
from swath.shards.sources.source import Item, Sample

WHOLE = 256  # px: files up to this size are samples themselves unless --chip says otherwise
CHIP = 64
_BESIDE = ("_landcover", "_valid", "_change", "_sar")


@dataclass(frozen=True)
class Scene:
    """Files of one scene with their band names, in band order; sizes are of the finest grid; `broken` says why not."""

    name: str
    files: tuple[str, ...]
    names: tuple[str, ...] = ()
    height: int = 0
    width: int = 0
    dtype: str = ""
    nodata: float | None = None
    scale: float | None = None
    add: float = 0.0
    gsd_m: tuple[float, ...] = ()
    tags: tuple[tuple[str, str], ...] = ()
    broken: str | None = None


class Rasters:
    """All scenes below a folder, which must have the same bands and dtype."""

    kind = "rasters"

    def __init__(
        self, source: Path, *, chip: int | None, stride: int | None, bands: tuple[str, ...] | None,
        sensor: str | None, level: str | None,
    ) -> None:  # fmt: skip
        self._rasterio = _rasterio()
        self.source, self.dataset = source, source.resolve().name
        paths = sorted(p for p in source.rglob("*") if p.suffix.lower() in (".tif", ".tiff") and not p.is_symlink())
        paths = [p for p in paths if not p.stem.endswith(_BESIDE)]
        if not paths:
            raise InputError(f"{source} holds no GeoTIFF scenes; name the folder that does")
        stated = [(p.relative_to(source).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in source.rglob("*.*")]
        self.fingerprint = hashlib.sha256(repr(sorted(stated)).encode()).hexdigest()
        self.scenes = [self._scene(name, files, bands) for name, files in sorted(_groups(source, paths).items())]
        whole = [s for s in self.scenes if s.broken is None]
        if not whole:
            raise InputError(f"none of the {len(self.scenes)} scenes in {source} can be read ({self.scenes[0].broken})")
        first = whole[0]
        for scene in whole:
            if (scene.names, scene.dtype) != (first.names, first.dtype):
                raise InputError(
                    f"scenes differ: {first.files[0]} has {', '.join(first.names)} in {first.dtype}, {scene.files[0]} has "
                    f"{', '.join(scene.names)} in {scene.dtype}; make shards from one kind at a time"
                )
        self.sensor = SENSORS.get(sensor or "") or sensor_of(f"{dict(first.tags).get('SENSOR', '')} {first.files[0]}")
        self.contract = self._contract(first, whole, sensor, level)
        small = all(max(s.height, s.width) <= WHOLE for s in whole)
        side = chip or (WHOLE if small else CHIP)
        self.items = [item for scene in self.scenes for item in _chips(scene, side, stride or side)]
        self.codes = self._codes(whole)
        self.classes = tuple(self.codes[code] for code in sorted(self.codes))
        self._open = lru_cache(maxsize=128)(self._rasterio.open)

    def read(self, item: Item) -> Sample:
        scene, top, left, height, width = item.place
        if scene.broken is not None:
            raise DecodeError(scene.broken)
        pixels = self._pixels(scene, top, left, height, width)
        valid = np.isfinite(pixels).all(axis=0) if pixels.dtype.kind == "f" else np.ones((height, width), bool)
        if self.contract.nodata is not None:
            valid &= (pixels != self.contract.nodata).all(axis=0)
        codes = valid.astype(np.uint8)
        if (mask := self._beside(scene, "_valid", top, left, height, width)) is not None:
            codes = np.where(valid, mask, 0).astype(np.uint8)
        scale, add = self._radiometry(scene)
        meta = self._place(scene, top, left, height, width)
        label = None
        if (cover := self._beside(scene, "_landcover", top, left, height, width)) is not None:
            label, share = self._majority(cover[valid])
            meta["landcover_share"] = share
        return Sample(pixels, encode_npy(pixels), "npy", None if (codes == 1).all() else codes, scale, add, label, meta)

    def _scene(self, name: str, files: list[Path], given: tuple[str, ...] | None) -> Scene:
        """Headers only. What cannot be opened is kept as a broken scene, to be listed."""
        shown = tuple(p.relative_to(self.source).as_posix() for p in files)
        try:
            opened = [self._rasterio.open(p) for p in files]
        except (self._rasterio.errors.RasterioError, OSError) as error:
            return Scene(name, shown, broken=f"cannot be opened: {error}")
        try:
            fine = max(opened, key=lambda f: f.height * f.width)
            names = _names(opened, shown, given)
            dtypes = {d for f in opened for d in f.dtypes}
            if len(dtypes) > 1:
                by_file = ", ".join(f"{n} {f.dtypes[0]}" for n, f in zip(shown, opened, strict=True))
                raise InputError(f"bands differ in dtype: {by_file}")
            for file, label in zip(opened, shown, strict=True):
                if not np.allclose(file.bounds, fine.bounds, rtol=0, atol=abs(fine.transform.a) / 2):
                    raise InputError(f"{label} and {Path(fine.name).name} do not cover the same ground; bands must share bounds")
            scales = {(s, o) for f in opened for s, o in zip(f.scales, f.offsets, strict=True)}
            if len(scales) > 1:
                raise InputError(f"{shown[0]}: bands have different scales or offsets, which one sample cannot carry")
            scale, add = scales.pop()
            tags = opened[0].tags()
            tagged = (scale, add) != (1.0, 0.0)
            return Scene(
                name, shown, names, fine.height, fine.width, dtypes.pop(), opened[0].nodata, scale if tagged else None, add,
                tuple(_gsd(f) for f in opened for _ in range(f.count)), tuple(sorted(tags.items())),
            )  # fmt: skip
        finally:
            for file in opened:
                file.close()

    def _contract(self, first: Scene, scenes: list[Scene], sensor: str | None, level: str | None) -> InputContract:
        known, tags = self.sensor, dict(first.tags)
        bands = tuple(_native(band(n, known), gsd) for n, gsd in zip(first.names, first.gsd_m, strict=True))
        unit: Unit = known.unit if known else "digital number"
        if known and unit == "reflectance" and first.dtype == "uint8" and first.scale is None:
            unit = "digital number"
        if known and known.name == "landsat8" and first.scale is not None:
            unit = "reflectance"
        nodata = first.nodata
        if any(s.nodata != nodata and not (_nan(s.nodata) and _nan(nodata)) for s in scenes):
            raise InputError(f"scenes in {self.source} declare different nodata values; make shards from one kind at a time")
        if nodata is None and known is not None and first.dtype != "uint8":
            nodata = known.nodata
        finest = {min(s.gsd_m) for s in scenes}
        none = tuple(0.0 for _ in bands)
        return InputContract(
            modality=known.name if known else "optical", sensor=sensor or (known.name if known else "unknown"),
            level=level or tags.get("LEVEL") or level_of(first.files[0]) or "unknown", unit=unit, bands=bands,
            normalisation=Normalisation(mean=none, std=none, pixels=tuple(0 for _ in bands)), dtype=first.dtype,
            nodata=None if nodata is None or not np.isfinite(nodata) else nodata,
            gsd_m=finest.pop() if len(finest) == 1 else None,
            resampling="nearest to the finest grid" if len(set(first.gsd_m)) > 1 else None,
        )  # fmt: skip

    def _radiometry(self, scene: Scene) -> tuple[float, float]:
        """physical = DN · scale + add. The file's own scale wins; Sentinel Hub's raw exports are reflectance · 65535."""
        if scene.scale is not None:
            return scene.scale, scene.add
        if self.contract.unit != "reflectance" or self.sensor is None or scene.dtype not in ("uint16", "int16"):
            return 1.0, 0.0
        scale = 1 / 65535 if "(Raw)" in scene.files[0] else self.sensor.scale
        tags = dict(scene.tags)
        return scale, float(tags.get("BOA_ADD_OFFSET", tags.get("RADIO_ADD_OFFSET", 0))) * scale

    def _pixels(self, scene: Scene, top: int, left: int, height: int, width: int) -> np.ndarray:
        parts = [self._window(self.source / f, scene, top, left, height, width) for f in scene.files]
        return np.ascontiguousarray(np.concatenate(parts))

    def _window(self, path: Path, scene: Scene, top: int, left: int, height: int, width: int) -> np.ndarray:
        """(C, height, width) on the scene's finest grid, from a file that may be coarser."""
        try:
            file = self._open(path)
            rows = (2 * np.arange(top, top + height) + 1) * file.height // (2 * scene.height)
            columns = (2 * np.arange(left, left + width) + 1) * file.width // (2 * scene.width)
            window = ((int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1))
            read = file.read(window=window)
        except (self._rasterio.errors.RasterioError, OSError) as error:
            raise DecodeError(f"{path.name}: {error}") from None
        return read[:, rows - rows[0]][:, :, columns - columns[0]]

    def _beside(self, scene: Scene, suffix: str, top: int, left: int, height: int, width: int) -> np.ndarray | None:
        path = self._path_beside(scene, suffix)
        return None if path is None else self._window(path, scene, top, left, height, width)[0]

    def _path_beside(self, scene: Scene, suffix: str) -> Path | None:
        path = self.source / f"{scene.name}{suffix}.tif"
        return path if path.exists() else None

    def _codes(self, scenes: list[Scene]) -> dict[int, str]:
        """Land-cover code → class, the same in all maps."""
        codes: dict[int, str] = {}
        for scene in scenes:
            if (path := self._path_beside(scene, "_landcover")) is None:
                continue
            try:
                with self._rasterio.open(path) as file:
                    named = _classes(file.tags().get("CLASSES", ""))
            except (self._rasterio.errors.RasterioError, OSError) as error:
                raise InputError(f"land-cover map {path} cannot be read ({error})") from None
            if codes and named != codes:
                raise InputError(f"{path}: its classes are not those of the maps before it")
            codes = named
        return codes

    def _majority(self, cover: np.ndarray) -> tuple[str | None, float]:
        """The class that covers most of the valid pixels (1-D), if at least half, and its share."""
        counts = np.bincount(cover, minlength=1)
        counts[0] = 0
        share = float(counts.max() / max(len(cover), 1))
        return (self.codes.get(int(counts.argmax())) if share >= 0.5 else None), round(share, 4)

    def _place(self, scene: Scene, top: int, left: int, height: int, width: int) -> dict[str, Any]:
        from rasterio.warp import transform

        fine = max((self._open(self.source / f) for f in scene.files), key=lambda f: f.height * f.width)
        west, north = fine.transform @ (left, top)
        east, south = fine.transform @ (left + width, top + height)
        meta: dict[str, Any] = {
            "source": scene.files[0], "window": [top, left, height, width], "gsd_m": min(scene.gsd_m),
            "crs": fine.crs.to_string() if fine.crs else None, "bounds": [west, south, east, north],
        }  # fmt: skip
        if fine.crs:
            lon, lat = transform(fine.crs, "EPSG:4326", [(west + east) / 2], [(north + south) / 2])
            meta |= {"lat": round(lat[0], 7), "lon": round(lon[0], 7)}
        beside = self.source / f"{scene.name}_labels_metadata.json"
        notes = json.loads(beside.read_text()) if beside.exists() else {}
        if isinstance(notes.get("labels"), list):
            meta["labels"] = notes["labels"]
        found = re.search(r"\d{4}-\d\d-\d\d|\d{8}T\d{6}", Path(scene.files[0]).name)
        time = dict(scene.tags).get("ACQUIRED") or notes.get("acquisition_date") or (found[0] if found else None)
        return meta | ({"time": time} if time else {})


def _rasterio() -> Any:
    try:
        import rasterio
        import rasterio.errors
    except ImportError:
        raise InputError("reading GeoTIFF needs rasterio: pip install 'swath[geo]'") from None
    return rasterio


def _groups(source: Path, paths: list[Path]) -> dict[str, list[Path]]:
    """Scene name (a path without extension) → its files: one, or one per band in the sensor's order."""
    groups: dict[str, list[tuple[tuple[int, str], Path]]] = defaultdict(list)
    for path in paths:
        inner = path.relative_to(source)
        single = split_band(path.stem)
        scene, name = single or (path.stem, "")
        groups[(inner.parent / scene).as_posix()].append((_spectral(name), path))
    return {name: [p for _, p in sorted(files)] for name, files in groups.items()}


def _spectral(name: str) -> tuple[float, str]:
    found = re.search(r"(\d+)(A?)$", name)
    number = float(found[1]) + 0.5 * bool(found[2]) if found else {"VV": 0, "VH": 1, "HH": 2, "HV": 3}.get(name, 0)
    return number, name


def _names(opened: list[Any], shown: tuple[str, ...], given: tuple[str, ...] | None) -> tuple[str, ...]:
    """Band names: --bands, else descriptions, else the file names, else red, green, blue for 8-bit triples."""
    count = sum(f.count for f in opened)
    if given is not None:
        if len(given) != count:
            raise InputError(f"{shown[0]} has {count} bands, --bands names {len(given)}: {', '.join(given)}")
        return given
    described = [d for f in opened for d in f.descriptions]
    if all(described):
        names = tuple(described)
    elif count == len(opened) and all(split_band(Path(n).stem) for n in shown):
        names = tuple((split_band(Path(n).stem) or ("", ""))[1] for n in shown)
    elif count == 3 and len(opened) == 1 and opened[0].dtypes[0] == "uint8":
        names = ("red", "green", "blue")
    else:
        raise InputError(f"{shown[0]} has {count} bands of {opened[0].dtypes[0]} without names; give --bands with {count} names")
    if len(set(names)) < count:
        raise InputError(f"{shown[0]}: band names repeat ({', '.join(names)}); give --bands")
    return names


def _gsd(file: Any) -> float:
    """Metres per pixel; degrees are turned into metres at the scene's latitude."""
    x, y = file.res
    if file.crs and file.crs.is_geographic:
        y, x = y * 111_320, x * 111_320 * np.cos(np.radians((file.bounds.top + file.bounds.bottom) / 2))
    return round(float(np.sqrt(abs(x * y))), 2)


def _native(known: Band, gsd: float) -> Band:
    """The coarser of what the sensor resolves and what the file has."""
    return known.model_copy(update={"gsd_m": max(known.gsd_m or 0, gsd)})


def _nan(value: float | None) -> bool:
    return value is not None and bool(np.isnan(value))


def _chips(scene: Scene, side: int, stride: int) -> list[Item]:
    """Windows that lie wholly inside; scenes smaller than a chip are one, as they are. What remains at edges is left."""
    if scene.broken is not None:
        return [Item(scene.name, scene.files[0], None, (scene, 0, 0, 0, 0))]
    height, width = min(side, scene.height), min(side, scene.width)
    if height * width * len(scene.names) > MAX_VALUES:
        raise InputError(f"{scene.files[0]}: a chip of {height}×{width} is beyond {MAX_VALUES} values; give a smaller --chip")
    tops, lefts = (range(0, full - cut + 1, stride) for full, cut in ((scene.height, height), (scene.width, width)))
    alone = len(tops) * len(lefts) == 1
    lookup = scene.name if len(scene.files) > 1 else scene.files[0]
    return [
        Item(scene.name if alone else f"{scene.name}_y{y:05d}_x{x:05d}", lookup, None, (scene, y, x, height, width))
        for y in tops
        for x in lefts
    ]


def _classes(text: str) -> dict[int, str]:
    """`1=water,2=forest`, `water,forest` (codes from 1), or a JSON list or object of either."""
    if text.startswith(("[", "{")):
        made = json.loads(text)
        return {int(k): str(v) for k, v in (made.items() if isinstance(made, dict) else enumerate(made, 1))}
    named = [part.partition("=") for part in text.split(",") if part]
    return {int(a) if mark else code: (b if mark else a).strip() for code, (a, mark, b) in enumerate(named, 1)}
