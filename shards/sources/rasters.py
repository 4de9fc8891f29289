"""GeoTIFF scenes, multi-band or one file per band, cut into chips by windowed reads.

Bands of a coarser grid are repeated onto the finest one (nearest neighbour), so that every DN stays as published.
"""

import hashlib
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from swath.shards.bands import Band, InputContract, Normalisation, Unit
from swath.shards.codec import MAX_VALUES, DecodeError, encode_npy
from swath.shards.errors import InputError
from swath.shards.sensors import SENSORS, band, level_of, sensor_of
from swath.shards.sources.beside import METADATA, left_out, split_beside
from swath.shards.sources.folder import TIFF, files_below
from swath.shards.sources.scene import Scene, group, load_rasterio, open_raster, raster_errors, read_scene, scene_name
from swath.shards.sources.source import Item, Sample

WHOLE = 256  # px: files up to this size are samples themselves unless --chip says otherwise
CHIP = 64
_RAW = "(Raw)"  # in the file names of Sentinel Hub's exports, whose DN are reflectance · 65535


class Rasters:
    """All scenes below a folder, which must have the same bands and dtype."""

    kind = "rasters"

    def __init__(
        self, source: Path, *, chip: int | None, stride: int | None, bands: tuple[str, ...] | None,
        sensor: str | None, level: str | None,
    ) -> None:  # fmt: skip
        load_rasterio()
        self.source, self.dataset = source, source.resolve().name
        files = files_below(source)
        tiffs = files.of(*TIFF)
        paths, beside = split_beside(tiffs, {p: scene_name(source, p) for p in tiffs})
        if not paths:
            raise InputError(f"{source} holds no GeoTIFF scenes; name the folder that does")
        texts = [p for p in files.paths if p.name.endswith(METADATA)]
        beside |= {p.relative_to(source).as_posix(): p for p in texts}
        stated = [(p.relative_to(source).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in (*tiffs, *texts)]
        self.fingerprint = hashlib.sha256(repr(sorted(stated)).encode()).hexdigest()
        self.scenes = [read_scene(source, name, members, beside, bands) for name, members in group(source, paths).items()]
        whole = [s for s in self.scenes if s.broken is None]
        if not whole:
            raise InputError(f"none of the {len(self.scenes)} scenes in {source} can be read ({self.scenes[0].broken})")
        first = whole[0]
        self.sensor = SENSORS.get(sensor or "") or sensor_of(f"{first.tags.get('SENSOR', '')} {first.files[0]}")
        _check_alike(whole)
        self.contract = self._contract(first, whole, sensor, level)
        radiometry = {scene.name: self._radiometry(scene) for scene in whole}
        small = all(max(s.height, s.width) <= WHOLE for s in whole)
        side = chip or (WHOLE if small else CHIP)
        self.items = [item for scene in self.scenes for item in _chips(scene, side, stride or side)]
        self.codes = _codes(whole)
        self.classes = tuple(self.codes[code] for code in sorted(self.codes))
        pictures = files.of(".jpg", ".jpeg", ".png")
        self.notes = (
            *files.notes,
            *left_out(beside),
            *([f"{len(pictures)} JPEG or PNG files left out: the folder is read as GeoTIFF scenes"] if pictures else []),
            *_told(whole, radiometry),
        )
        self._open = lru_cache(maxsize=128)(open_raster)
        self._errors = raster_errors()

    def read(self, item: Item) -> Sample:
        scene, *window = item.place
        if scene.broken is not None:
            raise DecodeError(scene.broken)
        pixels = np.ascontiguousarray(np.concatenate([self._window(self.source / f, scene, *window) for f in scene.files]))
        valid = np.ones(pixels.shape[1:], bool)
        if pixels.dtype.kind == "f":
            valid &= np.isfinite(pixels).all(axis=0)
        if self.contract.nodata is not None:
            valid &= (pixels != self.contract.nodata).all(axis=0)
        codes = valid.astype(np.uint8)
        if scene.beside.mask is not None:
            codes *= self._window(scene.beside.mask, scene, *window)[0]
        meta, label = self._place(scene, *window), None
        if scene.beside.cover is not None:
            label, share = self._majority(self._window(scene.beside.cover, scene, *window)[0][valid])
            meta["landcover_share"] = share
        scale, add, scale_source = self._radiometry(scene)
        mask = None if (codes == 1).all() else codes
        return Sample(pixels, encode_npy(pixels), "npy", mask, scale, add, scale_source, label, meta)

    def _contract(self, first: Scene, scenes: list[Scene], sensor: str | None, level: str | None) -> InputContract:
        known = self.sensor
        bands = tuple(_native(band(n, known), gsd) for n, gsd in zip(first.names, first.gsd_m, strict=True))
        if len({b.name for b in bands}) < len(bands):
            raise InputError(f"{first.files[0]}: bands {', '.join(first.names)} are not all different ones; give --bands")
        unit: Unit = known.unit if known else "digital number"
        if known and unit == "reflectance" and first.dtype == "uint8" and first.scale is None:
            unit = "digital number"
        if known and known.name == "landsat8" and first.scale is not None:
            unit = "reflectance"
        tagged = next((s for s in scenes if s.scale is not None), None)
        bare = next((s for s in scenes if s.scale is None), None)
        if tagged and bare and not (known and known.unit == "reflectance" and first.dtype in ("uint16", "int16")):
            raise InputError(
                f"scenes differ: {tagged.files[0]} has a scale or an offset, {bare.files[0]} has none; "
                "make shards from one kind at a time"
            )
        nodata = first.nodata
        if any(s.nodata != nodata for s in scenes):
            raise InputError(f"scenes in {self.source} declare different nodata values; make shards from one kind at a time")
        if nodata is None and known is not None and first.dtype != "uint8":
            nodata = known.nodata
        finest = {s.finest_m for s in scenes}
        none = tuple(0.0 for _ in bands)
        return InputContract(
            modality=known.name if known else "optical", sensor=sensor or (known.name if known else "unknown"),
            level=level or first.tags.get("LEVEL") or level_of(first.files[0]) or "unknown", unit=unit, bands=bands,
            normalisation=Normalisation(mean=none, std=none, pixels=tuple(0 for _ in bands)), dtype=first.dtype,
            nodata=None if nodata is None or not np.isfinite(nodata) else nodata,
            gsd_m=finest.pop() if len(finest) == 1 else None,
            resampling="nearest to the finest grid" if len(set(first.gsd_m)) > 1 else None,
        )  # fmt: skip

    def _radiometry(self, scene: Scene) -> tuple[float, float, str]:
        """(scale, add, who says so) of physical = DN · scale + add. The file's own scale wins over what is customary."""
        if scene.scale is not None:
            return scene.scale, scene.add, "file tag: scale and offset"
        if self.contract.unit != "reflectance" or self.sensor is None or scene.dtype not in ("uint16", "int16"):
            return 1.0, 0.0, "none: values as stored"
        scale, said = self.sensor.scale, f"sensor default: {self.sensor.name} DN are reflectance · {1 / self.sensor.scale:g}"
        if _RAW in scene.files[0]:
            scale, said = 1 / 65535, f"guessed from the file name: {_RAW} means reflectance · 65535"
        name = next((n for n in ("BOA_ADD_OFFSET", "RADIO_ADD_OFFSET") if n in scene.tags), None)
        if name is None:
            return scale, 0.0, said
        if not re.fullmatch(r"\s*[-+]?\d{1,9}(\.\d*)?\s*", scene.tags[name]):
            raise InputError(f"{scene.files[0]}: its tag {name} is {scene.tags[name]!r}, not a number of DN")
        return scale, float(scene.tags[name]) * scale, f"{said}; file tag: {name}"

    def _window(self, path: Path, scene: Scene, top: int, left: int, height: int, width: int) -> np.ndarray:
        """(C, height, width) on the scene's finest grid, from a file that may be coarser."""
        try:
            file = self._open(path)
            rows = (2 * np.arange(top, top + height) + 1) * file.height // (2 * scene.height)
            columns = (2 * np.arange(left, left + width) + 1) * file.width // (2 * scene.width)
            window = ((int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1))
            read = file.read(window=window)
        except self._errors as error:
            raise DecodeError(f"{path.name}: {error.__cause__ or error}") from None
        return read[:, rows - rows[0]][:, :, columns - columns[0]]

    def _majority(self, cover: np.ndarray) -> tuple[str | None, float]:
        """The class that covers most of the valid pixels (1-D), if at least half, and its share."""
        counts = np.bincount(cover, minlength=1)
        counts[0] = 0
        share = float(counts.max() / max(len(cover), 1))
        return (self.codes.get(int(counts.argmax())) if share >= 0.5 else None), round(share, 4)

    def _place(self, scene: Scene, top: int, left: int, height: int, width: int) -> dict[str, Any]:
        from rasterio.warp import transform
        from rasterio.windows import Window, bounds

        meta: dict[str, Any] = {"source": scene.files[0], "window": [top, left, height, width]}
        try:
            fine = max((self._open(self.source / f) for f in scene.files), key=lambda f: f.height * f.width)
            if fine.crs:
                west, south, east, north = bounds(Window(left, top, width, height), fine.transform)  # pyright: ignore[reportCallIssue]
                degrees = transform(fine.crs, "EPSG:4326", [(west + east) / 2], [(north + south) / 2])
                meta |= {"crs": fine.crs.to_string(), "bounds": [west, south, east, north], "gsd_m": scene.finest_m}
                meta |= {"lat": round(degrees[1][0], 7), "lon": round(degrees[0][0], 7)}
        except self._errors as error:
            raise DecodeError(f"{scene.files[0]}: its place cannot be told ({error})") from None
        if scene.beside.labels is not None:
            meta["labels"] = list(scene.beside.labels)
        found = re.search(r"\d{4}-\d\d-\d\d|\d{8}T\d{6}", Path(scene.files[0]).name)
        time = scene.tags.get("ACQUIRED") or scene.beside.time or (found[0] if found else None)
        return meta | ({"time": time} if time else {})


def _check_alike(scenes: list[Scene]) -> None:
    first = scenes[0]
    for scene in scenes:
        if (scene.names, scene.dtype) == (first.names, first.dtype):
            continue
        pairs = ((first, scene), (scene, first)) if set(first.names) & set(scene.names) else ()
        lacking = [
            f"{b.name} lacks {', '.join(n for n in a.names if n not in b.names)}" for a, b in pairs if set(a.names) - set(b.names)
        ]
        raise InputError(
            f"scenes differ: {first.name} has {', '.join(first.names)} in {first.dtype}, {scene.name} has "
            f"{', '.join(scene.names)} in {scene.dtype}{f' ({lacking[0]})' if lacking else ''}; "
            "make shards from one kind at a time"
        )


def _codes(scenes: list[Scene]) -> dict[int, str]:
    """Land-cover code → class, the same in all maps."""
    mapped = [s for s in scenes if s.beside.cover is not None]
    for scene in mapped:
        if scene.beside.codes != mapped[0].beside.codes:
            raise InputError(f"{scene.beside.cover}: its classes are not those of {mapped[0].beside.cover}")
    return dict(mapped[0].beside.codes) if mapped else {}


def _told(scenes: list[Scene], radiometry: dict[str, tuple[float, float, str]]) -> list[str]:
    """What was assumed, and of how many scenes."""
    said = [source for _, _, source in radiometry.values()]
    told = [f"scale of {said.count(s)} scenes – {s}" for s in sorted(set(said)) if not s.startswith(("none", "file tag"))]
    lost = sum(s.finest_m is None for s in scenes)
    if lost:
        told.append(f"{lost} scenes have no georeference: their samples have no place and no GSD")
    unnamed = sum(s.beside.cover is not None and not s.beside.codes for s in scenes)
    if unnamed:
        told.append(f"{unnamed} land-cover maps have no CLASSES tag: their samples have no label")
    return told


def _native(known: Band, gsd: float | None) -> Band:
    """The coarser of what the sensor resolves and what the file has."""
    return known.model_copy(update={"gsd_m": max(known.gsd_m or 0, gsd or 0) or None})


def _chips(scene: Scene, side: int, stride: int) -> list[Item]:
    """Windows that lie wholly inside; scenes smaller than a chip are one, as they are. What remains at edges is left."""
    if scene.broken is not None:
        return [Item(scene.name, scene.files[0], None, (scene, 0, 0, 0, 0))]
    height, width = min(side, scene.height), min(side, scene.width)
    if height * width * len(scene.names) > MAX_VALUES:
        raise InputError(f"{scene.files[0]}: a chip of {height}×{width} is beyond {MAX_VALUES} values; give a smaller --chip")
    tops, lefts = (range(0, full - cut + 1, stride) for full, cut in ((scene.height, height), (scene.width, width)))
    alone = len(tops) * len(lefts) == 1
    lookup = scene.files[0] if len(scene.files) == 1 else scene.name
    return [
        Item(scene.name if alone else f"{scene.name}_y{y:05d}_x{x:05d}", lookup, None, (scene, y, x, height, width))
        for y in tops
        for x in lefts
    ]
