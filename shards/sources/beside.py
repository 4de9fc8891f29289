"""What lies beside a scene `x.tif`: `x_landcover.tif` (labels), `x_valid.tif` (mask), `x_labels_metadata.json`, `x_sar.tif`.

`x_change.tif` says what changed from `x` to the last date of its place: where samples are of one date, it is left out and told.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.sources.parts import reached
from swath.shards.sources.scene import open_raster, raster_errors

TWO_DATES = "left out: of two dates, not of one scene"
LANDCOVER, VALID, SAR, CHANGE, METADATA = "_landcover", "_valid", "_sar", "_change", "_labels_metadata.json"
_CODES = ("uint8", "uint16")
SUFFIXES = (LANDCOVER, VALID, CHANGE, SAR)


@dataclass(frozen=True)
class Beside:
    """Paths of the map, the mask, the radar, the change; the map's code → class, empty where it names none; labels and time of
    the JSON."""

    cover: Path | None = None
    mask: Path | None = None
    sar: Path | None = None
    codes: tuple[tuple[int, str], ...] = ()
    change: Path | None = None
    labels: tuple[str, ...] | None = None
    time: str | None = None


def split_beside(paths: list[Path], names: dict[Path, str]) -> tuple[list[Path], dict[str, Path]]:
    """(files of scenes, {scene name + suffix: path} of what lies beside one). A suffix alone does not make a file a map."""
    taken = set(names.values())
    beside = {}
    for path in paths:
        suffix = next((s for s in SUFFIXES if path.stem.endswith(s)), None)
        if suffix and names[path].removesuffix(suffix) in taken:
            beside[names[path]] = path
    return [p for p in paths if names[p] not in beside], beside


def left_out(beside: dict[str, Path]) -> tuple[str, ...]:
    """A line on what is not used."""
    count = sum(name.endswith(CHANGE) for name in beside)
    plural = "s" * (count > 1)
    return (f"{count} change raster{plural} (*{CHANGE}.tif) {TWO_DATES}",) if count else ()


def read_beside(name: str, beside: dict[str, Path], bounds: tuple[float, ...]) -> Beside:
    """What there is for scene `name`, checked: maps are one band of integers on the scene's ground.

    DecodeError for maps that cannot be opened, InputError for those that do not fit.
    """
    cover, mask, sar = (beside.get(name + suffix) for suffix in (LANDCOVER, VALID, SAR))
    codes: dict[int, str] = {}
    for path in (cover, mask, sar):
        if path is None:
            continue
        try:
            with reached(), open_raster(str(path)) as file:
                _check(path, file, bounds, () if path is sar else ("uint8",) if path is mask else _CODES)
                if path is cover:
                    codes = parse_classes(path, file.tags().get("CLASSES", ""))
        except raster_errors() as error:
            raise DecodeError(f"{path.name} beside it cannot be opened: {error}") from None
    notes = _metadata(beside.get(name + METADATA))
    labels, time = notes.get("labels"), notes.get("acquisition_date")
    return Beside(
        cover, mask, sar, tuple(sorted(codes.items())), beside.get(name + CHANGE),
        tuple(str(label) for label in labels) if isinstance(labels, list) else None, str(time) if time else None,
    )  # fmt: skip


def read_codes(path: Path, bounds: tuple[float, ...]) -> dict[int, str]:
    """Code → class of a map of codes on a scene's ground. InputError for one that does not fit, or names no classes."""
    try:
        with reached(), open_raster(str(path)) as file:
            _check(path, file, bounds, _CODES)
            codes = parse_classes(path, file.tags().get("CLASSES", ""))
    except raster_errors() as error:
        raise InputError(f"{path} cannot be opened: {error}") from None
    if not codes:
        raise InputError(f"{path} has no CLASSES tag; write it as 1=unchanged,2=changed")
    return codes


def _check(path: Path, file: Any, bounds: tuple[float, ...], dtypes: tuple[str, ...]) -> None:
    """InputError unless it covers the scene's ground, and is one band of `dtypes`, where there are any."""
    if dtypes and (file.count != 1 or file.dtypes[0] not in dtypes):
        raise InputError(f"{path} has {file.count} band(s) of {file.dtypes[0]}; such a map is one of {' or '.join(dtypes)}")
    if not np.allclose(file.bounds, bounds, rtol=0, atol=abs(file.transform.a) / 2):
        raise InputError(f"{path} does not cover the same ground as its scene")


def _metadata(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); repair it or remove it") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object; repair it or remove it")
    return value


def parse_classes(path: Path, text: str) -> dict[int, str]:
    """`1=water,2=forest`, `water,forest` (codes from 1), or a JSON list or object of either. {} for an empty text."""
    try:
        if text.startswith(("[", "{")):
            made = json.loads(text)
            pairs = [(int(k), str(v)) for k, v in (made.items() if isinstance(made, dict) else enumerate(made, 1))]
        else:
            named = [part.partition("=") for part in text.split(",") if part.strip()]
            pairs = [(int(a) if mark else n, (b if mark else a).strip()) for n, (a, mark, b) in enumerate(named, 1)]
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: its CLASSES tag cannot be read ({error}); write it as 1=water,2=forest") from None
    codes = dict(pairs)
    if len(codes) < len(pairs) or len(set(codes.values())) < len(pairs) or not all(codes.values()) or min(codes, default=1) < 1:
        raise InputError(f"{path}: its CLASSES tag {text[:80]!r} repeats itself, has empty names or codes below 1")
    return codes
