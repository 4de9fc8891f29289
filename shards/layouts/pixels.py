"""Rasters of one sample and modality → its array: bands onto the finest grid, the size policy, and what is valid."""

from dataclasses import dataclass

import numpy as np

from swath.shards.codec import MAX_VALUES, DecodeError
from swath.shards.layouts.layout import NEAREST, Layer, Size
from swath.shards.layouts.raster import Raster


@dataclass(frozen=True)
class Chip:
    """One date: `raster` with all bands (C, H, W), and `there` (H, W) bool, False where it was padded; None: nowhere."""

    raster: Raster
    there: np.ndarray | None = None


def stack(rasters: list[Raster], names: list[str], layer: Layer) -> Raster:
    """Bands of one date on the finest grid; coarser ones are repeated. DecodeError where they do not go together."""
    fine = max(rasters, key=lambda r: r.pixels.shape[1] * r.pixels.shape[2])
    height, width = fine.pixels.shape[1:]
    if sum(len(r.pixels) for r in rasters) * height * width > MAX_VALUES:
        raise DecodeError(f"{names[0]}: {len(rasters)} bands of {width}×{height} are beyond the limit of {MAX_VALUES} values")
    for raster, name in zip(rasters, names, strict=True):
        if str(raster.pixels.dtype) != layer.dtype:
            raise DecodeError(f"{name} is of {raster.pixels.dtype}, the layout has {layer.dtype}")
        if raster.pixels.shape[1:] != (height, width) and layer.resampling != NEAREST:
            raise DecodeError(f"{name} is {raster.pixels.shape[2]}×{raster.pixels.shape[1]}, other bands are {width}×{height}")
        _check_ground(raster, name, fine)
    if len(rasters) == 1:
        return fine
    return Raster(np.concatenate([_onto(r.pixels, height, width) for r in rasters]), fine.crs, fine.bounds, fine.metric)


def _onto(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each pixel of the fine grid takes the coarse one that its centre lies in."""
    rows = (2 * np.arange(height) + 1) * pixels.shape[1] // (2 * height)
    columns = (2 * np.arange(width) + 1) * pixels.shape[2] // (2 * width)
    return pixels if pixels.shape[1:] == (height, width) else pixels[:, rows][:, :, columns]


def _check_ground(raster: Raster, name: str, fine: Raster) -> None:
    """The same CRS, and edges that differ by less than the coarser pixel: some publishers cut each band for itself."""
    if raster.bounds is None or fine.bounds is None:
        return
    slack = max(raster.resolution or 0, fine.resolution or 0)
    if raster.crs != fine.crs or any(abs(a - b) > slack for a, b in zip(raster.bounds, fine.bounds, strict=True)):
        raise DecodeError(f"{name} does not cover the same ground as the other bands")


def fit(raster: Raster, size: Size, name: str) -> Chip:
    """The size policy of one date; bounds follow."""
    height, width = raster.pixels.shape[1:]
    side = size.side
    if size.policy == "keep" or (height, width) == (side, side):
        return Chip(raster)
    if size.policy == "reject" or (size.policy == "crop" and min(height, width) < side):
        raise DecodeError(f"{name} is {width}×{height}, the layout has {'at least ' * (size.policy == 'crop')}{side}×{side}")
    top, left = max(0, (height - side) // 2), max(0, (width - side) // 2)
    cut = np.ascontiguousarray(raster.pixels[:, top : top + side, left : left + side])
    bounds = None
    if raster.bounds is not None:
        west, south, east, north = raster.bounds
        across, down = (east - west) / width, (north - south) / height
        west, north = west + left * across, north - top * down
        bounds = (west, north - side * down, west + side * across, north)
    there = None
    if cut.shape[1:] != (side, side):
        there = np.zeros((side, side), bool)
        there[: cut.shape[1], : cut.shape[2]] = True
        cut = np.pad(cut, ((0, 0), (0, side - cut.shape[1]), (0, side - cut.shape[2])))
    return Chip(Raster(cut, raster.crs, bounds, raster.metric), there)


def valid(chip: Chip, layer: Layer) -> np.ndarray:
    """(H, W) uint8 codes: 0 nodata, 1 clear."""
    pixels = chip.raster.pixels
    good = np.ones(pixels.shape[1:], bool) if chip.there is None else chip.there.copy()
    if pixels.dtype.kind == "f":
        good &= np.isfinite(pixels).all(axis=0)
    if layer.nodata is not None:
        good &= (pixels != layer.nodata).all(axis=0)
    if layer.void is not None:
        good &= (pixels != layer.void).any(axis=0)
    return good.astype(np.uint8)


def series(chips: list[Chip], layer: Layer, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """((dates · C, H, W), valid (dates, H, W) or (H, W) for one date, None where all is clear). Dates that lack are masked."""
    shapes = {chip.raster.pixels.shape for chip in chips}
    if len(shapes) > 1:
        raise DecodeError(f"{name}: dates differ in size ({', '.join(f'{s[2]}×{s[1]}' for s in sorted(shapes))})")
    codes_thw = [valid(chip, layer) for chip in chips]
    pixels = [chip.raster.pixels for chip in chips]
    lacking = layer.dates - len(chips)
    pixels += [np.zeros_like(pixels[0])] * lacking
    codes_thw += [np.zeros_like(codes_thw[0])] * lacking
    codes = codes_thw[0] if layer.dates == 1 else np.stack(codes_thw)
    return (pixels[0] if layer.dates == 1 else np.concatenate(pixels)), (None if codes.all() else codes)
