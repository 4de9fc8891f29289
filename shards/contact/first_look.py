"""A look at a few files of an archive, evenly over it: what is there, and what every kind of source understands of it."""

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from swath.shards.bands import InputContract
from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.layouts.store import open_store
from swath.shards.layouts.tree import Tree
from swath.shards.layouts.walk import IMAGERY
from swath.shards.recipes.registry import Recipe, find, recipes
from swath.shards.sensors import SENSORS, sensor_of
from swath.shards.sources.beside import METADATA, left_out, split_beside
from swath.shards.sources.cut import Scenes
from swath.shards.sources.folder import files_below
from swath.shards.sources.landsat import MTL, Landsat
from swath.shards.sources.open import opener_of
from swath.shards.sources.rasters import GRD, RAW_RADAR, Rasters, grouped, meaning, raster_files, raster_scene, scene_name
from swath.shards.sources.safe import Safe, is_safe, is_safe_zip, safe_root
from swath.shards.sources.scene import Scene, Stack, open_raster, raster_errors
from swath.shards.sources.source import Options, Source
from swath.shards.sources.stac import Stac, read_json

_FILES = 20  # scenes that are opened
SECONDS = 20.0  # for opening them: what is not done by then is left
_NAMES = 400  # file names that a published layout is recognised by
_FIT = 0.95  # share of them that must fit it
_NO_PUBLISHED_SET = ("aligned_pairs",)  # fits any two folders
# how many bands, and which they then are if they are all of the sensor's usual ones
_USUAL = {
    "sentinel2": {13: tuple(SENSORS["sentinel2"].bands), 12: tuple(b for b in SENSORS["sentinel2"].bands if b != "B10")},
    "sentinel1": {2: ("VV", "VH")},
}
_HINTS = {
    13: "; Sentinel-2 L1C has 13",
    12: "; Sentinel-2 L2A has 12",
    4: "; blue, green, red, nir and red, green, blue, nir are usual",
}
_T = TypeVar("_T")


@dataclass
class Look:
    """What was seen. `source` is of the files that were opened and are alike; `raw` are stacks before anybody said what they
    mean, by scene. `units` is how many scenes or samples there are, `opened` how many were opened. `warnings` are lines.
    `published` names the layout of a published data set, `because` says why.
    """

    source: Source
    kind: str
    units: int
    opened: int = 0
    raw: dict[str, Stack] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    published: str | None = None
    because: str = ""

    @property
    def scenes(self) -> list[Scene]:
        return self.source.scenes if isinstance(self.source, Scenes) else []

    @property
    def stacks(self) -> list[Stack]:
        """The first one of each scene, which options speak of."""
        return [scene.stacks[0] for scene in self.scenes]

    def count(self, test: Callable[[Stack], bool]) -> int:
        return sum(test(stack) for stack in self.stacks)

    def of_all(self, count: int | None = None) -> str:
        """`20 of 20 scenes`, of those that were looked at and are alike."""
        alike = len(self.stacks)
        return f"{alike if count is None else count} of {alike} scenes"


def look(archive: Path, options: Options, layout: str | None = None) -> Look:
    """Open a few files of it, as `options` say. Raises InputError."""
    if not archive.exists():
        raise InputError(f"{archive} does not exist; give a folder or a zip of images or of scenes")
    if layout is not None:
        open_it = find(layout).open
    else:
        open_it = opener_of(archive)
        if isinstance(open_it, type) and issubclass(open_it, Scenes):
            return _look_at_scenes(archive, open_it, options)
    source = open_it(archive, options)
    return Look(source, source.kind, len(source.items), warnings=list(source.notes), published=layout)


def understand(archive: Path) -> tuple[Look, Options, dict[str, str]]:
    """The look, the values that had to be guessed for it to be possible or better, and why each."""
    if not archive.exists():
        raise InputError(f"{archive} does not exist; give a folder or a zip of images or of scenes")
    if (known := _recognised(archive)) is not None:
        return known, Options(), {}
    options, told = Options(), {}
    try:
        seen = look(archive, options)
    except _Unnamed as error:
        options, told["bands"] = error.guess(archive)
        seen = look(archive, options)
    contract = next(iter(seen.source.contracts.values()))
    if contract.sensor == "unknown" and (guess := _sensor_elsewhere(archive, contract)) is not None:
        try:
            wiser = replace(options, sensor=guess[0])
            seen, options, told["sensor"] = look(archive, wiser), wiser, guess[1]
        except InputError as error:  # its bands cannot be that sensor's
            seen.warnings.append(f"sensor: {guess[1]} speaks of {guess[0]}, but {error}")
    return seen, options, told


def _sensor_elsewhere(archive: Path, contract: InputContract) -> tuple[str, str] | None:
    """(sensor, evidence), where no file says it: by the folder's name, or by the names of bands."""
    names = {name.upper() for name in contract.names}
    if (known := sensor_of(archive.resolve().name)) is not None:
        return known.name, f"the name of the folder, {archive.resolve().name}"
    if names <= {"VV", "VH", "HH", "HV"}:
        return "sentinel1", f"bands are called {', '.join(contract.names)}; it could be another radar"
    if "B8A" in names and names <= set(SENSORS["sentinel2"].bands):
        return "sentinel2", "bands are called as Sentinel-2's, with B8A"
    return None


