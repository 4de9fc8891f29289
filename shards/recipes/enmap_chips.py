"""Chips of EnMAP L2A as GeoTIFFs: HySpecNet-11k (224 bands, 22 of them void) and SpectralEarth (the 202 others)."""

import csv
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from swath.shards.codec import MAX_VALUES, DecodeError
from swath.shards.errors import InputError
from swath.shards.recipes import enmap
from swath.shards.recipes.registry import register
from swath.shards.sources.cube import clear
from swath.shards.sources.planned import Planned, contract, fingerprint
from swath.shards.sources.scene import open_raster, raster_errors
from swath.shards.sources.source import Item, Options, Part, Sample

SPLITS = ("train", "val", "test")


@dataclass(kw_only=True)
class EnmapChips(Planned):
    """`stored` are EnMAP's numbers of the files' bands, in file order; those in `enmap.VOID` are dropped."""

    root: Path
    stored: tuple[int, ...]

    def read(self, item: Item) -> Sample:
        path = self.root / item.place
        try:
            with open_raster(str(path)) as file:
                if file.count != len(self.stored) or set(file.dtypes) != {"int16"}:
                    raise DecodeError(f"{file.count} bands of {file.dtypes[0]}; {len(self.stored)} of int16 are expected")
                if file.count * file.height * file.width > MAX_VALUES:
                    raise DecodeError(f"{file.height}×{file.width} px are beyond the limits")
                pixels, meta = file.read(), _place(file)
        except raster_errors() as error:
            raise DecodeError(f"{error.__cause__ or error}") from None
        void = [n in enmap.VOID for n in self.stored]
        filled = [n for n, band in zip(self.stored, pixels, strict=True) if n in enmap.VOID and (band != enmap.NODATA).any()]
        if filled:
            raise DecodeError(f"bands {', '.join(map(str, filled))} hold data, but are known to be void")
        kept = np.ascontiguousarray(pixels[~np.array(void)])
        part = Part(kept, valid=clear(kept, enmap.NODATA), scale=enmap.SCALE, scale_source=enmap.SCALE_SOURCE)
        location = PurePosixPath(item.place).parent.name
        return Sample({"enmap": part}, meta=meta | {"location": location, "source": item.lookup, "gsd_m": 30.0})


@register("hyspecnet", "HySpecNet-11k, EnMAP L2A chips of 128 px, its easy split", "CC0-1.0")
def hyspecnet(path: Path, options: Options) -> EnmapChips:
    """`patches/<tile>/<patch>/<patch>-SPECTRAL_IMAGE.TIF`, `splits/easy/{train,val,test}.csv`."""
    return _hyspecnet(path, "easy", options)


@register("hyspecnet_hard", "HySpecNet-11k, EnMAP L2A chips of 128 px, its hard split (by tile)", "CC0-1.0")
def hyspecnet_hard(path: Path, options: Options) -> EnmapChips:
    """As `hyspecnet`, with `splits/hard/`."""
    return _hyspecnet(path, "hard", options)


@register("spectral_earth", "SpectralEarth, EnMAP L2A chips of 128 px, several dates of many places", "EnMAP data licence")
def spectral_earth(path: Path, options: Options) -> EnmapChips:
    """`enmap/<id>/<file>.tif` with EnMAP's bands 1–126, 142–160, 168–224; split files are lists of `<id>/<file>.tif`.

    The upstream table of wavelengths mislabels positions 130 to 144 by up to 240 nm; here they follow from the kept bands.
    """
    folder = path / "enmap"
    tiffs = {f"{p.parent.name}/{p.stem}": p for p in sorted(folder.glob("*/*.tif")) if not p.is_symlink()}
    listed = {s: _lines(found[0]) for s in SPLITS if (found := sorted(path.rglob(f"{s}.txt")))}
    splits = {str(PurePosixPath(*PurePosixPath(line).parts[-2:]).with_suffix("")): s for s, ls in listed.items() for line in ls}
    return _plan(path, "spectral_earth", tiffs, splits, enmap.KEPT, options)


def _hyspecnet(path: Path, scheme: str, options: Options) -> EnmapChips:
    tiffs = {
        f"{p.parent.parent.name}/{p.parent.name}": p
        for p in sorted((path / "patches").glob("*/*/*-SPECTRAL_IMAGE.TIF"))
        if not p.is_symlink()
    }
    listed = {s: _lines(p) for s in SPLITS if (p := path / "splits" / scheme / f"{s}.csv").is_file()}
    # they name `<tile>/<patch>/<patch>-DATA.npy`, which is what the authors convert the TIFFs to
    splits = {"/".join(PurePosixPath(line).parts[-3:-1]): s for s, lines in listed.items() for line in lines}
    return _plan(path, "hyspecnet", tiffs, splits, tuple(range(1, 225)), options)


def _plan(
    root: Path, name: str, tiffs: dict[str, Path], splits: dict[str, str], stored: tuple[int, ...], options: Options
) -> EnmapChips:
    if not tiffs:
        expected = "patches/<tile>/<patch>/<patch>-SPECTRAL_IMAGE.TIF" if name == "hyspecnet" else "enmap/<id>/<file>.tif"
        raise InputError(f"{root} holds no {expected}; name the folder of {name} that does")
    absent = [key for key in splits if key not in tiffs]
    if splits and len(absent) == len(splits):
        raise InputError(f"{root}: none of the chips that its split files name is there, such as {absent[0]}")
    items = [
        Item(key, (lookup := path.relative_to(root).as_posix()), place=lookup, split=splits.get(key))
        for key, path in tiffs.items()
        if not splits or key in splits
    ]
    notes = [enmap.NOTE]
    if absent:
        notes.append(f"{len(absent)} chips of the split files are not there, such as {absent[0]}")
    if len(items) < len(tiffs):
        notes.append(f"{len(tiffs) - len(items)} chips are in no split file and left out")
    if not splits:
        notes.append("no split files found: all chips are taken")
    made = contract(
        "enmap", enmap.bands(), "int16", sensor="enmap", level="L2A", unit="reflectance", nodata=enmap.NODATA, gsd_m=30.0
    )
    return EnmapChips(
        dataset=name, kind=name, contracts={"enmap": made}, items=items, notes=tuple(notes), root=root, stored=stored,
        fingerprint=fingerprint(root, tiffs.values(), options, sorted(splits.items())),
    )  # fmt: skip


def _lines(path: Path) -> list[str]:
    """The first column of a list of files, without a header if it has one."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return [row[0].strip() for row in csv.reader(file) if row and "/" in row[0]]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error})") from None


def _place(file: Any) -> dict[str, Any]:
    """crs, bounds and the centre in degrees, where the file has a georeference."""
    if not file.crs:
        return {}
    from rasterio.warp import transform

    box = file.bounds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (lon,), (lat,) = transform(file.crs, "EPSG:4326", [(box.left + box.right) / 2], [(box.bottom + box.top) / 2])[:2]
    return {"crs": file.crs.to_string(), "bounds": list(box), "lat": round(lat, 7), "lon": round(lon, 7)}
