"""Samples of SSL4EO-S12 v1.1 and TerraMesh: one Zarr per modality with `bands`, `band`, `center_lat`, `time`, `cloud_mask`."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from swath.shards.bands import Band, InputContract, Unit
from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.recipes.radiometric_offset import SCALE, Rule, decide
from swath.shards.sensors import SENSORS, band
from swath.shards.sources import tars
from swath.shards.sources.cube import clear
from swath.shards.sources.planned import Planned, contract, fingerprint
from swath.shards.sources.source import Item, Options, Part, Sample
from swath.shards.sources.zarrs import Zarr

L2A = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
L1C = (*L2A[:10], "B10", *L2A[10:])
# SEnSeI v2: land, water, snow, thin cloud, thick cloud, shadow, no data → nodata 0, clear 1, cloud 2, shadow 3
CLOUDS = np.array([1, 1, 1, 2, 2, 3, 0], np.uint8)
CLOUD_NOTE = "cloud_mask codes are taken as land, water, snow, thin cloud, thick cloud, shadow, no data (0 to 6)"


@dataclass(frozen=True)
class Folder:
    """One modality: how it is called here, and its bands in file order."""

    modality: str
    sensor: str
    level: str
    unit: Unit
    bands: tuple[str, ...]


FOLDERS = {
    "S2L2A": Folder("sentinel2_l2a", "sentinel2", "L2A", "reflectance", L2A),
    "S2L1C": Folder("sentinel2_l1c", "sentinel2", "L1C", "reflectance", L1C),
    "S1GRD": Folder("sentinel1_grd", "sentinel1", "GRD sigma0", "dB", ("VV", "VH")),
    "S1RTC": Folder("sentinel1_rtc", "sentinel1", "RTC gamma0", "dB", ("VV", "VH")),
    "S2RGB": Folder("rgb", "sentinel2", "L2A display", "digital number", ("red", "green", "blue")),
    "DEM": Folder("dem", "Copernicus DEM", "elevation", "metres", ("elevation",)),
    "LULC": Folder("lulc", "land cover", "map", "class", ("class",)),
}
LEFT_OUT = {"NDVI": "it is computed from S2L2A, and has no physical unit"}


def folders_of(split: Path) -> tuple[list[str], list[str]]:
    """(modality folders of a split in a fixed order, names of folders that are left out)."""
    there = sorted(p.name for p in split.iterdir() if p.is_dir() and not p.is_symlink())
    return [name for name in FOLDERS if name in there], [name for name in there if name not in FOLDERS]


def splits_of(root: Path, title: str, pattern: str) -> list[Path]:
    """The folders train and val; InputError without any that holds `pattern`."""
    found = [root / name for name in ("train", "val") if (root / name).is_dir()]
    if not any(split.glob(f"*/{pattern}") for split in found) or not found:
        raise InputError(f"{root} is not {title}: train/ or val/ with folders such as S2L2A/ of {pattern} files are expected")
    return found


def contracts_of(first: dict[str, Zarr], dates: int) -> dict[str, InputContract]:
    """By modality, from one sample (or file of samples) of each folder."""
    made = {}
    for name, zarr in first.items():
        folder = FOLDERS[name]
        known = SENSORS.get(folder.sensor)
        bands = [band(b, known) if folder.modality != "rgb" else Band(name=b, common_name=b) for b in folder.bands]
        made[folder.modality] = contract(
            folder.modality, bands, str(zarr.numbers("bands").dtype), sensor=folder.sensor, level=folder.level, unit=folder.unit,
            dates=dates, gsd_m=10.0, resampling="to 10 m by the publisher" if folder.sensor == "sentinel2" else None,
        )  # fmt: skip
    return made


def sample_of(zarrs: dict[str, Zarr], n: int | None, dates: int, rule: Rule, options: Options) -> Sample:
    """All modalities of a sample; `n` is its place in files that hold several. Raises DecodeError."""
    stacks = {name: _pixels(name, zarr, n, dates) for name, zarr in zarrs.items()}
    at = () if n is None else (n,)
    b10 = stacks["S2L1C"][:, L1C.index("B10")] if "S2L1C" in stacks else None
    parts: dict[str, Part] = {}
    meta: dict[str, Any] = {"gsd_m": 10.0}
    times: dict[str, list[str]] = {}
    for name, dn in stacks.items():
        folder, zarr = FOLDERS[name], zarrs[name]
        part = Part(dn.reshape(-1, *dn.shape[2:]), valid=_valid(dn, folder, zarr, at))
        if folder.unit == "reflectance":
            part.scale = options.scale if options.scale is not None else SCALE
            if options.add is not None:
                part.add, part.scale_source = options.add, "given by whoever made the shards"
            else:
                part.add, part.scale_source = decide(rule, folder.level, dn, b10)
        parts[folder.modality] = part
        clock = next((c for c in ("time_", "time") if c in zarr.names), None)
        told = zarr.times(clock, *at) if clock else []
        if len(told) == dates and all(told):
            times[folder.modality] = [t for t in told if t]
    if times:
        meta |= {"times": times} if dates > 1 else {"times": times, "time": next(iter(times.values()))[0]}
    return Sample(parts, meta=meta | _place(next(iter(zarrs.values())), at))


def _pixels(name: str, zarr: Zarr, n: int | None, dates: int) -> np.ndarray:
    """(T, C, H, W), band names and order checked."""
    bands, found = FOLDERS[name].bands, zarr.numbers("bands")
    if len(bands) > 1 and name != "S2RGB":
        said = tuple(text.upper() for text in zarr.texts("band"))
        if said != bands:
            raise DecodeError(f"{name} holds the bands {', '.join(said)}, not {', '.join(bands)}")
    axes = "tchw" if n is None else "ntchw"
    if len(found.shape) != len(axes) or found.shape[-4:-2] != (dates, len(bands)):
        raise DecodeError(f"{name} has the shape {found.shape}; {dates} dates of {len(bands)} bands are expected")
    pixels = zarr.chip("bands", axes, n=n or 0)
    return pixels.reshape(dates, len(bands), *pixels.shape[1:])


def _valid(dn: np.ndarray, folder: Folder, zarr: Zarr, at: tuple[int, ...]) -> np.ndarray | None:
    """(T, H, W) codes, (H, W) of a single date; None where all is clear. 0 in all optical bands is fill: B10 alone may be 0."""
    dates, _, height, width = dn.shape
    codes = np.ones((dates, height, width), np.uint8)
    finite = clear(dn.reshape(-1, height, width), None, dates)
    if finite is not None:
        codes &= finite.reshape(codes.shape)
    if folder.unit == "reflectance":
        codes[(dn == 0).all(axis=1)] = 0
        if "cloud_mask" in zarr.names:
            mask = zarr.values("cloud_mask", *at)
            if mask.size != codes.size or mask.dtype.kind not in "iu" or mask.min() < 0 or mask.max() >= len(CLOUDS):
                raise DecodeError(f"cloud_mask of shape {mask.shape} and codes up to {mask.max()} is not understood")
            codes *= CLOUDS[mask.reshape(codes.shape)]
    if (codes == 1).all():
        return None
    return codes if dates > 1 else codes[0]


def _place(zarr: Zarr, at: tuple[int, ...]) -> dict[str, Any]:
    meta: dict[str, Any] = {}
    if {"center_lat", "center_lon"} <= set(zarr.names):
        for key, name in (("lat", "center_lat"), ("lon", "center_lon")):
            meta[key] = round(float(zarr.values(name, *at).ravel()[0]), 7)
    if "crs" in zarr.names and zarr.numbers("crs").dtype.kind in "iu":
        meta["crs"] = f"EPSG:{int(zarr.values('crs', *at).ravel()[0])}"
    return meta


@dataclass(kw_only=True)
class LockStep(Planned):
    """Tars of single samples, one folder per modality, with the same keys in the same order in each."""

    root: Path
    dates: int
    rule: Rule
    options: Options

    def read(self, item: Item) -> Sample:
        zarrs = {}
        for name, (path, member) in item.place.items():
            zarrs[name] = Zarr(tars.read(self.root / path, member), f"{path}: {member.key}")
        sample = sample_of(zarrs, None, self.dates, self.rule, self.options)
        sample.meta["source"] = item.lookup
        return sample


def lock_step(
    root: Path, options: Options, *, dataset: str, title: str, dates: int, rule: Rule, notes: tuple[str, ...]
) -> LockStep:
    """InputError where folders disagree about a key, or nothing is there."""
    splits = splits_of(root, title, "*.tar")
    items: list[Item] = []
    files: list[Path] = []
    first: dict[str, Zarr] = {}
    extra: set[str] = set()
    for split in splits:
        folders, left = folders_of(split)
        extra |= set(left)
        for tar in sorted({p.name for f in folders for p in (split / f).glob("*.tar")}):
            there = {f: split / f / tar for f in folders if (split / f / tar).is_file()}
            listed = {f: [m for m in tars.members(p) if m.suffix == "zarr.zip"] for f, p in there.items()}
            _check_in_step(there, listed)
            files += there.values()
            for rows in zip(*listed.values(), strict=True):
                place = {f: (there[f].relative_to(root).as_posix(), m) for f, m in zip(there, rows, strict=True)}
                key = f"{split.name}/{rows[0].key}"
                items.append(Item(key, f"{key}.zarr.zip", place=place, split=split.name))
            for f, members in listed.items():
                if f not in first and members:
                    first[f] = _first(there[f], members)
    if not items:
        raise InputError(f"{root} is not {title}: its tars hold no .zarr.zip members")
    ordered = {name: first[name] for name in FOLDERS if name in first}
    told = tuple(f"{name} left out: {LEFT_OUT.get(name, 'it is not known')}" for name in sorted(extra))
    return LockStep(
        dataset=dataset, kind=dataset, contracts=_contracts(ordered, dates), items=items, notes=(*notes, CLOUD_NOTE, *told),
        fingerprint=fingerprint(root, files, options), root=root, dates=dates, rule=rule, options=options,
    )  # fmt: skip


def _first(path: Path, members: list[tars.Member]) -> Zarr:
    reason = ""
    for member in members[:100]:
        try:
            zarr = Zarr(tars.read(path, member), f"{path.name}: {member.key}")
            zarr.numbers("bands")
            return zarr
        except DecodeError as error:
            reason = reason or str(error)
    raise InputError(f"{path}: none of its first samples can be read ({reason})")


def _contracts(first: dict[str, Zarr], dates: int) -> dict[str, InputContract]:
    try:
        return contracts_of(first, dates)
    except DecodeError as error:
        raise InputError(str(error)) from None


def _check_in_step(paths: dict[str, Path], listed: dict[str, list[tars.Member]]) -> None:
    (name, members), *others = listed.items()
    keys = [m.key for m in members]
    for other, found in others:
        theirs = [m.key for m in found]
        if theirs == keys:
            continue
        place, (mine, yours) = next((i, pair) for i, pair in enumerate(zip_longest(keys, theirs)) if pair[0] != pair[1])
        raise InputError(
            f"{paths[other]}: sample {place} is {yours or 'missing'}, in {paths[name]} it is {mine or 'missing'}; "
            "tars of one number must hold the same samples in the same order, so copy both again"
        )


@lru_cache(maxsize=16)
def open_file(path: Path, changed: int) -> Zarr:
    """A file of many samples, kept open for those that follow; `changed` is its time."""
    return Zarr(path, path.name)
