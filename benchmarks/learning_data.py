"""The data sets that `learning.py` trains and probes on, as shards: train, val and test, by blocks that share no pixel."""

import argparse
import csv
from pathlib import Path

import numpy as np

from swath.shards.ingest import Blocks, shard
from swath.shards.scenes import BANDS, write_scenes
from swath.shards.sources import mat
from swath.shards.sources.source import Options

CHIP = 8  # pixels of a side, of the hyperspectral scenes
SCENES = {"train": 72, "val": 10, "test": 24}  # synthetic ones
DATA = {
    "rgb": "EuroSAT RGB, 64 px; 18,665 train, 2,717 val, 5,618 test, split by half-degree blocks",
    "scenes12": "synthetic Sentinel-2 without B10, 64 px; 72, 10 and 24 scenes for train, val and test; a scene is a block",
    "scenes10": "synthetic Sentinel-2 without B1, B9 and B10, 32 px, otherwise as scenes12",
    "salinas": "SalinasA, 204 bands: 8 px chips of most of one class, in blocks of 12 px that lie 2 px apart",
    "jasper": "JasperRidge, 198 bands, class of the largest mean abundance, otherwise as salinas",
    "scene": "one Sentinel-2 scene of 12 bands, 48 px, without labels: reconstruction and health only",
}


def scenes(out: Path) -> Path:
    """Synthetic scenes of 13 bands, and beside them the split: a scene is a block, and lies in one part only.

    Settings of recipes were chosen on val of scenes of another seed."""
    split = out / "split.csv"
    if not split.exists():
        count = sum(SCENES.values())
        write_scenes(out / "all", count=count, size=512, seed=7)
        part = [name for name, some in SCENES.items() for _ in range(some)]
        write_split(split, [(f"scene_{n:04d}.tif", "", part[n], n) for n in range(count)])
    return split


def some_bands(folder: Path, out: Path, left_out: tuple[str, ...]) -> Path:
    """The scenes of `folder` without some of their bands, with their land cover."""
    import rasterio

    out.mkdir(parents=True, exist_ok=True)
    kept = [number for number, name in enumerate(BANDS, start=1) if name not in left_out]
    for path in sorted(folder.glob("scene_????.tif")):
        cover = path.with_name(f"{path.stem}_landcover.tif")
        if (out / cover.name).exists():
            continue
        with rasterio.open(path) as given:
            with rasterio.open(out / path.name, "w", **given.profile | {"count": len(kept)}) as made:
                made.update_tags(**given.tags())
                made.descriptions = [given.descriptions[number - 1] for number in kept]
                made.scales, made.offsets = (given.scales[0],) * len(kept), (given.offsets[0],) * len(kept)
                made.write(given.read(kept))
        (out / cover.name).write_bytes(cover.read_bytes())
    return out


def blocks(labels_hw: np.ndarray, side: int = 12, gap: int = 2) -> list[tuple[int, int, int, int]]:
    """(top, left, block, label) of chips that lie wholly inside blocks of `side` pixels, `gap` pixels apart: no pixel is in two
    blocks. The label is that of most of a chip's labelled pixels; chips with fewer than half of theirs labelled are left out."""
    height, width = labels_hw.shape
    corners = [(y, x) for y in range(0, height - side + 1, side + gap) for x in range(0, width - side + 1, side + gap)]
    found = []
    for number, (top, left) in enumerate(corners):
        for y in range(top, top + side - CHIP + 1):
            for x in range(left, left + side - CHIP + 1):
                codes, counts = np.unique(labels_hw[y : y + CHIP, x : x + CHIP], return_counts=True)
                counts = np.where(codes > 0, counts, 0)
                if counts.sum() * 2 >= CHIP * CHIP:
                    found.append((y, x, number, int(codes[counts.argmax()])))
    return found


def write_split(path: Path, rows: list[tuple[str, str, str, int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "class", "split", "block"))
        writer.writerows(rows)


def hyperspectral(file: str, labels_hw: np.ndarray, names: dict[int, str], out: Path) -> Path:
    """A split of one scene's chips of 8 × 8: by block of 12 × 12, every third for test and every ninth for val.

    Without `names` a chip's class is left to whoever reads the scene."""
    parts = {0: "test", 4: "val"}
    chips = blocks(labels_hw)
    rows = [
        (f"{file}/y{y:04d}_x{x:04d}", names.get(label, ""), "test" if block % 3 == 0 else parts.get(block % 9, "train"), block)
        for y, x, block, label in chips
    ]
    write_split(out, rows)
    return out


def make(data: str, args: argparse.Namespace) -> Path:
    """The shards of a data set: train, val and test; made once."""
    out, given = args.work / "shards" / data, args.work / "given"
    chips = Options(chip=CHIP, stride=1)
    if data == "rgb":
        shard(args.rgb, out, split=args.split)
    elif data == "scenes10":
        split, ten = scenes(given / "scenes"), some_bands(given / "scenes" / "all", given / data, ("B01", "B09", "B10"))
        shard(ten, out, split=split, options=Options(chip=32))
    elif data == "scenes12":
        split = scenes(given / "scenes")
        shard(some_bands(given / "scenes" / "all", given / data, ("B10",)), out, split=split)
    elif data == "salinas":
        folder = args.hsi / "SalinasA"
        labels_hw = mat.load(folder / "SalinasA_gt.mat", "salinasA_gt")
        split = hyperspectral("SalinasA_corrected.mat", labels_hw, {}, given / "salinas.csv")
        shard(folder, out, recipe="salinas_a", split=split, options=chips)
    elif data == "jasper":
        folder = args.hsi / "JasperRidge"
        labels_hw = mat.load(folder / "end4.mat", "A").argmax(axis=0).reshape(100, 100, order="F") + 1
        names = {1: "tree", 2: "water", 3: "dirt", 4: "road"}
        split = hyperspectral("jasperRidge2_R198.mat", labels_hw, names, given / "jasper.csv")
        shard(folder, out, recipe="jasper_ridge", split=split, options=chips)
    else:
        shard(args.scene, out, split=Blocks({"train": 0.8, "val": 0.2}, block_km=4.0), options=Options(chip=48))
    return out
