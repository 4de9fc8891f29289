"""What the headers of a scene's files say. A scene is one or several stacks of bands over the same ground."""

import re
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, Literal

import numpy as np

from swath.shards.bands import Band, Unit
from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.sensors import split_band
from swath.shards.sources.parts import closed_at_exit, opener_of, reached

MAX_PIXELS = 1 << 34  # of a scene, 131,072 × 131,072: what declares more is a bomb or wants to be cut before
MAX_BLOCK = 1 << 30  # bytes that must be decoded at once to see one pixel
DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64")
UNSCALED = "none: values as stored"
_DRIVERS = {".tif": "GTiff", ".tiff": "GTiff", ".jp2": "JP2OpenJPEG", ".vrt": "VRT", ".nc": "netCDF"}


@dataclass(frozen=True)
class Grid:
    """Pixels on the ground; `transform` is rasterio's affine, `crs` None without georeference."""

    height: int
    width: int
    transform: Any
    crs: Any

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east, north for grids that are not rotated."""
        (west, north), (east, south) = self.at(0, 0), self.at(self.width, self.height)
        return west, south, east, north

    def at(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Ground coordinates of pixel coordinates, numbers or arrays."""
        t = self.transform
        return t.a * x + t.b * y + t.c, t.d * x + t.e * y + t.f

    def window(self, top: int, left: int, height: int, width: int) -> "Grid":
        """A part of it."""
        t, (x, y) = self.transform, self.at(left, top)
        return Grid(height, width, type(t)(t.a, t.b, x, t.d, t.e, y), self.crs)

    @cached_property
    def pixel_m(self) -> tuple[float, float] | None:
        """Metres per pixel along x and y; degrees are turned into metres at the scene's latitude."""
        if self.crs is None:
            return None
        t = self.transform
        x, y = float(np.hypot(t.a, t.d)), float(np.hypot(t.b, t.e))
        if self.crs.is_geographic:
            _, south, _, north = self.bounds
            return x * 111_320 * float(np.cos(np.radians((north + south) / 2))), y * 111_320
        factor = self.crs.linear_units_factor[1]
        return x * factor, y * factor

    @property
    def gsd_m(self) -> float | None:
        return None if self.pixel_m is None else round(float(np.sqrt(self.pixel_m[0] * self.pixel_m[1])), 2)

    def resized(self, gsd_m: float) -> "Grid":
        """The same ground, from the same corner, in pixels of `gsd_m`; a last partial row or column is left."""
        assert self.pixel_m is not None
        x, y = (gsd_m / metres for metres in self.pixel_m)
        height, width = int(self.height / y + 1e-6), int(self.width / x + 1e-6)
        t = self.transform
        return Grid(height, width, type(t)(t.a * x, t.b * y, t.c, t.d * x, t.e * y, t.f), self.crs)

    def centres(self, tops: np.ndarray, lefts: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray] | None:
        """(latitudes, longitudes) of windows, degrees; None without georeference."""
        if self.crs is None:
            return None
        from rasterio.warp import transform

        xs, ys = self.at(lefts + width / 2, tops + height / 2)
        lons, lats = transform(self.crs, "EPSG:4326", xs.tolist(), ys.tolist())[:2]
        return np.round(lats, 7), np.round(lons, 7)


@dataclass(frozen=True)
class Mask:
    """A band that says what each pixel is; `kind` says in which code: ours, Sentinel-2's classification, Landsat's bits."""

    path: str
    kind: Literal["valid", "SCL", "QA_PIXEL"]


@dataclass(frozen=True)
class Stack:
    """One modality: all bands of `paths` (as GDAL opens them) in order, on the finest of their grids.

    `scale` is None where the files have none; `gsd_m`, by band, is None without georeference. What the numbers mean
    (`modality` to `said`) is for whoever knows the product to fill in.
    """

    paths: tuple[str, ...]
    shown: tuple[str, ...]
    bands: tuple[Band, ...]
    grid: Grid
    dtype: str
    gsd_m: tuple[float | None, ...]
    nodata: float | None = None
    scale: float | None = None
    add: float = 0.0
    tags: dict[str, str] = field(default_factory=dict)
    modality: str = "optical"
    sensor: str = "unknown"
    level: str = "unknown"
    unit: Unit = "digital number"
    said: str = UNSCALED
    mask: Mask | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(band.name for band in self.bands)


