"""What belongs to one sample: the rules that a person gives, and what they need to know of ground, time and names."""

import csv
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self

import numpy as np

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.index import NO_TIME
from swath.shards.sources.parts import reached
from swath.shards.sources.scene import Grid, grid_of, open_raster, raster_errors
from swath.shards.writer import seconds

_MAX_BYTES = 1 << 26  # of a table
_DAY = 86_400
_LATTICE = 5  # points along each side of a footprint
_CELLS, _CHUNK = 64, 256  # along each side of a chip that a partner covers in part, at most; such chips looked at together
_SLACK = 1e-3  # px: of coordinates that went through two projections


@dataclass(frozen=True)
class Pairs:
    """Every sample gets a partner out of the source `other`, of another sensor.

    By footprint, by equal keys, or by a CSV `table` with columns key and other. Of several the nearest in time counts, none
    beyond `within_days`, and for scenes none that lies on less than `min_cover` of the chip. Raises InputError.
    """

    other: str
    by: Literal["footprint", "key", "table"] = "footprint"
    table: str | None = None
    within_days: float | None = None
    min_cover: float = 0.5
    paired_only: bool = False

    def __post_init__(self) -> None:
        _check_days(self.within_days)
        _check_cover(self.min_cover)

    @classmethod
    def of(cls, other: str, join: str, **rest: Any) -> Self:
        """From `--join`: footprint, key or table=FILE."""
        by, mark, table = join.partition("=")
        if by == "table" and table:
            return cls(other, "table", table, **rest)
        if mark or by not in ("footprint", "key"):
            raise InputError(f"--join {join!r} is none of footprint, key and table=FILE")
        return cls(other, "key" if by == "key" else "footprint", **rest)


@dataclass(frozen=True)
class Dates:
    """Every sample is a series: `count` acquisitions of one place in the order of time, at least `at_least` of them there, the
    others masked; from the first to the last not more than `within_days`. Raises InputError."""

    count: int
    at_least: int = 1
    within_days: float | None = None
    min_cover: float = 0.5

    def __post_init__(self) -> None:
        if self.count < 2:
            raise InputError(f"--dates-per-sample must be at least 2, not {self.count}")
        if not 1 <= self.at_least <= self.count:
            raise InputError(f"--min-dates lies between 1 and --dates-per-sample ({self.count}), not at {self.at_least}")
        _check_days(self.within_days)
        _check_cover(self.min_cover)


def _check_days(days: float | None) -> None:
    if days is not None and not 0 <= days < float("inf"):
        raise InputError(f"--within-days must be at least 0, not {days}")


def _check_cover(share: float) -> None:
    if not 0 < share <= 1:
        raise InputError(f"--min-cover is a share above 0 and up to 1, not {share}")


