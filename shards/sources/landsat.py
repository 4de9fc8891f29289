"""Landsat Collection-2 scenes as published: one GeoTIFF per band, `*_MTL.json` or `*_MTL.txt`, QA_PIXEL.

Surface or top-of-atmosphere reflectance is one modality, brightness (surface temperature, or the radiance of level 1) another.
Sources: Landsat 8-9 Collection 2 Level 2 Science Product Guide (LSDS-1619), and LSDS-1618 for Landsat 4-7.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swath.shards.bands import Unit
from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.sensors import SENSORS, Sensor, band
from swath.shards.sources.cut import Scenes, stated
from swath.shards.sources.folder import files_below
from swath.shards.sources.scene import UNSCALED, Mask, Scene, Stack, iso_time, read_stack
from swath.shards.sources.source import Options

MTL = re.compile(r"_MTL\.(json|txt)$", re.IGNORECASE)
_MAX_BYTES = 1 << 20
_BAND = re.compile(r"(?:SR_|ST_)?B\d{1,2}(?:_VCID_[12])?", re.IGNORECASE)
_THERMAL_NM = 8000
_SENSORS = {
    "LANDSAT_9": "landsat8",
    "LANDSAT_8": "landsat8",
    "LANDSAT_7": "landsat7",
    "LANDSAT_5": "landsat5",
    "LANDSAT_4": "landsat5",
}
_Groups = dict[str, dict[str, str]]


class Landsat(Scenes):
    """All Landsat scenes below a folder; a scene is an MTL file and the bands beside it that share its name."""

    def __init__(self, path: Path, options: Options) -> None:
        found = files_below(path)
        metadata: dict[tuple[Path, str], Path] = {}
        for file in found.paths:  # sorted: of a JSON and a text the JSON comes first and is kept
            if MTL.search(file.name):
                metadata.setdefault((file.parent, MTL.sub("", file.name)), file)
        inside: dict[Path, list[Path]] = {}
        for file in found.of(".tif", ".tiff"):
            inside.setdefault(file.parent, []).append(file)
        scenes, files, panchromatic = [], list(metadata.values()), 0
        for (folder, stem), mtl in sorted(metadata.items()):
            members = {f.stem[len(stem) + 1 :].upper(): f for f in inside.get(folder, ()) if f.stem.startswith(f"{stem}_")}
            files += members.values()
            scenes.append(_scene(path, stem, mtl, members, options))
            panchromatic += "B8" in members and "B8" not in (options.bands or ()) and scenes[-1].broken is None
        left = [f"{panchromatic} panchromatic bands (B8, 15 m) left out; name B8 in --bands to have it"] if panchromatic else []
        super().__init__(path, options, "landsat", scenes, stated(path, files), (*found.notes, *left))


@dataclass(frozen=True)
class _Metadata:
    """What an MTL says, its numbers as text by group."""

    shown: str
    groups: _Groups
    sensor: Sensor
    level: str

    def radiometry(self, group: str, kind: str, names: list[str]) -> tuple[float, float, str] | None:
        """(scale, add, who says so) that all `names` share; None where the file gives none or they differ."""
        keys = [(f"{kind}_MULT_BAND_{name}", f"{kind}_ADD_BAND_{name}") for name in names]
        values = self.groups.get(group, {})
        found = {(values.get(mult), values.get(add)) for mult, add in keys}
        if len(found) != 1 or None in (pair := found.pop()):
            return None
        scale, add = (self.number(text or "", keys[0][0]) for text in pair)
        if scale == 0:
            raise DecodeError(f"{self.shown}: {keys[0][0]} is 0")
        return scale, add, f"file metadata: {kind}_MULT_BAND and {kind}_ADD_BAND"

    def number(self, text: str, name: str) -> float:
        if not re.fullmatch(r"[-+]?\d{1,9}(\.\d{0,20})?(E[-+]?\d{1,2})?", text.strip(), re.IGNORECASE):
            raise DecodeError(f"{self.shown}: {name} is {text[:20]!r}, not a number")
        return float(text)


def _scene(source: Path, stem: str, mtl: Path, members: dict[str, Path], options: Options) -> Scene:
    shown = mtl.relative_to(source).as_posix()
    name = shown[: MTL.search(shown).start()]  # pyright: ignore[reportOptionalMemberAccess]
    lookup = mtl.parent.relative_to(source).as_posix() if mtl.parent != source else stem
    try:
        metadata = _read_metadata(mtl, shown)
        stacks = _stacks(source, metadata, members, options)
        image = metadata.groups.get("IMAGE_ATTRIBUTES", {})
        cloud = metadata.number(image.get("CLOUD_COVER", "-1"), "CLOUD_COVER")
    except DecodeError as error:
        return Scene(name, lookup, broken=str(error))
    day = image.get("DATE_ACQUIRED", "")
    time = iso_time(f"{day}T{image.get('SCENE_CENTER_TIME', '')}") or iso_time(day)
    meta: dict[str, Any] = {"product": stem, "platform": image.get("SPACECRAFT_ID", "")}
    return Scene(name, lookup, stacks, time=time, cloud=min(round(cloud / 100, 6), 1.0) if cloud >= 0 else None, meta=meta)


def _stacks(source: Path, metadata: _Metadata, members: dict[str, Path], options: Options) -> tuple[Stack, ...]:
    """Reflective bands, and thermal ones where there are any, each in the sensor's order."""
    second = metadata.level.startswith("L2")
    names: dict[bool, list[tuple[str, str]]] = {False: [], True: []}  # thermal? → (suffix of the file, name of the band)
    for suffix in members:
        if not _BAND.fullmatch(suffix) or second != suffix.startswith(("SR_", "ST_")):
            continue
        plain = suffix.removeprefix("SR_").removeprefix("ST_")
        known = metadata.sensor.bands.get(plain.partition("_")[0])
        if known is not None and (plain != "B8" or known.common_name != "pan" or "B8" in (options.bands or ())):
            names[(known.wavelength_nm or 0) > _THERMAL_NM].append((suffix, plain))
    if options.bands is not None:
        chosen = {name: pair for pairs in names.values() for pair in pairs for name in (pair[1], pair[0])}
        unknown = [b for b in options.bands if b.upper() not in chosen]
        if unknown:
            raise InputError(f"--bands names {', '.join(unknown)}; {metadata.shown} has {', '.join(sorted(chosen))}")
        wanted = [chosen[b.upper()] for b in options.bands]
        names = {thermal: [pair for pair in wanted if pair in names[thermal]] for thermal in names}
    order = list(metadata.sensor.bands)
    made = []
    for thermal, pairs in names.items():
        if options.bands is None:
            pairs = sorted(pairs, key=lambda pair: (order.index(pair[1].partition("_")[0]), pair[1]))
        if pairs:
            made.append(_stack(source, metadata, members, pairs, thermal, options))
    if not made:
        raise DecodeError(f"{metadata.shown} has no bands beside it")
    return tuple(made)


