"""Images per second out of the input pipeline, beside webdataset, on the same shards of 64-pixel JPEG, alternating.

    python benchmarks/loader.py --shards out/eurosat/train --out benchmarks/results/loader.json

Three ways to a batch of 256 uint8 images: swath's loader in its exact order with checksums; `webdataset` with its default decoder
(Pillow) and a torch DataLoader; `webdataset` with simplejpeg, the decoder that swath uses, and a DataLoader. Equal workers.
"""

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset.compat
from torch.utils.data import DataLoader

from swath.shards.loader import Loader
from swath.shards.order import SampleOrder
from swath.shards.reader import ShardReader

BATCH = 256


def ours(folder: Path, workers: int) -> Iterable[Any]:
    reader = ShardReader(folder)
    order = SampleOrder(reader.shard_sizes, seed=0)
    return Loader(reader, order, global_batch=BATCH, micro_batch=BATCH, workers=workers)


def theirs(folder: Path, workers: int, decoder: str) -> Iterable[Any]:
    """Shuffled in a buffer of 1,000, decoded, batched by the DataLoader's workers; repeats for ever, as ours does."""
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    data: Any = webdataset.compat.WebDataset(tars, shardshuffle=False, resampled=False, empty_check=False).shuffle(1000)
    data = data.decode("rgb8") if decoder == "default" else data.map(fast)
    data = data.map(picture).batched(BATCH, collation_fn=stack).repeat()
    return DataLoader(data, batch_size=None, num_workers=workers)


def fast(sample: dict[str, Any]) -> dict[str, Any]:
    return {k: simplejpeg.decode_jpeg(v) if k.endswith("jpg") else v for k, v in sample.items()}


def picture(sample: dict[str, Any]) -> np.ndarray:
    return next(value for key, value in sample.items() if key.endswith("jpg"))


def stack(samples: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(samples))


def rate(make: Callable[[], Iterable[Any]], batches: int) -> float:
    """Images per second of `batches` batches, after five that start the workers."""
    batch_iterator = iter(make())
    for _ in range(5):
        next(batch_iterator)
    start = time.perf_counter()
    for _ in itertools.islice(batch_iterator, batches):
        pass
    made = BATCH * batches / (time.perf_counter() - start)
    close = getattr(batch_iterator, "close", None)
    if close is not None:
        close()
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    table: dict[str, Any] = {}
    for workers in (0, 1, 2):
        ways: dict[str, Callable[[], Iterable[Any]]] = {
            "swath": lambda w=workers: ours(args.shards, w),
            "webdataset": lambda w=workers: theirs(args.shards, w, "default"),
            "webdataset with simplejpeg": lambda w=workers: theirs(args.shards, w, "fast"),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.alternations):
            for name, make in ways.items():
                rates[name].append(rate(make, args.batches))
        table[f"{workers} workers"] = {
            "images_per_second": {name: round(statistics.median(r)) for name, r in rates.items()},
            "swath_ratio_to": {
                name: round(statistics.median(a / b for a, b in zip(rates["swath"], r, strict=True)), 2)
                for name, r in rates.items()
                if name != "swath"
            },
        }
    result = {
        "command": " ".join(["python", "benchmarks/loader.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, torch {torch.__version__}, webdataset {webdataset.__version__}",
        **table,
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