def days_apart(one: str | None, two: str | None) -> float:
    """Between two ISO 8601 times, in whole days where one of them is a date only; infinity where one is not known."""
    first, second = seconds(one), seconds(two)
    if NO_TIME in (first, second):
        return float("inf")
    if "T" not in f"{one}" or "T" not in f"{two}":
        return float(abs(first // _DAY - second // _DAY))
    return abs(first - second) / _DAY


def boxes(grids: Sequence[Grid]) -> np.ndarray:
    """(N, 2, 3): lowest and highest x, y, z on the unit sphere, with some margin: there 180° and the poles are like any place."""
    from rasterio.warp import transform

    made = np.empty((len(grids), 2, 3))
    by_crs: dict[Any, list[int]] = {}
    for number, grid in enumerate(grids):
        by_crs.setdefault(grid.crs, []).append(number)
    u, v = (axis.ravel() for axis in np.meshgrid(np.linspace(0, 1, _LATTICE), np.linspace(0, 1, _LATTICE)))
    for crs, numbers in by_crs.items():
        points = [grids[n].at(u * grids[n].width, v * grids[n].height) for n in numbers]
        xs, ys = (np.concatenate(axis) for axis in zip(*points, strict=True))
        degrees = np.array(transform(crs, "EPSG:4326", xs.tolist(), ys.tolist())[:2])
        degrees[~np.isfinite(degrees)] = np.nan  # a projection that has no place for it
        lon, lat = np.radians(degrees).reshape(2, len(numbers), -1)
        places = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)
        low, high = np.nanmin(places, axis=2, initial=1), np.nanmax(places, axis=2, initial=-1)
        margin = np.maximum(high - low, 0).max(axis=1, keepdims=True) / 8 + 1e-9
        made[numbers] = np.stack([low - margin, high + margin], axis=1)
    return made


def neighbours(own: np.ndarray, others: np.ndarray) -> list[np.ndarray]:
    """For each of `boxes` the numbers of those among `others` that it meets, ascending."""
    if not len(others):
        return [np.zeros(0, np.int64) for _ in own]
    order = np.argsort(others[:, 0, 0], kind="stable")
    starts = others[order, 0, 0]
    widest = (others[:, 1, 0] - others[:, 0, 0]).max()
    found = []
    for low, high in own:
        some = order[np.searchsorted(starts, low[0] - widest) : np.searchsorted(starts, high[0], "right")]
        met = (others[some, 0] <= high).all(axis=1) & (others[some, 1] >= low).all(axis=1)
        found.append(np.sort(some[met]))
    return found


def covers(grid: Grid, windows_n4: np.ndarray, others: Sequence[Grid]) -> np.ndarray:
    """(len(others), N) shares of windows (top, left, height, width) of `grid` that lie on each of `others`.

    Counted in pixels, of sides beyond 64 in 64 steps. A window is taken as straight-sided on the other grid, which chips are.
    """
    from rasterio.warp import transform

    top, left, height, width = windows_n4.T.astype(np.float64)
    xs, ys = grid.at(left[:, None] + width[:, None] * [0, 1, 0, 1], top[:, None] + height[:, None] * [0, 0, 1, 1])
    rows, columns = np.minimum(windows_n4[:, 2:].max(axis=0), _CELLS).tolist()
    places: dict[Any, tuple[np.ndarray, np.ndarray]] = {grid.crs: (xs, ys)}
    made = np.zeros((len(others), len(windows_n4)))
    for row, other in zip(made, others, strict=True):
        if other.crs not in places:
            moved = transform(grid.crs, other.crs, xs.ravel().tolist(), ys.ravel().tolist())[:2]
            places[other.crs] = np.reshape(moved[0], xs.shape), np.reshape(moved[1], ys.shape)
        x, y = _pixels(other, *places[other.crs])
        inside = _inside(x, y, other).all(axis=1)
        apart = ~(  # also where a projection has no place for it, and all comparisons are false
            (x.max(axis=1) > 0) & (x.min(axis=1) < other.width) & (y.max(axis=1) > 0) & (y.min(axis=1) < other.height)
        )
        row[inside] = 1
        part = np.flatnonzero(~inside & ~apart)
        for some in (part[start : start + _CHUNK] for start in range(0, len(part), _CHUNK)):
            weights = _cells(rows, columns)
            row[some] = _inside(x[some] @ weights, y[some] @ weights, other).mean(axis=1)
    return made


@lru_cache(maxsize=16)
def _cells(rows: int, columns: int) -> np.ndarray:
    """(4, rows · columns) shares of the four corners in the centre of each cell between them."""
    u, v = (axis.ravel() for axis in np.meshgrid((np.arange(columns) + 0.5) / columns, (np.arange(rows) + 0.5) / rows))
    return np.stack([(1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v])


def aligned(one: Grid | None, two: Grid | None) -> bool:
    """Whether both have the same pixels, to half of one."""
    if one is None or two is None:
        return one is two
    if (one.height, one.width, one.crs) != (two.height, two.width, two.crs):
        return False
    x, y = (axis.ravel() for axis in np.meshgrid([0, one.width], [0, one.height]))
    return bool(np.abs(np.subtract(_pixels(one, *two.at(x, y)), (x, y))).max() <= 0.5)


def alike(one: Grid, two: Grid) -> float:
    """The smaller of the shares of two grids that lie on the other."""
    whole = [np.array([[0, 0, grid.height, grid.width]]) for grid in (one, two)]
    return min(covers(one, whole[0], [two]).item(), covers(two, whole[1], [one]).item())


def _pixels(grid: Grid, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates of ground coordinates: `Grid.at` the other way round."""
    back = ~grid.transform
    return back.a * x + back.b * y + back.c, back.d * x + back.e * y + back.f


def _inside(x: np.ndarray, y: np.ndarray, grid: Grid) -> np.ndarray:
    return (x >= -_SLACK) & (x <= grid.width + _SLACK) & (y >= -_SLACK) & (y <= grid.height + _SLACK)


class Names:
    """What a table may call the members of a source: in full, by the path of a file, or by the last part of either."""

    def __init__(self, shown: str, named: Iterable[tuple[str, str]]) -> None:
        self.shown = shown
        self._full: dict[str, list[int]] = {}
        self._short: dict[str, dict[str, list[int]]] = {}
        for number, (name, lookup) in enumerate(named):
            self._full.setdefault(name, []).append(number)
            for short in {lookup, PurePosixPath(name).name, PurePosixPath(lookup).name, PurePosixPath(lookup).stem} - {name}:
                self._short.setdefault(short, {}).setdefault(name, []).append(number)

    def find(self, name: str) -> list[int]:
        """The members called so, or none. InputError where a short name may mean several."""
        if name in self._full:
            return self._full[name]
        meant = self._short.get(name, {})
        if len(meant) > 1:
            raise InputError(f"{name} could be {' or '.join(sorted(meant)[:2])} of {self.shown}; write more of the path")
        return [number for numbers in meant.values() for number in numbers]


def read_table(path: Path) -> list[tuple[str, str]]:
    """(key, other) of each row of a CSV. Raises InputError."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path}: {path.stat().st_size} bytes are beyond the limit of {_MAX_BYTES} for a table")
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            lacking = [name for name in ("key", "other") if name not in (reader.fieldnames or ())]
            if lacking:
                raise InputError(f"{path} has no column {', '.join(lacking)}; a table of pairs has key,other")
            rows = [(row["key"] or "", row["other"] or "") for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"table of pairs {path} cannot be read ({error})") from None
    if not rows:
        raise InputError(f"table of pairs {path} has no rows")
    return rows


def read_onto(
    path: str, mark: str, grid: Grid, window: Sequence[int], resampling: str, nodata: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """(C, height, width) of a window (top, left, height, width) of `grid`, and which of its pixels (height, width) the file
    reaches. `mark` is the fingerprint of its source. Raises DecodeError."""
    top, left, height, width = window
    try:
        with reached():
            file, bands = _warped(path, (mark, os.getpid(), threading.get_ident()), grid, resampling, nodata)
            read = file.read(window=((top, top + height), (left, left + width)))
    except raster_errors() as error:
        raise DecodeError(f"{path.rpartition('/')[2]}: {error.__cause__ or error}") from None
    return read[:bands], np.ones((height, width), bool) if len(read) == bands else read[bands] != 0


@lru_cache(maxsize=512)
def _warped(path: str, here: tuple[str, int, int], grid: Grid, resampling: str, nodata: float | None) -> tuple[Any, int]:
    """The file on `grid`, and its number of bands: one more tells what it reaches, where no value does.

    `here` keeps sources, processes and threads apart: GDAL's datasets survive neither a fork nor a thread.
    """
    from rasterio.enums import ColorInterp, Resampling
    from rasterio.vrt import WarpedVRT

    file = open_raster(path)
    if grid_of(file) == grid:
        return file, file.count
    if nodata is None and np.dtype(file.dtypes[0]).kind == "f":
        nodata = float("nan")
    made = WarpedVRT(
        file, crs=grid.crs, transform=grid.transform, height=grid.height, width=grid.width, resampling=Resampling[resampling],
        src_nodata=nodata, nodata=nodata, add_alpha=nodata is None and ColorInterp.alpha not in file.colorinterp,
    )  # fmt: skip
    return made, file.count
