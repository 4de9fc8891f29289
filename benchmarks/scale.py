"""How the cost of a run grows with ranks and with samples, as far as one machine can tell without starting them.

    python benchmarks/scale.py --out benchmarks/results/scale.json

`start` is what one rank of so many pays, with a lane for each node of eight, from opening the data set to the numbers of its
samples: manifest and index (sparse files: nothing is in them, they are as long as they would be), the order, the rows of its
first batch; then to resume in the middle of epoch 3, each batch after that, and the list for `data.stage`; memory at the end of
all. benchmarks/startup.py measures one rank with real rows and chips. Ranks of one step are checked to hold, between them, what
a single one would.

`plan` is `swath pretrain --plan` of the shipped recipes, their batch grown with the ranks.

`checkpoint` is what torch.distributed.checkpoint plans for a sharded model: the local plan of rank 0 under a fake process group,
that of every other rank by the rule that rank 0's obeys (the last one's is compared with its own, made in a process of its own),
then DCP's own global plan. Bytes and files of each rank, what rank 0 gathers, and the metadata that every reader reads.

Each measurement is a process of its own; memory is Private_Clean + Private_Dirty of smaps_rollup beyond the imports.
"""

import argparse
import hashlib
import json
import pickle
import platform
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.testing._internal.distributed.fake_pg import FakeStore

from swath.launch.recipes import find
from swath.pretrain import build
from swath.pretrain.config import Recipe, read_recipe
from swath.pretrain.data import Data
from swath.pretrain.forecast import forecast
from swath.pretrain.strategy import shard
from swath.pretrain.world import World
from swath.shards import index
from swath.shards.bands import Band, InputContract, Normalisation
from swath.shards.index import MEMBER, SAMPLE, columns_of
from swath.shards.loader import Loader
from swath.shards.manifest import Manifest, Shard
from swath.shards.order import SampleOrder
from swath.shards.reader import ShardReader

OF_NODE, SHARE = 8, 16  # ranks of a node; samples of a rank in a batch
RANKS = (8, 64, 512)
SAMPLES = {1_000_000: 1_000, 10_000_000: 10_000, 100_000_000: 100_000}  # and shards
RECIPES = ("mae_vit_base_one_gpu", "mae_vit_large_one_node", "mae_vit_huge_16_nodes")


