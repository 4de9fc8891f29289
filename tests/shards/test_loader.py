"""The loader delivers the order, whatever the workers, the ranks, the micro-batch and the step that it starts at."""

import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from swath.shards.bands import Band
from swath.shards.draw import Draw, mix
from swath.shards.errors import InputError
from swath.shards.loader import Loader, MicroBatch
from swath.shards.mixture import Mixture
from swath.shards.order import SampleOrder
from swath.shards.reader import Chips, ShardReader
from tests.shard_folders import make_shards

DEADLINE = 60  # seconds; a busy machine takes its time to start processes


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    return ShardReader(make_shards(tmp_path_factory.mktemp("loader") / "shards", samples=23, per_shard=5, size=8))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[ShardReader]:
    """Thirteen optical bands, seven, and two of radar."""
    folder = tmp_path_factory.mktemp("three")
    made = []
    for bands, samples in ((13, 48), (7, 26), (2, 22)):
        names = tuple(Band(name=f"b{n}") for n in range(bands))
        made.append(ShardReader(make_shards(folder / str(bands), samples=samples, per_shard=7, size=4, bands=names)))
    return made


def load(reader: ShardReader, count: int, **options: Any) -> list[Chips]:
    """The first `count` micro-batches of 4 of global batches of 12."""
    order = SampleOrder(reader.shard_sizes, seed=3, window=7)
    loader = Loader(reader, order, **{"global_batch": 12, "micro_batch": 4, **options})
    return [chips for _, chips in islice(loader, count)]


def tensors_of(chips: Chips) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(tensor)
        return tensor

    chips.each(keep)
    return tensors


def same(a: list[Chips], b: list[Chips]) -> bool:
    """Bit for bit, every tensor; NaN (unknown metadata) equals NaN."""
    pairs = [(s, t) for x, y in zip(a, b, strict=True) for s, t in zip(tensors_of(x), tensors_of(y), strict=True)]
    return all(s.dtype == t.dtype and np.array_equal(s.numpy(), t.numpy(), equal_nan=True) for s, t in pairs)


class Numbers:
    """Stands in for a reader where only the order counts: a batch of it is the sample numbers."""

    def __init__(self, sizes: list[int], work: Any = None) -> None:
        self.sizes, self.work = sizes, work
        self.manifest = SimpleNamespace(shards=[SimpleNamespace(name=f"{n}.tar") for n in range(len(sizes))])

    def __len__(self) -> int:
        return sum(self.sizes)

    def chips(self, numbers: np.ndarray, visits: np.ndarray) -> Chips:
        if self.work is not None:
            self.work(numbers)
        return Chips({}, id=mix(torch.from_numpy(numbers)), visit=torch.from_numpy(visits), label=torch.from_numpy(numbers))


def run(readers: Any, stream: Any, first: int, last: int, **options: Any) -> list[tuple[int, list[int], list[int]]]:
    """(data set, numbers, visits) of each global batch first .. last - 1, put together from all ranks."""
    world, micro, batch = options.get("world_size", 1), options["micro_batch"], options["global_batch"]
    per_step = batch // world // micro
    ranks = [
        list(islice(Loader(readers, stream, rank=rank, step=first, **options), per_step * (last - first)))
        for rank in range(world)
    ]
    made = []
    for step in range(last - first):
        parts = [part for rank in ranks for part in rank[step * per_step : (step + 1) * per_step]]
        assert len({part.source for part in parts}) == 1
        assert {len(part.chips.id) for part in parts} == {micro}
        numbers = torch.cat([part.chips.label for part in parts]).tolist()
        made.append((parts[0].source, numbers, torch.cat([part.chips.visit for part in parts]).tolist()))
    return made


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("swath-decode")]


def threads_end() -> bool:
    until = time.monotonic() + DEADLINE
    while threads() and time.monotonic() < until:
        time.sleep(0.005)
    return not threads()


