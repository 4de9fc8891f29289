"""The Triton scan in the interpreter: equal to the reference, forward and every gradient. Small: a step takes milliseconds."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from swath.kernels.dispatch import use
from swath.kernels.scan import reference, selective_scan
from tests.kernels.test_scan import CASES, Given, canonical, compare, inputs, outcome

pytest.importorskip("triton")
launcher = importlib.import_module("swath.kernels.scan.triton")

SLOW = (
    "length 197", "64 states", "4 groups", "directions", "an order per direction", "directions apart", "packed backwards",
    "an order per sample", "an order per direction and sample",
)  # for the interpreter  # fmt: skip


def single(given: Given) -> Given:
    return {name: value.detach().float().requires_grad_() for name, value in given.items()}


def check(given: Given, options: dict[str, Any], share: float = 2e-6) -> None:
    """fp32 sums in another order: a few units in the last place of the largest value."""
    with use(selective_scan="triton"):
        got = outcome(selective_scan, given, **options)
    compare(got, outcome(reference.selective_scan, given, **options), share)


@pytest.mark.parametrize("name", [name for name in CASES if name not in SLOW])
def test_equals_the_reference(name: str) -> None:
    given, options = CASES[name]
    check(single(given), options)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_equals_the_reference_at_length(name: str) -> None:
    given, options = CASES[name]
    check(single(given), options)


@pytest.mark.parametrize(
    "name",
    ["length 37", "packed", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mask", "packed backwards", "directions apart"))],
)
def test_segments_of_long_sequences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_SHORTEST", 16)
    monkeypatch.setattr(launcher, "_ENOUGH", 64)
    given, options = CASES[name]
    given = single(given)
    x = canonical({n: given[n] for n in ("u", "delta", "A", "B", "C")}, cu_seqlens=options.get("cu_seqlens"))
    assert launcher._Call(x, True, False, True).segments > 1
    check(given, options)


def test_directions_of_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_ENOUGH", 1)
    given, options = CASES["an order per direction and sample"]
    check(single(given), options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precisions(dtype: torch.dtype) -> None:
    given = inputs(1, 9, 6, 4, 2, dtype=dtype)
    # rounded once, to a unit in the last place (the interpreter cuts bf16 off instead of rounding)
    check(given, {}, {torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype])


def test_indices_are_checked_where_contents_are() -> None:
    given = inputs(1, 9, 4, 3, dtype=torch.float32)
    with use(selective_scan="triton"), pytest.raises(ValueError, match="order must be in 0 … 8, but has 1 … 9"):
        selective_scan(**given, order=torch.arange(1, 10))


def test_bad_indices_read_nothing_out_of_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU without SWATH_CHECK=1: a place out of range is as if no token were there."""
    monkeypatch.setattr(launcher, "check_contents", lambda device: False)
    given = inputs(1, 5, 3, 2, without=("initial_state",), dtype=torch.float32)
    order = torch.tensor([0, 2**31 - 1, 1, -7, 2])
    with use(selective_scan="triton"):
        y = selective_scan(**given, order=order)
        packed = selective_scan(**given, cu_seqlens=torch.tensor([-4, 3, 99]))
    first = {n: v[:, :3] if n in ("u", "delta", "B", "C", "z") else v for n, v in given.items()}
    expected = reference.selective_scan(**first)
    assert isinstance(y, Tensor) and isinstance(packed, Tensor) and isinstance(expected, Tensor)
    assert torch.allclose(y[:, :3], expected, atol=1e-6) and torch.allclose(packed[:, :3], expected, atol=1e-6)
