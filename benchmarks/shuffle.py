"""How well a window shuffles, and a picture of it, beside the buffer of 1,000 samples that `webdataset` pipelines use.

    python benchmarks/shuffle.py --out benchmarks/results/shuffle.json --plot docs/shuffle.png

One epoch of a million samples in shards of 1,024, stored in a meaningful order (an ingest goes scene by scene). Of the order in
which they are visited it is asked, 0 being what a full shuffle has:

- `position`: Spearman's rank correlation of the place in the epoch with the place in storage;
- `neighbours`: the rank correlation of the places in storage of samples visited one after the other;
- `batch`: the intraclass correlation of the place in storage in batches of 256: how much alike a batch is, 1 if all of it is one
  place, whatever the order inside (lanes interleave, so that neighbours are far apart and every fourth is not);

and, for what it costs, `distance`, the median distance in storage of neighbours as a share of a full shuffle's, and `shards`,
from how many a batch comes. `webdataset` is run as it is: its own `shuffle(1000)`, over shards in a shuffled order and in a
sorted one.
"""

import argparse
import json
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import scipy
import webdataset
from scipy.stats import spearmanr
from webdataset import filters

from swath.shards.order import SampleOrder

mpl.use("Agg")
from matplotlib import pyplot as plt

BATCH = 256
SHARD = 1024
SAMPLES = 1 << 20
WINDOWS = [1 << power for power in range(6, 21, 2)]
LANES = (1, 4)


def visited(window: int, lanes: int) -> np.ndarray:
    """(N,) places in storage in the order of the first epoch."""
    order = SampleOrder([SHARD] * (SAMPLES // SHARD), seed=0, window=window, lanes=lanes)
    return np.concatenate([order.at(first, 4096)[0] for first in range(0, SAMPLES, 4096)])


def buffered(shards: list[int]) -> np.ndarray:
    """The same of webdataset's shuffle buffer, which is fed shard by shard."""
    stream = (number for shard in shards for number in range(shard * SHARD, (shard + 1) * SHARD))
    return np.fromiter(filters.shuffle(1000, rng=random.Random(0))(stream), np.int64, SAMPLES)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, between -1 and 1."""
    result: Any = spearmanr(a, b)
    return float(result.statistic)


def quality(places: np.ndarray) -> dict[str, float]:
    batches = places.reshape(-1, BATCH)
    between = BATCH * batches.mean(axis=1).var(ddof=1)
    within = batches.var(axis=1, ddof=1).mean()
    full = (1 - 0.5**0.5) * len(places)  # the median of |x - y| of two random places
    return {
        "position": round(correlation(np.arange(len(places)), places), 4),
        "neighbours": round(correlation(places[:-1], places[1:]), 4),
        "batch": round(float((between - within) / (between + (BATCH - 1) * within)), 4),
        "distance": round(float(np.median(np.abs(np.diff(places))) / full), 4),
        "shards": round(float(np.mean([len(np.unique(batch // SHARD)) for batch in batches])), 1),
    }


def plot(table: dict[str, dict[str, float]], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    titles = {
        "neighbours": "rank correlation of neighbours",
        "batch": f"likeness of a batch of {BATCH}\n(intraclass correlation)",
        "shards": f"shards that a batch of {BATCH} comes from",
    }
    for axis, (field, title) in zip(axes, titles.items(), strict=True):
        for lanes, marker in zip(LANES, "os", strict=True):
            values = [table[f"window {window}, lanes {lanes}"][field] for window in WINDOWS]
            axis.plot(WINDOWS, values, marker=marker, label=f"swath, {lanes} lane{'s' * (lanes > 1)}")
        for name, style in (("shards shuffled", "--"), ("shards sorted", ":")):
            value = table[f"webdataset shuffle(1000), {name}"][field]
            axis.axhline(value, color="0.35", linestyle=style, label=f"webdataset shuffle(1000), {name}")
        axis.axvline(65536, color="0.8", zorder=0)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("window (samples)")
        axis.set_title(title, fontsize=10)
    axes[0].annotate("default", (65536, 0.5), rotation=90, color="0.5", ha="right", va="center", fontsize=9)
    axes[2].set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    table: dict[str, dict[str, float]] = {}
    for lanes in LANES:
        for window in WINDOWS:
            table[f"window {window}, lanes {lanes}"] = quality(visited(window, lanes))
    shards = list(range(SAMPLES // SHARD))
    table["webdataset shuffle(1000), shards sorted"] = quality(buffered(shards))
    random.Random(0).shuffle(shards)
    table["webdataset shuffle(1000), shards shuffled"] = quality(buffered(shards))
    table["full shuffle"] = quality(np.random.default_rng(0).permutation(SAMPLES))
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/shuffle.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "versions": {package.__name__: package.__version__ for package in (np, scipy, webdataset)},
        "samples": SAMPLES,
        "samples_per_shard": SHARD,
        "batch": BATCH,
        **table,
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(table, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
