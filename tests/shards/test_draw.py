"""Draws (DESIGN §2.4): uniform, uncorrelated, a function of the key alone, and the same for ever."""

import pytest
import torch
from torch import Tensor

from swath.shards.draw import Draw, hashes, mix, signed
from swath.shards.identity import hash_text

FROZEN_BITS = [
    [14702584, 5229655, 9122506, 279242],
    [5930662, 2184993, 7282992, 10431440],
    [12062915, 15802539, 12652201, 14790815],
]
FROZEN_ORDER = [[3, 1, 4, 2, 5, 0], [1, 5, 0, 2, 3, 4], [4, 0, 2, 3, 1, 5]]
FROZEN_CHOICES = [[3, 1, 5, 2], [5, 1, 2, 3], [2, 3, 5, 0]]
FROZEN_HASH = 3209235871285955162
FROZEN_HASHES = [-2222122128065639655, -6320822026524817567, -4823899994970671521]


def make(seed: int, ids: list[int] | Tensor, visits: list[int] | Tensor | None = None) -> Draw:
    ids = torch.as_tensor(ids)
    return Draw(seed, ids, torch.zeros_like(ids) if visits is None else torch.as_tensor(visits))


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.double().flatten(), b.double().flatten()]))[0, 1].item()


@pytest.mark.parametrize("seed", [0, 1, 2**63, -1])
def test_uniforms_are_uniform(seed: int):
    values = make(seed, torch.arange(1000)).uniform("mask", 1000).double()
    assert 0 <= values.min() < 1e-4 < 1 - 1e-4 < values.max() < 1
    assert values.mean().item() == pytest.approx(0.5, abs=5 * (1 / 12e6) ** 0.5)
    assert values.var().item() == pytest.approx(1 / 12, abs=5 * (1 / 180e6) ** 0.5)
    counts = torch.histc(values, 256, 0, 1)
    chi2 = ((counts - 1e6 / 256) ** 2 / (1e6 / 256)).sum().item()
    assert 150 < chi2 < 370  # 255 degrees of freedom: five standard deviations


def test_neighbours_in_any_part_of_the_key_are_uncorrelated():
    ids = torch.arange(400)
    base = make(7, ids).uniform("mask", 500)
    others = {
        "stream": make(7, ids).uniform("masl", 500),
        "seed": make(8, ids).uniform("mask", 500),
        "visit": make(7, ids, torch.ones(400, dtype=torch.int64)).uniform("mask", 500),
        "id": make(7, ids + 1).uniform("mask", 500)[:, torch.randperm(500, generator=torch.Generator().manual_seed(0))],
        "swapped": make(0, torch.full((400,), 7), ids).uniform("mask", 500),
    }
    for name, other in others.items():
        assert abs(correlation(base, other)) < 5 / (400 * 500) ** 0.5, name
    assert abs(correlation(base[:-1], base[1:])) < 5 / (400 * 500) ** 0.5
    assert abs(correlation(base[:, :-1], base[:, 1:])) < 5 / (400 * 500) ** 0.5


def test_draws_do_not_depend_on_the_batch():
    ids, visits = torch.tensor([3, -9, 2**62, 0, 5]), torch.tensor([0, 1, 2, 3, 4])
    whole = Draw(3, ids, visits)
    for rows in ([0], [4, 2], [1, 1, 3]):
        part = Draw(3, ids[rows], visits[rows])
        assert torch.equal(part.uniform("crop", 9), whole.uniform("crop", 9)[rows])
        assert torch.equal(part.order("crop", 9), whole.order("crop", 9)[rows])
    assert torch.equal(whole.uniform("crop", 4), whole.uniform("crop", 9)[:, :4])


def test_order_is_a_permutation_and_each_is_as_likely():
    order = make(1, torch.arange(6000)).order("mask", 4)
    assert torch.equal(order.sort(1).values, torch.arange(4).expand(6000, 4))
    codes = (order * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)[1]
    assert len(codes) == 24
    assert codes.min() > 170
    assert codes.max() < 330
    long = make(1, [5]).order("mask", 5000)
    assert sorted(long[0].tolist()) == list(range(5000))