def make(folder: Path, samples: int, shards: int) -> Path:
    """A data set whose index is empty, but as long as that of so many samples."""
    folder.mkdir()
    contract = InputContract(
        modality="image", sensor="made", level="none", unit="digital number", dtype="uint8", height=64, width=64,
        bands=tuple(Band(name=c) for c in "rgb"), normalisation=Normalisation(mean=(0.0,) * 3, std=(1.0,) * 3, pixels=(1,) * 3),
    )  # fmt: skip
    names = [f"shard-{n:06d}.tar" for n in range(shards)]
    Manifest(
        dataset="made", samples=samples, contracts={"image": contract},
        shards=tuple(Shard(name=n, samples=samples // shards, bytes=1 << 30, sha256="0" * 64) for n in names),
    ).write(folder)  # fmt: skip
    columns = len(columns_of(["image"]))
    with (folder / index.NAME).open("wb") as file, (folder / index.KEYS).open("wb") as keys:
        file.write(index._HEADER.pack(index._MAGIC, samples, columns))
        file.truncate(struct.calcsize("<8sQI44x") + samples * (SAMPLE.itemsize + columns * MEMBER.itemsize))
        keys.truncate(samples * 16)
    return folder


def private() -> float:
    """MB that this process has for itself."""
    told = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in told if line.startswith(("Private_Clean", "Private_Dirty"))) * 1024 / 1e6


def start(folder: Path, ranks: int) -> dict[str, Any]:
    """Of the last rank of so many."""
    before, began = private(), time.perf_counter()
    reader = ShardReader(folder)
    row = {"seconds_open": time.perf_counter() - began}
    nodes, batch, more = max(1, ranks // OF_NODE), SHARE * ranks, 200
    for name, epoch in (("first", 0.0), ("resumed", 3.5)):
        began = time.perf_counter()
        order = SampleOrder(reader.shard_sizes, seed=0, lanes=nodes)
        step = int(epoch * order.samples) // batch
        rank: dict[str, Any] = {"global_batch": batch, "micro_batch": SHARE, "world_size": ranks, "step": step}
        work = Loader(reader, order, rank=ranks - 1, **rank)._work()
        _, numbers, _ = next(work)
        assert not reader.index.samples["id"][numbers].any()
        row[f"seconds_to_{name}_numbers"] = time.perf_counter() - began
    began = time.perf_counter()
    for _, numbers, _ in islice(work, more):
        assert not reader.index.samples["id"][numbers].any()
    row["ms_a_step"] = 1e3 * (time.perf_counter() - began) / more
    row["MB"] = private() - before
    began = time.perf_counter()
    row["shards_of_the_node"] = len(order.needed(step * batch, range(nodes - 1, nodes)))
    row["ms_list_for_stage"] = 1e3 * (time.perf_counter() - began)
    shares = [Loader(reader, order, rank=number, **rank)._samples(step)[1] for number in range(ranks)]
    assert np.array_equal(np.concatenate(shares), order.find(order.batch(step * batch, batch))[0])
    return row


def shipped(name: str, folder: Path, *more: str) -> Recipe:
    text, name = find(name)
    return read_recipe(text, [f"data.train={folder}", "data.stage=false", *more], name=name)


def plans(folder: Path, name: str, *ranks: int) -> dict[str, Any]:
    return {str(number): plan(folder, name, number) for number in ranks}


def plan(folder: Path, name: str, ranks: int) -> dict[str, Any]:
    base = shipped(name, folder)
    assert base.train.micro_batch is not None
    lanes = max(1, ranks // OF_NODE) if base.data.lanes > 1 else 1
    recipe = shipped(name, folder, f"train.global_batch={base.train.micro_batch * ranks}", f"data.lanes={lanes}")
    began = time.perf_counter()
    said = forecast(recipe, ranks, OF_NODE)
    return {
        "seconds": time.perf_counter() - began,
        "strategy": recipe.train.strategy,
        "micro_batch": said.micro_batch,
        "steps": said.stages[-1].last,
        "GFLOP_a_sample": said.gflop_per_sample[0],
        "M_weights": said.parameters / 1e6,
        "MB_weights_gradients_moments": said.weights / 1e6,
        "MB_gathered": said.gathered / 1e6,
        "MB_activations_fp32": said.activations / 1e6,
        "MB_checkpoint": said.checkpoint / 1e6,
    }


def tensors(folder: Path, name: str, ranks: int, rank: int) -> dict[str, Any]:
    """What a checkpoint of a sharded run holds on one rank: weights, both moments, and AdamW's count of steps. Bytes are none."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    recipe = shipped(name, folder)
    data = Data(recipe.data, 0)
    size = (224, 224)
    with torch.device("meta"):
        model = build.model(recipe, data, size, size)
    shard(model, World(rank, ranks, rank % OF_NODE, max(1, ranks // OF_NODE)), torch.device("cpu"))
    held = {f"model.{name}": value for name, value in model.state_dict().items()}
    for key, parameter in model.named_parameters():
        moments = {f"optimizer.{key}.{moment}": parameter for moment in ("exp_avg", "exp_avg_sq")}
        held |= {**moments, f"optimizer.{key}.step": torch.zeros(())}
    return held


def of_rank(items: list[WriteItem], rank: int, ranks: int) -> list[WriteItem]:
    """The plan of `rank` from rank 0's: a tensor's rows are dealt out in equal runs, the last ones shorter or empty."""
    made = []
    for item in items:
        assert item.tensor_data is not None
        if item.type.name == "SHARD":
            size = item.tensor_data.size
            run = -(-size[0] // ranks)
            first = min(rank * run, size[0])
            offsets = torch.Size([first, *[0] * (len(size) - 1)])
            chunk = ChunkStorageMetadata(offsets, torch.Size([min(run, size[0] - first), *size[1:]]))
            data = replace(item.tensor_data, chunk=chunk)
            item = replace(item, index=replace(item.index, offset=offsets), tensor_data=data)
        made.append(item)
    return made


def fingerprint(items: list[WriteItem]) -> str:
    told = [(i.index.fqn, i.tensor_data and (i.tensor_data.chunk.offsets, i.tensor_data.chunk.sizes)) for i in items]
    return hashlib.sha256(repr(told).encode()).hexdigest()


def last_rank(folder: Path, name: str, ranks: int) -> dict[str, Any]:
    held = tensors(folder, name, ranks, ranks - 1)
    return {"fingerprint": fingerprint(create_default_local_save_plan(held, False).items)}


def weigh(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def checkpoint(folder: Path, name: str, ranks: int) -> dict[str, Any]:
    held = tensors(folder, name, ranks, 0)
    began = time.perf_counter()
    planner = DefaultSavePlanner()
    planner.set_up_planner(held, None, True)
    own = planner.create_local_plan()
    local, first = time.perf_counter() - began, own.items
    everyone = [replace(own, items=of_rank(first, rank, ranks)) for rank in range(ranks)]
    gathered = sum(len(pickle.dumps(everyone[rank])) for rank in (0, ranks - 1)) / 2 * ranks
    began = time.perf_counter()
    dealt, metadata = planner.create_global_plan(everyone)
    planned = time.perf_counter() - began
    written = [sum(map(weigh, one.items)) for one in dealt]
    metadata.storage_data = {
        item.index: _StorageInfo(f"__{rank}_0.distcp", 0, weigh(item)) for rank, one in enumerate(dealt) for item in one.items
    }
    began = time.perf_counter()
    raw = pickle.dumps(metadata)
    dumped = time.perf_counter() - began
    began = time.perf_counter()
    pickle.loads(raw)
    loaded = time.perf_counter() - began
    return {
        "fingerprint_of_last": fingerprint(everyone[-1].items),
        "tensors": len(first),
        "files": sum(1 for one in dealt if one.items),
        "MB": sum(written) / 1e6,
        "MB_of_a_rank": {"most": max(written) / 1e6, "median": float(np.median(written)) / 1e6, "least": min(written) / 1e6},
        "ranks_with_less_than_a_tenth_of_the_median": sum(one < 0.1 * float(np.median(written)) for one in written),
        "seconds_local_plan": local,
        "seconds_global_plan": planned,
        "MB_of_plans_gathered": gathered / 1e6,
        "MB_metadata": len(raw) / 1e6,
        "seconds_metadata": {"write": dumped, "read": loaded},
    }


def apart(what: str, *words: Any) -> dict[str, Any]:
    """One of the functions above, in a process of its own."""
    command = [sys.executable, __file__, "--measure", what, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1], parse_float=lambda text: float(f"{float(text):.4g}"))


def measure(what: str, folder: Path, *words: str) -> dict[str, Any]:
    if what == "start":
        return start(folder, *map(int, words))
    work = {"plans": plans, "checkpoint": checkpoint, "last_rank": last_rank}[what]
    return work(folder, words[0], *map(int, words[1:]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--samples", type=int, nargs="+", default=list(SAMPLES), choices=list(SAMPLES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.measure:
        what, folder, *words = args.measure
        print(json.dumps(measure(what, Path(folder), *words)))
        return 0
    table: dict[str, Any] = {"start": {}, "plan": {}, "checkpoint": {}}

    def note(part: str, case: str, row: dict[str, Any]) -> None:
        table[part][case] = row
        print(f"{part:10} {case:44} {row}", file=sys.stderr)

    with tempfile.TemporaryDirectory() as place:
        for samples in args.samples:
            folder = make(Path(place) / str(samples), samples, SAMPLES[samples])
            for ranks in args.ranks:
                note("start", f"{samples:,} samples, {ranks} ranks", apart("start", folder, ranks))
        folder = Path(place) / str(max(args.samples))
        for name in RECIPES:
            for ranks, row in apart("plans", folder, name, *args.ranks).items():
                note("plan", f"{name}, {ranks} ranks", row)
        for ranks in args.ranks:
            row = apart("checkpoint", folder, RECIPES[-1], ranks)
            if row.pop("fingerprint_of_last") != apart("last_rank", folder, RECIPES[-1], ranks)["fingerprint"]:
                raise RuntimeError(f"the last of {ranks} ranks plans something else than rank 0's rule says")
            note("checkpoint", f"{RECIPES[-1]}, {ranks} ranks", row)
    result = {
        "command": " ".join(["python", "benchmarks/scale.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}",
        "samples_of_a_rank_in_a_batch": SHARE,
        "ranks_of_a_node": OF_NODE,
        **table,
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
