"""Plain raster files as scenes: GeoTIFF, VRT, ENVI, JPEG 2000 or netCDF, multi-band or one file per band."""

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from swath.shards.bands import Unit
from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.sensors import SENSORS, Sensor, band, level_of, sensor_of, split_band
from swath.shards.sources.beside import METADATA, Beside, left_out, read_beside, split_beside
from swath.shards.sources.cut import Scenes, stated
from swath.shards.sources.folder import Files, files_below
from swath.shards.sources.scene import Mask, Scene, Stack, iso_time, load_rasterio, open_raster, raster_errors, read_stack
from swath.shards.sources.source import Options
from swath.shards.sources.vrt import check_vrt

EXTENSIONS = (".tif", ".tiff", ".vrt", ".jp2", ".nc")
_RAW = "(Raw)"  # in the file names of Sentinel Hub's exports, whose DN are reflectance · 65535
GRD = re.compile(r"^s1[a-d]-(iw|ew|wv\d?|s\d)-(grd|slc)-", re.IGNORECASE)  # measurements out of a Sentinel-1 product
_BESIDE_GRIDS = ("lat", "lon", "latitude", "longitude", "crs", "spatial_ref", "time")  # of a netCDF file, no bands


class Rasters(Scenes):
    """All scenes below a folder, which must have the same bands and dtype; or, of a file, the one that it belongs to."""

    def __init__(self, path: Path, options: Options) -> None:
        load_rasterio()
        file, path = (path, path.parent) if path.is_file() else (None, path)
        files = files_below(path) if file is None else Files(tuple(sorted(p for p in path.iterdir() if p.is_file())), 0)
        rasters, within = raster_files(files, path)
        raw = next((p for p in rasters if GRD.match(p.name) and file in (None, p)), None)
        if raw is not None:
            raise InputError(f"{raw} {RAW_RADAR}")
        paths, beside = split_beside(rasters, {p: scene_name(path, p) for p in rasters})
        groups = {name: members for name, members in grouped(path, paths).items() if file is None or file in members}
        if not groups:
            raise InputError(f"{file or path} holds no scenes ({', '.join(EXTENSIONS)} or ENVI); name the folder that does")
        notes = [p for p in files.paths if p.name.endswith(METADATA)]
        beside |= {p.relative_to(path).as_posix(): p for p in notes}
        scenes = [raster_scene(path, name, members, beside, options) for name, members in groups.items()]
        pictures = files.of(".jpg", ".jpeg", ".png")
        super().__init__(
            path, options, "rasters", meaning(scenes, options), stated(path, {*rasters, *within, *notes}),
            (
                *files.notes,
                *left_out(beside),
                *([f"{len(pictures)} JPEG or PNG files left out: the folder is read as scenes"] if pictures else []),
            ),
        )  # fmt: skip


RAW_RADAR = (
    "is a raw Sentinel-1 product, uncalibrated and in the radar's geometry: calibrate and terrain-correct it first "
    "(SNAP, pyroSAR or an RTC service), and give GeoTIFFs of VV and VH in dB"
)


def raster_files(files: Files, folder: Path) -> tuple[list[Path], set[Path]]:
    """(files that are scenes, files that a VRT is made of); ENVI headers stand for the data that lie beside them."""
    rasters = set(files.of(*EXTENSIONS))
    headers = [header for header in files.of(".hdr") if _is_envi(header)]
    data = (
        {header: p for p in files.paths for header in (p.with_suffix(".hdr"), Path(f"{p}.hdr")) if p != header} if headers else {}
    )
    for header in headers:
        if header not in data:
            raise InputError(f"{header} has no data beside it; an ENVI file is a header and its data of the same name")
        rasters.add(data[header])
    within: set[Path] = set()
    for path in files.of(".vrt"):
        within |= check_vrt(path, frozenset(files.paths), folder)
    return sorted(rasters - within), within


def _is_envi(header: Path) -> bool:
    with header.open("rb") as file:
        return file.read(4) == b"ENVI"


def scene_name(source: Path, path: Path) -> str:
    """Relative path of the scene that a file belongs to."""
    single = split_band(path.stem)
    return (path.relative_to(source).parent / (single[0] if single else path.stem)).as_posix()


def grouped(source: Path, paths: list[Path]) -> dict[str, list[Path]]:
    """Scene name (a path without extension) → its files: one, or one per band in the sensor's order."""
    groups: dict[str, list[tuple[tuple[float, str], Path]]] = defaultdict(list)
    for path in paths:
        _, band = split_band(path.stem) or ("", "")
        groups[scene_name(source, path)].append((_spectral(band), path))
    return {name: [p for _, p in sorted(files)] for name, files in sorted(groups.items())}


def _spectral(name: str) -> tuple[float, str]:
    found = re.search(r"(\d+)(A?)$", name)
    number = float(found[1]) + 0.5 * bool(found[2]) if found else {"VV": 0, "VH": 1, "HH": 2, "HV": 3}.get(name, 0)
    return number, name


def raster_scene(source: Path, name: str, files: list[Path], beside: dict[str, Path], options: Options) -> Scene:
    """Headers only. What cannot be opened is a broken scene, to be listed; what contradicts itself is an InputError."""
    shown = [p.relative_to(source).as_posix() for p in files]
    lookup = shown[0] if len(files) == 1 else name
    try:
        paths = [(inner, label) for p, label in zip(files, shown, strict=True) for inner in _variables(p)]
        stack = read_stack([p for p, _ in paths], [label for _, label in paths], options.bands)
        found = read_beside(name, beside, stack.grid.bounds)
        radar = None if found.sar is None else read_stack([str(found.sar)], [found.sar.relative_to(source).as_posix()])
    except DecodeError as error:
        return Scene(name, lookup, broken=str(error))
    if found.mask is not None:
        stack = replace(stack, mask=Mask(str(found.mask), "valid"))
    return Scene(
        name, lookup, (stack,) if radar is None else (stack, radar), None if found.cover is None else str(found.cover),
        found.codes, None if found.change is None else str(found.change), _time(stack, found),
        meta={} if found.labels is None else {"labels": list(found.labels)},
    )  # fmt: skip


