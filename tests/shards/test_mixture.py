"""A mixture is a pure function of (seed, batch): exact over every cycle, without replay, the same for all ranks."""

import itertools
import random
import time
from collections import Counter
from fractions import Fraction

import pytest

from swath.shards import mixture as module
from swath.shards.errors import InputError
from swath.shards.mixture import Mixture
from swath.shards.order import SampleOrder

FROZEN = [0, 0, 0, 0, 1, 1, 2, 0, 1, 0, 0, 1]


def orders(*samples: int, seed: int = 0) -> list[SampleOrder]:
    return [SampleOrder([n], seed=seed, window=64) for n in samples]


def sources(mixture: Mixture, first: int, count: int, global_batch: int) -> list[int]:
    return [mixture.batch(b, global_batch)[0] for b in range(first, first + count)]


def test_one_data_set_is_the_plain_case():
    mixture = Mixture(orders(97))
    for number in [*range(50), 10**12]:
        assert mixture.batch(number, 12) == (0, 12 * number)


@pytest.mark.parametrize("samples", [(1000, 1000), (1300, 700, 200), (1, 1000), (37, 197, 1), (12, 12), (5, 5, 5, 5)])
@pytest.mark.parametrize("global_batch", [1, 8, 12])
def test_by_default_an_epoch_holds_each_data_set_by_its_samples(samples: tuple[int, ...], global_batch: int):
    """To less than one batch at the end of each of five cycles."""
    mixture, total = Mixture(orders(*samples)), sum(samples)
    length = mixture.cycle_length(global_batch)
    epoch = max(1, total // global_batch)
    assert length % epoch == 0
    if min(samples) >= total / epoch:
        assert length == epoch
    seen: Counter[int] = Counter()
    for cycle in range(5):
        held = Counter(sources(mixture, cycle * length, length, global_batch))
        assert all(held[source] >= 1 for source in range(len(samples)))
        seen += held
        for source, count in enumerate(samples):
            assert abs(seen[source] - Fraction(count, total) * length * (cycle + 1)) < 1


def test_any_weights_are_exact_and_positions_run_on():
    """Against counting: each data set's position is the number of its earlier batches; nothing is skipped or repeated."""
    chance = random.Random(0)
    for _ in range(60):
        sizes = [chance.choice([1, 37, 197, 500, 1000]) for _ in range(chance.randint(1, 5))]
        weights = [chance.choice([1, 2, 0.5, 0.1, 0.07, 3.3]) for _ in sizes]
        mixture, global_batch = Mixture(orders(*sizes, seed=chance.randrange(1 << 40)), weights), chance.choice([1, 5, 24])
        length = mixture.cycle_length(global_batch)
        seen = [0] * len(sizes)
        for number in range(3 * length):
            source, first = mixture.batch(number, global_batch)
            assert first == seen[source] * global_batch
            seen[source] += 1
            if (number + 1) % length == 0:
                total = sum(Fraction(str(w)) for w in weights)
                for count, weight in zip(seen, weights, strict=True):
                    assert abs(count - Fraction(str(weight)) / total * (number + 1)) < 1


def test_no_batch_depends_on_how_it_is_reached():
    mixture = Mixture(orders(1300, 700, 200))
    whole = [mixture.batch(b, 8) for b in range(1000)]
    chance = random.Random(1)
    for _ in range(50):
        number = chance.randrange(1000)
        assert Mixture(orders(1300, 700, 200)).batch(number, 8) == whole[number]
        assert mixture.batch(number, 8) == whole[number]


def test_seeds_and_cycles_differ_and_never_change():
    mixture = Mixture(orders(70, 40, 10))
    assert sources(mixture, 0, 12, 10) == FROZEN
    assert sources(mixture, 12, 12, 10) != FROZEN
    assert sources(Mixture(orders(70, 40, 10, seed=1)), 0, 12, 10) != FROZEN


def test_data_sets_are_interleaved():
    """No long run of one: of 2,000 batches, half of each, the longest is near log2(2000)."""
    told = sources(Mixture(orders(1000, 1000)), 0, 2000, 1)
    longest = run = 1
    for a, b in itertools.pairwise(told):
        run = run + 1 if a == b else 1
        longest = max(longest, run)
    assert longest < 25


def test_long_epochs_are_cut_into_equal_cycles(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LONGEST", 100)
    mixture = Mixture(orders(1500, 500))
    assert mixture.cycle_length(1) == 100
    assert mixture.cycle_length(8) == 83  # an epoch of 250 batches in three
    assert Counter(sources(mixture, 0, 2000, 1)) == {0: 1500, 1: 500}


def test_far_into_a_run_nothing_is_replayed():
    start = time.perf_counter()
    big = [SampleOrder([10_000] * n, seed=0) for n in (7000, 2500, 500)]
    mixture = Mixture(big)
    source, first = mixture.batch(10**9, 256)
    assert time.perf_counter() - start < 1
    share = big[source].samples / mixture.samples
    assert first / 256 == pytest.approx(1e9 * share, abs=mixture.cycle_length(256) * share)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 2], "2 weights for 3 data sets; give one weight for each"),
        ([1, 0, 1], "the weight of data set 2 is 0; weights are positive numbers"),
        ([1, 1, -0.5], "the weight of data set 3 is -0.5"),
        ([float("nan"), 1, 1], "the weight of data set 1 is nan"),
        ([1, float("inf"), 1], "the weight of data set 2 is inf"),
        ([1, 1e-7, 1], "the weight of data set 2, 1e-07, is less than 1/262144 of all weights together"),
    ],
)
def test_impossible_weights(weights: list[float], message: str):
    with pytest.raises(InputError, match=message):
        Mixture(orders(10, 10, 10), weights)
