"""The Triton kernels of Kronecker attention, in the interpreter on a CPU, equal the reference in forward and gradients."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from swath.kernels.dispatch import interpreted, use
from swath.kernels.kronecker import fold, kronecker_attention, op, reference
from swath.kernels.kronecker import triton as kernels

pytestmark = pytest.mark.skipif(not interpreted() and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU")
DEVICE = "cpu" if interpreted() else "cuda"

# B, R, H, C, N, dc, ds, Dout: several tiles of channels, of positions and of the output, parts of s, ranks above 16
SHAPES = [
    (2, 8, 2, 5, 9, 2, 3, 7), (1, 3, 1, 13, 37, 3, 5, 20), (1, 17, 2, 3, 5, 8, 17, 70), (1, 1, 1, 1, 1, 1, 1, 1),
    (1, 2, 1, 2, 3, 33, 2, 5),
]  # fmt: skip


def _inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """qc, kc, vc, qs, ks, vs, weight, bias."""
    torch.manual_seed(0)
    b, r, h, c, n, dc, ds, width = shape
    branch = [s for length, d in ((c, dc), (n, ds)) for s in ((b, r, h, length, d), (b, r, h, length, d), (b, h, length, d))]
    made = [torch.randn(s) for s in (*branch, (width, h * dc * ds), (width,))]
    made[6] /= (r * h * dc * ds) ** 0.5
    return [x.to(DEVICE, dtype).requires_grad_() for x in made]


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference_with_gradients(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "plan", lambda *_: "product")
    inputs, mask = _inputs(shape), (torch.rand(shape[4], shape[4]) < 0.6).to(DEVICE)
    mask_c = (torch.rand(shape[0], shape[3], shape[3]) < 0.6).to(DEVICE)
    mask[0] = mask_c[:, 0] = False
    expected = reference.kronecker_attention(*inputs, mask=mask, mask_c=mask_c)
    grad = torch.randn(expected.shape).to(DEVICE)
    with use(kronecker_attention="triton"):
        got = kronecker_attention(*inputs, mask=mask, mask_c=mask_c)
        mine = torch.autograd.grad(got, inputs, grad)
    assert torch.allclose(got, expected, atol=1e-5)
    for one, other in zip(mine, torch.autograd.grad(expected, inputs, grad), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=2e-5)


def test_sums_are_split_over_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    oc, os, weight = torch.randn(2, 2, 1, 9, 2), torch.randn(2, 2, 1, 20, 3), torch.randn(5, 6)
    oc, os, weight = (x.to(DEVICE) for x in (oc, os, weight))
    grad = torch.randn(2, 9, 20, 5).to(DEVICE)
    expected = fold.backward(grad, oc, os, weight, "product")
    for programs in (1, 264):
        monkeypatch.setattr(kernels, "_PROGRAMS", programs)
        for one, other in zip(kernels.backward(grad, oc, os, weight), expected, strict=True):
            assert torch.allclose(one, other, atol=1e-4)
    assert kernels._splits(10, 1000) == (10, 1) and kernels._splits(10, 132) == (3, 4) and kernels._splits(2, 1) == (1, 2)


@pytest.mark.parametrize("way", ["positions", "channels"])
def test_folding_takes_the_branches_of_triton(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "plan", lambda *_: way)
    monkeypatch.setattr(kernels, "forward", lambda *_: pytest.fail("the product was formed"))
    inputs = _inputs((1, 2, 2, 3, 70, 4, 3, 5))
    near = torch.arange(70)
    mask = ((near[:, None] - near).abs() < 5).to(DEVICE)  # a perception field with empty blocks
    expected = reference.kronecker_attention(*inputs, mask=mask)
    with use(kronecker_attention="triton"):
        got = kronecker_attention(*inputs, mask=mask)
        mine = torch.autograd.grad(got.sum(), inputs)
    assert torch.allclose(got, expected, atol=1e-5)
    for one, other in zip(mine, torch.autograd.grad(expected.sum(), inputs), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=2e-5)


def test_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "plan", lambda *_: "product")
    inputs = _inputs((1, 3, 2, 5, 9, 2, 4, 6), torch.bfloat16)
    expected = reference.kronecker_attention(*inputs)
    with use(kronecker_attention="triton"):
        got = kronecker_attention(*inputs)
        mine = torch.autograd.grad(got.float().square().sum(), inputs)
    # bf16 has 8 bits, and the interpreter truncates to them: a hundredth of the whole
    assert got.dtype == torch.bfloat16 and (got - expected).float().norm() < 1e-2 * expected.float().norm()
    for one, other in zip(mine, torch.autograd.grad(expected.float().square().sum(), inputs), strict=True):
        assert (one - other).float().norm() < 3e-2 * other.float().norm()


def test_opcheck_and_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "plan", lambda *_: "product")
    inputs = _inputs((1, 2, 1, 2, 3, 2, 2, 3))
    torch.library.opcheck(op.kronecker_projection, (inputs[0], inputs[3], inputs[6], inputs[7], True))
    with use(kronecker_attention="triton"):
        compiled = torch.compile(kronecker_attention, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(*inputs), kronecker_attention(*inputs), atol=1e-6)


def test_empty() -> None:
    oc, os, weight = torch.zeros(0, 2, 1, 3, 2), torch.zeros(0, 2, 1, 4, 3), torch.zeros(5, 6)
    y = kernels.forward(oc, os, weight, None)
    assert y.shape == (0, 3, 4, 5) and (kernels.backward(y, oc, os, weight)[2] == 0).all()
