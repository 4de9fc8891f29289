"""The causal convolution: implementations equal the reference with all gradients, and the reference a plain loop."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swath.kernels.conv import causal_conv1d, reference
from swath.kernels.dispatch import use

Given = dict[str, Any]  # tensors by argument


def inputs(
    batch: int, length: int, width: int, taps: int = 4, directions: int | None = None, *, shared: bool = True, bias: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Given:  # fmt: skip
    torch.manual_seed(0)
    lead = () if directions is None else (directions,)
    given = {
        "x": torch.randn(*(() if shared else lead), batch, length, width, dtype=torch.float64),
        "weight": torch.randn(*lead, width, taps, dtype=torch.float64),
    }
    if bias:
        given["bias"] = torch.randn(*lead, width, dtype=torch.float64)
    return {name: value.to(dtype).requires_grad_() for name, value in given.items()}


def outcome(way: Callable[..., Any], given: Given, **options: Any) -> dict[str, Tensor]:
    y = way(**given, **options)
    torch.manual_seed(1)
    grads = torch.autograd.grad((y * torch.randn(y.shape, dtype=torch.float64).to(y.dtype)).sum(), list(given.values()))
    return {"y": y.detach()} | {f"grad of {name}": grad for name, grad in zip(given, grads, strict=True)}


def compare(got: dict[str, Tensor], expected: dict[str, Tensor], share: float) -> None:
    for name, value in expected.items():
        assert got[name].shape == value.shape and got[name].dtype == value.dtype, name
        worst = (got[name].double() - value.double()).abs().max().item()
        assert worst <= share * max(1.0, value.double().abs().max().item()), f"{name}: off by {worst:.2e}"


def orders(*shape: int, length: int) -> Tensor:
    return torch.rand(*shape, length).argsort(dim=-1)


_packing = torch.tensor([0, 2, 2, 19, 37])
_within = torch.cat([first + torch.randperm(n) for first, n in ((0, 2), (2, 17), (19, 18))])
CASES: dict[str, tuple[Given, dict[str, Any]]] = {
    "one token": (inputs(1, 1, 1), {}),
    "shorter than the window": (inputs(2, 3, 5), {}),
    "plain": (inputs(2, 37, 70), {}),
    "no bias, no activation": (inputs(2, 37, 5, 3, bias=False), {"activation": None}),
    "one tap": (inputs(2, 9, 5, 1), {}),
    "reverse": (inputs(2, 37, 5), {"reverse": True}),
    "one order": (inputs(2, 37, 5), {"order": orders(length=37).int()}),
    "plain orders": (inputs(2, 37, 5, 4, 2), {"order": torch.stack([torch.arange(37), torch.arange(37).flip(0)])}),
    "plain orders of one token": (inputs(2, 1, 5, 4, 2), {"order": torch.zeros(2, 1, dtype=torch.int64)}),
    "an order per sample": (inputs(3, 37, 5), {"order": orders(3, length=37), "reverse": True}),
    "mask": (inputs(3, 37, 5), {"mask": torch.rand(3, 37) > 0.5}),
    "nothing present": (inputs(2, 9, 5), {"mask": torch.zeros(2, 9, dtype=torch.bool)}),
    "directions": (inputs(2, 37, 5, 4, 3), {}),
    "directions apart": (inputs(2, 37, 5, 4, 2, shared=False), {"order": orders(2, length=37)}),
    "directions backwards": (inputs(2, 37, 5, 4, 2), {"reverse": True}),
    "an order per direction and sample": (
        inputs(3, 37, 5, 4, 2), {"order": orders(2, 3, length=37), "mask": torch.rand(3, 37) > 0.5}
    ),
    "packed": (inputs(1, 37, 5), {"cu_seqlens": _packing}),
    "packed in order": (
        inputs(1, 37, 5, 4, 2), {"cu_seqlens": _packing.int(), "order": _within, "mask": torch.rand(1, 37) > 0.4, "reverse": True}
    ),
}  # fmt: skip


def by_hand(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor, mask: Tensor, ends: list[int], reverse: bool) -> Tensor:
    """One sample (L, D), one step after the other."""
    y = torch.zeros_like(x)
    steps = [list(range(a, b)) for a, b in pairwise(ends)]
    for sequence in steps:
        window: list[Tensor] = []
        for step in reversed(sequence) if reverse else sequence:
            place = int(order[step])
            if not mask[place]:
                continue
            window = [*window, x[place]][-weight.shape[1] :]
            taps = weight[:, -len(window) :]
            y[place] = F.silu(sum(token * taps[:, i] for i, token in enumerate(window)) + bias)
    return y


@pytest.mark.parametrize("reverse", [False, True])
def test_the_reference_is_a_plain_loop(reverse: bool) -> None:
    given = inputs(1, 37, 5)
    mask = torch.rand(1, 37) > 0.4
    got = reference.causal_conv1d(**given, order=_within, mask=mask, cu_seqlens=_packing, reverse=reverse)
    expected = by_hand(given["x"][0], given["weight"], given["bias"], _within, mask[0], _packing.tolist(), reverse)
    assert torch.allclose(got[0], expected, atol=1e-13)


def test_the_plain_case_is_a_convolution() -> None:
    given = inputs(2, 37, 5)
    padded = F.pad(given["x"].transpose(1, 2), (3, 0))
    expected = F.silu(F.conv1d(padded, given["weight"][:, None], given["bias"], groups=5)).transpose(1, 2)
    for way in (causal_conv1d, reference.causal_conv1d):
        assert torch.allclose(way(**given), expected, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_cpu_equals_the_reference(name: str) -> None:
    given, options = CASES[name]
    # float64, so that what differs is the order of sums only
    compare(outcome(causal_conv1d, given, **options), outcome(reference.causal_conv1d, given, **options), 1e-13)


@pytest.mark.parametrize("name", CASES)
def test_triton_equals_the_reference(name: str) -> None:
    pytest.importorskip("triton")
    given, options = CASES[name]
    given = {name: value.detach().float().requires_grad_() for name, value in given.items()}
    with use(causal_conv1d="triton"):
        got = outcome(causal_conv1d, given, **options)
    compare(got, outcome(reference.causal_conv1d, given, **options), 2e-6)  # fp32 sums in another order


@pytest.mark.parametrize("implementation", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precisions(implementation: str, dtype: torch.dtype) -> None:
    if implementation == "triton":
        pytest.importorskip("triton")
    given = inputs(2, 37, 5, dtype=dtype)
    with use(causal_conv1d=implementation):
        got = outcome(causal_conv1d, given)
    # rounded once, to a unit in the last place (the interpreter cuts bf16 off instead of rounding)
    compare(got, outcome(reference.causal_conv1d, given), {torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype])


def test_gradcheck_of_the_reference() -> None:
    given = inputs(2, 7, 3, 4, 2)
    options: dict[str, Any] = {"order": orders(2, length=7), "mask": torch.rand(2, 7) > 0.3}

    def function(*values: Tensor) -> Tensor:
        return reference.causal_conv1d(**dict(zip(given, values, strict=True)), **options)

    assert torch.autograd.gradcheck(function, tuple(given.values()))


def test_what_is_masked_is_not_looked_at() -> None:
    mask = torch.rand(2, 30) > 0.5
    given = inputs(2, 30, 6)
    poisoned = given | {"x": torch.where(mask[..., None], given["x"].detach(), float("nan")).requires_grad_()}
    for implementation in ("cpu", "reference"):
        with use(causal_conv1d=implementation):
            expected = outcome(causal_conv1d, given, mask=mask)
            compare(outcome(causal_conv1d, poisoned, mask=mask), expected, 0.0)
            assert (expected["y"][~mask] == 0).all() and (expected["grad of x"][~mask] == 0).all()


def test_empty_input() -> None:
    for shape in ((0, 5), (2, 0)):
        given = inputs(*shape, 6)
        choices: list[dict[str, Any]] = [{}, {"order": torch.arange(shape[1])}, {"mask": torch.ones(shape, dtype=torch.bool)}]
        for options in choices:
            y = causal_conv1d(**given, **options)
            (grad,) = torch.autograd.grad(y.sum(), [given["weight"]])
            assert y.shape == (*shape, 6) and (grad == 0).all()


def test_opcheck() -> None:
    from swath.kernels.conv.op import conv

    given = inputs(2, 9, 6, 4, 2, dtype=torch.float32)
    tables = [t.int() for t in reference.neighbours(orders(2, 2, length=9), 4, torch.rand(2, 9) > 0.4, None)]
    torch.library.opcheck(conv, (given["x"][None], given["weight"], given["bias"], *tables, True, False))
    torch.library.opcheck(conv, (given["x"][None], given["weight"], None, None, None, False, True))


def test_compile_export_and_autocast() -> None:
    given = inputs(2, 16, 6, 4, 2, dtype=torch.float32)
    order, mask = orders(2, length=16), torch.rand(2, 16) > 0.3

    class Conv(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return causal_conv1d(x, weight, bias, order=order, mask=mask)

    compiled = torch.compile(Conv(), fullgraph=True, backend="aot_eager")
    compare(outcome(compiled, given), outcome(causal_conv1d, given, order=order, mask=mask), 1e-6)
    plain: Given = {name: value.detach() for name, value in given.items()}
    program = torch.export.export(Conv(), (), plain)
    assert torch.allclose(program.module()(**plain), Conv()(**plain))
    assert any("swath.causal_conv1d" in str(node.target) for node in program.graph.nodes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Conv()(**plain).dtype == torch.float32, "each input keeps its dtype"


GOOD = inputs(2, 9, 4)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "x of another width": ({"x": torch.zeros(2, 9, 5)}, r"x must be \(B, L, 4\) where weight is \(4, 4\), not \(2, 9, 5\)"),
    "x without batch": ({"x": torch.zeros(9, 4)}, "x must be"),
    "weight": ({"weight": torch.zeros(4)}, r"weight must be \(D, W\)"),
    "bias": ({"bias": torch.zeros(3)}, r"bias must be \(4,\)"),
    "activation": ({"activation": "gelu"}, "activation must be 'silu' or None"),
    "an integer x": ({"x": torch.zeros(2, 9, 4, dtype=torch.int64)}, "x must be floating point"),
    "another device": ({"bias": torch.zeros(4, device="meta")}, "bias is on meta, x on cpu"),
    "order": ({"order": torch.arange(8)}, r"order must be \(9,\) or \(2, 9\), not \(8,\)"),
    "order out of range": ({"order": torch.arange(1, 10)}, "order must be in 0 … 8"),
    "mask": ({"mask": torch.ones(2, 9)}, "mask must be bool"),
    "packing": ({"cu_seqlens": torch.tensor([0, 9])}, "packs sequences into a batch of 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    wrong, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**GOOD | wrong)
