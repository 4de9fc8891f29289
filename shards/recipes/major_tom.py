"""Major TOM Core: `images/part_NNNNN.parquet` with a GeoTIFF per band in each row, and `metadata.parquet`."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.recipes.radiometric_offset import ADD, SCALE, by_baseline, by_cirrus, darkest
from swath.shards.recipes.registry import register
from swath.shards.sensors import SENTINEL1, SENTINEL2, band
from swath.shards.sources.cube import Window, clear, windows
from swath.shards.sources.parquet import Table, geotiff
from swath.shards.sources.planned import Planned, contract, fingerprint
from swath.shards.sources.source import Item, Options, Part, Sample

SIDE = 1068  # px at 10 m; a few cells are some px larger or smaller
CHIP = 256
L2A = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
L1C = (*L2A[:10], "B10", *L2A[10:])
RTC_NODATA = -32768.0
# SEnSeI v2 in four classes: clear, thick cloud, thin cloud, shadow → clear 1, cloud 2, shadow 3
CLOUDS = np.array([1, 2, 2, 3], np.uint8)
_DEGREE_M = 111_320.0  # of latitude; with UTM's turned axes a chip's centre is right to some 100 m
_META = ("grid_cell", "product_id", "timestamp", "centre_lat", "centre_lon", "crs", "parquet_url", "parquet_row")


@dataclass(kw_only=True)
class MajorTom(Planned):
    root: Path
    bands: tuple[str, ...]
    options: Options
    _tables: dict[str, Table] = field(default_factory=dict)
    _last: tuple[Any, dict[str, np.ndarray]] | None = None

    def read(self, item: Item) -> Sample:
        part_name, row, cell, product, crs, window = item.place
        stack, coarse = self._cell(part_name, row, cell, product), {}
        height, width = (max(array.shape[i] for array in stack.values()) for i in (0, 1))
        if window[0] + window[2] > height or window[1] + window[3] > width:
            raise DecodeError(f"cell {cell} has {height}×{width} px, this chip reaches beyond")
        for name in self.bands:
            coarse[name] = _onto(stack[name], height, width, window)
        pixels = np.stack(list(coarse.values()))
        (modality,) = self.contracts
        part = self._radar(pixels) if modality == "sentinel1" else self._optical(pixels, stack, product, window)
        meta = {"crs": crs, "gsd_m": 10.0, "grid_cell": cell, "product": product, "window": list(window), "source": item.lookup}
        for key, value in (("lat", item.lat), ("lon", item.lon), ("time", item.time)):
            if value is not None:
                meta[key] = value
        return Sample({modality: part}, meta=meta)

    def _radar(self, pixels: np.ndarray) -> Part:
        return Part(pixels, valid=clear(pixels, RTC_NODATA), scale_source="publisher: linear gamma0")

    def _optical(self, pixels: np.ndarray, stack: dict[str, np.ndarray], product: str, window: Window) -> Part:
        valid = (pixels != 0).any(axis=0).astype(np.uint8)  # B10 alone may be 0
        if "cloud_mask" in stack:
            mask = _onto(stack["cloud_mask"], *_size(stack, self.bands), window)
            if mask.max() >= len(CLOUDS) or mask.min() < 0:
                raise DecodeError(f"cloud_mask has the code {mask.max()}; 0 to 3 are expected")
            valid *= CLOUDS[mask.astype(np.intp)]
        add, said = self._offset(stack, product)
        scale = SCALE if self.options.scale is None else self.options.scale
        return Part(pixels, valid=None if (valid == 1).all() else valid, scale=scale, add=add, scale_source=said)

    def _offset(self, stack: dict[str, np.ndarray], product: str) -> tuple[float, str]:
        """Decided for the whole cell, by its product's baseline, which its own dark pixels and B10 must not contradict."""
        if self.options.add is not None:
            return self.options.add, "given by whoever made the shards"
        has, cirrus = by_baseline(product), by_cirrus(stack["B10"]) if "B10" in stack else None
        lows = [low for name in self.bands if name != "B10" and (low := darkest(stack[name])) is not None]
        dark = bool(lows) and min(lows) < 500  # with the offset a reflectance below −0.05
        if has is None:
            raise DecodeError(f"product {product} names no processing baseline, so its radiometric offset is unknown; give --add")
        if (has and (dark or cirrus is False)) or (not has and cirrus is True):
            raise DecodeError(f"product {product} should have {'the' if has else 'no'} offset of 1000, its pixels say otherwise")
        baseline = re.search(r"_(N\d{4})_", product)
        return (ADD if has else 0.0), f"baseline {baseline[1] if baseline else ''}: radiometric offset of {1000 if has else 0}"

    def _cell(self, name: str, row: int, cell: str, product: str) -> dict[str, np.ndarray]:
        """(H, W) by band, of the last cell again without reading: its chips follow one another."""
        if self._last is not None and self._last[0] == (name, row):
            return self._last[1]
        if name not in self._tables:
            self._tables[name] = Table(self.root / name)
        table = self._tables[name]
        extra = ("cloud_mask",) if "cloud_mask" in table.columns and "B02" in self.bands else ()
        names = [*self.bands, *extra]
        cells = table.row(row, ["grid_cell", "product_id", *names])
        if (cells["grid_cell"], cells["product_id"]) != (cell, product):
            raise DecodeError(f"{name} row {row} is {cells['grid_cell']} {cells['product_id']}, metadata say {cell} {product}")
        stack = {}
        for band_name in names:
            read = geotiff(cells[band_name], f"{name} row {row} {band_name}")
            if len(read) != 1:
                raise DecodeError(f"{name} row {row} {band_name} has {len(read)} bands")
            stack[band_name] = read[0]
        kinds = {str(stack[b].dtype) for b in self.bands}
        (modality,) = self.contracts
        if kinds != {self.contracts[modality].dtype}:
            raise DecodeError(f"{name} row {row} holds {', '.join(sorted(kinds))}, not {self.contracts[modality].dtype}")
        self._last = (name, row), stack
        return stack


