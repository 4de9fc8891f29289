"""Small things to test with: a contract, a backbone that nobody trained, a run folder, a folder of shards."""

import dataclasses
import io
import json
import tarfile
import zlib
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swath.backbones.base import create
from swath.hub.load import Loaded
from swath.pretrain.checkpoint import save
from swath.shards.bands import Band, InputContract, Normalisation
from swath.shards.codec import encode_npy
from swath.shards.identity import hash_text
from swath.shards.index import FORMATS, MEMBER, NO_TIME, SAMPLE, Index, columns_of
from swath.shards.manifest import Manifest, Shard

WAVELENGTHS = {"B02": 490.0, "B03": 560.0, "B04": 665.0, "B08": 842.0}


def contract(*names: str, unit: str = "reflectance", nodata: float | None = 0, side: int = 16) -> InputContract:
    """Sentinel-2 bands, all four by default, of uint16 chips of side² pixels."""
    names = names or tuple(WAVELENGTHS)
    count = len(names)
    return InputContract.model_validate(
        {
            "modality": "optical", "sensor": "sentinel2", "level": "L2A", "unit": unit, "dtype": "uint16", "nodata": nodata,
            "height": side, "width": side, "gsd_m": 10,
            "bands": tuple(Band(name=name, wavelength_nm=WAVELENGTHS.get(name)) for name in names),
            "normalisation": Normalisation(mean=(0.2,) * count, std=(0.07,) * count, pixels=(9,) * count),
        }
    )  # fmt: skip


def loaded(bands: InputContract | None = None, *, pool: str = "mean", seed: int = 0) -> Loaded:
    """A ViT of two blocks and width 24 with random weights, as if trained at 16 × 16 pixels."""
    bands = bands or contract()
    torch.manual_seed(seed)
    options = {"bands": len(bands.bands), "image_size": 16, "patch": 8, "width": 24, "depth": 2, "heads": 3, "pool": pool}
    backbone = create("vit_tiny_patch8", **options).eval()
    origin = {
        "step": 1200,
        "samples": 307200,
        "recipe": "mae_vit_tiny",
        "versions": {"torch": "2.13.0"},
        "config": {
            "run": {"dir": "/home/somebody/runs/a", "seed": 3},
            "data": {"train": "/data/secret/eurosat/train", "size": 16},
        },
    }
    return Loaded(backbone, {bands.modality: bands}, (16, 16), "vit_tiny_patch8", dataclasses.asdict(backbone.config), origin)  # type: ignore[arg-type]


def save_run(source: Loaded, run: Path) -> Path:
    """A run folder with one checkpoint, as `swath pretrain` leaves it."""
    tensors = {f"model.backbone.{name}": tensor for name, tensor in source.backbone.state_dict().items()}
    tensors["model.decoder.weight"] = torch.zeros(3)
    state = {
        "step": 7,
        "samples": 1792,
        "config": {"data": {"size": 16, "train": "/data/secret"}, "backbone": {"name": source.name}, "run": {"dir": str(run)}},
        "backbone": {"name": source.name, "options": source.options},
        "contracts": {name: contract.model_dump(mode="json") for name, contract in source.contracts.items()},
        "versions": {"torch": torch.__version__},
    }
    run.mkdir()
    save(run, 7, tensors, state, keep=1, permanent_every=None)
    return run


def write_shards(
    folder: Path,
    pixels_nchw: np.ndarray,
    labels: Sequence[int],
    *,
    bands: InputContract | None = None,
    classes: Sequence[str] = ("field", "water"),
    blocks: Sequence[int] | None = None,
    metas: Sequence[dict[str, Any]] | None = None,
    places: Sequence[tuple[float, float]] | None = None,
) -> Path:
    """One shard of uint16 chips, to be read as DN · 1e-4; label -1 is none; `metas` are the samples' JSON, `places` lat, lon."""
    bands = bands or contract()
    folder.mkdir(parents=True)
    columns = columns_of([bands.modality])
    samples = np.zeros(len(labels), SAMPLE)
    members = np.zeros((len(labels), len(columns)), MEMBER)
    path = folder / "shard-000000.tar"
    with tarfile.open(path, "w") as tar:
        for row, (chip, label) in enumerate(zip(pixels_nchw, labels, strict=True)):
            key = f"{row:06d}"
            block = -1 if blocks is None else blocks[row]
            lat, lon = (np.nan, np.nan) if places is None else places[row]
            samples[row] = (hash_text(folder.name, key), row * 6, 6, label, block, NO_TIME, lat, lon, np.nan, 0)
            meta = json.dumps({} if metas is None else metas[row]).encode()
            for column, kind, data in ((bands.modality, "npy", encode_npy(chip)), ("json", "json", meta)):
                info = tarfile.TarInfo(f"{key}.{column}.{kind}" if kind != "json" else f"{key}.json")
                info.size = len(data)
                start = tar.offset + 512
                tar.addfile(info, io.BytesIO(data))
                member = (start, len(data), 0, zlib.crc32(data), FORMATS.index(kind), 1e-4, 0.0)
                members[row, columns.index(column)] = member
    keys = np.frombuffer("".join(f"{row:06d}" for row in range(len(labels))).encode(), np.uint8)
    Index(samples, members, keys, columns).write(folder)
    data = path.read_bytes()
    Manifest(
        dataset=folder.name,
        samples=len(labels),
        contracts={bands.modality: bands},
        classes=tuple(classes),
        shards=(Shard(name=path.name, samples=len(labels), bytes=len(data), sha256=sha256(data).hexdigest()),),
    ).write(folder)
    return folder
