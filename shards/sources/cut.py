"""Scenes cut into chips by windowed reads: the source that all geographic products share.

Bands of a coarser grid are repeated onto the finest one (nearest neighbour), so that every DN stays as published, unless
another pixel size or resampling is asked for.
"""

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from swath.shards.bands import Band, InputContract, Normalisation
from swath.shards.codec import MAX_VALUES, DecodeError
from swath.shards.errors import InputError
from swath.shards.manifest import LabelMap
from swath.shards.sources.parts import reached
from swath.shards.sources.scene import UNSCALED, Grid, Mask, Scene, Stack, grid_of, load_rasterio, open_raster, raster_errors
from swath.shards.sources.source import Item, Options, Part, Sample

WHOLE = 256  # px: files up to this size are samples themselves unless --chip says otherwise
CHIP = 64
COVER, CHANGE = "landcover", "change"  # names of label maps
NEAR = 1024  # px: chips of one such square are read one after another; a tile of JPEG 2000 has this side
_NODATA, _CLEAR, _CLOUD, _SHADOW = 0, 1, 2, 3
# Sentinel-2's classification: nothing, saturated; cloud shadow; clouds of medium and high probability, thin cirrus.
_SCL = np.full(256, _CLEAR, np.uint8)
_SCL[[0, 1]], _SCL[3], _SCL[[8, 9, 10]] = _NODATA, _SHADOW, _CLOUD


