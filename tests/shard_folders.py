"""Small folders of shards for tests, written member by member, so that they do not rest on the ingest they may be testing."""

import io
import json
import tarfile
import zlib
from hashlib import sha256
from pathlib import Path

import numpy as np

from swath.shards.bands import Band, InputContract, Normalisation
from swath.shards.codec import encode_npy
from swath.shards.identity import hash_text
from swath.shards.index import MEMBER, NO_TIME, SAMPLE, VALID, Index, columns_of
from swath.shards.manifest import Manifest, Shard
from swath.shards.writer import Member, Place, Rows, ShardWriter

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


def sensor(modality: str, bands: int, *, size: int = 16, dates: int = 1, wavelengths: bool = True) -> InputContract:
    """A contract of so many bands, at wavelengths of their own or none."""
    made = tuple(Band(name=f"{modality}_{n}", wavelength_nm=450.0 + 100 * n if wavelengths else None) for n in range(bands))
    return contract(made, size, "uint16").model_copy(update={"modality": modality, "sensor": modality, "dates": dates})


def make_sensor_shards(
    folder: Path,
    *contracts: InputContract,
    samples: int = 24,
    per_shard: int = 10,
    missing: dict[int, str] | None = None,
    key: str = "s",
    place: tuple[float, float] = (10.0, 20.0),
) -> Path:
    """uint16 chips of several modalities, with place (latitude, longitude) and time; sample n lacks the modality `missing[n]`,
    and all pixels of the first row are nodata in sample 0."""
    folder.mkdir(parents=True)
    columns = columns_of([c.modality for c in contracts])
    rng, shards, parts = np.random.default_rng(len(contracts)), [], []
    for first in range(0, samples, per_shard):
        writer = ShardWriter(folder, first // per_shard, folder.name, columns)
        for number in range(first, min(first + per_shard, samples)):
            members = []
            for one in contracts:
                if (missing or {}).get(number) == one.modality:
                    continue
                chip = rng.normal(100, 50, (one.channels, one.height or 1, one.width or 1)).clip(0, 65535).astype(np.uint16)
                members.append(Member(f"{one.modality}.npy", one.modality, encode_npy(chip)))
                if number == 0:
                    valid = np.ones(chip.shape[1:], np.uint8)
                    valid[0] = 0
                    members.append(Member(f"{one.modality}{VALID}.npy", one.modality + VALID, encode_npy(valid)))
            times = {one.modality: [f"2020-0{1 + d}-01T00:00:00Z" for d in range(one.dates)] for one in contracts}
            members.append(Member("json", "json", json.dumps({"times": times}).encode()))
            where = Place(lat=place[0], lon=place[1], gsd_m=10.0, time=1_577_836_800)
            writer.add(f"{key}{number:04d}", members, number % 2, -1, where)
        shard, rows = writer.close()
        shards.append(shard)
        parts.append(rows)
    rows = Rows.join(parts)
    files = Index(rows.samples, rows.members, np.frombuffer(rows.keys, np.uint8), columns).write(folder)
    Manifest(
        dataset=folder.name, samples=samples, contracts={c.modality: c for c in contracts}, shards=tuple(shards),
        classes=("even", "odd"), files=files,
    ).write(folder)  # fmt: skip
    return folder
