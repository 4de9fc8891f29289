"""The Triton kernels of axial attention, in the interpreter on a CPU, equal the reference in forward and gradients."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from swath.kernels.axial import axial_attention, op, reference
from swath.kernels.axial import triton as kernels
from swath.kernels.dispatch import interpreted, use

pytestmark = pytest.mark.skipif(not interpreted() and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU")
DEVICE = "cpu" if interpreted() else "cuda"

# (B, G, N, H, E): packed tiles, tiles with rows left over, whole tiles, and one place more than a tile or block holds
GRIDS = [(2, 13, 5, 3, 6), (1, 1, 7, 2, 17), (1, 37, 2, 2, 5), (2, 64, 1, 1, 16), (1, 65, 2, 1, 3), (1, 197, 1, 1, 12)]


def _qkv(grid: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(*grid[:3], 3, *grid[3:]).to(DEVICE, dtype).requires_grad_()


def _mask(kind: str, batch: int, length: int) -> Tensor | None:
    """Rows that see nothing and, in long masks, whole blocks that are empty."""
    if kind == "none":
        return None
    mask = torch.rand((length, length) if kind == "shared" else (batch, length, length)) < 0.5
    mask[..., 0, :] = False
    mask[..., :64, 64:] = False
    if kind == "each":
        mask[-1, 64:, :32] = False
    return mask.to(DEVICE)


def _compare(qkv: Tensor, axis: str, mask: Tensor | None, atol: float) -> None:
    q, k, v = qkv.unbind(3)
    grad = torch.randn(q.shape).to(qkv)
    with use(axial_attention="triton"):
        got = axial_attention(q, k, v, axis, mask=mask)
    expected = reference.axial_attention(q, k, v, axis, mask=mask)
    assert got.is_contiguous() and torch.allclose(got.float(), expected.float(), atol=atol)
    mine, theirs = torch.autograd.grad(got, qkv, grad)[0], torch.autograd.grad(expected, qkv, grad)[0]
    assert torch.allclose(mine.float(), theirs.float(), atol=2 * atol)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", ["none", "shared", "each"])
def test_spectral(grid: tuple[int, ...], kind: str) -> None:
    _compare(_qkv(grid), "spectral", _mask(kind, grid[0], grid[1]), 1e-5)


@pytest.mark.parametrize(("grid", "kind"), [((2, 3, 5, 2, 6), "none"), ((1, 2, 37, 1, 5), "each"), ((2, 1, 70, 1, 4), "each")])
def test_spatial(grid: tuple[int, ...], kind: str) -> None:
    _compare(_qkv(grid), "spatial", _mask(kind, grid[0], grid[2]), 1e-5)


@pytest.mark.parametrize("grid", [(2, 13, 5, 2, 6), (1, 70, 1, 1, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(grid: tuple[int, ...], dtype: torch.dtype) -> None:
    # outputs and gradients of up to about 4, rounded to 8 (11) bits, truncated by the interpreter: a unit in the last place
    _compare(_qkv(grid, dtype), "spectral", None, 4e-2 if dtype == torch.bfloat16 else 5e-3)


def test_a_long_unmasked_spatial_axis_is_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "forward", lambda *_: pytest.fail("the kernel was taken"))
    with use(axial_attention="triton"):
        axial_attention(*_qkv((1, 1, 128, 1, 4)).unbind(3), axis="spatial")
        axial_attention(*_qkv((1, 3, 2, 1, 256)).unbind(3), axis="spatial")


def test_a_gradient_of_stride_0() -> None:
    qkv = _qkv((1, 5, 3, 2, 4))
    with use(axial_attention="triton"):
        mine = torch.autograd.grad(axial_attention(*qkv.unbind(3), axis="spectral").sum(), qkv)[0]
    theirs = torch.autograd.grad(reference.axial_attention(*qkv.unbind(3), axis="spectral").sum(), qkv)[0]
    assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("length", [5, 66])
def test_opcheck(length: int) -> None:
    q, k, v = (x.detach().requires_grad_() for x in _qkv((1, length, 2, 1, 4)).unbind(3))
    torch.library.opcheck(op.attention_along, (q, k, v, _mask("shared", 1, length), None, 1))


def test_compile_and_export() -> None:
    class Layer(torch.nn.Module):
        def forward(self, qkv: Tensor) -> Tensor:
            return axial_attention(*qkv.unbind(3), axis="spectral")

    qkv = _qkv((2, 5, 3, 2, 4))
    with use(axial_attention="triton"):
        expected, grad = Layer()(qkv), torch.randn(2, 5, 3, 2, 4).to(DEVICE)
        compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")(qkv)
        assert torch.equal(compiled, expected)
        pair = (torch.autograd.grad(y, qkv, grad)[0] for y in (compiled, expected))
        assert torch.equal(*pair)
        plain = qkv.detach()
        exported = torch.export.export(Layer(), (plain,))
        assert "attention_along" in str(exported.graph) and torch.equal(exported.module()(plain), expected)


def test_autocast_and_empty() -> None:
    with use(axial_attention="triton"):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert axial_attention(*_qkv((1, 3, 2, 1, 4)).unbind(3), axis="spectral").dtype == torch.bfloat16
        for shape in ((0, 2, 3, 1, 4), (2, 0, 3, 1, 4), (2, 3, 0, 1, 4)):
            qkv = [torch.zeros(shape, device=DEVICE, requires_grad=True) for _ in range(3)]
            axial_attention(*qkv, axis="spectral").sum().backward()
            assert qkv[0].grad is not None and qkv[0].grad.shape == shape


def test_operations_are_counted() -> None:
    qkv = _qkv((1, 5, 2, 1, 4))
    with use(axial_attention="triton"), FlopCounterMode(display=False) as counter:
        axial_attention(*qkv.unbind(3), axis="spectral").sum().backward()
    assert counter.get_total_flops() == (4 + 10) * 5 * 5 * 2 * 4


def test_only_blocks_that_the_mask_leaves_are_visited() -> None:
    mask = torch.zeros(2, 70, 70, dtype=torch.bool)
    mask[0, :32, 40] = mask[0, 69, 0] = mask[1] = True
    lists, counts, line = kernels._lists(mask, {"MASKED": True, "ROWS": 32}, 70, transposed=False)
    assert line == 3 and counts.tolist() == [[1, 0, 1], [3, 3, 3]]
    assert lists[0, 0, 0] == 1 and lists[0, 2, 0] == 0 and lists[1, 0].tolist() == [0, 1, 2]
    lists, counts, _ = kernels._lists(mask, {"MASKED": True, "ROWS": 32}, 70, transposed=True)
    assert counts[0].tolist() == [1, 1, 0] and lists[0, 0, 0] == 2 and lists[0, 1, 0] == 0
