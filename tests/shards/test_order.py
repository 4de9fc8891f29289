"""The sample order (DESIGN §2.3) is one stream: permutations per epoch, and nobody's share of it depends on the cutting."""

import hashlib
import random

import numpy as np
import pytest

from swath.shards.errors import InputError
from swath.shards.order import SampleOrder, cut

SIZES = [7, 1, 19, 30, 4, 25, 11]  # 97 samples, a prime
FROZEN = [0, 4, 1, 3, 2, 8, 6, 5, 9, 7, 6, 8, 7, 9, 0, 1, 5, 3, 4, 2]
AWKWARD = [[1], [37], [197], [1] * 50, [197, 1, 37], [37] * 30, SIZES]


def samples(order: SampleOrder, first: int, count: int) -> list[int]:
    return order.at(first, count)[0].tolist()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("window", [1, 2, 10, 97, 65536])
@pytest.mark.parametrize("lanes", [1, 2, 5, 97])
def test_each_epoch_is_a_permutation(seed: int, window: int, lanes: int):
    order = SampleOrder(SIZES, seed=seed, window=window, lanes=lanes)
    seen = []
    for epoch in range(3):
        numbers, visits = order.at(97 * epoch, 97)
        assert sorted(numbers.tolist()) == list(range(97))
        assert (visits == epoch).all()
        seen.append(tuple(numbers.tolist()))
    if window > 1:
        assert len(set(seen)) == 3


@pytest.mark.parametrize("shuffle", range(3))
def test_union_over_ranks_is_the_order(shuffle: int):
    """For any world size, micro-batch and position, the ranks' slices are the stream, in order, once each."""
    chance = random.Random(shuffle)
    for _ in range(150):
        world, micro, steps = chance.randint(1, 12), chance.randint(1, 7), chance.randint(1, 4)
        order = SampleOrder(
            chance.choice([SIZES, [5], [1] * 23]),
            seed=chance.randrange(1 << 40),
            window=chance.randint(1, 50),
            lanes=chance.randint(1, 5),
        )
        global_batch = world * micro * steps
        batch = chance.randrange(0, 200)
        whole = samples(order, batch * global_batch, global_batch)
        assert cut(global_batch, world, micro) == (micro, steps)
        together = []
        for rank in range(world):
            for step in range(steps):
                together += samples(order, batch * global_batch + rank * micro * steps + step * micro, micro)
        assert together == whole


