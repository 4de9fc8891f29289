"""Small folders of shards for tests, written member by member, so that they do not rest on the ingest they may be testing."""

import io
import tarfile
import zlib
from hashlib import sha256
from pathlib import Path

import numpy as np

from swath.shards.bands import Band, InputContract, Normalisation
from swath.shards.draw import hash_text
from swath.shards.index import MEMBER, NO_TIME, SAMPLE, Index, columns_of
from swath.shards.manifest import Manifest, Shard

RGB = tuple(Band(name=c, common_name=c) for c in ("red", "green", "blue"))


def contract(bands: tuple[Band, ...] = RGB, size: int = 32, dtype: str = "uint8") -> InputContract:
    count = len(bands)
    return InputContract(
        modality="image", sensor="made", level="none", unit="digital number", bands=bands, dtype=dtype, height=size, width=size,
        normalisation=Normalisation(mean=(100.0,) * count, std=(50.0,) * count, pixels=(1,) * count),
    )  # fmt: skip


def make_shards(
    folder: Path,
    *,
    samples: int = 40,
    bands: tuple[Band, ...] = RGB,
    size: int = 32,
    classes: int = 2,
    per_shard: int = 16,
) -> Path:
    """NPY chips whose brightness and stripes tell their class."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows, members, keys, shards = np.zeros(samples, SAMPLE), np.zeros((samples, 3), MEMBER), b"", []
    for first in range(0, samples, per_shard):
        name = f"shard-{first // per_shard:06d}.tar"
        last = min(first + per_shard, samples)
        with tarfile.open(folder / name, "w") as tar:
            for number in range(first, last):
                label, key = number % classes, f"chip{number}"
                stripes = np.sin(np.arange(size) * (label + 1)) * 60
                chip = 80 + 40 * label + stripes + rng.normal(0, 20, (len(bands), size, size))
                buffer = io.BytesIO()
                np.save(buffer, chip.clip(0, 255).astype(np.uint8))
                data = buffer.getvalue()
                info = tarfile.TarInfo(f"{key}.image.npy")
                info.size = len(data)
                start = tar.offset + 512
                tar.addfile(info, io.BytesIO(data))
                rows[number] = (hash_text("made", key), len(keys), len(key), label, -1, NO_TIME, np.nan, np.nan, np.nan, 0)
                members[number, 0] = (start, len(data), first // per_shard, zlib.crc32(data), 3, 1.0, 0.0)
                keys += key.encode()
        raw = (folder / name).read_bytes()
        shards.append(Shard(name=name, samples=last - first, bytes=len(raw), sha256=sha256(raw).hexdigest()))
    Index(rows, members, np.frombuffer(keys, np.uint8), columns_of(["image"])).write(folder)
    Manifest(
        dataset="made", samples=samples, contracts={"image": contract(bands, size)}, shards=tuple(shards),
        classes=tuple(f"class{c}" for c in range(classes)),
    ).write(folder)  # fmt: skip
    return folder
