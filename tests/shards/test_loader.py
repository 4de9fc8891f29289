"""The loader delivers the order, whatever the workers, the ranks, the micro-batch and the step that it starts at."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from swath.shards.errors import InputError
from swath.shards.loader import Loader
from swath.shards.order import SampleOrder
from swath.shards.reader import Chips, ShardReader
from tests.shard_folders import make_shards


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    return ShardReader(make_shards(tmp_path_factory.mktemp("loader") / "shards", samples=23, per_shard=5, size=8))


def load(reader: ShardReader, count: int, **options: int) -> list[Chips]:
    """The first `count` micro-batches of 4 of global batches of 12."""
    order = SampleOrder(reader.shard_sizes, seed=3, window=7)
    return list(islice(Loader(reader, order, **({"global_batch": 12, "micro_batch": 4} | options)), count))


def same(a: list[Chips], b: list[Chips]) -> bool:
    fields = ("pixels", "size", "scale", "add", "id", "visit", "label")
    return len(a) == len(b) and all(torch.equal(getattr(x, f), getattr(y, f)) for x, y in zip(a, b, strict=True) for f in fields)


def test_batches_are_the_order(reader: ShardReader):
    numbers, visits = SampleOrder(reader.shard_sizes, seed=3, window=7).at(0, 60)
    batches = load(reader, 15, workers=0)
    assert torch.cat([b.id for b in batches]).tolist() == [int(reader.index.samples["id"][n]) for n in numbers]
    assert torch.cat([b.visit for b in batches]).tolist() == visits.tolist()
    assert torch.equal(torch.cat([b.pixels for b in batches])[17], torch.from_numpy(reader.pixels(int(numbers[17])).copy()))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_do_not_show(reader: ShardReader, workers: int):
    assert same(load(reader, 30, workers=workers), load(reader, 30, workers=0))


@pytest.mark.parametrize("step", [0, 1, 2, 5, 11])
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_skipping(reader: ShardReader, step: int, workers: int):
    whole = load(reader, 3 * (step + 4), workers=0)
    assert same(load(reader, 12, step=step, workers=workers), whole[3 * step :])


@pytest.mark.parametrize(("world", "micro"), [(1, 12), (1, 1), (2, 3), (3, 4), (4, 1), (6, 2), (12, 1)])
def test_ranks_together_are_one(reader: ShardReader, world: int, micro: int):
    """Step by step, over three epochs' ends."""
    alone = load(reader, 18, workers=0)
    steps = 6
    share = 12 // world // micro
    ranks = [load(reader, share * steps, rank=r, world_size=world, micro_batch=micro, workers=0) for r in range(world)]
    for step in range(steps):
        ids = torch.cat([b.id for rank in ranks for b in rank[share * step : share * (step + 1)]])
        assert torch.equal(ids, torch.cat([b.id for b in alone[3 * step : 3 * step + 3]]))


def test_damage_reaches_the_trainer_and_ends_the_threads(tmp_path: Path):
    folder = make_shards(tmp_path / "shards", samples=8, size=8)
    reader = ShardReader(folder)
    path = folder / "shard-000000.tar"
    raw = bytearray(path.read_bytes())
    raw[int(reader.index.members[5, 0]["offset"]) + 150] ^= 1
    path.write_bytes(raw)
    with pytest.raises(InputError, match="sample chip5 in shard"):
        load(ShardReader(folder), 10, workers=2)
