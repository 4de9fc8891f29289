"""Bytes of an image file → pixels with their place. TIFFs go through rasterio, which must not look at anything but the bytes."""

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from swath.shards.codec import MAX_VALUES, DecodeError, decode
from swath.shards.sources.scene import DTYPES, MAX_BLOCK, load_rasterio, raster_errors

PICTURES = (".jpg", ".jpeg", ".png")
TIFFS = (".tif", ".tiff")


@dataclass(frozen=True)
class Raster:
    """`pixels` (C, H, W) as stored; `bounds` (west, south, east, north) and `crs` are None without georeference.

    `metric`: the CRS counts in metres.
    """

    pixels: np.ndarray
    crs: str | None = None
    bounds: tuple[float, float, float, float] | None = None
    metric: bool = False

    @property
    def resolution(self) -> float | None:
        """The larger side of a pixel, in units of the CRS."""
        if self.bounds is None:
            return None
        west, south, east, north = self.bounds
        return max(abs(east - west) / self.pixels.shape[2], abs(north - south) / self.pixels.shape[1])


def extension(name: str) -> str:
    """'jpg', 'png' or 'tif'."""
    end = name.rsplit(".", 1)[-1].lower()
    return {"jpeg": "jpg", "tiff": "tif"}.get(end, end)


def read_raster(data: bytes, name: str) -> Raster:
    """All bands. DecodeError names the file."""
    if extension(name) == "tif":
        return _read_tiff(data, name)
    try:
        return Raster(decode(data, extension(name)))
    except DecodeError as error:
        raise DecodeError(f"{name}: {error}") from None


def _read_tiff(data: bytes, name: str) -> Raster:
    rasterio = load_rasterio()
    try:
        # the driver by name: a .tif that is really a VRT could lead to other files, or to the net
        with (
            warnings.catch_warnings(action="ignore", category=rasterio.errors.NotGeoreferencedWarning),
            rasterio.MemoryFile(data) as memory,
            memory.open(driver="GTiff") as file,
        ):
            _check(file, name)
            pixels = file.read()
            if file.crs is None or file.transform.is_identity:
                return Raster(pixels)
            metric = file.crs.is_projected and file.crs.linear_units_factor[1] == 1
            return Raster(pixels, file.crs.to_string(), tuple(file.bounds), metric)
    except raster_errors() as error:
        raise DecodeError(f"{name}: {error.__cause__ or error}") from None


def _check(file: Any, name: str) -> None:
    """DecodeError before anything large is allocated."""
    if file.count * file.height * file.width > MAX_VALUES:
        raise DecodeError(f"{name}: {file.count}×{file.height}×{file.width} is beyond the limit of {MAX_VALUES} values")
    if any(d not in DTYPES for d in file.dtypes):
        raise DecodeError(f"{name} is of {', '.join(sorted(set(file.dtypes)))}; bands are {', '.join(DTYPES)}")
    if max(h * w * np.dtype(d).itemsize for (h, w), d in zip(file.block_shapes, file.dtypes, strict=True)) > MAX_BLOCK:
        raise DecodeError(f"{name}: its blocks are beyond the limit of {MAX_BLOCK} bytes")


def degrees(crs: str, bounds: tuple[float, float, float, float]) -> tuple[float, float]:
    """(latitude, longitude) of the centre. DecodeError for a CRS that has none."""
    west, south, east, north = bounds
    try:
        lon, lat = _to_degrees(crs, (west + east) / 2, (south + north) / 2)
    except raster_errors() as error:
        raise DecodeError(f"its place cannot be told ({error})") from None
    return round(lat, 7), round(lon, 7)


@lru_cache(maxsize=1)  # the bands of one sample ask for the same
def _to_degrees(crs: str, x: float, y: float) -> tuple[float, float]:
    from rasterio.warp import transform

    lon, lat = transform(crs, "EPSG:4326", [x], [y])[:2]
    return float(lon[0]), float(lat[0])
