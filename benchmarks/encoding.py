"""Bytes and time per chip of the ways to store it, on published images: what docs/encoding.md chooses from.

    python benchmarks/encoding.py --data ../shared/data --out benchmarks/results/encoding.json

`--data` is the folder that the tests call $SWATH_DATA; kinds whose files are not there are left out. Needs rasterio, scipy,
blosc2 and zstandard. One thread. Every way is lossless, which is checked, but for the JPEG that is kept as it came. Decoding ends
with the chip copied to its place in a batch. The ways alternate; of the times per chip the median over the alternations is given.
"""

import argparse
import io
import json
import os
import platform
import statistics
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import rasterio
import zstandard
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile

from swath.shards.codec import decode, encode_npy

BITSHUFFLE = [blosc2.Filter.NOFILTER] * 5 + [blosc2.Filter.BITSHUFFLE]
KEPT = "JPEG as it came"
TEN_METRES = ("B02", "B03", "B04", "B08")


@dataclass
class Way:
    """`encode` (C, H, W) → bytes, and back."""

    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[bytes], np.ndarray]


def by_blosc2(codec: blosc2.Codec) -> Way:
    """Of the whole .npy, so that what comes out says its shape and dtype."""
    pack: Any = blosc2.compress2  # whose options are annotated wrongly
    unpack: Any = blosc2.decompress2
    how = {"codec": codec, "clevel": 5, "filters": BITSHUFFLE, "filters_meta": [0] * 6, "nthreads": 1}

    def encode(chip: np.ndarray) -> bytes:
        return pack(encode_npy(chip), typesize=chip.itemsize, **how)

    return Way(encode, lambda data: decode(unpack(data, nthreads=1), "npy"))


def by_zstd() -> Way:
    packer, unpacker = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()
    return Way(lambda chip: packer.compress(encode_npy(chip)), lambda data: decode(unpacker.decompress(data), "npy"))


def by_geotiff(compress: str) -> Way:
    def encode(chip: np.ndarray) -> bytes:
        bands, height, width = chip.shape
        predictor = 3 if chip.dtype.kind == "f" else 2
        with MemoryFile() as memory:
            with memory.open(
                driver="GTiff", count=bands, height=height, width=width, dtype=chip.dtype, compress=compress, predictor=predictor
            ) as file:
                file.write(chip)
            return memory.read()

    def decode_tiff(data: bytes) -> np.ndarray:
        with MemoryFile(data) as memory, memory.open() as file:
            return file.read()

    return Way(encode, decode_tiff)


def by_npz() -> Way:
    def encode(chip: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, chip=chip)
        return buffer.getvalue()

    return Way(encode, lambda data: np.load(io.BytesIO(data))["chip"])


