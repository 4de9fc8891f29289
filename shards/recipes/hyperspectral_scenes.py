"""The hyperspectral scenes that everybody tests with, as `.mat`: Indian Pines, Salinas, Pavia, Houston 2013, MUUFL, Jasper Ridge.

None has a georeference, and most have no wavelengths: these are computed from the documented range and number of bands, so they
are nominal and may be some 10 nm off. Labels are per pixel: a chip has a map of them, and takes the class of most.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from swath.shards.bands import Band, Unit
from swath.shards.errors import InputError
from swath.shards.manifest import LabelMap
from swath.shards.recipes.registry import register
from swath.shards.sources import mat
from swath.shards.sources.cube import clear, majority, take, windows
from swath.shards.sources.planned import Planned, contract, fingerprint
from swath.shards.sources.source import Item, Options, Part, Sample

Bands = Callable[[int], list[Band]]
LABELS, SHARES = "labels", "abundances"  # names of label maps


@dataclass(frozen=True)
class Scene:
    """`cube` is (H, W, C), `labels` (H, W) by code, `heights` (H, W, n) in metres, `shares` (n, H, W) of the `materials`;
    `wavelengths` win over nominal ones."""

    cube: np.ndarray
    files: tuple[Path, ...]
    labels: np.ndarray | None = None
    heights: np.ndarray | None = None
    wavelengths: tuple[float, ...] | None = None
    classes: tuple[str, ...] | None = None
    shares: np.ndarray | None = None
    materials: tuple[str, ...] = ()


@dataclass(frozen=True)
class Published:
    """`classes` have the codes from 1 on; `kept` are the sensor's band numbers (1-based) in the file, in its order.

    `nominal_nm` gives the centre of one of these; None where the file has them.
    """

    name: str
    sensor: str
    gsd_m: float | None
    kept: tuple[int, ...]
    nominal_nm: Callable[[int], float] | None
    load: Callable[[Path, "Published"], Scene]
    classes: tuple[str, ...] = ()
    unit: Unit = "digital number"


@dataclass(kw_only=True)
class HyperspectralScene(Planned):
    scene: Scene
    gsd_m: float | None
    options: Options

    def read(self, item: Item) -> Sample:
        parts = {}
        for modality, values in (("hsi", self.scene.cube), ("lidar", self.scene.heights)):
            if values is not None:
                pixels = take(values, "hwc", window=item.place)
                parts[modality] = Part(pixels, valid=clear(pixels, self.contracts[modality].nodata))
        if self.options.scale is not None or self.options.add is not None:
            part = parts["hsi"]
            part.scale, part.add = self.options.scale or 1.0, self.options.add or 0.0
            part.scale_source = "given by whoever made the shards"
        meta = {"window": list(item.place), "source": item.lookup} | ({"gsd_m": self.gsd_m} if self.gsd_m else {})
        label, maps = None, {}
        top, left, height, width = item.place
        window = (..., slice(top, top + height), slice(left, left + width))
        if self.scene.labels is not None:
            maps[LABELS] = self.scene.labels[window]
            label, said = majority(maps[LABELS], dict(enumerate(self.classes, start=1)))
            meta |= said
        if self.scene.shares is not None:
            maps[SHARES] = self.scene.shares[window]
        return Sample(parts, label, meta, maps)


def _open(published: Published, path: Path, options: Options) -> HyperspectralScene:
    scene = published.load(path, published)
    height, width, count = scene.cube.shape
    if count != len(published.kept):
        raise InputError(f"{scene.files[0]}: the cube has {count} bands, {published.name} has {len(published.kept)}")
    for what, other in (("label map", scene.labels), ("heights", scene.heights)):
        if other is not None and other.shape[:2] != (height, width):
            raise InputError(f"{scene.files[0]}: the {what} is {other.shape[0]}×{other.shape[1]}, the cube {height}×{width}")
    nominal = published.nominal_nm
    nm = scene.wavelengths or (tuple(round(nominal(n), 1) for n in published.kept) if nominal else (None,) * count)
    bands = [Band(name=f"b{n:03d}", wavelength_nm=w, gsd_m=published.gsd_m) for n, w in zip(published.kept, nm, strict=True)]
    contracts = {
        "hsi": contract(
            "hsi", bands, str(scene.cube.dtype), sensor=published.sensor, level=options.level or "as published",
            unit=options.unit or published.unit, nodata=options.nodata, gsd_m=published.gsd_m,
        )
    }  # fmt: skip
    if scene.heights is not None:
        layers = scene.heights.shape[2]
        contracts["lidar"] = contract(
            "lidar", [Band(name=f"height{i + 1}" if layers > 1 else "height", gsd_m=published.gsd_m) for i in range(layers)],
            str(scene.heights.dtype), sensor="lidar", level="raster", unit="metres", gsd_m=published.gsd_m,
        )  # fmt: skip
    root = scene.files[0].parent
    items = [
        Item(f"{published.name}_y{w[0]:04d}_x{w[1]:04d}", f"{scene.files[0].name}/y{w[0]:04d}_x{w[1]:04d}", place=w)
        for w in windows(height, width, options.chip, options.stride)
    ]
    said = "the file's own" if scene.wavelengths else "nominal: computed from range and number of bands"
    notes = [
        f"wavelengths are {said}",
        "the scene has no georeference: its samples have no place",
    ]
    classes = scene.classes or published.classes
    if scene.labels is None:
        notes.append("no label map found beside the cube: samples have no label")
    else:
        unnamed = sorted(set(np.unique(scene.labels).tolist()) - set(range(1, len(classes) + 1)) - {0, -1})
        if unnamed:
            raise InputError(f"{root}: the label map has codes {unnamed[:5]}, {published.name} has 1 to {len(classes)}")
        notes.append("labels are of pixels: chips of one scene lie side by side, so a random split of them leaks")
    maps = {} if scene.labels is None else {LABELS: LabelMap(classes=dict(enumerate(classes, start=1)))}
    maps |= {} if scene.shares is None else {SHARES: LabelMap(shares=scene.materials)}
    return HyperspectralScene(
        dataset=published.name, kind=published.name, contracts=contracts, items=items, notes=tuple(notes),
        classes=classes if scene.labels is not None else (), maps=maps, fingerprint=fingerprint(root, scene.files, options),
        scene=scene, gsd_m=published.gsd_m, options=options,
    )  # fmt: skip


def _linear(first: float, last: float, count: int) -> Callable[[int], float]:
    return lambda n: first + (last - first) * (n - 1) / (count - 1)


def _without(count: int, *removed: range) -> tuple[int, ...]:
    return tuple(n for n in range(1, count + 1) if not any(n in gap for gap in removed))


def _file(folder: Path, *names: str) -> Path | None:
    """The first of `names` in the folder, whatever its case."""
    there = {p.name.lower(): p for p in sorted(folder.glob("*.mat")) if p.is_file() and not p.is_symlink()}
    return next((there[n.lower()] for n in names if n.lower() in there), None)


def _needed(path: Path, *names: str) -> Path:
    folder = path if path.is_dir() else path.parent
    found = _file(folder, *names)
    if found is None:
        raise InputError(f"{folder} has no {' or '.join(names)}")
    return found


def _array(path: Path, name: str, dimensions: int) -> np.ndarray:
    value = mat.load(path, name)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "uif" or value.ndim != dimensions:
        shape = getattr(value, "shape", "?")
        raise InputError(f"{path}: {name} is no array of numbers with {dimensions} axes (it is {shape})")
    return value


def _codes(values: np.ndarray, where: Path) -> np.ndarray:
    """Label maps are often stored as float."""
    if not np.array_equal(values, np.rint(values)) or np.abs(values).max(initial=0) > 10_000:
        raise InputError(f"{where}: the label map holds numbers that are no codes")
    return values.astype(np.int16)


def _cube_and_map(cube: str, keys: tuple[str, ...]) -> Callable[[Path, Published], Scene]:
    """GIC's files: `<cube>.mat` and `<first key>_gt.mat`, each with one variable of that name."""

    def load(path: Path, published: Published) -> Scene:
        file = _needed(path, f"{cube}.mat")
        names = mat.shapes(file)
        key = next((k for k in (*keys, cube) if k in names), None)
        if key is None:
            raise InputError(f"{file} has {', '.join(names) or 'no arrays'}, not {keys[0]}")
        stem = cube.removesuffix("_corrected")
        truth = _file(file.parent, f"{stem}_gt.mat")
        labels = None
        if truth is not None:
            (name,) = [n for n in mat.shapes(truth) if n.lower() == f"{stem}_gt".lower()] or [f"{stem}_gt"]
            labels = _codes(_array(truth, name, 2), truth)
        return Scene(_array(file, key, 3), (file, *([truth] if truth else [])), labels)

    return load


