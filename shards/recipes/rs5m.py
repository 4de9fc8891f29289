"""Sets that are published as WebDataset tars: converted by these recipes, or trained from as they are after `swath index`."""

from pathlib import Path

from swath.shards.errors import InputError
from swath.shards.recipes.registry import register
from swath.shards.sources.folder import files_below
from swath.shards.sources.source import Options
from swath.shards.sources.webdataset import WebDataset, open_webdataset


@register(
    "rs5m", "RS5M: 5 million images with captions, WebDataset tars of .img_content, .img_name, .caption", "mixed, by source"
)
def rs5m(path: Path, options: Options) -> WebDataset:
    """`train/{pub11,rs3}-train-0000.tar` … and `val/`."""
    return open_webdataset(path, options, "rs5m")


@register("rsteller", "RSTeller: 1.3 million NAIP images with two captions each, 448 px, 0.6 m, WebDataset tars", "Apache-2.0")
def rsteller(path: Path, options: Options) -> WebDataset:
    """Tars of jpg and json; nobody here has opened them, so captions are taken where JSON or text members have them."""
    return open_webdataset(path, options, "rsteller")


@register("crisislandmark", "CrisisLandMark, where it has been written as WebDataset tars", "CC-BY-NC-4.0")
def crisislandmark(path: Path, options: Options) -> WebDataset:
    """The published crisislandmark.h5 holds links to other files, which are not followed."""
    if path.is_dir() and not (files := files_below(path)).of(".tar") and (hdf5 := files.of(".h5")):
        raise InputError(
            f"{hdf5[0]}: its links to other HDF5 files are not followed; write its samples as WebDataset tars (npy, json)"
        )
    return open_webdataset(path, options, "crisislandmark")