def _stack(
    source: Path, metadata: _Metadata, members: dict[str, Path], pairs: list[tuple[str, str]], thermal: bool, options: Options
) -> Stack:  # fmt: skip
    files = [members[suffix] for suffix, _ in pairs]
    bands = tuple(band(n.partition("_")[0], metadata.sensor).model_copy(update={"name": n}) for _, n in pairs)
    stack = read_stack([str(f) for f in files], [f.relative_to(source).as_posix() for f in files], tuple(b.name for b in bands))
    keys = [name if not thermal or not suffix.startswith("ST_") else suffix for suffix, name in pairs]
    numbers = [key if key.startswith("ST_") else key.removeprefix("B") for key in keys]
    if metadata.level.startswith("L2"):
        kind, group = ("TEMPERATURE", "TEMPERATURE") if thermal else ("REFLECTANCE", "REFLECTANCE")
        found = metadata.radiometry(f"LEVEL2_SURFACE_{group}_PARAMETERS", kind, numbers)
        if found is None:
            raise DecodeError(f"{metadata.shown} gives no {kind}_MULT_BAND and {kind}_ADD_BAND that its bands share")
    else:
        found = metadata.radiometry("LEVEL1_RADIOMETRIC_RESCALING", "RADIANCE" if thermal else "REFLECTANCE", numbers)
    unit: Unit = "digital number"
    if found is not None:
        unit = "reflectance" if not thermal else "kelvin" if metadata.level.startswith("L2") else "radiance"
    scale, add, said = found or (1.0, 0.0, UNSCALED)
    if found is not None and not thermal and metadata.level.startswith("L1"):
        said += ", not corrected for the sun's elevation"
    if not thermal and (options.scale is not None or options.add is not None):
        scale, add = options.scale or scale, add if options.add is None else options.add
        said = f"--scale and --add, over {said}"
    mask = members.get("QA_PIXEL")
    return replace(
        stack, bands=bands, modality=f"{metadata.sensor.name}_thermal" if thermal else metadata.sensor.name,
        sensor=options.sensor or metadata.sensor.name, level=options.level or metadata.level,
        unit=unit if thermal else options.unit or unit, scale=scale, add=add, said=said,
        nodata=0.0 if options.nodata is None or thermal else options.nodata, mask=Mask(str(mask), "QA_PIXEL") if mask else None,
    )  # fmt: skip


def _read_metadata(path: Path, shown: str) -> _Metadata:
    if path.stat().st_size > _MAX_BYTES:
        raise DecodeError(f"{shown}: {path.stat().st_size} bytes are beyond the limit of {_MAX_BYTES}")
    text = path.read_bytes().decode("utf-8", "replace")
    groups = _parse_json(text, shown) if path.suffix.lower() == ".json" else _parse_odl(text)
    contents = groups.get("PRODUCT_CONTENTS", {})
    if "PROCESSING_LEVEL" not in contents:
        raise DecodeError(f"{shown} is no Collection-2 metadata (LANDSAT_METADATA_FILE with PRODUCT_CONTENTS)")
    craft = groups.get("IMAGE_ATTRIBUTES", {}).get("SPACECRAFT_ID", "")
    sensor = {"9": "landsat8", "8": "landsat8", "7": "landsat7", "5": "landsat5", "4": "landsat5"}.get(
        craft.removeprefix("LANDSAT_")
    )
    if sensor is None:
        raise InputError(f"{shown} is of {craft[:40]!r}; bands are known of LANDSAT_4, 5, 7, 8 and 9")
    return _Metadata(shown, groups, SENSORS[sensor], contents["PROCESSING_LEVEL"])


def _parse_json(text: str, shown: str) -> _Groups:
    try:
        value = json.loads(text)["LANDSAT_METADATA_FILE"]
        return {group: {k: str(v) for k, v in pairs.items()} for group, pairs in value.items() if isinstance(pairs, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DecodeError(f"{shown} is no JSON of a LANDSAT_METADATA_FILE") from None


def _parse_odl(text: str) -> _Groups:
    """`GROUP = X`, `KEY = value`, `END_GROUP = X`; keys go to the innermost group."""
    groups: _Groups = {}
    inside: list[str] = []
    for line in text.splitlines():
        key, mark, value = (part.strip() for part in line.partition("="))
        if key == "GROUP":
            inside.append(value)
        elif key == "END_GROUP":
            del inside[-1:]
        elif mark and inside:
            groups.setdefault(inside[-1], {})[key] = value.strip('"')
    return groups