def _houston(path: Path, published: Published) -> Scene:
    """The community's `HSI.mat`, `LiDAR.mat`, `TRLabel.mat`, `TSLabel.mat` (or `gt.mat`), each with a variable of that name."""
    cube = _needed(path, "HSI.mat")
    files, labels, heights = [cube], None, None
    for names in (("gt",), ("TRLabel", "TSLabel")):
        maps = [(f, n) for n in names if (f := _file(cube.parent, f"{n}.mat")) is not None]
        if maps and labels is None:
            files += [f for f, _ in maps]
            labels = np.maximum.reduce([_codes(_array(f, n, 2), f) for f, n in maps])
    lidar = _file(cube.parent, "LiDAR.mat")
    if lidar is not None:
        files.append(lidar)
        heights = mat.load(lidar, "LiDAR")
        heights = heights[..., None] if heights.ndim == 2 else heights
    return Scene(_array(cube, "HSI", 3), tuple(files), labels, heights)


def _muufl(path: Path, published: Published) -> Scene:
    """One struct `hsi`: Data, Lidar{1}.z, sceneLabels.labels (−1 unlabelled) and .Materials_Type, info.wavelength."""
    file = _needed(path, "muufl_gulfport_campus_1_hsi_220_label.mat") if path.is_dir() else path
    hsi = mat.load(file, "hsi")

    def at(*steps: str | int) -> np.ndarray:
        return mat.field(hsi, *steps, where=f"{file}: hsi")

    cube, nm = at("Data"), at("info", "wavelength").ravel()
    if cube.ndim != 3 or cube.dtype.kind not in "uif" or nm.dtype.kind not in "uif" or len(nm) != cube.shape[2]:
        raise InputError(f"{file}: hsi.Data is {cube.shape} with {len(nm)} wavelengths; H×W×C and one for each band are expected")
    heights = at("Lidar", 0, "z") if "Lidar" in (hsi.dtype.names or ()) else None
    if heights is not None and heights.ndim == 2:
        heights = heights[..., None]
    names = tuple(str(np.ravel(n)[0]) for n in at("sceneLabels", "Materials_Type").ravel())
    micrometres = float(nm.max()) < 100
    return Scene(
        cube, (file,), _codes(at("sceneLabels", "labels"), file), heights,
        tuple(round(float(w) * (1000 if micrometres else 1), 3) for w in nm), names,
    )  # fmt: skip


