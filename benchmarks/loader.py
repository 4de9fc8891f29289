"""Samples per second out of the input pipeline, beside other loaders on the same samples, alternating in one process tree.

    python benchmarks/loader.py --jpeg out/eurosat/train --bands out/bands --out benchmarks/results/loader.json

`--jpeg`: shards of 64-pixel JPEG. swath's loader in its exact order with checksums, `webdataset` with its default decoder
(Pillow), and with simplejpeg, the decoder that swath uses.

`--bands`: 4,096 chips of 13 bands uint16, 64 pixels, made up in that folder unless they are there (2.6 GB with all copies; needs
rasterio). swath reads its shards; `webdataset` reads the same shards with its own decoder of .npy, and tars of the same chips as
GeoTIFF, decoded by rasterio, uncompressed and deflated with predictor 2. With --others also by tifffile, and `mosaicml-streaming`
and `litdata` on copies in their own formats. Those go into an environment of their own, by `pip install --no-deps` with whatever
the import asks for: what they require takes numpy back, and torchvision, which is not there for every torch.

All shuffle, check nothing more than they do by default, and come as uint8 or uint16 batches of 256, by a torch DataLoader in all
but swath, with equal workers.
"""

import argparse
import io
import itertools
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import simplejpeg
import torch
import webdataset
import webdataset.compat
import webdataset.writer
from torch.utils.data import DataLoader

from swath.shards.ingest import shard
from swath.shards.loader import Loader
from swath.shards.order import SampleOrder
from swath.shards.reader import ShardReader, crc32
from swath.shards.sources.source import Options

BATCH, SIDE, SCENE = 256, 64, (2048, 8192)  # 4,096 chips
WARM = 5  # batches that start the workers
# Sentinel-2 L1C: mean and standard deviation of the published EuroSAT, all 13 bands, DN
BANDS = {
    "B01": (1354, 245), "B02": (1118, 333), "B03": (1043, 395), "B04": (947, 594), "B05": (1200, 567), "B06": (2003, 861),
    "B07": (2374, 1087), "B08": (2301, 1118), "B8A": (2599, 1232), "B09": (732, 405), "B10": (12, 5), "B11": (1820, 1003),
    "B12": (1119, 761),
}  # fmt: skip
Way = Callable[[int], Iterable[Any]]  # from the number of workers


def swath_loader(folder: Path) -> Way:
    def make(workers: int) -> Iterable[Any]:
        reader = ShardReader(folder)
        order = SampleOrder(reader.shard_sizes, seed=0)
        return Loader(reader, order, global_batch=BATCH, micro_batch=BATCH, workers=workers)

    return make


def webdataset_loader(folder: Path, decode: Callable[[dict[str, Any]], np.ndarray] | str | None, suffix: str) -> Way:
    """Shuffled in a buffer of 1,000, decoded, batched by the DataLoader's workers; repeats for ever, as ours does.

    `decode` takes the sample's bytes to an array, or says what `WebDataset.decode` is asked for (None: its default).
    """

    def make(workers: int) -> Iterable[Any]:
        tars = sorted(str(path) for path in folder.glob("*.tar"))
        data: Any = webdataset.compat.WebDataset(tars, shardshuffle=False, resampled=False, empty_check=False).shuffle(1000)
        if callable(decode):
            data = data.map(decode)
        else:
            data = data.decode(*([decode] if decode else [])).map(lambda sample: member(sample, suffix))
        return DataLoader(data.batched(BATCH, collation_fn=stack).repeat(), batch_size=None, num_workers=workers)

    return make


def stack(samples: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(samples))  # three times faster than torch's default_collate on uint16


def member(sample: dict[str, Any], suffix: str) -> Any:
    return next(value for key, value in sample.items() if key.endswith(suffix))


def by_rasterio(data: bytes) -> np.ndarray:
    from rasterio.errors import NotGeoreferencedWarning
    from rasterio.io import MemoryFile

    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    with MemoryFile(data) as memory, memory.open() as file:
        return file.read()