@dataclass(frozen=True)
class Scene:
    """`stacks` over the ground of the first; a land-cover map with its code → class; a map of what changed until the last date of
    its place; what is known of the whole scene.

    `lookup` is the path a split file knows it by. `broken` says why the scene cannot be read, and then nothing else counts.
    """

    name: str
    lookup: str
    stacks: tuple[Stack, ...] = ()
    cover: str | None = None
    codes: tuple[tuple[int, str], ...] = ()
    change: str | None = None
    time: str | None = None
    cloud: float | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    broken: str | None = None


def iso_time(text: object) -> str | None:
    """ISO 8601 of what looks like a date, or None: `20170617T113321` becomes `2017-06-17T11:33:21`."""
    try:
        if re.fullmatch(r"\d{4}-?\d\d-?\d\d", str(text)):
            return datetime.fromisoformat(str(text)).date().isoformat()
        return datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", str(text))).isoformat()
    except ValueError:
        return None


def load_rasterio() -> Any:
    """The module; it is an extra, since only scenes need it."""
    try:
        import rasterio
        import rasterio.errors
    except ImportError:
        raise InputError("reading scenes needs rasterio: pip install 'swath[geo]'") from None
    return rasterio


def raster_errors() -> tuple[type[Exception], ...]:
    """Whatever reading a damaged file may raise."""
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import RasterioError

    return RasterioError, CPLE_BaseError, OSError, UnicodeEncodeError  # a name that is no UTF-8


def open_raster(path: str) -> Any:
    """rasterio's dataset, by the one driver that the name asks for: what a file holds does not choose the code that reads it.

    That a file has no georeference is told once for all, not by a warning each. A file that is on a server is read in parts;
    put `reached` around what is done with it.
    """
    rasterio = load_rasterio()
    suffix = path[path.rfind(".") :].lower() if "." in path else ""
    driver = "netCDF" if path.startswith("netcdf:") else _DRIVERS.get(suffix, "ENVI")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        if (opener := opener_of(path)) is None:
            return rasterio.open(path, driver=driver)
        with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"):  # files beside it are files by themselves
            return closed_at_exit(rasterio.open(path, driver=driver, opener=opener))


def read_stack(paths: Sequence[str], shown: Sequence[str], given: tuple[str, ...] | None = None) -> Stack:
    """Headers only. DecodeError for what cannot be opened, InputError for what contradicts itself."""
    with reached(), ExitStack() as held:
        try:
            opened = [held.enter_context(open_raster(path)) for path in paths]
        except raster_errors() as error:
            raise DecodeError(f"cannot be opened: {error}") from None
        for file, label in zip(opened, shown, strict=True):
            if (bomb := _bomb(file)) is not None:
                raise DecodeError(f"{label}: {bomb}")
        fine = max(opened, key=lambda f: f.height * f.width)
        bands = _bands(opened, shown, given)
        dtype = _dtype(opened, shown)
        _check_ground(opened, shown, fine)
        nodata = {v for f in opened for v in f.nodatavals if v is not None and not np.isnan(v)}
        if len(nodata) > 1:
            raise InputError(f"{shown[0]}: bands declare different nodata values ({', '.join(f'{v:g}' for v in sorted(nodata))})")
        scale, add = _scale(opened, shown[0])
        return Stack(
            tuple(paths), tuple(shown), bands, grid_of(fine), dtype,
            tuple(grid_of(f).gsd_m for f in opened for _ in range(f.count)), nodata.pop() if nodata else None, scale, add,
            dict(sorted(opened[0].tags().items())),
        )  # fmt: skip


def grid_of(file: Any) -> Grid:
    return Grid(file.height, file.width, file.transform, file.crs)


def _bomb(file: Any) -> str | None:
    """Why reading a window of the file could exhaust the memory."""
    if file.height * file.width > MAX_PIXELS:
        return f"declared size {file.width}×{file.height} is beyond the limit of {MAX_PIXELS} pixels"
    sizes = [h * w * np.dtype(d).itemsize for (h, w), d in zip(file.block_shapes, file.dtypes, strict=True) if d in DTYPES]
    if max(sizes, default=0) > MAX_BLOCK:
        return f"blocks of {max(sizes)} bytes are beyond the limit of {MAX_BLOCK}; write it with tiles"
    return None


def _dtype(opened: list[Any], shown: Sequence[str]) -> str:
    dtypes = {d for f in opened for d in f.dtypes}
    if len(dtypes) > 1:
        by_file = ", ".join(f"{n} {'/'.join(sorted(set(f.dtypes)))}" for n, f in zip(shown, opened, strict=True))
        raise InputError(f"bands differ in dtype: {by_file}; a sample has one dtype")
    dtype = dtypes.pop()
    if dtype not in DTYPES:
        raise InputError(f"{shown[0]} is of {dtype}; bands are {', '.join(DTYPES)}")
    return dtype