def choose(scores: list[float], k: int, samples: int = 20_000) -> Tensor:
    return make(2, torch.arange(samples)).choose("patch", torch.tensor(scores).expand(samples, -1), k)


def test_choices_are_different_and_follow_the_scores():
    """The first is i with odds p_i, the second then j with odds p_j / (1 - p_i): without replacement."""
    odds = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    chosen = choose([10, 6, 3, 1], 2)
    assert chosen.dtype == torch.int64 and (chosen[:, 0] != chosen[:, 1]).all()
    seen = torch.zeros(4, 4, dtype=torch.float64).index_put((chosen[:, 0], chosen[:, 1]), torch.tensor(1.0).double(), True)
    expected = len(chosen) * odds[:, None] * odds / (1 - odds[:, None])
    expected.fill_diagonal_(0)
    assert ((seen - expected).abs() <= 5 * expected.sqrt()).all(), (seen, expected)


def test_choices_from_equal_scores_are_orders():
    every = choose([0.25] * 4, 4, 6000)
    assert torch.equal(every.sort(1).values, torch.arange(4).expand(6000, 4))
    counts = (every * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 170 and counts.max() < 330


@pytest.mark.parametrize("nothing", [0.0, -1.0, float("nan"), float("-inf")])
def test_what_has_no_score_is_chosen_last(nothing: float):
    """However small the others' scores are; and among each other every order is as likely."""
    chosen = choose([nothing, 1e-30, nothing, 1e30, nothing], 5, 6000)
    assert (chosen[:, :2] % 2 == 1).all() and (chosen[:, 2:] % 2 == 0).all()
    assert (chosen[:, 0] == 3).float().mean() > 0.999
    last = chosen[:, 2:].mul(torch.tensor([25, 5, 1])).sum(1).unique(return_counts=True)[1]
    assert len(last) == 6 and last.min() > 1000 - 5 * 29 and last.max() < 1000 + 5 * 29  # sqrt(6000 · 1/6 · 5/6) = 29
    only = choose([nothing, nothing], 1, 100)
    assert set(only.flatten().tolist()) == {0, 1}


def test_choices_do_not_depend_on_the_batch_nor_on_how_many_are_made():
    ids = torch.arange(5)
    scores = torch.rand(5, 9, generator=torch.Generator().manual_seed(0))
    whole = make(3, ids).choose("crop", scores, 9)
    for rows in ([0], [4, 2], [1, 1, 3]):
        assert torch.equal(make(3, ids[rows]).choose("crop", scores[rows], 9), whole[rows])
    assert torch.equal(make(3, ids).choose("crop", scores, 4), whole[:, :4])
    assert torch.equal(make(3, ids).choose("crop", scores * 0.125, 9), whole), "scores are odds, whatever they add up to"
    assert make(3, ids).choose("crop", scores, 0).shape == (5, 0)
    assert torch.equal(make(3, ids).choose("crop", torch.ones(5, 1), 1), torch.zeros(5, 1, dtype=torch.int64))
    assert not torch.equal(make(3, ids).choose("mask", scores, 9), whole)


def test_the_stream_never_changes():
    draw = Draw(42, torch.tensor([0, 1, -1]), torch.tensor([0, 7, 2**40]))
    bits = (draw.uniform("mask", 4) * 2**24).long().tolist()
    assert bits == FROZEN_BITS
    assert draw.order("mask", 6).tolist() == FROZEN_ORDER
    assert draw.choose("mask", torch.tensor([[1.0, 2, 3, 4, 0, 6]]).expand(3, -1), 4).tolist() == FROZEN_CHOICES
    assert hash_text("EuroSAT", "Forest_1") == FROZEN_HASH
    assert hashes(3, "shards/0", 5, 3).tolist() == FROZEN_HASHES


def test_mix_is_splitmix64():
    """First outputs of the published generator with seed 0, which adds the golden ratio before each."""
    assert [int(mix(torch.tensor(signed(n * 0x9E3779B97F4A7C15)))) & (1 << 64) - 1 for n in range(3)] == [
        0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F,
    ]  # fmt: skip


def test_hashes_are_one_line_however_cut():
    assert torch.equal(hashes(3, "s", 0, 20)[5:9], hashes(3, "s", 5, 4))
    assert hash_text("ab", "c") != hash_text("a", "bc")
