"""Files of arrays without a recipe: `.mat`, HDF5 and Zarr, of one cube that is cut into chips or of many samples.

What an axis means is taken from the shape where only one reading is possible, from --bands where their number decides, and asked
for otherwise. A map `<name>_gt.mat` beside a cube labels its chips.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from swath.shards.bands import Band
from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.sensors import SENSORS, band
from swath.shards.sources import hdf5, mat
from swath.shards.sources.cube import Window, clear, majority, sizes, take, windows
from swath.shards.sources.folder import files_below
from swath.shards.sources.planned import Planned, contract, fingerprint
from swath.shards.sources.source import Item, Options, Part, Sample
from swath.shards.sources.zarrs import Zarr

_TRUTH = "_gt"  # of a label map's file name
_MANY = 20  # bands, from which on a cube counts as hyperspectral
_MAX_CLASSES = 1000


class Format(Protocol):
    def shapes(self, path: Path) -> dict[str, tuple[int, ...]]:
        """The arrays of numbers in a file. InputError or DecodeError."""
        ...

    def dtype(self, path: Path, name: str) -> Any:
        """That of the chips, in any byte order. InputError or DecodeError."""
        ...

    def chip(self, path: Path, name: str, axes: str, n: int, window: Window | None) -> np.ndarray:
        """(C, h, w). DecodeError."""
        ...


class Matlab:
    """Three axes are rows, columns, bands; a fourth one counts samples."""

    def shapes(self, path: Path) -> dict[str, tuple[int, ...]]:
        return mat.shapes(path)

    def dtype(self, path: Path, name: str) -> Any:
        return _loaded(path, path.stat().st_mtime_ns, name).dtype  # the header tells MATLAB's class, not what is stored

    def chip(self, path: Path, name: str, axes: str, n: int, window: Window | None) -> np.ndarray:
        return take(_loaded(path, path.stat().st_mtime_ns, name), axes, n=n, window=window)


class Hdf5:
    def shapes(self, path: Path) -> dict[str, tuple[int, ...]]:
        with hdf5.open_file(path) as file:
            return {name: tuple(hdf5.dataset(file, name).shape) for name in hdf5.names(file)}

    def dtype(self, path: Path, name: str) -> Any:
        with hdf5.open_file(path) as file:
            return hdf5.dataset(file, name).dtype

    def chip(self, path: Path, name: str, axes: str, n: int, window: Window | None) -> np.ndarray:
        try:
            with hdf5.open_file(path) as file:
                return take(hdf5.dataset(file, name), axes, n=n, window=window)
        except hdf5.read_errors() as error:
            raise DecodeError(f"{name} is damaged ({error})") from None


class ZarrFiles:
    def shapes(self, path: Path) -> dict[str, tuple[int, ...]]:
        with Zarr(path, path.name) as zarr:
            return {name: tuple(zarr.numbers(name).shape) for name in zarr.names if zarr.is_numbers(name)}

    def dtype(self, path: Path, name: str) -> Any:
        with Zarr(path, path.name) as zarr:
            return zarr.numbers(name).dtype

    def chip(self, path: Path, name: str, axes: str, n: int, window: Window | None) -> np.ndarray:
        with Zarr(path, path.name) as zarr:
            return zarr.chip(name, axes, n=n, window=window)


@lru_cache(maxsize=2)
def _loaded(path: Path, changed: int, name: str) -> np.ndarray:
    """A `.mat` is read wholly; `changed` is its time."""
    return mat.load(path, name)


@dataclass(kw_only=True)
class Arrays(Planned):
    root: Path
    format: Format
    name: str
    axes: str
    options: Options
    truths: dict[Path, np.ndarray] = field(default_factory=dict)

    def read(self, item: Item) -> Sample:
        path, n, window = item.place
        ((modality, made),) = self.contracts.items()
        try:
            pixels = self.format.chip(path, self.name, self.axes, n, window)
        except InputError as error:  # this file is of another kind than the first
            raise DecodeError(str(error)) from None
        if (len(pixels), str(pixels.dtype)) != (len(made.bands), made.dtype):
            raise InputError(
                f"{path}: {self.name} has {len(pixels)} bands of {pixels.dtype}, the others {len(made.bands)} of {made.dtype}; "
                "make shards from one kind at a time"
            )
        part = Part(pixels, valid=clear(pixels, made.nodata))
        if self.options.scale is not None or self.options.add is not None:
            part.scale = 1.0 if self.options.scale is None else self.options.scale
            part.add, part.scale_source = self.options.add or 0.0, "given by whoever made the shards"
        meta: dict[str, Any] = {"source": item.lookup} | ({"window": list(window)} if window else {})
        label = None
        if path in self.truths and window is not None:
            top, left, height, width = window
            names = {int(name): name for name in self.classes}
            label, said = majority(self.truths[path][top : top + height, left : left + width], names)
            meta |= said
        return Sample({modality: part}, label, meta)


def open_mat(path: Path, options: Options) -> Arrays:
    """One `.mat` or a folder of them, versions 5 and 7.3."""
    return _plan(path, options, Matlab(), (".mat",), lambda shape: {3: "hwc", 4: "hwcn"}[len(shape)])


def open_hdf5(path: Path, options: Options) -> Arrays:
    """One HDF5 file or a folder of them, each with one array of 3 (a cube) or 4 axes (samples first)."""
    return _plan(path, options, Hdf5(), (".h5", ".hdf5", ".he5"), lambda shape: _axes(shape, options))


def open_zarr(path: Path, options: Options) -> Arrays:
    """One Zarr (folder `.zarr` or `.zarr.zip`) or a folder of them, with arrays as of `open_hdf5`."""
    return _plan(path, options, ZarrFiles(), (".zarr", ".zarr.zip"), lambda shape: _axes(shape, options))


def _plan(
    path: Path, options: Options, kind: Format, endings: tuple[str, ...], axes_of: Callable[[tuple[int, ...]], str]
) -> Arrays:
    files, notes = _files(path, endings)
    cubes = [p for p in files if not p.stem.endswith(_TRUTH)] or files
    root = path if path.is_dir() and path not in files else path.parent
    first = cubes[0]
    shape, name = _array(kind, first)
    axes = axes_of(shape)
    count = sizes(shape, axes)["c"]
    named = options.bands or tuple(f"b{k:03d}" for k in range(1, count + 1))
    if len(named) != count:
        raise InputError(f"{first}: {name} has {count} bands, --bands names {len(named)}")
    if not options.bands:
        notes.append(f"the names of the {count} bands are not known: they are numbered; --bands names them")
    try:
        stored = np.dtype(kind.dtype(first, name))
    except DecodeError as error:
        raise InputError(f"{first}: {name} cannot be read ({error})") from None
    known = SENSORS.get(options.sensor or "")
    modality = known.name if known else "hsi" if count > _MANY else "optical"
    dtype = "uint8" if stored.kind == "b" else str(stored.newbyteorder("="))
    made = contract(
        modality, [band(n, known) if options.bands else Band(name=n) for n in named], dtype, sensor=options.sensor or "unknown",
        level=options.level or "unknown", unit=options.unit or "digital number", nodata=options.nodata, gsd_m=options.gsd_m,
    )  # fmt: skip
    letters = {"n": "sample", "h": "row", "w": "column", "c": "band"}
    notes.append(f"axes of {name} {shape} are taken as {', '.join(letters[a] for a in axes)}")
    items: list[Item] = []
    truths: dict[Path, np.ndarray] = {}
    for file in cubes:
        size = sizes(_array(kind, file, name)[0], axes)
        lookup = file.relative_to(root).as_posix()
        stem = lookup[: -len(next(e for e in endings if lookup.lower().endswith(e)))]
        if "n" in axes:
            items += [Item(f"{stem}/{n:07d}", f"{stem}/{n:07d}", place=(file, n, None)) for n in range(size["n"])]
            continue
        truth = file.with_name(f"{file.stem}{_TRUTH}.mat")
        if isinstance(kind, Matlab) and truth in files:
            truths[file] = _truth(truth, (size["h"], size["w"]))
        for window in windows(size["h"], size["w"], options.chip, options.stride):
            key = f"{stem}_y{window[0]:05d}_x{window[1]:05d}"
            items.append(Item(key, key, place=(file, 0, window)))
    codes = sorted({int(c) for t in truths.values() for c in np.unique(t)} - {0})
    stated = [p for f in files for p in (sorted(f.rglob("*")) if f.is_dir() else [f]) if p.is_file()]
    return Arrays(
        dataset=first.name.split(".")[0] if len(cubes) == 1 else root.resolve().name, kind="arrays", contracts={modality: made},
        items=items, classes=tuple(str(c) for c in codes), notes=tuple(notes), fingerprint=fingerprint(root, stated, options),
        root=root, format=kind, name=name, axes=axes, options=options, truths=truths,
    )  # fmt: skip


def _files(path: Path, endings: tuple[str, ...]) -> tuple[list[Path], list[str]]:
    """The files (and folders `x.zarr`) with one of the endings, and what a person must hear."""
    if path.name.lower().endswith(endings):
        return [path], []
    below = files_below(path)
    found = {p for p in below.paths if p.name.lower().endswith(endings)}
    if ".zarr" in endings:
        folders = {d for p in below.paths for d in p.parents if d.suffix.lower() == ".zarr" and d.is_relative_to(path)}
        found = {p for p in found if not folders & set(p.parents)} | folders
    if not found:
        raise InputError(f"{path} holds no {' or '.join(endings)}")
    return sorted(found), list(below.notes)


def _array(kind: Format, path: Path, name: str | None = None) -> tuple[tuple[int, ...], str]:
    """(shape, name) of the array of that name, or of the only one with 3 or 4 axes."""
    try:
        shapes = kind.shapes(path)
    except DecodeError as error:
        raise InputError(f"{path} cannot be read ({error})") from None
    fit = {n: s for n, s in shapes.items() if len(s) in (3, 4) and min(s) > 0}
    if name is not None:
        if name not in fit:
            raise InputError(f"{path} has no array {name!r} of 3 or 4 axes, as the others do")
        return fit[name], name
    if len(fit) != 1:
        listed = "; ".join(f"{n} {s}" for n, s in list(shapes.items())[:8]) or "no arrays of numbers"
        raise InputError(
            f"{path}: one array of 3 axes (a cube) or 4 (samples) is read, it has {listed}; such a file needs a recipe"
        )
    ((found, shape),) = fit.items()
    return shape, found


def _axes(shape: tuple[int, ...], options: Options) -> str:
    """Which axis is the bands'; with 4 axes the first counts samples, and rows and columns are alike."""
    count = len(options.bands) if options.bands else None
    first, last = (1, 3) if len(shape) == 4 else (0, 2)
    samples = "n" if len(shape) == 4 else ""
    if count is not None and (shape[first] == count) != (shape[last] == count):
        return samples + ("chw" if shape[first] == count else "hwc")
    square_first, square_last = shape[last - 2] == shape[last - 1], shape[first + 1] == shape[first + 2]
    if len(shape) == 4 and square_first != square_last and count is None:
        return samples + ("hwc" if square_first else "chw")
    raise InputError(f"which axis of {shape} holds the bands cannot be told; name them all with --bands")


def _truth(path: Path, size: tuple[int, int]) -> np.ndarray:
    """(H, W) codes, 0 unlabelled."""
    maps = {n: s for n, s in mat.shapes(path).items() if s == size}
    if len(maps) != 1:
        raise InputError(f"{path}: one label map of {size[0]}×{size[1]} is expected, as large as its cube")
    values = mat.load(path, next(iter(maps)))
    codes = np.asarray(values).astype(np.int32)
    if not np.array_equal(codes, values) or codes.min() < 0 or len(np.unique(codes)) > _MAX_CLASSES:
        raise InputError(f"{path} holds no codes of classes (whole numbers from 0 on, at most {_MAX_CLASSES} of them)")
    return codes