def _variables(path: Path) -> list[str]:
    """A file as GDAL opens it; a netCDF file with several variables is several, of those on the largest grid."""
    if path.suffix.lower() != ".nc":
        return [str(path)]
    try:
        with open_raster(str(path)) as file:
            names = file.subdatasets
        sizes = {}
        for name in names:
            with open_raster(name) as variable:
                if name.rpartition(":")[2] not in _BESIDE_GRIDS and variable.crs is not None:
                    sizes[name] = (variable.height, variable.width)
    except raster_errors() as error:
        raise DecodeError(f"cannot be opened: {error}") from None
    if names and not sizes:
        raise InputError(f"{path} holds no georeferenced grid; write it with CF grid mappings or as GeoTIFF")
    return [name for name in names if sizes.get(name) == max(sizes.values())] or [str(path)]


def _time(stack: Stack, beside: Beside) -> str | None:
    found = re.search(r"\d{4}-\d\d-\d\d|\d{8}T\d{6}", stack.shown[0].rpartition("/")[2])
    said = (stack.tags.get("ACQUIRED"), beside.time, found[0] if found else None)
    return next((time for text in said if text and (time := iso_time(text))), None)


def meaning(scenes: list[Scene], options: Options) -> list[Scene]:
    """Says of every stack which sensor's it is, and what its numbers mean; the sensor of one scene holds for those untold."""
    told = {s.name: _sensor(s.stacks[0], options) for s in scenes if s.broken is None}
    usual = next((sensor for sensor in told.values() if sensor is not None), None)
    made = []
    for scene in scenes:
        if scene.broken is None:
            main, *radar = scene.stacks
            stacks = (
                _understood(main, told[scene.name] or usual, options),
                *(_understood(s, SENSORS["sentinel1"]) for s in radar),
            )
            if len({stack.modality for stack in stacks}) < len(stacks):
                raise InputError(
                    f"{scene.lookup} is of the same sensor as {stacks[1].shown[0]} beside it; name one of them otherwise"
                )
            scene = replace(scene, stacks=stacks)
        made.append(scene)
    return made


def _sensor(stack: Stack, options: Options) -> Sensor | None:
    if options.sensor is not None:
        return SENSORS.get(options.sensor)
    return sensor_of(f"{stack.tags.get('SENSOR', '')} {stack.shown[0]}")


def _understood(stack: Stack, known: Sensor | None, options: Options = Options()) -> Stack:  # noqa: B008 - it is frozen
    bands = tuple(b if b.wavelength_nm else band(b.name, known) for b in stack.bands)
    if len({b.name for b in bands}) < len(bands):
        raise InputError(f"{stack.shown[0]}: bands {', '.join(stack.names)} are not all different ones; give --bands")
    unit: Unit = known.unit if known else "digital number"
    if known and unit == "reflectance" and stack.dtype == "uint8" and stack.scale is None:
        unit = "digital number"
    if known and known.name.startswith("landsat") and stack.scale is not None:
        unit = "reflectance"
    if stack.tags.get("UNITS") == "linear":
        unit = "linear power"
    nodata = stack.nodata
    if nodata is None and known is not None and stack.dtype != "uint8":
        nodata = known.nodata
    stack = replace(
        stack, bands=bands, modality=known.name if known else "optical",
        sensor=options.sensor or (known.name if known else "unknown"),
        level=options.level or stack.tags.get("LEVEL") or level_of(stack.shown[0]) or "unknown",
        unit=options.unit or unit, nodata=nodata if options.nodata is None else options.nodata,
    )  # fmt: skip
    scale, add, said = _radiometry(stack, known)
    if options.scale is not None or options.add is not None:
        scale = options.scale if options.scale is not None else (1.0 if scale is None else scale)
        add = options.add if options.add is not None else add
        said = "--scale and --add" if said.startswith("none") else f"--scale and --add, over {said}"
    return replace(stack, scale=scale, add=add, said=said)


def _radiometry(stack: Stack, known: Sensor | None) -> tuple[float | None, float, str]:
    """(scale, add, who says so) of physical = DN · scale + add. The file's own scale wins over what is customary."""
    if stack.scale is not None:
        return stack.scale, stack.add, "file tag: scale and offset"
    if stack.unit != "reflectance" or known is None or stack.dtype not in ("uint16", "int16"):
        return None, 0.0, stack.said
    scale, said = known.scale, f"sensor default: {known.name} DN are reflectance · {1 / known.scale:g}"
    if _RAW in stack.shown[0]:
        scale, said = 1 / 65535, f"guessed from the file name: {_RAW} means reflectance · 65535"
    name = next((n for n in ("BOA_ADD_OFFSET", "RADIO_ADD_OFFSET") if n in stack.tags), None)
    if name is None:
        return scale, 0.0, said
    if not re.fullmatch(r"\s*[-+]?\d{1,9}(\.\d*)?\s*", stack.tags[name]):
        raise InputError(f"{stack.shown[0]}: its tag {name} is {stack.tags[name]!r}, not a number of DN")
    return scale, float(stack.tags[name]) * scale, f"{said}; file tag: {name}"