def _jasper(path: Path, published: Published) -> Scene:
    """`Y` is bands × pixels, pixels column by column; `SlectBands` says which of 224 bands they are. Where the published ground
    truth `end4.mat` lies beside it, its `A` has the abundances of four materials, named by `cood` ("1-tree")."""
    file = _needed(path, "jasperRidge2_R198.mat")
    rows, columns = (int(_array(file, key, 2).ravel()[0]) for key in ("nRow", "nCol"))
    flat, kept = _array(file, "Y", 2), _array(file, "SlectBands", 2).ravel()
    if flat.shape != (len(kept), rows * columns):
        raise InputError(f"{file}: Y is {flat.shape}, {len(kept)} bands of {rows}×{columns} pixels are expected")
    if tuple(kept.tolist()) != published.kept:
        raise InputError(f"{file}: SlectBands are not the 198 of {published.name}; name the bands of this version with --bands")
    cube = flat.reshape(len(kept), rows, columns, order="F").transpose(1, 2, 0)
    truth = _file(file.parent, "end4.mat")
    if truth is None:
        return Scene(cube, (file,))
    shares = _array(truth, "A", 2)
    if shares.shape[1] != rows * columns or shares.dtype.kind != "f" or not np.isfinite(shares).all():
        raise InputError(f"{truth}: A is {shares.shape} of {shares.dtype}; shares of {rows * columns} pixels are expected")
    folded = shares.reshape(-1, rows, columns, order="F").astype(np.float32)
    return Scene(cube, (file, truth), shares=np.ascontiguousarray(folded), materials=_materials(truth, len(shares)))


