"""Health measures against constructions with known answers; warnings for a collapse, silence for a healthy run."""

import pytest
import torch

from swath.pretrain.health import effective_rank, measure, warnings


def test_effective_rank_counts_directions() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 64)).Q
    rows = torch.randn(4096, 5) @ basis[:5]
    assert effective_rank(rows - rows.mean(dim=0)) == pytest.approx(5, rel=0.01)
    assert effective_rank(torch.zeros(10, 4)) == 0


def test_positional_share() -> None:
    torch.manual_seed(0)
    place, content = torch.randn(1, 16, 8).expand(64, -1, -1), torch.randn(64, 16, 8)
    assert measure(content[:, 0], place)["positional"] == pytest.approx(1, abs=1e-5)
    assert measure(content[:, 0], content)["positional"] < 0.1
    half = measure(content[:, 0], place / place.std() + content / content.std())["positional"]
    assert half == pytest.approx(0.5, abs=0.1)


def healthy(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    return measure(torch.randn(256, 32), torch.randn(256, 16, 32))


def collapsed(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    one = torch.randn(32)
    return measure(one + 1e-3 * torch.randn(256, 32), one * torch.randn(256, 16, 1) + 1e-3 * torch.randn(256, 16, 32))


def test_collapse_is_told_the_second_time() -> None:
    first = healthy(0)
    assert warnings([first, collapsed(1)]) == []
    assert warnings([first, healthy(1), collapsed(2)]) == []
    signs = warnings([first, collapsed(1), collapsed(2)])
    assert any("deviation of pooled" in s for s in signs) and any("rank of tokens" in s for s in signs)


def test_health_is_silent() -> None:
    assert warnings([healthy(n) for n in range(5)]) == []


def test_a_rank_that_dips_and_climbs_is_no_sign() -> None:
    """The ranks of a healthy run on synthetic scenes: 97 at initialisation, then 33, 41, 54."""
    rows = [{**healthy(0), "tokens_rank": rank} for rank in (96.9, 33.0, 41.1, 53.7, 55.9)]
    assert all(warnings(rows[: n + 1]) == [] for n in range(len(rows)))
    stuck = [{**healthy(0), "tokens_rank": rank} for rank in (96.9, 33.0, 33.1, 33.0)]
    assert warnings(stuck[:3]) and warnings(stuck)


def test_position_alone() -> None:
    torch.manual_seed(0)
    place = torch.randn(1, 16, 32).expand(256, -1, -1)
    rows = [healthy(0), *(measure(torch.randn(256, 32), place + 0.05 * torch.randn(256, 16, 32)) for _ in range(2))]
    assert any("position alone" in sign for sign in warnings(rows))


@pytest.mark.parametrize("kind", ["constant", "one sample twice"])
def test_degenerate_features_are_measured(kind: str) -> None:
    rows = torch.ones(8, 4) if kind == "constant" else torch.randn(1, 4).repeat(8, 1)
    got = measure(rows, rows[:, None].expand(-1, 3, -1))
    assert all(value == value for value in got.values()), got  # none is NaN
