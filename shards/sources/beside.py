"""What lies beside a scene `x.tif`: `x_landcover.tif` (labels), `x_valid.tif` (mask), `x_labels_metadata.json`.

`x_sar.tif` and `x_change.tif` are other modalities: they are left out, and it is said.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swath.shards.errors import InputError

LANDCOVER, VALID, METADATA = "_landcover", "_valid", "_labels_metadata.json"
SUFFIXES = (LANDCOVER, VALID, "_change", "_sar")


@dataclass(frozen=True)
class Beside:
    """Paths of the map and the mask; the map's code → class, empty where it names none; labels and time of the JSON."""

    cover: Path | None = None
    mask: Path | None = None
    codes: tuple[tuple[int, str], ...] = ()
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
    """A line for each kind that is not used."""
    made = []
    for suffix, what in (("_sar", "SAR"), ("_change", "change")):
        count = sum(name.endswith(suffix) for name in beside)
        if count:
            made.append(f"{count} {what} raster{'s' * (count > 1)} (*{suffix}.tif) left out: another modality than the scenes")
    return tuple(made)


def read_beside(
    name: str, beside: dict[str, Path], open_raster: Callable[[Path], Any], bounds: tuple[float, ...]
) -> Beside:  # fmt: skip
    """What there is for scene `name`, checked: maps are one band of integers on the scene's ground."""
    cover, mask = beside.get(name + LANDCOVER), beside.get(name + VALID)
    codes: dict[int, str] = {}
    for path in (cover, mask):
        if path is None:
            continue
        with open_raster(path) as file:
            wanted = ("uint8",) if path is mask else ("uint8", "uint16")
            if file.count != 1 or file.dtypes[0] not in wanted:
                raise InputError(
                    f"{path} has {file.count} band(s) of {file.dtypes[0]}; such a map is one of {' or '.join(wanted)}"
                )
            if not np.allclose(file.bounds, bounds, rtol=0, atol=abs(file.transform.a) / 2):
                raise InputError(f"{path} does not cover the same ground as its scene")
            if path is cover:
                codes = parse_classes(path, file.tags().get("CLASSES", ""))
    notes = _metadata(beside.get(name + METADATA))
    labels, time = notes.get("labels"), notes.get("acquisition_date")
    return Beside(
        cover, mask, tuple(sorted(codes.items())),
        tuple(str(label) for label in labels) if isinstance(labels, list) else None, str(time) if time else None,
    )  # fmt: skip


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
