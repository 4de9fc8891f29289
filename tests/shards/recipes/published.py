"""Writes data sets in their published layouts, small, every band with a constant of its own, and reads them by their recipes."""

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from swath.shards.recipes.registry import find
from swath.shards.sources.source import Item, Options, Sample, Source

DATA = Path(os.environ.get("SWATH_DATA") or Path(__file__).resolve().parents[3].parent / "shared" / "data")
# by the band's name in the contract, so that a file's order cannot leak into what is expected; B10 is dark, as without an offset
DN = {
    "B01": 100, "B02": 200, "B03": 300, "B04": 400, "B05": 500, "B06": 600, "B07": 700, "B08": 800, "B8A": 900, "B09": 1000,
    "B10": 11, "B11": 1200, "B12": 1300, "VV": -10, "VH": -20,
}  # fmt: skip
GSD_M = {"B01": 60, "B09": 60, "B10": 60} | dict.fromkeys(("B05", "B06", "B07", "B8A", "B11", "B12"), 20)


def need(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not here; set SWATH_DATA to the folder that holds {name}")
    return DATA / name


def tiff(
    path: Path, pixels: np.ndarray, *, crs: str | None = "EPSG:32633", gsd_m: float = 10, west: float = 500_000,
    north: float = 5_000_000, **options: Any,
) -> Path:  # fmt: skip
    """(C, H, W) from one corner of the ground, `gsd_m` in units of the CRS. As published: no nodata tag, no band names."""
    rasterio = pytest.importorskip("rasterio")
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    place = {"crs": crs, "transform": rasterio.transform.from_origin(west, north, gsd_m, gsd_m)} if crs else {}
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width, dtype=pixels.dtype, **place, **options
    ) as file:
        file.write(pixels)
    return path


def canonical(name: str) -> str:
    """`B1` is `B01`."""
    return f"B0{name[1:]}" if len(name) == 2 and name[0] == "B" else name


def flat(name: str, side: int, dtype: Any = np.uint16, plus: int = 0) -> np.ndarray:
    return np.full((1, side, side), DN[canonical(name)] + plus, dtype)


def cube(names: tuple[str, ...], height: int, width: int, dtype: Any = np.uint16) -> np.ndarray:
    """(C, H, W), bands in the order of `names`."""
    return np.stack([np.full((height, width), DN[canonical(name)], dtype) for name in names])


def picture(path: Path, side: int | tuple[int, int] = 8, mode: str = "RGB", colour: Any = (100, 200, 50)) -> Path:
    """An image of one colour, of a size (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (side, side) if isinstance(side, int) else side, colour).save(path, quality=95)
    return path


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(file, file.relative_to(folder).as_posix())
    return path


def opened(recipe: str, path: Path, **options: Any) -> Source:
    return find(recipe).open(path, Options(**options))


def samples(source: Source) -> dict[str, tuple[Item, Sample]]:
    """All, by key."""
    return {item.key: (item, source.read(item)) for item in source.items}


def values(source: Source, sample: Sample, modality: str) -> dict[str, list[int]]:
    """Band → the values that stand in it, of all dates."""
    contract = source.contracts[modality]
    pixels = sample.parts[modality].pixels
    assert str(pixels.dtype) == contract.dtype
    assert len(pixels) == contract.channels
    dates_tchw = pixels.reshape(contract.dates, -1, *pixels.shape[1:])
    return {name: np.unique(dates_tchw[:, number]).tolist() for number, name in enumerate(contract.names)}


def own(names: tuple[str, ...]) -> dict[str, list[int]]:
    """What `values` must be where every band has its own constant."""
    return {name: [DN[name]] for name in names}
