"""Axial attention through torch equals its reference, and compiles, exports and refuses what does not fit."""

import pytest
import torch
from torch import Tensor

from swath.kernels.axial import axial_attention, reference
from swath.kernels.dispatch import use

GRIDS = [(2, 13, 5, 3, 6), (1, 1, 37, 2, 8), (1, 3, 196, 1, 5), (1, 197, 2, 2, 12), (2, 1, 1, 1, 1)]


def _qkv(grid: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, G, N, 3, H, E), the result of one projection."""
    torch.manual_seed(0)
    return torch.randn(*grid[:3], 3, *grid[3:], dtype=dtype, requires_grad=True)


def _mask(kind: str, batch: int, length: int) -> Tensor | None:
    if kind == "none":
        return None
    mask = torch.rand((length, length) if kind == "shared" else (batch, length, length)) < 0.5
    mask[..., 0, :] = False
    return mask


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("axis", ["spectral", "spatial"])
@pytest.mark.parametrize("kind", ["none", "shared", "each"])
def test_equals_the_reference_with_gradients(grid: tuple[int, ...], axis: str, kind: str) -> None:
    qkv, mask = _qkv(grid), _mask(kind, grid[0], grid[1 if axis == "spectral" else 2])
    grad = torch.randn(grid)
    got = axial_attention(*qkv.unbind(3), axis=axis, mask=mask, scale=0.3)
    expected = reference.axial_attention(*qkv.unbind(3), axis=axis, mask=mask, scale=0.3)
    assert got.is_contiguous() and torch.allclose(got, expected, atol=3e-6)
    mine, theirs = torch.autograd.grad(got, qkv, grad)[0], torch.autograd.grad(expected, qkv, grad)[0]
    assert torch.allclose(mine, theirs, atol=1e-5)
    if mask is not None:
        empty = got[:, 0] if axis == "spectral" else got[:, :, 0]
        assert (empty == 0).all(), "a row that sees nothing is 0"


def test_the_reference_is_attention_of_each_line() -> None:
    q, k, v = _qkv((2, 4, 3, 2, 5), torch.float64).unbind(3)
    spectral, spatial = (reference.axial_attention(q, k, v, axis) for axis in ("spectral", "spatial"))
    for b, g, n, h in ((0, 0, 0, 0), (1, 3, 2, 1), (1, 0, 1, 1)):
        share = (k[b, :, n, h] @ q[b, g, n, h] * 5**-0.5).softmax(0)
        assert torch.allclose(spectral[b, g, n, h], share @ v[b, :, n, h])
        share = (k[b, g, :, h] @ q[b, g, n, h] * 5**-0.5).softmax(0)
        assert torch.allclose(spatial[b, g, n, h], share @ v[b, g, :, h])


@pytest.mark.parametrize("axis", ["spectral", "spatial"])
def test_gradcheck_of_the_reference(axis: str) -> None:
    qkv = _qkv((2, 3, 4, 1, 2), torch.float64)
    mask = _mask("each", 2, 3 if axis == "spectral" else 4)
    assert torch.autograd.gradcheck(lambda x: reference.axial_attention(*x.unbind(3), axis=axis, mask=mask), qkv)


def test_bf16_and_autocast() -> None:
    qkv = _qkv((2, 13, 5, 3, 6))
    exact = reference.axial_attention(*qkv.bfloat16().float().unbind(3), axis="spectral")
    # bf16 has 8 bits: shares and results of up to about 2 are rounded to 2^-8 of themselves
    assert torch.allclose(axial_attention(*qkv.bfloat16().unbind(3), axis="spectral").float(), exact, atol=2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, k, v = qkv.unbind(3)
        mixed = axial_attention(q, k.bfloat16(), v, "spectral")
    assert mixed.dtype == torch.bfloat16 and torch.allclose(mixed.float(), exact, atol=2e-2)


def test_compile_and_export() -> None:
    qkv = _qkv((2, 5, 7, 2, 8))

    class Layer(torch.nn.Module):
        def forward(self, qkv: Tensor) -> Tensor:
            return axial_attention(*qkv.unbind(3), axis="spectral") + axial_attention(*qkv.unbind(3), axis="spatial")

    plain = qkv.detach()
    assert torch.allclose(torch.compile(Layer(), fullgraph=True, backend="aot_eager")(qkv), Layer()(qkv), atol=1e-6)
    assert torch.allclose(torch.export.export(Layer(), (plain,)).module()(plain), Layer()(plain), atol=1e-6)


def test_empty() -> None:
    for shape in ((0, 2, 3, 2, 4), (2, 0, 3, 2, 4), (2, 3, 0, 2, 4)):
        for axis in ("spectral", "spatial"):
            assert axial_attention(*[torch.zeros(shape)] * 3, axis=axis).shape == shape


def test_a_constant_stays() -> None:
    q = torch.randn(1, 7, 5, 2, 4)
    for axis in ("spectral", "spatial"):
        assert torch.allclose(axial_attention(q, q, torch.full_like(q, 3), axis), torch.full_like(q, 3))


def test_errors_name_the_argument() -> None:
    q = torch.zeros(2, 3, 4, 1, 5)
    fine = {"q": q, "k": q, "v": q, "axis": "spectral"}
    for wrong, words in (
        ({"axis": "time"}, 'axis must be "spectral" or "spatial"'),
        ({"q": q[0]}, r"q must be .* \(3, 4, 1, 5\)"),
        ({"k": q[:, :2]}, r"k must be as q, \(2, 3, 4, 1, 5\), not \(2, 2, 4, 1, 5\)"),
        ({"v": q.double()}, "v is torch.float64, q is torch.float32"),
        ({"mask": torch.ones(4, 4, dtype=torch.bool)}, r"mask must be bool, \(\[2,\] 3, 3\).*\(4, 4\)"),
        ({"mask": torch.ones(4, 4, dtype=torch.uint8), "axis": "spatial"}, "mask must be bool"),
        ({"k": q.to("meta")}, "k is on meta, q is on cpu"),
    ):
        with pytest.raises(ValueError, match=words):
            axial_attention(**{**fine, **wrong})  # pyright: ignore[reportArgumentType]


def test_the_reference_can_be_asked_for() -> None:
    qkv = _qkv((1, 3, 2, 1, 4))
    with use(axial_attention="reference"):
        got = axial_attention(*qkv.unbind(3), axis="spatial")
    assert torch.equal(got, reference.axial_attention(*qkv.unbind(3), axis="spatial"))