class Scenes:
    """All scenes must have the same bands, dtype and meaning by modality; a scene may lack a modality, but not the first.

    `stated` are (name, size, time) of every file, by which a change is noticed.
    """

    _items: list[Item] | None

    def __init__(
        self, path: Path, options: Options, kind: str, scenes: list[Scene], stated: list[tuple[str, int, int]],
        notes: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.source, self.dataset, self.kind, self.scenes = path, path.resolve().name, kind, scenes
        self.fingerprint = hashlib.sha256(repr((sorted(stated), options)).encode()).hexdigest()
        twice = [name for name, count in Counter(scene.name for scene in scenes).items() if count > 1]
        if twice:
            raise InputError(f"{path} holds {twice[0]} twice; remove one of them, or give one folder at a time")
        whole = [scene for scene in scenes if scene.broken is None]
        if not whole:
            raise InputError(f"none of the {len(scenes)} scenes in {path} can be read ({scenes[0].broken})")
        self._resampling = _resampling(options)
        self._options = options
        self._check_alike(whole)
        stacks: dict[str, list[Stack]] = {}
        for scene in whole:
            for stack in scene.stacks:
                stacks.setdefault(stack.modality, []).append(stack)
        self.grids = [self._target(scene) for scene in scenes]
        self.contracts = {name: self._contract(members, whole) for name, members in stacks.items()}
        small = all(max(grid.height, grid.width) <= WHOLE for grid in self.grids if grid is not None)
        side = options.chip or (WHOLE if small else CHIP)
        self._cut, self._items = (side, options.stride or side), None
        self.codes = same_codes([(scene.cover, scene.codes) for scene in whole if scene.cover is not None])
        self.classes = tuple(self.codes[code] for code in sorted(self.codes))
        self.maps = {COVER: LabelMap(classes=self.codes)} if self.codes else {}
        self.notes = (*notes, *_told(whole))
        self._errors = raster_errors()

    @property
    def items(self) -> list[Item]:
        """Made when first asked for: of a large scene they are many."""
        if self._items is None:
            self._items = [item for number in range(len(self.scenes)) for item in self.chips(number, *self._cut)]
        return self._items

    def read(self, item: Item) -> Sample:
        number, *window = item.place
        scene, grid = self.scenes[number], self.grids[number]
        if scene.broken is not None or grid is None:
            raise DecodeError(scene.broken or "has no grid")
        parts = {stack.modality: self._part(stack, grid, window) for stack in scene.stacks}
        meta = self.place_of(item, scene, grid, window)
        label, maps = None, {}
        if scene.cover is not None:
            main = parts[scene.stacks[0].modality].valid
            seen = np.ones(window[2:], bool) if main is None else main != _NODATA
            codes = self.codes_in(scene.cover, grid, window)
            label, share = self._majority(codes[seen])
            meta["landcover_share"] = share
            maps = dict.fromkeys(self.maps, codes)
        return Sample(parts, label, meta, maps)

    def codes_in(self, path: str, grid: Grid, window: list[int]) -> np.ndarray:
        """(height, width) of a map of codes, in a window of the scene's grid."""
        return self._window(path, None, grid, window)[0]

    def _part(self, stack: Stack, grid: Grid, window: list[int]) -> Part:
        pixels = np.ascontiguousarray(np.concatenate([self._window(path, stack, grid, window) for path in stack.paths]))
        nodata = self.contracts[stack.modality].nodata
        seen = np.isfinite(pixels).all(axis=0) if pixels.dtype.kind == "f" else np.ones(pixels.shape[1:], bool)
        if nodata is not None:
            seen &= (pixels != nodata).all(axis=0)
        codes: np.ndarray = np.asarray(seen, np.uint8)
        if stack.mask is not None:
            codes = codes * decoded(self._window(stack.mask.path, None, grid, window)[0], stack.mask)
        scale = 1.0 if stack.scale is None else stack.scale
        return Part(pixels, valid=None if (codes == _CLEAR).all() else codes, scale=scale, add=stack.add, scale_source=stack.said)

    def _window(self, path: str, stack: Stack | None, grid: Grid, window: list[int]) -> np.ndarray:
        """(C, height, width) of a window of the scene's grid, from a file on another; without a stack it is a map of codes."""
        top, left, height, width = window
        resampling = "nearest" if stack is None else self._resampling
        exact = self._options.gsd_m is None and resampling == "nearest"
        nodata = None if stack is None else self.contracts[stack.modality].nodata
        here = (self.fingerprint, os.getpid(), threading.get_ident())  # GDAL's datasets survive neither a fork nor a thread
        try:
            with reached():
                if not exact:
                    file = _open(path, here, grid, resampling, nodata)
                    return file.read(window=((top, top + height), (left, left + width)))
                file = _open(path, here, None, "nearest", None)
                rows = (2 * np.arange(top, top + height) + 1) * file.height // (2 * grid.height)
                columns = (2 * np.arange(left, left + width) + 1) * file.width // (2 * grid.width)
                read = file.read(window=((int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)))
        except self._errors as error:
            raise DecodeError(f"{path.rpartition('/')[2]}: {error.__cause__ or error}") from None
        return read[:, rows - rows[0]][:, :, columns - columns[0]]

    def _majority(self, cover: np.ndarray) -> tuple[str | None, float]:
        """The class that covers most of the valid pixels (1-D), if at least half, and its share."""
        counts = np.bincount(cover, minlength=1)
        counts[0] = 0
        share = float(counts.max() / max(len(cover), 1))
        return (self.codes.get(int(counts.argmax())) if share >= 0.5 else None), round(share, 4)

    @staticmethod
    def place_of(item: Item, scene: Scene, grid: Grid, window: list[int]) -> dict[str, Any]:
        meta: dict[str, Any] = {**scene.meta, "source": scene.stacks[0].shown[0], "window": window}
        if grid.crs is not None:
            meta |= {"crs": grid.crs.to_string(), "bounds": list(grid.window(*window).bounds), "gsd_m": grid.gsd_m}
            meta |= {"lat": item.lat, "lon": item.lon}
        if scene.time is not None:
            meta |= {"time": scene.time}
        return meta if scene.cloud is None else meta | {"scene_cloud": scene.cloud}

    def _target(self, scene: Scene) -> Grid | None:
        """The grid that all of a scene is brought to."""
        if scene.broken is not None:
            return None
        grid, wanted = scene.stacks[0].grid, self._options.gsd_m
        if (wanted is not None or self._resampling != "nearest") and grid.crs is None:
            raise InputError(f"{scene.lookup} has no georeference, so it cannot be resampled; leave --gsd and --resampling out")
        if wanted is None:
            return grid
        made = grid.resized(wanted)
        if made.height < 1 or made.width < 1:
            raise InputError(f"{scene.lookup} is smaller than one pixel of {wanted:g} m; give a smaller --gsd")
        return made

    def _contract(self, stacks: list[Stack], scenes: list[Scene]) -> InputContract:
        first, gsd = stacks[0], {grid.gsd_m for grid in self.grids if grid is not None}
        none = tuple(0.0 for _ in first.bands)
        other = len({g for scene in scenes[:1] for stack in scene.stacks for g in stack.gsd_m} | set(first.gsd_m)) > 1
        if self._options.gsd_m is not None:
            resampling = f"{self._resampling} to {self._options.gsd_m:g} m"
        else:
            resampling = f"{self._resampling} to the finest grid" if other else None
        nodata = first.nodata
        return InputContract(
            modality=first.modality, sensor=first.sensor, level=first.level, unit=first.unit,
            bands=tuple(_native(b, max(g or 0, self._options.gsd_m or 0)) for b, g in zip(first.bands, first.gsd_m, strict=True)),
            normalisation=Normalisation(mean=none, std=none, pixels=tuple(0 for _ in first.bands)), dtype=first.dtype,
            nodata=None if nodata is None or not np.isfinite(nodata) else nodata,
            gsd_m=gsd.pop() if len(gsd) == 1 else None, resampling=resampling,
        )  # fmt: skip

    def chips(self, number: int, side: int, stride: int, *, edges: bool = False) -> Iterator[Item]:
        """Windows of scene `number` that lie wholly inside, row by row; scenes smaller than a chip are one, as they are. What
        remains at the right and the bottom is left, or with `edges` seen by windows that lie closer to those before."""
        scene, grid = self.scenes[number], self.grids[number]
        if grid is None:
            yield Item(scene.name, scene.lookup, None, (number, 0, 0, 0, 0))
            return
        height, width = min(side, grid.height), min(side, grid.width)
        if height * width * max(len(stack.bands) for stack in scene.stacks) > MAX_VALUES:
            raise InputError(f"{scene.lookup}: a chip of {height}×{width} is beyond {MAX_VALUES} values; give a smaller --chip")
        tops, lefts = starts(grid.height, height, stride, edges), starts(grid.width, width, stride, edges)
        for y in tops.tolist():
            places = grid.centres(np.full_like(lefts, y), lefts, height, width)
            for i, x in enumerate(lefts.tolist()):
                lat, lon = (None, None) if places is None else (float(places[0][i]), float(places[1][i]))
                key = scene.name if len(tops) * len(lefts) == 1 else f"{scene.name}_y{y:05d}_x{x:05d}"
                place, near = (number, y, x, height, width), f"{scene.name} {y // NEAR} {x // NEAR}"
                yield Item(key, scene.lookup, None, place, None, lat, lon, scene.time, scene.cloud, near)

    def _check_alike(self, scenes: list[Scene]) -> None:
        firsts: dict[str, tuple[Scene, Stack]] = {}
        main = scenes[0].stacks[0]
        for scene in scenes:
            if (scene.stacks[0].modality, scene.stacks[0].sensor) != (main.modality, main.sensor):
                raise InputError(
                    f"scenes differ: {scenes[0].name} is of {main.sensor}, {scene.name} of {scene.stacks[0].sensor}; "
                    "make shards from one kind at a time"
                )
            for stack in scene.stacks:
                _compare(*firsts.setdefault(stack.modality, (scene, stack)), scene, stack)


def starts(length: int, side: int, stride: int, edges: bool) -> np.ndarray:
    """(n,) int64: where windows of `side` begin along `length`, every `stride`; with `edges` the last ends with it."""
    whole = np.arange(0, length - side + 1, stride)
    return np.append(whole, length - side) if edges and whole[-1] + side < length else whole


def stated(folder: Path, paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """(relative path, bytes, time) of files, for `Scenes`."""
    return [(path.relative_to(folder).as_posix(), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in paths]


def _compare(first: Scene, one: Stack, second: Scene, two: Stack) -> None:
    remedy = "make shards from one kind at a time"
    if (one.names, one.dtype) != (two.names, two.dtype):
        pairs = ((first, one, two), (second, two, one)) if set(one.names) & set(two.names) else ()
        lacking = [
            f"{other.name} lacks {', '.join(n for n in a.names if n not in b.names)}"
            for (_, a, b), other in zip(pairs, (second, first), strict=False)
            if set(a.names) - set(b.names)
        ]
        raise InputError(
            f"scenes differ: {first.name} has {', '.join(one.names)} in {one.dtype}, {second.name} has {', '.join(two.names)} "
            f"in {two.dtype}{f' ({lacking[0]})' if lacking else ''}; {remedy}"
        )
    if one.nodata != two.nodata:
        raise InputError(f"scenes {first.name} and {second.name} declare different nodata values; {remedy}")
    if (one.scale is None) != (two.scale is None):
        tagged, bare = (one, two) if two.scale is None else (two, one)
        raise InputError(f"scenes differ: {tagged.shown[0]} has a scale or an offset, {bare.shown[0]} has none; {remedy}")
    if (one.sensor, one.level, one.unit) != (two.sensor, two.level, two.unit):
        says = [f"{s.name} is {t.sensor} {t.level} in {t.unit}" for s, t in ((first, one), (second, two))]
        raise InputError(f"scenes differ: {says[0]}, {says[1]}; {remedy}")


@lru_cache(maxsize=512)
def _open(path: str, here: tuple[str, int, int], grid: Grid | None, resampling: str, nodata: float | None) -> Any:
    """The file, or, for another grid than its own, what GDAL warps it to; `here` keeps sources, processes and threads apart."""
    file = open_raster(path)
    if grid is None or grid_of(file) == grid:
        return file
    from rasterio.enums import Resampling
    from rasterio.vrt import WarpedVRT

    if nodata is None and np.dtype(file.dtypes[0]).kind == "f":
        nodata = float("nan")
    return WarpedVRT(
        file, crs=grid.crs, transform=grid.transform, height=grid.height, width=grid.width,
        resampling=Resampling[resampling], src_nodata=nodata, nodata=nodata,
    )  # fmt: skip


def decoded(read: np.ndarray, mask: Mask) -> np.ndarray:
    """(H, W) uint8 of our codes."""
    if mask.kind == "valid":
        return read
    if mask.kind == "SCL":
        return _SCL[read]
    fill, cloud, shadow = read & 1, read & 0b1110, read & 0b10000  # bits 1 to 3: dilated cloud, cirrus, cloud
    return np.select([fill != 0, cloud != 0, shadow != 0], [_NODATA, _CLOUD, _SHADOW], _CLEAR).astype(np.uint8)


def _resampling(options: Options) -> str:
    from rasterio.enums import Resampling

    load_rasterio()
    usable = [method.name for method in Resampling if method.name not in ("gauss", "sum")]
    if options.resampling not in usable:
        raise InputError(f"--resampling {options.resampling!r} is not one of {', '.join(usable)}")
    if options.gsd_m is not None and not 0 < options.gsd_m < 1e6:
        raise InputError(f"--gsd {options.gsd_m} is no pixel size in metres")
    return options.resampling


def _native(known: Band, gsd: float) -> Band:
    """The coarser of what the sensor resolves and what the file has."""
    return known.model_copy(update={"gsd_m": max(known.gsd_m or 0, gsd) or None})


def same_codes(maps: Sequence[tuple[str, tuple[tuple[int, str], ...]]]) -> dict[int, str]:
    """Code → class out of (path, codes) of label maps, which must all have the same."""
    for path, codes in maps:
        if codes != maps[0][1]:
            raise InputError(f"{path}: its classes are not those of {maps[0][0]}")
    return dict(maps[0][1]) if maps else {}


def _told(scenes: list[Scene]) -> list[str]:
    """What was assumed, and of how many scenes."""
    said = [stack.said for scene in scenes for stack in scene.stacks]
    told = [
        f"scale of {said.count(s)} scenes – {s}" for s in sorted(set(said)) if s != UNSCALED and not s.startswith(("file", "--"))
    ]
    lost = sum(scene.stacks[0].grid.crs is None for scene in scenes)
    if lost:
        told.append(f"{lost} scenes have no georeference: their samples have no place and no GSD")
    unnamed = sum(scene.cover is not None and not scene.codes for scene in scenes)
    if unnamed:
        told.append(f"{unnamed} land-cover maps have no CLASSES tag: their samples have no label")
    return told
