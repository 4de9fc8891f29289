"""What a rank pays to start and to resume, in time and in memory, with 1 million and with 100 million samples.

    python benchmarks/startup.py --out benchmarks/results/startup.json

The data set is made up. Its manifest is whole; index and keys are filled in where they are looked at (at a million samples all of
them; at 100 million the files are sparse, with whole windows filled), and every shard is a link to one tar with one chip of
64×64×3, so that batches are really read, checked and decoded. Every measurement is a process of its own, files in the system's
cache. Time runs from opening the reader to the first batch in hand, imports excluded. Memory is Private_Clean + Private_Dirty of
/proc/self/smaps_rollup beyond what it was after the imports. Pages of the index that a single process has mapped count, also
those that the system mapped around them; between the ranks of a node they are shared, and it takes them back when it must.
`MB_peak` is the most there was while the rows of 2^20 samples, 16 windows, were looked at, without their chips.
"""

import argparse
import io
import json
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swath.shards import index
from swath.shards.bands import Band, InputContract, Normalisation
from swath.shards.draw import mix
from swath.shards.index import MEMBER, SAMPLE, columns_of
from swath.shards.loader import Loader
from swath.shards.manifest import Manifest, Shard
from swath.shards.mixture import Mixture
from swath.shards.order import SampleOrder
from swath.shards.reader import Chips, ShardReader

BATCH = 256
LOADED = 64  # batches whose chips are decoded
ROWS = 1 << 20  # samples whose rows are looked at
KEY = "tile_{:012d}"
CASES = [
    # samples, shards
    (1_000_000, 1_000),
    (100_000_000, 10_000),
    (100_000_000, 100_000),
]


@cache
def chip() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.random.default_rng(0).integers(0, 255, (3, 64, 64), dtype=np.uint8))
    return buffer.getvalue()


def rows(numbers: np.ndarray, per_shard: int) -> tuple[np.ndarray, np.ndarray]:
    """The index's rows of `numbers`: (n,) of SAMPLE and (n, members) of MEMBER."""
    width = len(KEY.format(0))
    samples = np.zeros(len(numbers), SAMPLE)
    samples["id"] = mix(torch.from_numpy(numbers)).numpy()
    samples["key_start"], samples["key_length"] = numbers * width, width
    samples["label"], samples["block"] = -1, -1
    data = chip()
    members = np.zeros((len(numbers), len(columns_of(["image"]))), MEMBER)
    members[:, 0] = [(512, len(data), 0, zlib.crc32(data), index.FORMATS.index("npy"), 1.0, 0.0)]
    members[:, 0]["shard"] = numbers // per_shard
    return samples, members