def test_batches_are_the_order(reader: ShardReader):
    numbers, visits = SampleOrder(reader.shard_sizes, seed=3, window=7).at(0, 60)
    batches = load(reader, 15, workers=0)
    assert torch.cat([b.id for b in batches]).tolist() == [int(reader.index.samples["id"][n]) for n in numbers]
    assert torch.cat([b.visit for b in batches]).tolist() == visits.tolist()
    pixels = torch.cat([b.stored["image"].pixels for b in batches])
    assert torch.equal(pixels[17], torch.from_numpy(reader.pixels(int(numbers[17])).copy()))


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("depth", [None, 0, 1, 9])
def test_workers_do_not_show(reader: ShardReader, workers: int, depth: int | None):
    assert same(load(reader, 30, workers=workers, depth=depth), load(reader, 30, workers=0))
    assert threads_end()


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


@pytest.mark.parametrize("shuffle", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 6))])
def test_a_run_may_be_cut_and_continued_at_will(shuffle: int):
    """Each of 30 runs stops twice and goes on with other ranks, workers and micro-batches: the samples, their visits and the
    draws of each are those of the order, once each."""
    chance = random.Random(shuffle)
    for _ in range(30):
        sizes = chance.choice([[1], [37], [197], [1] * 23, [197, 1, 37], [37] * 12])
        total, global_batch = sum(sizes), chance.choice([12, 24])
        order = SampleOrder(
            sizes,
            seed=chance.randrange(1 << 40),
            window=chance.choice([5, 37, 65536]),
            lanes=min(total, chance.choice([1, 1, 2, 5])),
        )
        first = chance.choice([0, 3, 1000, 10**7])
        marks = [first, first + chance.randint(1, 4), first + chance.randint(5, 8), first + chance.randint(9, 12)]
        made = []
        for start, stop in pairwise(marks):
            world = chance.choice([1, 2, 3, 4, 6, 12])
            micro = chance.choice([n for n in range(1, global_batch // world + 1) if global_batch // world % n == 0])
            workers = chance.choice([0, 0, 1, 2, 3])
            fresh = SampleOrder(sizes, seed=order.seed, window=order.window, lanes=order.lanes)
            options = {"global_batch": global_batch, "micro_batch": micro, "world_size": world, "workers": workers}
            made += run([Numbers(sizes)], fresh, start, stop, **options)
        numbers = np.concatenate([n for _, n, _ in made])
        visits = np.concatenate([v for _, _, v in made])
        for step, (_, taken, _) in enumerate(made, start=first):  # each global batch is its positions, once each
            assert Counter(taken) == Counter(order.at(step * global_batch, global_batch)[0].tolist())
        whole, seen = order.find(np.concatenate([order.batch(s * global_batch, global_batch) for s in range(first, marks[-1])]))
        assert np.array_equal(numbers, whole) and np.array_equal(visits, seen)
        if order.lanes == 1:
            assert np.array_equal(numbers, order.at(first * global_batch, len(numbers))[0])
        ours, theirs = (
            Draw(9, mix(torch.from_numpy(n)), torch.from_numpy(v)).uniform("crop", 4)
            for n, v in ((numbers, visits), (whole, seen))
        )
        assert torch.equal(ours, theirs)
    assert threads_end()


def test_draws_belong_to_the_sample_and_its_visit():
    """Drawn rank by rank at three world sizes, the values of a (sample, visit) are the same bits."""
    order = SampleOrder([37, 1, 9], seed=1, window=11)
    drawn: list[dict[tuple[int, int], tuple[float, ...]]] = []
    for world, micro in ((1, 12), (2, 3), (6, 1)):
        values = {}
        for rank in range(world):
            options = {"global_batch": 12, "micro_batch": micro, "world_size": world, "rank": rank, "workers": 0}
            for _, chips in islice(Loader([Numbers([37, 1, 9])], order, **options), 12 // world // micro * 12):  # type: ignore[arg-type]
                rows = Draw(5, chips.id, chips.visit).uniform("mask", 3).tolist()
                values |= {(int(i), int(v)): tuple(row) for i, v, row in zip(chips.id, chips.visit, rows, strict=True)}
        drawn.append(values)
    assert drawn[0] == drawn[1] == drawn[2]
    assert len(drawn[0]) == 144


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("step", [0, 5, 11])
def test_three_sensors_in_one_run(three: list[ShardReader], world: int, step: int):
    """All ranks come to the same data set at the same step; an epoch of 12 batches holds each by its samples."""
    orders = [SampleOrder(r.shard_sizes, seed=4, window=9) for r in three]
    loaders = [
        iter(Loader(three, Mixture(orders), global_batch=8, micro_batch=2, rank=rank, world_size=world, step=step, workers=2))
        for rank in range(world)
    ]
    told, taken = [], [[0] * len(r) for r in three]
    for _ in range(step, 12):
        steps: list[MicroBatch] = [next(loader) for loader in loaders for _ in range(4 // world)]
        (source,) = {s for s, _ in steps}
        assert all(chips.stored["image"].pixels.shape == (2, (13, 7, 2)[source], 4, 4) for _, chips in steps)
        numbers = {int(i): n for n, i in enumerate(three[source].index.samples["id"])}
        for _, chips in steps:
            for i in chips.id.tolist():
                taken[source][numbers[i]] += 1
        told.append(source)
    for loader in loaders:
        loader.close()  # type: ignore[attr-defined]
    assert not threads()
    assert told == [Mixture(orders).batch(b, 8)[0] for b in range(step, 12)]
    if step == 0:
        assert Counter(told) == {0: 6, 1: 3, 2: 3}
        assert taken[0] == [1] * 48  # six batches of 8: every sample once
        assert [sum(t) for t in taken] == [48, 24, 24]


@pytest.mark.parametrize("shuffle", range(3))
def test_mixtures_may_be_cut_and_continued_at_will(shuffle: int):
    chance = random.Random(shuffle)
    for _ in range(25):
        sizes = [[chance.choice([1, 5, 37, 197]) for _ in range(chance.randint(1, 4))] for _ in range(3)]
        weights = chance.choice([None, [1, 1, 1], [5, 2, 0.5]])
        seed = chance.randrange(1 << 30)

        def stream(sizes: list[list[int]] = sizes, seed: int = seed, weights: Any = weights) -> Mixture:
            return Mixture([SampleOrder(s, seed=seed, window=16) for s in sizes], weights)

        readers = [Numbers(s) for s in sizes]
        whole = run(readers, stream(), 0, 40, global_batch=12, micro_batch=12, workers=0)
        cuts = [0, *sorted(chance.sample(range(1, 40), 2)), 40]
        made = []
        for start, stop in pairwise(cuts):
            world = chance.choice([1, 2, 4])
            options = {
                "global_batch": 12,
                "micro_batch": chance.choice([1, 3]),
                "world_size": world,
                "workers": chance.choice([0, 2]),
            }
            made += run(readers, stream(), start, stop, **options)
        assert made == whole


def test_orders_must_be_those_of_the_readers(three: list[ShardReader]):
    orders = [SampleOrder(r.shard_sizes, seed=4) for r in three]
    with pytest.raises(ValueError, match="not those of the readers"):
        Loader(three[:2], Mixture(orders), global_batch=8, micro_batch=8)
    with pytest.raises(ValueError, match="not those of the readers"):
        Loader(three[0], orders[1], global_batch=8, micro_batch=8)


def test_no_more_than_depth_is_decoded_ahead():
    started: list[int] = []
    reader: Any = Numbers([64], work=lambda numbers: started.append(len(numbers)))
    loader = iter(Loader([reader], SampleOrder([64], seed=0), global_batch=4, micro_batch=4, workers=3, depth=5))
    for taken in range(1, 9):
        next(loader)
        time.sleep(0.01)
        assert len(started) <= taken + 5
    loader.close()  # type: ignore[attr-defined]
    assert not threads()


def test_shards_are_announced_before_they_are_needed():
    """Of this rank only, in the order of need, `ahead` steps before, also over the end of an epoch."""
    sizes = [[5] * 8, [3] * 4]
    stream = Mixture([SampleOrder(s, seed=2, window=10) for s in sizes], [2, 1])
    told: list[tuple[int, list[str]]] = []
    options: dict[str, Any] = {"global_batch": 4, "micro_batch": 2, "world_size": 2, "rank": 1, "workers": 0}
    loader = Loader(
        [Numbers(s) for s in sizes],  # type: ignore[arg-type]
        stream, **options, step=7, ahead=3, upcoming=lambda source, names: told.append((source, names)),
    )  # fmt: skip
    for step, (source, chips) in enumerate(islice(loader, 40), start=7):
        assert len(told) == step - 7 + 4
        owner = np.repeat(np.arange(len(sizes[source])), sizes[source])
        needed = [f"{s}.tar" for s in dict.fromkeys(owner[chips.label.numpy()].tolist())]
        assert told[step - 7] == (source, needed)


def test_batches_are_pinned_in_the_workers(reader: ShardReader, monkeypatch: pytest.MonkeyPatch):
    """Every tensor of a batch, and off the trainer's thread. Stands in for a GPU, without which nothing can be pinned."""
    pinned: list[tuple[int, str]] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append((tensor.data_ptr(), threading.current_thread().name))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    chips = load(reader, 1, workers=1, depth=0, pin=True)[0]
    assert {t.data_ptr() for t in tensors_of(chips)} == {p for p, _ in pinned}
    assert all(name.startswith("swath-decode") for _, name in pinned)
    pinned.clear()
    load(reader, 1, workers=1)
    assert not pinned


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_lie_in_page_locked_memory(reader: ShardReader):
    plain, locked = load(reader, 4), load(reader, 4, pin=True)
    assert same(plain, locked)
    assert all(c.id.is_pinned() and c.stored["image"].pixels.is_pinned() for c in locked)


def test_damage_reaches_the_trainer_and_ends_the_threads(tmp_path: Path):
    folder = make_shards(tmp_path / "shards", samples=8, size=8)
    reader = ShardReader(folder)
    path = folder / "shard-000000.tar"
    raw = bytearray(path.read_bytes())
    raw[int(reader.index.members[5, 0]["offset"]) + 150] ^= 1
    path.write_bytes(raw)
    with pytest.raises(InputError, match="sample chip5 in shard"):
        load(ShardReader(folder), 10, workers=2)
    assert threads_end()


def test_an_error_waits_for_nobody():
    """The micro-batches before it arrive, it comes in its place, and a thread that still reads does not delay it."""
    order, held = SampleOrder([64], seed=0), threading.Event()
    bad, stuck = (order.at(4 * place, 1)[0][0] for place in (3, 4))

    def work(numbers: np.ndarray) -> None:
        if numbers[0] == bad:
            raise InputError("sample x is damaged")
        if numbers[0] == stuck:
            held.wait(DEADLINE)

    reader: Any = Numbers([64], work)
    loader = iter(Loader([reader], order, global_batch=4, micro_batch=4, workers=2))
    assert [next(loader).chips.label[0] for _ in range(3)] == [order.at(4 * p, 1)[0][0] for p in range(3)]
    start = time.monotonic()
    with pytest.raises(InputError, match="sample x is damaged"):
        next(loader)
    assert time.monotonic() - start < DEADLINE / 2
    held.set()
    assert threads_end()


@pytest.mark.parametrize("how", ["close", "forget", "break"])
def test_no_thread_is_left(reader: ShardReader, how: str):
    order = SampleOrder(reader.shard_sizes, seed=3)
    for _ in range(3):
        loader = iter(Loader(reader, order, global_batch=4, micro_batch=4, workers=3))
        next(loader)
        assert threads()
        if how == "close":
            loader.close()  # type: ignore[attr-defined]
        elif how == "break":
            for _ in loader:
                break
        del loader
        assert not threads()


INTERRUPTED = """
import sys, time
from tests.shards.test_loader import Loader, Numbers, SampleOrder
reader = Numbers([64], work=lambda numbers: time.sleep(0.3))
for micro_batch in Loader([reader], SampleOrder([64], seed=0), global_batch=4, micro_batch=4, workers=2):
    print("running", flush=True)
"""


def test_ctrl_c_ends_a_run_with_workers():
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode != 0
    assert errors.rstrip().endswith("KeyboardInterrupt")
