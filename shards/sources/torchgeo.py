"""Data sets of TorchGeo by the name of their class, such as `torchgeo:EuroSAT`, read by TorchGeo itself.

TorchGeo's code runs, with whatever it loads (some of its sets come with pickles); nothing is downloaded. Values are those that it
gives: it turns most images into float32, and some radar into integers. Where there is a recipe of our own, take that.
"""

import difflib
import hashlib
import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swath.shards.bands import Band, InputContract
from swath.shards.codec import DecodeError, describe
from swath.shards.errors import InputError
from swath.shards.layouts.layout import RGB
from swath.shards.sensors import SENSORS, band
from swath.shards.sources.cube import clear
from swath.shards.sources.folder import files_below
from swath.shards.sources.planned import Planned, contract
from swath.shards.sources.source import Item, Options, Part, Sample

PREFIX = "torchgeo:"  # of a recipe's name
_SPLITS = ("train", "val", "test")


@dataclass(kw_only=True)
class TorchGeo(Planned):
    """`sets` by split; an item's `place` is (split, number)."""

    sets: dict[str, Any]
    options: Options

    def read(self, item: Item) -> Sample:
        split, number = item.place
        given = _item(self.sets[split], number, item.key)
        sample = Sample({}, meta={"source": item.lookup})
        for name, made in self.contracts.items():
            pixels = _array(given, "mask" if name == "mask" else "image", item.key)
            if len(pixels) != len(made.bands) or str(pixels.dtype) != made.dtype:
                raise DecodeError(f"{name} is {describe(pixels)}, of the first item {len(made.bands)} of {made.dtype}")
            valid = clear(pixels, made.nodata)
            scale, add, claim = 1.0, 0.0, "none: values as TorchGeo gives them"
            if name == "image" and (self.options.scale is not None or self.options.add is not None):
                scale, add, claim = (
                    1.0 if self.options.scale is None else self.options.scale,
                    self.options.add or 0.0,
                    "given by hand",
                )
            sample.parts[name] = Part(pixels, None, "npy", valid, scale, add, claim)
        self._describe(sample, given)
        return sample

    def _describe(self, sample: Sample, given: dict[str, Any]) -> None:
        """Labels by name where the data set has names; a vector of 0 and 1 is several labels."""
        if (label := given.get("label")) is not None:
            values = np.asarray(label)
            if values.dtype.kind not in "biu":
                raise DecodeError(f"label is of {values.dtype}, not a class number")
            numbers = [int(values)] if values.ndim == 0 else np.flatnonzero(values).tolist()
            if any(n < 0 or n >= len(self.classes) for n in numbers) and self.classes:
                raise DecodeError(f"label {numbers} is none of {len(self.classes)} classes")
            names = [self.classes[n] for n in numbers] if self.classes else numbers
            if values.ndim == 0 and self.classes:
                sample.label = self.classes[numbers[0]]
            else:
                sample.meta["labels"] = names
        captions = given.get("captions", given.get("caption"))
        if captions is not None:
            sample.meta["captions"] = [captions] if isinstance(captions, str) else [str(text) for text in captions]


