"""How fast features of EuroSAT RGB are taken, beside a plain loop, and what a kNN probe of them costs on top.

    python benchmarks/features.py --shards out/eurosat/shards --zip EuroSAT_RGB.zip --backbone out/eurosat/hour_0

The plain loop is what one would write: PIL decodes, numpy scales, the same backbone in fp32, one batch after the other. It and
`swath.probes.features.extract`, in fp32 and at the machine's default precision, take the same images in turns, in one run, with
equal threads and batches; the median over turns of the ratio within a turn counts. Then all samples are taken once, and kNN is
timed on them.
"""

import argparse
import io
import json
import platform
import statistics
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from swath.hub.load import Loaded, load_backbone
from swath.probes.features import Features, extract, labelled, match_classes, require_contract, resolve
from swath.probes.knn import knn
from swath.shards.reader import ShardReader


def plain(loaded: Loaded, archive: zipfile.ZipFile, names: list[str], batch: int) -> np.ndarray:
    """(N, D) features of the images `names`, at the size that they have."""
    contract = loaded.contract
    mean, std = (np.array(v, np.float32) for v in (contract.normalisation.mean, contract.normalisation.std))
    rows = []
    with torch.inference_mode():
        for first in range(0, len(names), batch):
            images = [
                np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names[first : first + batch]
            ]
            x = (np.stack(images).astype(np.float32) - mean) / std
            rows.append(loaded.backbone(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()).pooled.numpy())
    return np.concatenate(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shards", type=Path, required=True, help="with train and test in it, as benchmarks/eurosat.py makes them"
    )
    parser.add_argument("--zip", type=Path, required=True, help="the published archive, for the plain loop")
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--images", type=int, default=2048, help="of train, in each turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--limit", type=int, help="take no more samples of train and of test for kNN than this")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/features.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    loaded = load_backbone(args.backbone)
    readers = {part: ShardReader(args.shards / part) for part in ("train", "test")}
    contract = require_contract(loaded, readers["train"])
    loaded.size = (contract.height or loaded.size[0], contract.width or loaded.size[1])  # the plain loop does not resize
    default = resolve("auto", torch.device("cpu"))
    numbers = labelled(readers["train"])[: args.images]
    archive = zipfile.ZipFile(args.zip)
    inside = {Path(name).stem: name for name in archive.namelist() if name.endswith(".jpg")}
    names = [inside[readers["train"].index.key(int(number)).split("__")[-1]] for number in numbers]

    def ours(precision: str) -> Callable[[], np.ndarray]:
        return lambda: extract(loaded, readers["train"], numbers=numbers, batch=args.batch, precision=precision, progress=False).x  # type: ignore[arg-type]

    turns: dict[str, Callable[[], np.ndarray]] = {
        "plain": lambda: plain(loaded, archive, names, args.batch), "fp32": ours("fp32"), "default": ours(default),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    found = {}
    for turn in range(args.turns + 1):  # the first warms up
        for name, take in turns.items():
            started = time.perf_counter()
            found[name] = take()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    apart = float(np.abs(found["fp32"] - found["plain"]).max() / np.abs(found["plain"]).max())
    if apart > 1e-3:
        raise SystemExit(f"the loops do not take the same features: they are {apart:.1e} of the largest apart")

    def some(part: str) -> Features:
        rows = labelled(readers[part])[: args.limit]
        return extract(loaded, readers[part], numbers=rows, batch=args.batch, precision=default)

    started = time.perf_counter()
    train = some("train")
    test = match_classes(train, some("test"))
    taking = time.perf_counter() - started
    started = time.perf_counter()
    accuracy = knn(train, test).accuracy
    probing = time.perf_counter() - started
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = {
        name: round(statistics.median(p / o for p, o in zip(seconds["plain"], seconds[name], strict=True)), 3)
        for name in ("fp32", "default")
    }
    result = {
        "command": "python benchmarks/features.py --shards … --zip … --backbone …",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, torch {torch.__version__}, {args.threads} threads",
        "backbone": f"{loaded.name}, {loaded.size[0]} × {loaded.size[1]} pixels, batches of {args.batch}",
        "images_per_second": {name: round(len(numbers) / value) for name, value in middle.items()},
        "default_precision": default,
        "fp32_over_plain": ratio["fp32"],
        "default_over_plain": ratio["default"],
        "largest_difference_of_fp32": float(f"{apart:.1e}"),
        "seconds_of_every_turn": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "knn": {
            "train": len(train.label), "test": len(test.label), "width": train.x.shape[1],
            "seconds_of_features": round(taking, 1), "seconds_of_knn": round(probing, 2),
            "knn_over_features": round(probing / taking, 4), "accuracy": round(accuracy, 4),
        },
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