def by_tifffile(data: bytes) -> np.ndarray:
    import tifffile

    return tifffile.imread(io.BytesIO(data))


def mosaic_loader(folder: Path) -> Way:
    sys.modules["streaming.vision"] = MagicMock()  # its picture data sets import torchvision, which is for another torch
    import streaming

    def make(workers: int) -> Iterable[Any]:
        data = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
        return forever(DataLoader(data, BATCH, num_workers=workers, drop_last=True, collate_fn=collate_chips))

    return make


def collate_chips(samples: list[dict[str, np.ndarray]]) -> Any:
    return stack([sample["chip"] for sample in samples])


def litdata_loader(folder: Path) -> Way:
    import litdata

    def make(workers: int) -> Iterable[Any]:
        data = litdata.StreamingDataset(str(folder), shuffle=True, drop_last=True, batch_decode=False)
        return forever(litdata.StreamingDataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=stack))

    return make


def forever(data: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from data


def make_bands(folder: Path) -> None:
    """A scene of 13 correlated bands of 1/f texture with the noise of a sensor, cut into shards by the ordinary way."""
    import rasterio

    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(SCENE[0])[:, None], np.fft.rfftfreq(SCENE[1])).astype(np.float32)
    frequency[0, 0] = np.inf

    def texture() -> np.ndarray:
        spectrum = np.fft.rfft2(rng.standard_normal(SCENE, np.float32)) / frequency**1.2
        made = np.fft.irfft2(spectrum, SCENE).astype(np.float32)
        return made / made.std()

    grounds = np.stack([texture() for _ in range(3)])
    (folder / "scene").mkdir(parents=True)
    profile: dict[str, Any] = {"count": len(BANDS), "dtype": "uint16", "height": SCENE[0], "width": SCENE[1]}
    place = rasterio.Affine(10, 0, 600_000, 0, -10, 5_000_000)
    with rasterio.open(
        folder / "scene" / "S2.tif", "w", "GTiff", tiled=True, interleave="band", crs="EPSG:32632", transform=place, **profile
    ) as file:
        for number, (name, (mean, deviation)) in enumerate(BANDS.items(), 1):
            share = np.sqrt(rng.dirichlet([2, 1, 1])).astype(np.float32)
            noise = rng.standard_normal(SCENE, np.float32) * max(1, 0.02 * mean)
            band = mean + deviation / 2 * np.tensordot(share, grounds, 1) + noise
            file.write(band.clip(1, 65535).round().astype(np.uint16), number)
            file.set_band_description(number, name)
    options = Options(chip=SIDE, sensor="sentinel2", level="L1C")
    shard(folder / "scene", folder / "shards", options=options, progress=False, shard_bytes=64 << 20)


def make_tiffs(reader: ShardReader, folder: Path, **how: Any) -> Path:
    """The chips as GeoTIFF in as many tars as there are shards."""
    from rasterio.io import MemoryFile

    folder.mkdir()
    starts = itertools.accumulate(reader.shard_sizes, initial=0)
    for shard_number, (first, last) in enumerate(itertools.pairwise(starts)):
        with webdataset.writer.TarWriter(str(folder / f"{shard_number:06d}.tar")) as tar:
            for number in range(first, last):
                pixels = reader.pixels(number)
                with MemoryFile() as memory:
                    bands, height, width = pixels.shape
                    with memory.open(driver="GTiff", count=bands, height=height, width=width, dtype=pixels.dtype, **how) as file:
                        file.write(pixels)
                    tar.write({"__key__": reader.index.key(number), "tif": memory.read()})
    return folder


def make_mosaic(reader: ShardReader, folder: Path) -> Path:
    from streaming import MDSWriter

    bands, height, width = reader.pixels(0).shape
    with MDSWriter(out=str(folder), columns={"chip": f"ndarray:uint16:{bands},{height},{width}"}) as writer:
        for number in range(len(reader)):
            writer.write({"chip": reader.pixels(number)})
    return folder