def make(folder: Path, samples: int, shards: int, visited: list[int]) -> None:
    """A data set with rows for the windows of the ROWS positions from each of `visited` on, and chips for LOADED batches."""
    per_shard = samples // shards
    folder.mkdir()
    with tarfile.open(folder / "shard-000000.tar", "w") as tar:
        info = tarfile.TarInfo("chip.image.npy")
        info.size = len(chip())
        tar.addfile(info, io.BytesIO(chip()))
    size = (folder / "shard-000000.tar").stat().st_size
    names = [f"shard-{n:06d}.tar" for n in range(shards)]
    contract = InputContract(
        modality="image", sensor="made", level="none", unit="digital number", dtype="uint8", height=64, width=64,
        bands=tuple(Band(name=c) for c in "rgb"), normalisation=Normalisation(mean=(0.0,) * 3, std=(1.0,) * 3, pixels=(1,) * 3),
    )  # fmt: skip
    Manifest(
        dataset="made", samples=samples, contracts={"image": contract},
        shards=tuple(Shard(name=n, samples=per_shard, bytes=size, sha256="0" * 64) for n in names),
    ).write(folder)  # fmt: skip
    order = SampleOrder([per_shard] * shards, seed=0)
    if samples <= 1_000_000:
        runs = [np.arange(samples)]
    else:  # of each shard that a window spans, all between the first and the last sample that is visited
        looked = np.unique(np.concatenate([order.at(first, ROWS)[0] for first in visited]))
        parts = np.split(looked, np.flatnonzero(np.diff(looked // per_shard)) + 1)
        runs = [np.arange(part[0], part[-1] + 1) for part in parts]
    for shard in order.shards(np.concatenate([order.at(first, LOADED * BATCH)[0] for first in visited])):
        if shard:
            (folder / names[shard]).hardlink_to(folder / names[0])
    width, member_width = len(KEY.format(0)), len(columns_of(["image"])) * MEMBER.itemsize
    head = struct.calcsize("<8sQI44x")
    members_at = head + samples * SAMPLE.itemsize
    with (folder / index.NAME).open("wb") as file, (folder / index.KEYS).open("wb") as keys:
        keys.truncate(samples * width)
        file.truncate(members_at + samples * member_width)
        file.write(index._HEADER.pack(index._MAGIC, samples, len(columns_of(["image"]))))
        file.flush()
        for run in runs:
            sample_rows, member_rows = rows(run, per_shard)
            first = int(run[0])
            os.pwrite(file.fileno(), sample_rows.tobytes(), head + first * SAMPLE.itemsize)
            os.pwrite(file.fileno(), member_rows.tobytes(), members_at + first * member_width)
            os.pwrite(keys.fileno(), "".join(KEY.format(n) for n in run.tolist()).encode(), first * width)


def private() -> float:
    """MB that this process has for itself."""
    told = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in told if line.startswith(("Private_Clean", "Private_Dirty"))) * 1024 / 1e6


class Reader(ShardReader):
    """Looks at the rows of samples only, and not at their chips, once `rows_only` is set."""

    rows_only = False

    def chips(self, numbers: Sequence[int] | np.ndarray, visits: np.ndarray | None = None) -> Chips:
        if not self.rows_only:
            return super().chips(numbers, visits)
        samples, members = self.index.samples[numbers], self.index.members[numbers]
        assert samples["key_length"].all() and members["length"][:, 0].all()
        ids = torch.from_numpy(samples["id"].astype(np.int64))
        return Chips({}, ids, ids, ids)


def measure(folder: Path, step: int) -> dict[str, float]:
    """In a process of its own: open, deliver LOADED batches from `step` on, then look at the rows of ROWS samples."""
    before, start = private(), time.perf_counter()
    reader = Reader(folder)
    opened = time.perf_counter()
    after_open = private()
    order = SampleOrder(reader.shard_sizes, seed=0)
    batches = iter(Loader(reader, Mixture([order]), global_batch=BATCH, micro_batch=BATCH, step=step, workers=0))
    first = next(batches).chips
    ready = time.perf_counter()
    after_first = private()
    numbers = order.at(step * BATCH, BATCH)[0]
    assert torch.equal(first.id, mix(torch.from_numpy(numbers)))
    assert reader.index.key(int(numbers[-1])) == KEY.format(int(numbers[-1]))
    for _ in islice(batches, LOADED - 1):
        pass
    after_loaded = private()
    reader.rows_only = True
    peak = 0.0
    for number, _ in enumerate(islice(batches, ROWS // BATCH - LOADED)):
        if number % 8 == 7:
            peak = max(peak, private() - before)
    return {
        "seconds_open": opened - start,
        "seconds_to_first_batch": ready - start,
        "MB_after_open": after_open - before,
        "MB_after_first_batch": after_first - before,
        f"MB_after_{LOADED}_batches": after_loaded - before,
        "MB_peak": peak,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="where the made-up data sets are put for the time being; the system's default"
    )
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--step", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.step)))
        return 0
    table: dict[str, Any] = {}
    for samples, shards in CASES:
        steps = {
            "start": 0,
            "resume in the middle of epoch 0": samples // BATCH // 2,
            "resume in epoch 1000": 1000 * samples // BATCH + 77,
        }
        place = Path(tempfile.mkdtemp(dir=args.folder)) / "made"
        try:
            make(place, samples, shards, [step * BATCH for step in steps.values()])
            case: dict[str, Any] = {}
            for name, step in steps.items():
                runs = []
                for _ in range(args.repeats):
                    command = [sys.executable, __file__, "--measure", str(place), "--step", str(step)]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    runs.append(json.loads(done.stdout))
                case[name] = {field: round(statistics.median(run[field] for run in runs), 3) for field in runs[0]}
        finally:
            shutil.rmtree(place.parent)
        table[f"{samples:,} samples in {shards:,} shards"] = case
        print(f"{samples} in {shards}: {case}", file=sys.stderr)
    result = {
        "command": " ".join(["python", "benchmarks/startup.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}",
        "batch": BATCH,
        "bytes_per_sample_in_the_index": SAMPLE.itemsize + len(columns_of(["image"])) * MEMBER.itemsize,
        **table,
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