def by_png(shape: tuple[int, ...], dtype: np.dtype) -> Way:
    """Three bands of uint8 as they are; bands of 16 bits one below the other."""

    def encode(chip: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        plane = np.moveaxis(chip, 0, 2) if dtype == np.uint8 else chip.reshape(-1, shape[2]).view(np.uint16)
        Image.fromarray(np.ascontiguousarray(plane)).save(buffer, "png")
        return buffer.getvalue()

    def decode_png(data: bytes) -> np.ndarray:
        plane = np.asarray(Image.open(io.BytesIO(data)))
        return np.moveaxis(plane, 2, 0) if dtype == np.uint8 else plane.astype(np.uint16).view(dtype).reshape(shape)

    return Way(encode, decode_png)


def ways(chip: np.ndarray) -> dict[str, Way]:
    made = {
        "npy": Way(encode_npy, lambda data: decode(data, "npy")),
        "npy, zstd 3": by_zstd(),
        "npy, blosc2 LZ4 5 bitshuffle": by_blosc2(blosc2.Codec.LZ4),
        "npy, blosc2 ZSTD 5 bitshuffle": by_blosc2(blosc2.Codec.ZSTD),
        "npz": by_npz(),
        "GeoTIFF deflate, predictor": by_geotiff("deflate"),
        "GeoTIFF zstd, predictor": by_geotiff("zstd"),
    }
    if chip.dtype.kind in "ui" and (chip.itemsize == 2 or chip.shape[0] == 3):
        made["PNG"] = by_png(chip.shape, chip.dtype)
    return made


def crops(chip: np.ndarray, side: int) -> list[np.ndarray]:
    """The four corners, (C, side, side)."""
    rows, columns = slice(None, side), slice(None, side)
    last_rows, last_columns = slice(-side, None), slice(-side, None)
    return [np.ascontiguousarray(chip[:, r, c]) for r in (rows, last_rows) for c in (columns, last_columns)]


def patch(folder: Path, names: tuple[str, ...]) -> np.ndarray:
    """Bands of a BigEarthNet patch on the grid of the finest, as swath stores them."""
    bands = [rasterio.open(folder / f"{folder.name}_{name}.tif").read(1) for name in names]
    side = max(len(band) for band in bands)
    return np.stack([band.repeat(side // len(band), 0).repeat(side // len(band), 1) for band in bands])


def cube(path: Path) -> np.ndarray:
    """(bands, rows, columns) of a published hyperspectral scene."""
    from scipy.io import loadmat

    found = loadmat(path)
    if "Y" in found:  # Jasper Ridge: bands × pixels, column after column
        return np.ascontiguousarray(found["Y"].reshape(-1, 100, 100).transpose(0, 2, 1))
    return np.ascontiguousarray(np.moveaxis(found["salinasA_corrected"], 2, 0))


def jpegs(archive: Path) -> list[bytes]:
    with zipfile.ZipFile(archive) as file:
        names = sorted(name for name in file.namelist() if name.endswith(".jpg"))
        return [file.read(name) for name in names[:: len(names) // 64][:64]]


def kinds(data: Path) -> dict[str, list[np.ndarray]]:
    """Chips (C, H, W) by what they are."""
    made: dict[str, list[np.ndarray]] = {}
    big_earth = data / "bigearthnet_samples"
    if big_earth.exists():
        twelve = (*(f"B{n:02d}" for n in range(1, 9)), "B8A", "B09", "B11", "B12")
        patches = sorted(path for path in (big_earth / "S2").iterdir() if path.is_dir())
        radar = sorted(path for path in (big_earth / "S1").iterdir() if path.is_dir())
        whole = [patch(folder, twelve) for folder in patches]
        ten = [patch(folder, TEN_METRES) for folder in patches]
        made["Sentinel-2 L2A, 12 bands on 10 m, uint16, 120×120"] = whole
        made["Sentinel-2 L2A, 12 bands on 10 m, uint16, 64×64"] = [part for chip in whole for part in crops(chip, 64)]
        made["Sentinel-2 L2A, the four 10 m bands, uint16, 120×120"] = ten
        made["Sentinel-2 L2A, the four 10 m bands, uint16, 64×64"] = [part for chip in ten for part in crops(chip, 64)]
        made["Sentinel-1 VV VH in dB, float32, 120×120"] = [patch(folder, ("VV", "VH")) for folder in radar]
    if (data / "hsi").exists():
        scenes = {"AVIRIS Salinas": "SalinasA/SalinasA_corrected.mat", "AVIRIS Jasper Ridge": "JasperRidge/jasperRidge2_R198.mat"}
        for name, path in scenes.items():
            chips = crops(cube(data / "hsi" / path), 64)
            made[f"{name}, {len(chips[0])} bands, {chips[0].dtype}, 64×64"] = chips
    return made


def measure(chips: list[np.ndarray], by: dict[str, Way], stored: dict[str, list[bytes]], alternations: int) -> dict[str, Any]:
    """`stored` is what each way made of the chips; ways without it encode."""
    place = np.empty_like(chips[0])
    encoding: dict[str, list[float]] = {name: [] for name in by}
    decoding: dict[str, list[float]] = {name: [] for name in by}
    rounds = max(1, 40 // len(chips))
    for name, way in by.items():
        if name not in stored:
            stored[name] = [way.encode(chip) for chip in chips]
            assert all(np.array_equal(way.decode(data), chip) for data, chip in zip(stored[name], chips, strict=True)), name
    for _ in range(alternations):
        for name, way in by.items():
            start = time.perf_counter()
            for chip in chips:
                way.encode(chip)
            encoding[name].append((time.perf_counter() - start) / len(chips) * 1e6)
        for name, way in by.items():
            start = time.perf_counter()
            for _ in range(rounds):
                for data in stored[name]:
                    place[:] = way.decode(data)
            decoding[name].append((time.perf_counter() - start) / len(chips) / rounds * 1e6)
    size = {name: sum(map(len, stored[name])) / len(chips) for name in by}
    return {
        name: {
            "bytes": round(size[name]),
            "times_smaller_than_npy": round(size["npy"] / size[name], 2),
            "decode_us": round(statistics.median(decoding[name]), 1),
            "decode_times_npy": round(statistics.median(a / b for a, b in zip(decoding[name], decoding["npy"], strict=True)), 2),
            "encode_us": None if name == KEPT else round(statistics.median(encoding[name]), 1),
        }
        for name in by
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--alternations", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    table: dict[str, Any] = {}
    if (args.data / "EuroSAT_RGB.zip").exists():
        as_came = jpegs(args.data / "EuroSAT_RGB.zip")
        chips = [np.ascontiguousarray(decode(data, "jpg")) for data in as_came]
        by = ways(chips[0]) | {KEPT: Way(lambda _: b"", lambda data: decode(data, "jpg"))}
        table["EuroSAT RGB, uint8, 64×64"] = measure(chips, by, {KEPT: as_came}, args.alternations)
    for kind, chips in kinds(args.data).items():
        table[kind] = measure(chips, ways(chips[0]), {}, args.alternations) | {"chips": len(chips)}
    result = {
        "command": " ".join(["python", "benchmarks/encoding.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, blosc2 {blosc2.__version__}, "
        f"rasterio {rasterio.__version__}, zstandard {zstandard.__version__}",
        **table,
    }
    print(json.dumps(result, indent=1, ensure_ascii=False))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
