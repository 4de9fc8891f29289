"""Which implementation is taken, said, and warned of."""

import warnings

import pytest
import torch

import swath.kernels
from swath.kernels import dispatch
from swath.kernels.dispatch import OPERATORS, Implementation, Operator, everywhere, use

CPU = torch.device("cpu")


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> Operator:
    monkeypatch.setattr(dispatch, "OPERATORS", {})
    dispatch._found.cache_clear()
    return Operator(
        "made_up",
        Implementation("optional", lambda device: "not installed", automatic=False),
        Implementation("fast", lambda device: None if device == "cpu" else "it needs a CPU"),
        Implementation("plain", everywhere, slow=True),
    )


def test_the_fastest_that_runs_is_taken(operator: Operator) -> None:
    assert operator.choose(CPU) == "fast"
    assert operator.unavailable("cpu") == {"optional": "not installed"}


def test_falling_back_on_a_gpu_warns_once(operator: Operator) -> None:
    with pytest.warns(RuntimeWarning, match="made_up: taking the slow plain on cuda; fast: it needs a CPU"):
        assert operator.fastest("cuda") == "plain"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert operator.fastest("cuda") == "plain"
    assert operator.unavailable("cuda") == {"optional": "not installed", "fast": "it needs a CPU"}


def test_use_overrides_and_is_undone(operator: Operator) -> None:
    with use(made_up="plain"):
        assert operator.choose(CPU) == "plain"
        with use(made_up="optional"), pytest.raises(ValueError, match="optional cannot take a tensor on cpu: not installed"):
            operator.choose(CPU)
        assert operator.choose(CPU) == "plain"
    assert operator.choose(CPU) == "fast"


def test_every_operator_says_what_it_takes() -> None:
    line = dispatch.summary("cpu")
    assert all(f"{name} " in line for name in OPERATORS)
    public = [getattr(swath.kernels, name) for name in swath.kernels.__all__]
    assert all(callable(function) and function.__doc__ for function in public)