def make_litdata(reader: ShardReader, folder: Path) -> Path:
    from litdata.streaming.cache import Cache

    cache = Cache(str(folder), chunk_bytes="64MB")
    for number in range(len(reader)):
        cache[number] = reader.pixels(number).copy()
    cache.done()
    cache.merge()
    return folder


def band_ways(folder: Path, others: bool) -> dict[str, Way]:
    if not folder.exists():
        make_bands(folder)
    reader = ShardReader(folder / "shards")

    def copy(name: str, make: Callable[..., Path], **how: Any) -> Path:
        made = folder / name
        return made if made.exists() else make(reader, made, **how)

    plain = copy("tiff", make_tiffs)
    deflated = copy("tiff_deflate", make_tiffs, compress="deflate", predictor=2)
    ways = {
        "swath": swath_loader(folder / "shards"),
        "webdataset, our .npy": webdataset_loader(folder / "shards", None, ".npy"),
        "webdataset, GeoTIFF, rasterio": webdataset_loader(plain, lambda sample: by_rasterio(sample["tif"]), ".tif"),
        "webdataset, GeoTIFF deflate, rasterio": webdataset_loader(deflated, lambda sample: by_rasterio(sample["tif"]), ".tif"),
    }
    if others:
        ways["webdataset, GeoTIFF, tifffile"] = webdataset_loader(plain, lambda sample: by_tifffile(sample["tif"]), ".tif")
        mosaic, lit = folder / "mosaic", folder / "litdata"
        ways["mosaicml-streaming"] = mosaic_loader(mosaic)
        copy("mosaic", make_mosaic)
        ways["litdata"] = litdata_loader(lit)
        copy("litdata", make_litdata)
    return ways


def jpeg_ways(folder: Path) -> dict[str, Way]:
    return {
        "swath": swath_loader(folder),
        "webdataset": webdataset_loader(folder, "rgb8", "jpg"),
        "webdataset with simplejpeg": webdataset_loader(folder, lambda s: simplejpeg.decode_jpeg(member(s, "jpg")), "jpg"),
    }


def pixels_of(batch: Any) -> torch.Tensor:
    return batch if isinstance(batch, torch.Tensor) else next(iter(batch.chips.stored.values())).pixels


def rate(way: Way, workers: int, batches: int) -> float:
    """Samples per second of `batches` batches, after those that start the workers."""
    stream = iter(way(workers))
    for _ in range(WARM):
        assert len(pixels_of(next(stream))) == BATCH
    start = time.perf_counter()
    for _ in itertools.islice(stream, batches):
        pass
    made = BATCH * batches / (time.perf_counter() - start)
    close = getattr(stream, "close", None)
    if close is not None:
        close()
    return made


def compare(ways: dict[str, Way], workers: int, batches: int, alternations: int) -> dict[str, Any]:
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(alternations):
        for name, way in ways.items():
            rates[name].append(rate(way, workers, batches))
    return {
        "samples_per_second": {name: round(statistics.median(r)) for name, r in rates.items()},
        "swath_ratio_to": {
            name: {
                "median": round(statistics.median(ratios := [a / b for a, b in zip(rates["swath"], r, strict=True)]), 2),
                "lowest": round(min(ratios), 2),
            }
            for name, r in rates.items()
            if name != "swath"
        },
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jpeg", type=Path, help="shards of 64-pixel JPEG")
    parser.add_argument("--bands", type=Path, help="folder for the 13-band chips")
    parser.add_argument("--others", action="store_true", help="mosaicml-streaming, litdata and tifffile too")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    kinds: dict[str, dict[str, Way]] = {}
    if args.jpeg:
        kinds["RGB 64×64 JPEG"] = jpeg_ways(args.jpeg)
    if args.bands:
        kinds["13 bands 64×64 uint16"] = band_ways(args.bands, args.others)
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/loader.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, numpy {np.__version__}, "
        f"webdataset {webdataset.__version__}, checksums by {crc32.__module__}",
    }
    for kind, ways in kinds.items():
        result[kind] = {f"{w} workers": compare(ways, w, args.batches, args.alternations) for w in args.workers}
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
