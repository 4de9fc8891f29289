"""Which kind of source a path is."""

import struct
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

from PIL import Image, TiffImagePlugin

from swath.shards.errors import InputError
from swath.shards.manifest import NAME as MANIFEST
from swath.shards.recipes.registry import find
from swath.shards.sources.arrays import open_hdf5, open_mat, open_zarr
from swath.shards.sources.beside import METADATA
from swath.shards.sources.cells import open_parquet
from swath.shards.sources.folder import TIFF, files_below
from swath.shards.sources.images import EXTENSIONS as IMAGES
from swath.shards.sources.images import Images
from swath.shards.sources.joined import Joined
from swath.shards.sources.landsat import MTL, Landsat
from swath.shards.sources.match import Dates
from swath.shards.sources.mirror import Mirror, located
from swath.shards.sources.parts import data_of
from swath.shards.sources.rasters import EXTENSIONS, Rasters
from swath.shards.sources.safe import Safe, is_safe, is_safe_zip, safe_root
from swath.shards.sources.series import Series
from swath.shards.sources.source import Options, Source
from swath.shards.sources.stac import MAX_BYTES, Stac, read_json
from swath.shards.sources.webdataset import open_webdataset

# Formats of arrays by the extension of a file or of a folder such as `x.zarr`.
ARRAYS: dict[str, Callable[[Path, Options], Source]] = {
    ".mat": open_mat,
    ".h5": open_hdf5,
    ".hdf5": open_hdf5,
    ".he5": open_hdf5,
    ".zarr": open_zarr,
}
_IN_PARTS = (Rasters, Landsat, Stac)  # what reads GeoTIFFs by way of rasterio only
_GEO_TAGS = (33550, 34264, 34735)  # ModelPixelScale, ModelTransformation, GeoKeyDirectory
_BITS, _PHOTOMETRIC, _RGB = 258, 262, 2
_LOOKS = 16  # JSON files that are opened to find out whether they are of STAC


def open_source(path: Path | Mirror, options: Options, recipe: str | None = None) -> Source:
    """By the named recipe, else by what the files are.

    Products with their own metadata come first (Sentinel-2 `.SAFE`, Landsat, STAC), then formats of arrays, then rasters
    (GeoTIFF, VRT, ENVI, JPEG 2000, netCDF); what is left, with plain RGB TIFFs, is images. Raises InputError.
    With `options.join` the samples of that source are put together.
    """
    if (join := options.join) is not None:
        source = open_source(path, replace(options, join=None), recipe)
        if isinstance(join, Dates):
            return Series(source, join, options.resampling)
        # what else is said of the files is said of the primary's
        partner = open_source(located(join.other), Options(chip=options.chip, stride=options.stride))
        return Joined(source, partner, join, options.resampling)
    if isinstance(path, Mirror):
        there = path.mount()
        path = there if recipe is None and opener_of(there) in _IN_PARTS else path.whole()
    if not path.exists():
        raise InputError(f"{path} does not exist; give a folder or a zip of images or of scenes")
    if recipe is not None:
        return find(recipe).open(path, options)
    return opener_of(path)(path, options)


def opener_of(path: Path) -> Callable[[Path, Options], Source]:
    files = (path,) if path.is_file() else files_below(path).paths
    safe = path if is_safe(path) else next((p for p in files if safe_root(p, path) or is_safe_zip(p)), None)
    landsat = next((p for p in files if MTL.search(p.name)), None)
    if safe and landsat:
        raise InputError(f"{path} holds .SAFE products ({safe}) and Landsat scenes ({landsat}); give one kind at a time")
    if safe:
        return Safe
    if landsat:
        return Landsat if path.is_dir() else _refuse_file
    texts = sorted((p for p in files if p.suffix.lower() in (".json", ".geojson") and not p.name.endswith(METADATA)), key=_depth)
    if any(p.stat().st_size <= MAX_BYTES and read_json(p) is not None for p in islice(texts, _LOOKS)):
        return Stac
    names = {path.resolve().name}.union(*(p.relative_to(path).parts for p in files))
    arrays = {suffix for name in names if (suffix := Path(name.lower().removesuffix(".zip")).suffix) in ARRAYS}
    if len({ARRAYS[suffix] for suffix in arrays}) > 1:
        raise InputError(f"{path} holds {' and '.join(sorted(arrays))} files; give one kind at a time")
    if arrays:
        return ARRAYS[arrays.pop()]
    if path.is_file():
        if path.suffix.lower() == ".tar":
            return open_webdataset
        scene = path.suffix.lower() in EXTENSIONS and not (path.suffix.lower() in TIFF and _is_picture(path))
        return Rasters if scene else Images
    others = any(p.suffix.lower() in (*EXTENSIONS, ".hdr") and p.suffix.lower() not in TIFF for p in files)
    tiffs = [p for p in files if p.suffix.lower() in TIFF]
    if others or (tiffs and not _is_picture(tiffs[0])):
        return Rasters
    pictures = any(p.suffix.lower() in IMAGES for p in files)
    # beside our own shards lie the pictures of `swath inspect`
    if (not pictures or (path / MANIFEST).is_file()) and any(p.suffix.lower() == ".tar" for p in files):
        return open_webdataset
    return open_parquet if not pictures and any(p.suffix.lower() == ".parquet" for p in files) else Images


def _depth(path: Path) -> tuple[int, Path]:
    return len(path.parts), path


def _refuse_file(path: Path, options: Options) -> Source:
    raise InputError(f"{path} is a single file of a scene; give the folder that it lies in")


def _is_picture(path: Path) -> bool:
    """A plain RGB TIFF without georeference, by its tags alone; whatever is odd is left to rasterio to judge."""
    try:
        with data_of(path) as file:
            head = file.read(8)
            tags = TiffImagePlugin.ImageFileDirectory_v2(head + file.read(8 if head[2:3] == b"\x2b" else 0))
            file.seek(tags.next)
            tags.load(file)
            plain = tags.get(_BITS) == (8, 8, 8) and tags.get(_PHOTOMETRIC) == _RGB
            return plain and not any(tag in tags for tag in _GEO_TAGS)
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error, Image.DecompressionBombError):
        return False
