"""The linear operator equals its reference, forward and every gradient, and works under compile, export and autocast."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from swath.kernels.linear import Linear, cpu, linear, reference

SHAPES = [((64,), 5, 7), ((2, 37), 48, 33), ((3, 1, 197), 32, 96), ((8, 196), 200, 1)]
needs_onednn = pytest.mark.skipif(not cpu.AVAILABLE, reason="this torch has no oneDNN linear operator")


@needs_onednn
@pytest.mark.parametrize(("rows", "k", "n"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_reference_with_gradients(rows: tuple[int, ...], k: int, n: int, bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(*rows, k, requires_grad=True), torch.randn(n, k, requires_grad=True)
    b = torch.randn(n, requires_grad=True) if bias else None
    inputs = [x, weight] + ([b] if b is not None else [])
    grad = torch.randn(*rows, n)
    got, expected = cpu.linear_cpu(x, weight, b), reference.linear(x, weight, b)
    # fp32 sums of k or of all rows in another order: a few units in the last place of the largest terms
    assert torch.allclose(got, expected, rtol=1e-5, atol=2e-5)
    pairs = zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True)
    for mine, theirs in pairs:
        assert mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=1e-5, atol=2e-4)


@needs_onednn
def test_slices_and_transposes_of_weights_and_inputs() -> None:
    weight = torch.randn(96, 32, requires_grad=True)
    x = torch.randn(32, 80, requires_grad=True)
    got = cpu.linear_cpu(x.t(), weight[32:], None)
    got.sum().backward()
    assert x.grad is not None and weight.grad is not None
    assert torch.allclose(got, x.t() @ weight[32:].t(), atol=1e-5) and (weight.grad[:32] == 0).all()
    assert torch.allclose(x.grad, weight[32:].sum(dim=0)[:, None].expand(-1, 80), atol=1e-4)


@needs_onednn
def test_opcheck() -> None:
    args = (torch.randn(70, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True), torch.randn(6, requires_grad=True))
    torch.library.opcheck(cpu.linear_cpu, args)


@needs_onednn
def test_who_takes_which(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("swath.kernels.linear.linear_cpu", lambda *a: calls.append("fast") or reference.linear(*a))
    layer, x = Linear(8, 8), torch.randn(100, 8)
    layer(x)
    assert calls == ["fast"]
    with torch.no_grad():
        layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer.double()(x.double())
    Linear(8, 8)(x[:3])
    assert calls == ["fast"], "inference, autocast, other dtypes and a few rows take the reference"


@needs_onednn
def test_compile_and_export() -> None:
    layer, x = Linear(16, 24), torch.randn(80, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), layer(x), atol=1e-5)
    assert torch.allclose(torch.export.export(layer, (x,)).module()(x), layer(x), atol=1e-5)


@needs_onednn
def test_operations_are_counted() -> None:
    x, layer = torch.randn(100, 8, requires_grad=True), Linear(8, 6)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 100 * 8 * 6


def test_empty_input() -> None:
    assert linear(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0, 3)