def test_a_position_means_the_same_however_it_is_reached():
    chance = random.Random(0)
    order = SampleOrder(SIZES, seed=5, window=13, lanes=3)
    whole = samples(order, 0, 1000)
    for _ in range(200):
        first = chance.randrange(900)
        count = chance.randint(1, 100)
        fresh = SampleOrder(SIZES, seed=5, window=13, lanes=3)
        assert samples(fresh, first, count) == whole[first : first + count]
        assert samples(order, first, count) == whole[first : first + count]
    visits = order.at(0, 1000)[1]
    assert visits.tolist() == [p // 97 for p in range(1000)]


@pytest.mark.parametrize("window", [1, 8, 32])
def test_windows_hold_their_stretch_of_the_shuffled_shards(window: int):
    """What one window needs lies in neighbouring shards: samples leave their place by less than a window."""
    order = SampleOrder([16] * 12, seed=1, window=window)
    shards: list[int] = []
    for first in range(0, 192, window):
        numbers = samples(order, first, window)
        touched = {n // 16 for n in numbers}
        assert len(touched) <= max(1, window // 16)
        shards += [s for s in dict.fromkeys(n // 16 for n in sorted(numbers)) if s not in shards]
    assert sorted(shards) == list(range(12))
    if window > 1:
        assert samples(order, 0, window) != sorted(samples(order, 0, window))


@pytest.mark.parametrize("lanes", [2, 3, 4, 8])
def test_global_batches_take_equal_shares_of_the_lanes(lanes: int):
    order = SampleOrder([16] * 12, seed=1, window=16, lanes=lanes)
    line = [0] * 192  # the lane of each sample, from the first epoch
    for position, number in enumerate(samples(order, 0, 192)):
        line[number] = position % lanes
    for first in range(0, 192 - 30, 7):
        counts = np.bincount([line[n] for n in samples(order, first, 30)], minlength=lanes)
        assert counts.max() - counts.min() <= 1
    shards = [{n // 16 for n in range(192) if line[n] == lane} for lane in range(lanes)]
    assert sum(len(s) for s in shards) <= 12 + lanes - 1  # lanes share at most the shards at their borders


def test_seeds_and_epochs_give_different_orders_and_these_never_change():
    order = SampleOrder([6, 4], seed=0, window=5)
    assert samples(order, 0, 20) == FROZEN
    assert samples(SampleOrder([6, 4], seed=1, window=5), 0, 20) != FROZEN
    hundred = SampleOrder([100], seed=0)
    moved = np.array(samples(hundred, 0, 100)) - np.array(samples(hundred, 100, 100))
    assert (moved == 0).sum() < 10


@pytest.mark.parametrize(
    ("sizes", "options", "first", "digest"),
    [
        ([100] * 10, {"seed": 0}, 0, "6aae3fd9fc6191e7"),
        ([100] * 10, {"seed": 0}, 10**9 + 7, "b3268828d41e40d5"),
        ([197, 1, 37], {"seed": 7, "window": 16}, 0, "60d67c4fa3a756d1"),
        ([197, 1, 37], {"seed": 7, "window": 16}, 10**9 + 7, "4b223af52a8de8d3"),
        ([37] * 30, {"seed": 12345678901, "window": 100, "lanes": 4}, 0, "5e1194e27e0a3e2e"),
        ([37] * 30, {"seed": 12345678901, "window": 100, "lanes": 4}, 10**9 + 7, "cefa3e3f2fc3a148"),
        ([1] * 50, {"seed": 3, "window": 7, "lanes": 3}, 0, "0381ed736b9c4cee"),
    ],
)
def test_orders_that_runs_were_trained_with(sizes: list[int], options: dict[str, int], first: int, digest: str):
    """A changed digest means that no stored run can be continued."""
    numbers, visits = SampleOrder(sizes, **options).at(first, 3000)
    raw = numbers.astype("<i8").tobytes() + visits.astype("<i8").tobytes()
    assert hashlib.sha256(raw).hexdigest()[:16] == digest


@pytest.mark.parametrize("shuffle", range(4))
def test_epochs_are_permutations_for_any_setting(shuffle: int):
    chance = random.Random(shuffle)
    for _ in range(60):
        sizes = chance.choice([*AWKWARD, [chance.choice([1, 2, 37, 197]) for _ in range(chance.randint(1, 9))]])
        total = sum(sizes)
        order = SampleOrder(
            sizes,
            seed=chance.randrange(1 << 64),
            window=chance.choice([1, 3, 37, 197, 65536]),
            lanes=min(total, chance.randint(1, 9)),
        )
        epoch = chance.choice([0, 1, 2, 1000, 10**6])
        numbers, visits = order.at(epoch * total, total)
        assert np.array_equal(np.sort(numbers), np.arange(total)) and (visits == epoch).all()
        scattered = np.array([chance.randrange(3 * total) for _ in range(20)])
        found = order.find(scattered)[0].tolist()
        assert found == [samples(order, p, 1)[0] for p in scattered.tolist()]


@pytest.mark.parametrize("shuffle", range(3))
def test_a_batch_is_its_positions_lane_by_lane(shuffle: int):
    chance = random.Random(shuffle)
    for _ in range(100):
        order = SampleOrder(chance.choice(AWKWARD), seed=0, window=8)
        order = SampleOrder(order.sizes.tolist(), seed=0, window=8, lanes=min(order.samples, chance.randint(1, 6)))
        first, count = chance.randrange(10**6), chance.randint(1, 300)
        positions = order.batch(first, count)
        assert sorted(positions.tolist()) == list(range(first, first + count))
        lanes = positions % order.samples % order.lanes
        assert (np.diff(lanes) >= 0).all()
        assert (np.diff(positions)[np.diff(lanes) == 0] > 0).all()


@pytest.mark.parametrize(("lanes", "nodes"), [(2, 2), (4, 2), (4, 4), (8, 2)])
def test_a_node_touches_only_the_shards_of_its_lanes(lanes: int, nodes: int):
    """In an epoch each node reads its part of the shards, and those at the borders of its lanes."""
    order = SampleOrder([16] * 64, seed=2, window=64, lanes=lanes)
    for epoch in range(2):
        touched: list[set[int]] = [set() for _ in range(nodes)]
        for first in range(0, 1024, 32):
            positions = order.batch(epoch * 1024 + first, 32)
            for node, share in enumerate(np.split(positions, nodes)):
                touched[node] |= set(order.shards(order.find(share)[0]))
        assert max(len(t) for t in touched) <= 64 // nodes + lanes // nodes
        assert len(set.union(*touched)) == 64


def test_shards_are_named_in_the_order_of_need():
    chance = random.Random(0)
    for sizes in AWKWARD:
        order = SampleOrder(sizes, seed=1, window=13)
        owner = np.repeat(np.arange(len(sizes)), sizes)
        for _ in range(20):
            numbers, _ = order.at(chance.randrange(1000), chance.randint(1, 60))
            assert order.shards(numbers) == list(dict.fromkeys(owner[numbers].tolist()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 3, None), "train.global_batch 10 does not divide by world size 3; 9 or 12 would"),
        ((2, 3, None), "does not divide by world size 3; 3 would"),
        ((24, 2, 5), "train.micro_batch 5 does not divide .* = 12; sizes that fit: 1, 2, 3, 4, 6, 12"),
        ((24, 2, 0), "sizes that fit"),
        ((24, 2, 24), "sizes that fit"),
    ],
)
def test_cut_refuses_with_the_sizes_that_fit(arguments: tuple[int, int, int | None], message: str):
    with pytest.raises(InputError, match=message):
        cut(*arguments)


def test_cut_takes_whatever_divides():
    for world in range(1, 9):
        for micro in range(1, 9):
            for steps in range(1, 4):
                assert cut(world * micro * steps, world, micro) == (micro, steps)
    assert cut(24, 2, None) == (12, 1)


@pytest.mark.parametrize(("lanes", "nodes", "fits"), [(6, 4, "1, 4, 8"), (2, 3, "1, 3"), (9, 2, "1, 8, 10")])
def test_lanes_divide_among_nodes(lanes: int, nodes: int, fits: str):
    with pytest.raises(InputError, match=f"data.lanes {lanes} does not divide by {nodes} nodes; sizes that fit: {fits}$"):
        cut(24, 12, None, lanes=lanes, nodes=nodes)
    assert cut(24, 12, None, lanes=2 * nodes, nodes=nodes) == (2, 1)
    assert cut(24, 12, None, lanes=1, nodes=nodes) == (2, 1)


@pytest.mark.parametrize("options", [{"window": 0}, {"lanes": 0}, {"lanes": 98}])
def test_impossible_orders(options: dict[str, int]):
    with pytest.raises(InputError, match="must be at least 1"):
        SampleOrder(SIZES, seed=0, **options)
    with pytest.raises(InputError, match="no samples"):
        SampleOrder([], seed=0)