def _check_ground(opened: list[Any], shown: Sequence[str], fine: Any) -> None:
    for file, label in zip(opened, shown, strict=True):
        near = np.allclose(file.bounds, fine.bounds, rtol=0, atol=abs(fine.transform.a) / 2)
        if not near or file.crs != fine.crs:
            other = shown[opened.index(fine)].rpartition("/")[2]
            raise InputError(f"{label} and {other} do not cover the same ground; bands must share CRS and bounds")


def _scale(opened: list[Any], shown: str) -> tuple[float | None, float]:
    """The files' own scale and offset; None and 0 where they have none."""
    scales = {(s, o) for f in opened for s, o in zip(f.scales, f.offsets, strict=True)}
    factor = opened[0].tags(ns="ENVI").get("reflectance_scale_factor") if opened[0].driver == "ENVI" else None
    if factor is not None and scales == {(1.0, 0.0)}:
        scales = {(1 / number if (number := _number(factor)) else 0.0, 0.0)}
    if len(scales) > 1:
        raise InputError(f"{shown}: bands have different scales or offsets, which one sample cannot carry")
    scale, add = scales.pop()
    if not np.isfinite([scale, add]).all() or scale == 0:
        raise InputError(f"{shown}: scale {scale} and offset {add} are no numbers to decode with")
    return (None, 0.0) if (scale, add) == (1.0, 0.0) else (scale, add)


def _bands(opened: list[Any], shown: Sequence[str], given: tuple[str, ...] | None) -> tuple[Band, ...]:
    """By --bands, else descriptions, else the file names, else red, green, blue for 8-bit triples."""
    count = sum(f.count for f in opened)
    found = [_spectrum(f) for f in opened]
    known = [band for bands in found for band in bands] if all(found) else []
    described = [f.descriptions[i] or _variable(f, i) for f in opened for i in range(f.count)]
    if given is not None:
        if len(given) != count:
            raise InputError(f"{shown[0]} has {count} bands, --bands names {len(given)}: {', '.join(given)}")
        names = given
    elif known:
        names = tuple(f"{wavelength:g}nm" for wavelength, _ in known)
    elif all(described):
        names = tuple(str(name) for name in described)
    elif count == len(opened) and all(split_band(stem_of(n)) for n in shown):
        names = tuple((split_band(stem_of(n)) or ("", ""))[1] for n in shown)
    elif count == 3 and len(opened) == 1 and opened[0].dtypes[0] == "uint8":
        names = ("red", "green", "blue")
    else:
        raise InputError(f"{shown[0]} has {count} bands of {opened[0].dtypes[0]} without names; give --bands with {count} names")
    if len(set(names)) < count:
        raise InputError(f"{shown[0]}: band names repeat ({', '.join(names)}); give --bands")
    spectrum = known or [(None, None)] * count
    return tuple(Band(name=n, wavelength_nm=w, width_nm=f) for n, (w, f) in zip(names, spectrum, strict=True))


def stem_of(shown: str) -> str:
    """The name of a file without folder and extension."""
    return shown.rpartition("/")[2].rpartition(".")[0]


def _variable(file: Any, band: int) -> str | None:
    """The name of the netCDF variable that a band comes from, numbered where it has several."""
    name = file.tags(band + 1).get("NETCDF_VARNAME") if file.driver == "netCDF" else None
    return name if name is None or file.count == 1 else f"{name}_{band + 1}"


def _spectrum(file: Any) -> list[tuple[float | None, float | None]]:
    """(centre, width) in nm of each band where an ENVI header tells wavelengths, else nothing."""
    tags = file.tags(ns="ENVI") if file.driver == "ENVI" else {}
    factor = {"nanometers": 1.0, "nm": 1.0, "micrometers": 1e3, "um": 1e3, "microns": 1e3}.get(
        tags.get("wavelength_units", "").strip().lower()
    )
    centres, widths = ([_number(v) for v in tags.get(k, "").strip("{} ").split(",")] for k in ("wavelength", "fwhm"))
    if factor is None or len(centres) != file.count or not all(centres):
        return []
    widths = widths if len(widths) == file.count else [None] * file.count
    return [(round(c * factor, 3), round(w * factor, 3) if w else None) for c, w in zip(centres, widths, strict=True) if c]


def _number(text: str) -> float | None:
    """A positive finite number, else None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) and value > 0 else None
