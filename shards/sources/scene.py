"""What the headers of one scene's files say. A scene is one multi-band GeoTIFF, or a group with one file per band."""

import re
import warnings
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from swath.shards.errors import InputError
from swath.shards.sensors import split_band
from swath.shards.sources.beside import Beside, read_beside

MAX_PIXELS = 1 << 34  # of a scene, 131,072 × 131,072: what declares more is a bomb or wants to be cut before
MAX_BLOCK = 1 << 30  # bytes that must be decoded at once to see one pixel
DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64")


@dataclass(frozen=True)
class Scene:
    """Files of one scene (relative paths) with their band names, in band order; sizes are of the finest grid.

    `scale` is None where the files have none; `gsd_m` is None for bands without georeference; `broken` says why the scene
    cannot be read, and then nothing else counts.
    """

    name: str
    files: tuple[str, ...]
    names: tuple[str, ...] = ()
    height: int = 0
    width: int = 0
    dtype: str = ""
    nodata: float | None = None
    scale: float | None = None
    add: float = 0.0
    gsd_m: tuple[float | None, ...] = ()
    tags: dict[str, str] = field(default_factory=dict)
    beside: Beside = field(default_factory=Beside)
    broken: str | None = None

    @property
    def finest_m(self) -> float | None:
        return min((gsd for gsd in self.gsd_m if gsd is not None), default=None)


def load_rasterio() -> Any:
    """The module; it is an extra, since only GeoTIFFs need it."""
    try:
        import rasterio
        import rasterio.errors
    except ImportError:
        raise InputError("reading GeoTIFF needs rasterio: pip install 'swath[geo]'") from None
    return rasterio


def raster_errors() -> tuple[type[Exception], ...]:
    """Whatever reading a damaged file may raise."""
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import RasterioError

    return RasterioError, CPLE_BaseError, OSError


def open_raster(path: Path) -> Any:
    """rasterio's dataset; that a file has no georeference is told once for all, not by a warning each."""
    rasterio = load_rasterio()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(path)


def group(source: Path, paths: list[Path]) -> dict[str, list[Path]]:
    """Scene name (a path without extension) → its files: one, or one per band in the sensor's order."""
    groups: dict[str, list[tuple[tuple[float, str], Path]]] = defaultdict(list)
    for path in paths:
        _, band = split_band(path.stem) or ("", "")
        groups[scene_name(source, path)].append((_spectral(band), path))
    return {name: [p for _, p in sorted(files)] for name, files in sorted(groups.items())}


def scene_name(source: Path, path: Path) -> str:
    """Relative path of the scene that a file belongs to."""
    single = split_band(path.stem)
    return (path.relative_to(source).parent / (single[0] if single else path.stem)).as_posix()


def read_scene(source: Path, name: str, files: list[Path], beside: dict[str, Path], given: tuple[str, ...] | None) -> Scene:
    """Headers only. What cannot be opened is a broken scene, to be listed; what contradicts itself is an InputError."""
    shown = tuple(p.relative_to(source).as_posix() for p in files)
    with ExitStack() as stack:
        try:
            opened = [stack.enter_context(open_raster(p)) for p in files]
        except raster_errors() as error:
            return Scene(name, shown, broken=f"cannot be opened: {error}")
        fine = max(opened, key=lambda f: f.height * f.width)
        for file, label in zip(opened, shown, strict=True):
            if (bomb := _bomb(file)) is not None:
                return Scene(name, shown, broken=f"{label}: {bomb}")
        names = _names(opened, shown, given)
        dtype = _dtype(opened, shown)
        _check_ground(opened, shown, fine)
        try:
            found = read_beside(name, beside, open_raster, tuple(fine.bounds))
        except raster_errors() as error:
            return Scene(name, shown, broken=f"a map beside it cannot be opened: {error}")
        nodata = {v for f in opened for v in f.nodatavals if v is not None and not np.isnan(v)}
        if len(nodata) > 1:
            raise InputError(f"{shown[0]}: bands declare different nodata values ({', '.join(f'{v:g}' for v in sorted(nodata))})")
        scale, add = _scale(opened, shown[0])
        return Scene(
            name, shown, names, fine.height, fine.width, dtype, nodata.pop() if nodata else None, scale, add,
            tuple(_gsd(f) for f in opened for _ in range(f.count)), dict(sorted(opened[0].tags().items())), found,
        )  # fmt: skip


def _bomb(file: Any) -> str | None:
    """Why reading a window of the file could exhaust the memory."""
    if file.height * file.width > MAX_PIXELS:
        return f"declared size {file.width}×{file.height} is beyond the limit of {MAX_PIXELS} pixels"
    sizes = [h * w * np.dtype(d).itemsize for (h, w), d in zip(file.block_shapes, file.dtypes, strict=True) if d in DTYPES]
    if max(sizes, default=0) > MAX_BLOCK:
        return f"blocks of {max(sizes)} bytes are beyond the limit of {MAX_BLOCK}; write it with tiles"
    return None


def _dtype(opened: list[Any], shown: tuple[str, ...]) -> str:
    dtypes = {d for f in opened for d in f.dtypes}
    if len(dtypes) > 1:
        by_file = ", ".join(f"{n} {'/'.join(sorted(set(f.dtypes)))}" for n, f in zip(shown, opened, strict=True))
        raise InputError(f"bands differ in dtype: {by_file}; a sample has one dtype")
    dtype = dtypes.pop()
    if dtype not in DTYPES:
        raise InputError(f"{shown[0]} is of {dtype}; bands are {', '.join(DTYPES)}")
    return dtype


def _check_ground(opened: list[Any], shown: tuple[str, ...], fine: Any) -> None:
    for file, label in zip(opened, shown, strict=True):
        near = np.allclose(file.bounds, fine.bounds, rtol=0, atol=abs(fine.transform.a) / 2)
        if not near or file.crs != fine.crs:
            raise InputError(f"{label} and {Path(fine.name).name} do not cover the same ground; bands must share CRS and bounds")


def _scale(opened: list[Any], shown: str) -> tuple[float | None, float]:
    """The files' own scale and offset; None and 0 where they have none."""
    scales = {(s, o) for f in opened for s, o in zip(f.scales, f.offsets, strict=True)}
    if len(scales) > 1:
        raise InputError(f"{shown}: bands have different scales or offsets, which one sample cannot carry")
    scale, add = scales.pop()
    if not np.isfinite([scale, add]).all() or scale == 0:
        raise InputError(f"{shown}: scale {scale} and offset {add} are no numbers to decode with")
    return (None, 0.0) if (scale, add) == (1.0, 0.0) else (scale, add)


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


def _spectral(name: str) -> tuple[float, str]:
    found = re.search(r"(\d+)(A?)$", name)
    number = float(found[1]) + 0.5 * bool(found[2]) if found else {"VV": 0, "VH": 1, "HH": 2, "HV": 3}.get(name, 0)
    return number, name


def _gsd(file: Any) -> float | None:
    """Metres per pixel, None without georeference; degrees are turned into metres at the scene's latitude."""
    if file.crs is None:
        return None
    x, y = file.res
    if file.crs.is_geographic:
        y, x = y * 111_320, x * 111_320 * np.cos(np.radians((file.bounds.top + file.bounds.bottom) / 2))
    else:
        x, y = (value * file.crs.linear_units_factor[1] for value in (x, y))
    return round(float(np.sqrt(abs(x * y))), 2)