class _Unnamed(Exception):
    """Scenes have bands without names."""

    def __init__(self, path: Path, count: int, colours: tuple[str, ...]) -> None:
        super().__init__(str(path))
        self.path, self.count, self.colours = path, count, colours

    def guess(self, archive: Path) -> tuple[Options, str]:
        known = sensor_of(f"{self.path.name} {archive.resolve().name}")
        usual = _USUAL.get(known.name, {}).get(self.count) if known else None
        if usual is not None and known is not None:
            trap = ", B8A after B08: EuroSAT for one has it last" if "B8A" in usual else ""
            return Options(bands=usual), f"no names in the files; {self.count} bands of {known.name} in the usual order{trap}"
        if len(set(self.colours)) == self.count and set(self.colours) <= {"red", "green", "blue", "nir"}:
            return Options(bands=self.colours), "the files' colour interpretation, which many programs write without being asked"
        names = tuple(f"b{number:02d}" for number in range(1, self.count + 1))
        return Options(bands=names), f"no names in {self.path.name}: numbered, write the real ones{_HINTS.get(self.count, '')}"


def counted(things: Counter[str]) -> str:
    """`512×512 (18), 256×256 (2)`."""
    text = ", ".join(thing if len(things) == 1 else f"{thing} ({count})" for thing, count in things.most_common(4))
    return text + (f" and {len(things) - 4} more" if len(things) > 4 else "")


def spread(things: Sequence[_T], count: int) -> list[_T]:
    """`count` of them, evenly, with the first and the last."""
    if len(things) <= count:
        return list(things)
    return [things[i] for i in np.linspace(0, len(things) - 1, count).round().astype(int)]


def _look_at_scenes(archive: Path, kind: type[Scenes], options: Options) -> Look:
    if kind is Rasters:
        scenes, raw, units, warnings = _some_rasters(archive, options)
    else:
        scenes, raw, units, warnings = _some_products(archive, kind, options)
    broken = [f"{scene.lookup}: {scene.broken}" for scene in scenes if scene.broken is not None]
    if broken:
        warnings.append(f"{len(broken)} of {len(scenes)} scenes cannot be opened: {'; '.join(broken[:3])}")
    groups: dict[str, list[Scene]] = {}
    for scene in scenes:
        if scene.broken is None:
            groups.setdefault(_likeness(scene), []).append(scene)
    if not groups:
        raise InputError(f"none of the {len(scenes)} scenes of {archive} that were tried can be opened ({broken[0]})")
    alike = max(groups.values(), key=len)
    for likeness, others in groups.items():
        if others is not alike:
            warnings.append(
                f"scenes differ, and shards are made of one kind at a time: {len(alike)} have {_likeness(alike[0])}, "
                f"{len(others)} have {likeness}, such as {others[0].lookup}"
            )
    crs = Counter("none" if s.stacks[0].grid.crs is None else s.stacks[0].grid.crs.to_string() for s in alike)
    if len(crs) > 1:
        warnings.append(f"scenes are in {len(crs)} reference systems: {counted(crs)}; each keeps its own")
    base = archive if archive.is_dir() else archive.parent
    source = Scenes(base, options, kind.__name__.lower(), alike, [])
    warnings += [note for note in source.notes if not note.startswith("scale of ") and note not in warnings]
    return Look(source, kind.__name__.lower(), units, len(scenes), raw, warnings)


def _likeness(scene: Scene) -> str:
    """What scenes must share, in words."""
    return "; ".join(
        f"{len(s.bands)} bands ({', '.join(s.names[:13])}) of {s.dtype} from {s.sensor} {s.level}"
        + (", with their own scale" if s.scale is not None and s.said.startswith("file tag") else "")
        + ("" if s.nodata is None else f", nodata {s.nodata:g}")
        for s in scene.stacks[:1]
    )


def _some_rasters(archive: Path, options: Options) -> tuple[list[Scene], dict[str, Stack], int, list[str]]:
    files = files_below(archive)
    rasters, _ = raster_files(files, archive)
    if (raw := next((p for p in rasters if GRD.match(p.name)), None)) is not None:
        raise InputError(f"{raw} {RAW_RADAR}")
    paths, beside = split_beside(rasters, {p: scene_name(archive, p) for p in rasters})
    if not paths:
        raise InputError(f"{archive} holds no scenes; name the folder that does")
    beside |= {p.relative_to(archive).as_posix(): p for p in files.paths if p.name.endswith(METADATA)}
    groups = grouped(archive, paths)
    scenes, troubles = [], []
    started = time.monotonic()
    for name in spread(list(groups), _FILES):
        if time.monotonic() - started > SECONDS:
            break
        try:
            scenes.append(raster_scene(archive, name, groups[name], beside, options))
        except InputError as error:
            troubles.append((groups[name], error))
    warnings = [*files.notes, *left_out(beside)]
    if troubles and not scenes:
        if options.bands is None and "give --bands" in str(troubles[0][1]):
            raise _unnamed(troubles[0][0]) or troubles[0][1]
        raise troubles[0][1]
    warnings += [f"{len(troubles)} scenes cannot be used: {troubles[0][1]}"] if troubles else []
    untold = {scene.name: scene.stacks[0] for scene in scenes if scene.stacks}
    return meaning(scenes, options), untold, len(groups), warnings