@register("major_tom", "Major TOM Core (S2L2A, S2L1C or S1RTC), chips of its 10.68 km cells", "CC-BY-SA-4.0")
def major_tom(path: Path, options: Options) -> MajorTom:
    """One of its Core sets, as downloaded wholly or in part; which one, the Parquet columns say."""
    parts = {p.name: p for p in sorted(path.glob("images/part_*.parquet")) if not p.is_symlink()}
    about = path / "metadata.parquet"
    if not parts or not about.is_file():
        raise InputError(f"{path} is not Major TOM Core: images/part_00001.parquet … and metadata.parquet are expected")
    columns = set(Table(next(iter(parts.values()))).columns)
    bands = next((b for b in (L1C, L2A, ("vv", "vh")) if set(b) <= columns), None)
    if bands is None:
        raise InputError(f"{path}: columns {', '.join(sorted(columns))} are those of none of S2L2A, S2L1C and S1RTC")
    table = Table(about)
    lacking = [c for c in _META if c not in table.columns]
    if lacking:
        raise InputError(f"{about} has no column {', '.join(lacking)}")
    items, absent = [], 0
    for row in table.all(list(_META)):
        name = PurePosixPath(str(row["parquet_url"])).name
        if name not in parts:
            absent += 1
            continue
        items += _chips(row, f"images/{name}", options)
    if not items:
        raise InputError(f"{about} names none of the parts in {path / 'images'}; get the metadata of the same set")
    notes = [f"{absent} cells of the metadata lie in parts that are not here"] if absent else []
    if len(bands) > 2:
        notes.append("cloud_mask codes are taken as clear, thick cloud, thin cloud, shadow (0 to 3)")
    return MajorTom(
        dataset="major_tom", kind="major_tom", contracts=_contracts(bands), items=items, notes=tuple(notes), root=path,
        bands=bands, fingerprint=fingerprint(path, [about, *parts.values()], options), options=options,
    )  # fmt: skip


def _contracts(bands: tuple[str, ...]) -> dict[str, Any]:
    if len(bands) == 2:
        return {
            "sentinel1": contract(
                "sentinel1", [band(b, SENTINEL1) for b in bands], "float32", sensor="sentinel1", level="RTC gamma0",
                unit="linear power", nodata=RTC_NODATA, gsd_m=10.0,
            )
        }  # fmt: skip
    return {
        "sentinel2": contract(
            "sentinel2", [band(b, SENTINEL2) for b in bands], "uint16", sensor="sentinel2",
            level="L1C" if "B10" in bands else "L2A", unit="reflectance", gsd_m=10.0, resampling="nearest to the finest grid",
        )
    }  # fmt: skip


def _chips(row: dict[str, Any], name: str, options: Options) -> list[Item]:
    cell, product = str(row["grid_cell"]), str(row["product_id"])
    time = row["timestamp"].isoformat() if hasattr(row["timestamp"], "isoformat") else str(row["timestamp"])
    made = []
    for window in windows(SIDE, SIDE, options.chip or CHIP, options.stride):
        key = f"{cell}/{product}_y{window[0]:04d}_x{window[1]:04d}"
        place = (name, int(row["parquet_row"]), cell, product, str(row["crs"]), window)
        south, east = (10 * (window[i] + window[i + 2] / 2 - SIDE / 2) for i in (0, 1))  # m from the cell's centre
        lat = float(row["centre_lat"]) - south / _DEGREE_M
        lon = float(row["centre_lon"]) + east / (_DEGREE_M * max(math.cos(math.radians(lat)), 0.01))
        made.append(Item(key, key, place=place, lat=round(lat, 4), lon=round(lon, 4), time=time))
    return made


def _size(stack: dict[str, np.ndarray], bands: Sequence[str]) -> tuple[int, int]:
    return max(stack[b].shape[0] for b in bands), max(stack[b].shape[1] for b in bands)


def _onto(array: np.ndarray, height: int, width: int, window: Window) -> np.ndarray:
    """The window of the finest (height, width) grid from an array of a coarser one, by nearest neighbour."""
    top, left, high, wide = window
    rows = (2 * np.arange(top, top + high) + 1) * array.shape[0] // (2 * height)
    columns = (2 * np.arange(left, left + wide) + 1) * array.shape[1] // (2 * width)
    return array[np.ix_(rows, columns)]
