"""Shards with label maps, small, and backbones that nobody trained for them."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.io import savemat

from swath.backbones.base import create
from swath.hub.load import Loaded
from swath.probes.task import Bench
from swath.shards.ingest import shard
from swath.shards.reader import ShardReader
from swath.shards.scenes import write_scenes
from swath.shards.sources.match import Dates
from swath.shards.sources.source import Options

PARTS = {"train": (0, 1), "val": (2,), "test": (3,)}
TINY: dict[str, Any] = {"patch": 8, "width": 24, "depth": 2, "heads": 3}


def scenes(folder: Path, out: Path, *, pairs: bool = False) -> Path:
    """Chips of 16 px of four scenes at two dates, a scene for a block, in train, val and test."""
    if not folder.exists():
        write_scenes(folder, count=4, size=64, seed=5, dates=2)
    split = out.with_suffix(".csv")
    with split.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "class", "split", "block"))
        for part, numbers in PARTS.items():
            for n in numbers:
                for date in ("",) if pairs else ("", "_d1"):
                    writer.writerow((f"scene_{n:04d}{date}.tif", "", part, n))
    options = Options(chip=16, join=Dates(2, 2, within_days=None, min_cover=0.5) if pairs else None)
    shard(folder, out, split=split, options=options, progress=False)
    return out


def hyperspectral(folder: Path, out: Path, chip: int = 128, *, size: tuple[int, int] = (64, 52), seed: int = 0) -> Path:
    """A scene as Pavia University is published, of four classes in patches of 7 px whose spectra overlap."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    labels = np.kron(random.integers(0, 5, (10, 8)), np.ones((7, 7), np.int64))[: size[0], : size[1]]
    spectra = np.random.default_rng(1).normal(1000, 60, (10, 103))
    cube = spectra[labels] + random.normal(0, 60, (*labels.shape, 103))
    savemat(folder / "PaviaU.mat", {"paviaU": cube.clip(0).astype(np.uint16)})
    savemat(folder / "PaviaU_gt.mat", {"paviaU_gt": labels.astype(np.uint8)})
    shard(folder, out, recipe="pavia_university", options=Options(chip=chip), max_nodata=1.0, progress=False)
    return out


def backbone(reader: ShardReader, size: int, *, name: str = "vit_tiny_patch8", **options: Any) -> Loaded:
    """For one date of what `reader` has."""
    contract = next(iter(reader.contracts.values())).model_copy(update={"dates": 1})
    torch.manual_seed(0)
    made = create(name, bands=len(contract.bands), image_size=size, **options).eval()
    return Loaded(made, {contract.modality: contract}, (size, size), name, dataclasses.asdict(made.config), {})


def bench(folder: Path, *, val: bool = True) -> Bench:
    readers = {part: ShardReader(folder / part) for part in PARTS if val or part != "val"}
    return Bench(backbone(readers["train"], 16, **TINY), readers, progress=False)