def open_torchgeo(name: str, path: Path, options: Options) -> TorchGeo:
    """The data set `name` of `torchgeo.datasets` below `path`, all its splits. Raises InputError."""
    for fixed in ("chip", "stride", "gsd_m"):
        if getattr(options, fixed) is not None:
            raise InputError(f"samples of torchgeo:{name} stay as they are; leave --{fixed.removesuffix('_m')} out")
    sets = _sets(_class(name), name, path)
    first = next(iter(sets.values()))
    try:
        given = _item(first, 0, "0")
        contracts = {"image": _contract(name, first, _array(given, "image", "0"), options)}
        if "mask" in given:
            mask = _array(given, "mask", "0")
            bands = [Band(name="mask" if len(mask) == 1 else f"mask_{n}") for n in range(len(mask))]
            contracts["mask"] = contract("mask", bands, str(mask.dtype), sensor="none", level="label", unit="class")
    except DecodeError as error:
        raise InputError(f"torchgeo:{name}: its first item cannot be taken ({error})") from None
    several = len(sets) > 1
    items = [
        Item(f"{split}/{n:08d}", f"{split}/{n:08d}", place=(split, n), split=split if several else None)
        for split, made in sets.items() for n in range(len(made))
    ]  # fmt: skip
    stamps = [(p.relative_to(path).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files_below(path).paths]
    return TorchGeo(
        dataset=f"torchgeo_{name.lower()}", kind="torchgeo", contracts=contracts, items=items, sets=sets, options=options,
        classes=tuple(str(c) for c in getattr(first, "classes", ()) or ()),
        fingerprint=hashlib.sha256(repr((name, stamps, [len(made) for made in sets.values()], options)).encode()).hexdigest(),
        notes=(f"torchgeo:{name}: values are as TorchGeo gives them ({contracts['image'].dtype}), not as published",),
    )  # fmt: skip


def _class(name: str) -> Any:
    try:
        module = importlib.import_module("torchgeo.datasets")
    except Exception as error:  # torchvision that does not fit torch raises RuntimeError
        needs = f"torchgeo:{name} needs TorchGeo, with a torchvision that fits torch: pip install torchgeo torchvision"
        raise InputError(f"{needs} ({type(error).__name__}: {error})") from None
    found = getattr(module, name, None) if name.isidentifier() and not name.startswith("_") else None
    if not inspect.isclass(found):
        near = difflib.get_close_matches(name, [n for n in dir(module) if n[:1].isupper()], n=1)
        raise InputError(f"torchgeo.datasets has no {name!r}{f'; did you mean {near[0]}?' if near else ''}")
    listed = hasattr(found, "__getitem__") and hasattr(found, "__len__")
    if not listed or any(base.__name__ == "GeoDataset" for base in found.__mro__):
        raise InputError(f"torchgeo:{name} is cut by place, no list of samples; give the folder of its rasters without --recipe")
    return found


def _sets(found: Any, name: str, path: Path) -> dict[str, Any]:
    """By split, those that are there; one without a name where the data set has no splits."""
    takes = inspect.signature(found).parameters
    if "root" not in takes:
        raise InputError(f"torchgeo:{name} takes no root; it cannot be read from a folder")
    given: dict[str, Any] = {"root": str(path)} | ({"download": False} if "download" in takes else {})
    if "split" not in takes:
        splits: Sequence[str | None] = (None,)
    else:
        splits = tuple(getattr(found, "splits", None) or _SPLITS)
    sets, reason = {}, ""
    for split in splits:
        try:
            made = found(**given, **({} if split is None else {"split": split}))
            if len(made):
                sets[split or "all"] = made
        except Exception as error:  # of their own kinds, for each data set
            reason = reason or " ".join(f"{type(error).__name__}: {error}".split())
    if not sets:
        raise InputError(f"torchgeo:{name} finds nothing in {path} ({reason or 'no items'}); download it there with TorchGeo")
    return sets


def _item(made: Any, number: int, key: str) -> dict[str, Any]:
    try:
        given = made[number]
    except Exception as error:  # of any kind: it is their code on somebody's file
        raise DecodeError(f"{key}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict):
        raise DecodeError(f"{key} is no dict of TorchGeo's")
    return given


def _array(given: dict[str, Any], name: str, key: str) -> np.ndarray:
    """(C, H, W) of a member of an item."""
    if name not in given:
        raise DecodeError(f"{key} has {', '.join(sorted(map(str, given)))}, but no {name!r}")
    try:
        array = np.asarray(given[name])
    except (TypeError, ValueError, RuntimeError) as error:
        raise DecodeError(f"{key}: {name} is no array ({error})") from None
    array = array[None] if array.ndim == 2 else array
    array = array.astype(np.uint8) if array.dtype == bool else array
    if array.ndim != 3 or array.dtype.kind not in "uif":
        raise DecodeError(f"{key}: {name} has shape {array.shape} of {array.dtype}; (C, H, W) of numbers are taken")
    return np.ascontiguousarray(array)


def _contract(name: str, made: Any, pixels: np.ndarray, options: Options) -> InputContract:
    sets = getattr(made, "BAND_SETS", None) or getattr(made, "band_sets", None) or {}
    told = [
        options.bands,
        getattr(made, "bands", None),
        getattr(made, "all_bands", None),
        getattr(made, "all_band_names", None),
        *dict(sets).values(),
        RGB,
    ]
    flat = [(names,) if isinstance(names, str) else tuple(map(str, names or ())) for names in told]
    if options.bands is not None and len(flat[0]) != len(pixels):
        raise InputError(f"torchgeo:{name} has {len(pixels)} bands, --bands names {len(flat[0])}")
    names = next((n for n in flat if len(n) == len(pixels) and len(set(n)) == len(n)), None)
    if names is None:
        raise InputError(f"torchgeo:{name} has {len(pixels)} bands and does not say which; give --bands with {len(pixels)} names")
    return contract(
        "image", [band(n, SENSORS.get(options.sensor or "")) for n in names], str(pixels.dtype),
        sensor=options.sensor or "unknown", level=options.level or "unknown", unit=options.unit or "digital number",
        nodata=options.nodata,
    )  # fmt: skip