def _materials(path: Path, count: int) -> tuple[str, ...]:
    """The names of `count` abundances, without their numbers."""
    try:
        named = [str(np.ravel(name)[0]) for name in mat.load(path, "cood").ravel() if np.size(name)]
    except InputError:
        named = []
    if len(named) != count:
        return tuple(f"material{n}" for n in range(1, count + 1))
    return tuple(re.sub(r"^\d+-", "", name) for name in named)


_AVIRIS, _ROSIS, _CASI = _linear(366, 2500, 224), (430.0, 860.0), _linear(364.0, 1046.1, 144)
_SALINAS = (
    "brocoli_green_weeds_1", "brocoli_green_weeds_2", "fallow", "fallow_rough_plow", "fallow_smooth", "stubble", "celery",
    "grapes_untrained", "soil_vinyard_develop", "corn_senesced_green_weeds", "lettuce_romaine_4wk", "lettuce_romaine_5wk",
    "lettuce_romaine_6wk", "lettuce_romaine_7wk", "vinyard_untrained", "vinyard_vertical_trellis",
)  # fmt: skip
_SCENES = (
    Published(
        "indian_pines", "aviris", 20.0, _without(220, range(104, 109), range(150, 164), range(220, 221)), _linear(400, 2500, 220),
        _cube_and_map("Indian_pines_corrected", ("indian_pines_corrected",)),
        ("alfalfa", "corn-notill", "corn-mintill", "corn", "grass-pasture", "grass-trees", "grass-pasture-mowed",
         "hay-windrowed", "oats", "soybean-notill", "soybean-mintill", "soybean-clean", "wheat", "woods",
         "buildings-grass-trees-drives", "stone-steel-towers"),
    ),
    Published(
        "salinas", "aviris", 3.7, _without(224, range(108, 113), range(154, 168), range(224, 225)), _AVIRIS,
        _cube_and_map("Salinas_corrected", ("salinas_corrected",)), _SALINAS,
    ),
    Published(
        "salinas_a", "aviris", 3.7, _without(224, range(108, 113), range(154, 168), range(224, 225)), _AVIRIS,
        _cube_and_map("SalinasA_corrected", ("salinasA_corrected",)), _SALINAS,
    ),
    Published(
        "pavia_university", "rosis", 1.3, _without(103), _linear(*_ROSIS, 103), _cube_and_map("PaviaU", ("paviaU",)),
        ("asphalt", "meadows", "gravel", "trees", "painted metal sheets", "bare soil", "bitumen",
         "self-blocking bricks", "shadows"),
    ),
    Published(
        "pavia_centre", "rosis", 1.3, _without(102), _linear(*_ROSIS, 102), _cube_and_map("Pavia", ("pavia",)),
        ("water", "trees", "asphalt", "self-blocking bricks", "bitumen", "tiles", "shadows", "meadows", "bare soil"),
    ),
    Published(
        "houston_2013", "casi", 2.5, _without(144), _CASI, _houston,
        ("healthy grass", "stressed grass", "synthetic grass", "trees", "soil", "water", "residential", "commercial", "road",
         "highway", "railway", "parking lot 1", "parking lot 2", "tennis court", "running track"),
    ),
    Published("muufl_gulfport", "casi", None, _without(64), None, _muufl),
    Published(
        "jasper_ridge", "aviris", None, _without(224, range(1, 4), range(108, 113), range(154, 167), range(220, 225)), _AVIRIS,
        _jasper,
    ),
)  # fmt: skip
_LICENCES = {"muufl_gulfport": "MIT", "houston_2013": "IEEE GRSS contest terms"}


def _register(published: Published) -> None:
    title = (
        f"{published.name.replace('_', ' ').title()}, one {published.sensor.upper()} scene of {len(published.kept)} bands (.mat)"
    )

    @register(published.name, title, _LICENCES.get(published.name, "none stated"))
    def _(path: Path, options: Options) -> HyperspectralScene:
        return _open(published, path, options)


for _published in _SCENES:
    _register(_published)
