"""How much faster an ingest is with several processes: chips in GeoTIFF files of 13 bands, deflate, made here.

    python benchmarks/ingest.py --chips 4000 --side 120 --workers 0 2

Runs alternate; the ratios are of medians, the seconds of this machine. The output is compared byte for byte.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from swath.shards.ingest import shard
from swath.shards.sources.source import Options

BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")


def write_chips(folder: Path, count: int, side: int) -> None:
    """Smooth ground with noise: it compresses about as imagery does."""
    import rasterio
    from rasterio.transform import from_origin

    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = rng.integers(300, 4000, (len(BANDS), side // 20 + 1, side // 20 + 1))
        smooth = coarse.repeat(20, axis=1).repeat(20, axis=2)[:, :side, :side]
        place = {"crs": "EPSG:32633", "transform": from_origin(500_000 + 10 * side * number, 5_000_000, 10, 10)}
        path = folder / f"sentinel2_{number:06d}.tif"
        options = {"compress": "deflate", "predictor": 2, "dtype": "uint16", "driver": "GTiff", "count": len(BANDS)}
        with rasterio.open(path, "w", height=side, width=side, **options, **place) as file:
            file.write((smooth + rng.integers(0, 60, smooth.shape)).astype(np.uint16))
            file.descriptions = BANDS


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", type=int, default=4000)
    parser.add_argument("--side", type=int, default=120)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    seconds: dict[int, list[float]] = {workers: [] for workers in args.workers}
    with tempfile.TemporaryDirectory() as place:
        source, out = Path(place) / "chips", Path(place) / "out"
        source.mkdir()
        write_chips(source, args.chips, args.side)
        first = None
        for _ in range(args.rounds):
            for workers in args.workers:
                begun = time.perf_counter()
                shard(source, out, options=Options(sensor="sentinel2"), workers=workers, implausible_ok=True, progress=False)
                seconds[workers].append(round(time.perf_counter() - begun, 2))
                made = contents(out)
                first = first or made
                assert made == first, f"{workers} workers make other bytes"
                shutil.rmtree(out)
    medians = {workers: statistics.median(found) for workers, found in seconds.items()}
    print(
        json.dumps(
            {
                "chips": args.chips, "side": args.side, "cores": len(os.sched_getaffinity(0)), "seconds": seconds,
                "faster": {workers: round(medians[args.workers[0]] / found, 2) for workers, found in medians.items()},
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