def _unnamed(paths: list[Path]) -> _Unnamed | None:
    try:
        with open_raster(str(paths[0])) as file:
            colours = tuple(colour.name for colour in file.colorinterp)
            return _Unnamed(paths[0], file.count, colours) if len(paths) == 1 else None
    except raster_errors():
        return None


def _some_products(archive: Path, kind: type[Scenes], options: Options) -> tuple[list[Scene], dict[str, Stack], int, list[str]]:
    """Products are opened one by one, each by its own path."""
    files = [archive] if archive.is_file() or is_safe(archive) else files_below(archive).paths
    texts: list[Path] = []
    if kind is Safe and files != [archive]:
        units = sorted({root for p in files if (root := p if is_safe_zip(p) else safe_root(p, archive)) is not None})
    elif kind is Landsat and files != [archive]:
        units = sorted({p.parent for p in files if MTL.search(p.name)})
    elif kind is Stac and len(jsons := [p for p in files if p.suffix.lower() in (".json", ".geojson")]) > _FILES:
        texts = jsons
        units = [p for p in spread(texts, 4 * _FILES) if (read_json(p) or {}).get("type") == "Feature"]
    else:
        units = [archive]
    build: Any = kind  # of the sources that take a path
    scenes: dict[str, Scene] = {}
    notes: dict[str, None] = {}
    troubles = []
    started = time.monotonic()
    for unit in spread(units, _FILES):
        if time.monotonic() - started > SECONDS:
            break
        try:
            opened = build(unit, options)
            scenes |= {scene.name: scene for scene in opened.scenes}
            notes |= dict.fromkeys(note for note in opened.notes if not note.startswith("scale of "))
        except InputError as error:
            troubles.append(error)
    if not scenes:
        raise troubles[0] if troubles else InputError(f"{archive} holds no scenes; name the folder that does")
    warnings = [*notes, *(str(error) for error in troubles[:3])]
    return list(scenes.values()), {}, max(len(units), len(texts), len(scenes)), warnings


def _recognised(archive: Path) -> Look | None:
    """A published data set, where names of files fit its layout and a sample of it can be read.

    Class folders of JPEGs look alike everywhere, so that a layout without a band in its names must be called by its name too.
    """
    if not archive.is_dir() and archive.suffix.lower() != ".zip":
        return None
    images, others = _some_names(archive)
    where = _plain(f"{archive.resolve().name}/{images[0] if images else ''}")
    fitting: list[tuple[int, str, Recipe, str]] = []
    for name, known in recipes().items():
        if isinstance(known.open, partial) and known.open.func is Tree:
            layout = known.open.args[0]
            called = any(_plain(n) in where for n in (name, layout.looks.partition("/")[0]) if len(_plain(n)) > 2)
            files = [layer.files for layer in layout.layers.values()]
            patterns = [re.compile(pattern) for pattern in (*files, *layout.left_out)]
            fit = sum(any(pattern.fullmatch(image) for pattern in patterns) for image in images)
            if fit and fit >= _FIT * len(images) and (called or any("(?P<band>" in pattern for pattern in files)):
                words = f"{fit} of {len(images)} file names looked at are as in its layout, {layout.looks}"
                fitting.append((0 if called else 1, name, known, words))
        elif others and name not in _NO_PUBLISHED_SET:
            fitting.append((0 if _plain(name) in where else 2, name, known, "its files are here, called and built as published"))
    ranked = sorted(fitting, key=lambda row: row[:2])
    for place, (rank, name, known, words) in enumerate(ranked):
        if (source := _opened(known, archive)) is not None:
            also = [n for r, n, k, _ in ranked[place + 1 :] if r == rank == 2 and _opened(k, archive) is not None]
            more = f"; so they are for {', '.join(also)}" if also else ""
            return Look(
                source, source.kind, len(source.items), warnings=list(source.notes), published=name,
                because=f"{known.title}; {words}{more}",
            )  # fmt: skip
    return None


def _opened(known: Recipe, archive: Path) -> Source | None:
    """The source, if its first sample can be read."""
    try:
        source = known.open(archive, Options())
        source.read(source.items[0])
    except (InputError, DecodeError):
        return None
    return source


def _some_names(archive: Path) -> tuple[list[str], bool]:
    """Names of images, evenly over all without keeping them all; whether there is anything else."""
    kept: list[str] = []
    others, number, step = False, 0, 1
    for name, _ in open_store(archive).walk():
        if not name.lower().endswith(IMAGERY):
            others = True
            continue
        if number % step == 0:
            kept.append(name)
        number += 1
        if len(kept) > 2 * _NAMES:
            kept, step = kept[::2], 2 * step
    return kept, others


def _plain(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())
