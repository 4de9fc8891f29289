"""SSL4EO-S12 v1.1 in both layouts: Zarr zips of 64 samples (with the radiometric offset), tars of single ones (without)."""

from dataclasses import dataclass
from pathlib import Path

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.recipes.registry import register
from swath.shards.recipes.zarr_samples import (
    CLOUD_NOTE,
    FOLDERS,
    LEFT_OUT,
    LockStep,
    contracts_of,
    folders_of,
    lock_step,
    open_file,
    sample_of,
    splits_of,
)
from swath.shards.sources.planned import Planned, fingerprint
from swath.shards.sources.source import Item, Options, Sample
from swath.shards.sources.zarrs import Zarr

DATES = 4
TITLE = "SSL4EO-S12 v1.1"


@dataclass(kw_only=True)
class ManyPerFile(Planned):
    """`{train,val}/<MODALITY>/ssl4eos12_<split>_seasonal_data_NNNNNN.zarr.zip`, one file name in each modality's folder."""

    root: Path
    options: Options

    def read(self, item: Item) -> Sample:
        paths, n, name = item.place
        zarrs = {f: open_file(self.root / p, (self.root / p).stat().st_mtime_ns) for f, p in paths.items()}
        for folder, zarr in zarrs.items():
            ids = zarr.texts("sample")
            if not n < len(ids) or ids[n] != name:
                raise DecodeError(f"{paths[folder]}: sample {n} is {ids[n] if n < len(ids) else 'missing'}, not {name}")
        sample = sample_of(zarrs, n, DATES, "added", self.options)
        sample.meta["source"] = item.lookup
        return sample


@register("ssl4eo_s12_v11", "SSL4EO-S12 v1.1, Sentinel-1 and 2, four seasons, 264 px", "CC-BY-4.0")
def ssl4eo_s12_v11(path: Path, options: Options) -> ManyPerFile | LockStep:
    """Layout A has +1000 in all optical bands; its re-issue as WebDataset (B) had it taken out, as its own loader says."""
    if not any(path.glob("*/*/*.zarr.zip")):
        return lock_step(
            path, options, dataset="ssl4eo_s12_v11", title=TITLE, dates=DATES, rule="removed",
            notes=("layout of tars: the publisher took the radiometric offset out; B10 is looked at in each sample",),
        )  # fmt: skip
    items: list[Item] = []
    files: list[Path] = []
    first: dict[str, Zarr] = {}
    notes = ["layout of Zarr zips: the publisher put the radiometric offset in; B10 is looked at in each sample", CLOUD_NOTE]
    for split in splits_of(path, TITLE, "*.zarr.zip"):
        folders, left = folders_of(split)
        notes += [f"{split.name}/{name} left out: {LEFT_OUT.get(name, 'it is not known')}" for name in left]
        for name in sorted({p.name for f in folders for p in (split / f).glob("*.zarr.zip")}):
            there = {f: split / f / name for f in folders if (split / f / name).is_file()}
            files += there.values()
            try:
                with Zarr(next(iter(there.values())), name) as zarr:
                    ids, lats, lons = zarr.texts("sample"), zarr.values("center_lat").ravel(), zarr.values("center_lon").ravel()
                first |= {f: Zarr(p, f"{f}/{name}") for f, p in there.items() if f not in first}
            except DecodeError as error:
                raise InputError(f"{split / name}: which samples it holds cannot be told ({error}); copy it again") from None
            if not len(ids) == len(lats) == len(lons):
                raise InputError(f"{split / name} has {len(ids)} samples and {len(lats)} latitudes; copy it again")
            paths = {f: p.relative_to(path).as_posix() for f, p in there.items()}
            for n, (sample, lat, lon) in enumerate(zip(ids, lats, lons, strict=True)):
                key = f"{split.name}/{sample}"
                items.append(Item(key, key, place=(paths, n, sample), split=split.name, lat=float(lat), lon=float(lon)))
    if not items:
        raise InputError(f"{path} holds no samples of {TITLE}")
    try:
        contracts = contracts_of({name: first[name] for name in FOLDERS if name in first}, DATES)
    except DecodeError as error:
        raise InputError(str(error)) from None
    return ManyPerFile(
        dataset="ssl4eo_s12_v11", kind="ssl4eo_s12_v11", contracts=contracts, items=items, notes=tuple(notes),
        fingerprint=fingerprint(path, files, options), root=path, options=options,
    )  # fmt: skip
