"""Patch embedding: every way equals the reference and a convolution, with all gradients, also compiled and under autocast."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from swath.kernels.dispatch import use
from swath.kernels.embed import OPERATOR, reference, visible_patch_embedding
from swath.kernels.embed.reference import patches

# (batch, bands, height, width), (p, q), width of the token, kept patches or None for all
SHAPES = [
    ((1, 1, 3, 5), (3, 5), 1, None),
    ((2, 3, 12, 20), (4, 4), 20, 5),
    ((3, 13, 8, 8), (4, 4), 33, 3),
    ((2, 5, 37, 8), (1, 4), 40, 37),
    ((1, 2, 28, 28), (2, 2), 7, 196),
    ((1, 1, 197, 2), (1, 2), 3, 197),
    ((2, 2, 8, 8), (2, 2), 6, 0),
    ((0, 2, 8, 8), (2, 2), 6, 3),
]


def inputs(
    images: tuple[int, ...], patch: tuple[int, int], width: int, kept: int | None, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any, Any, Any]:
    """(images, weight, bias, index or None)"""
    torch.manual_seed(0)
    x = torch.randn(images, dtype=dtype, requires_grad=True)
    weight = torch.randn(width, images[1], *patch, dtype=dtype, requires_grad=True)
    bias = torch.randn(width, dtype=dtype, requires_grad=True)
    places = (images[2] // patch[0]) * (images[3] // patch[1])
    # with repetitions, whose gradients add
    index = None if kept is None else torch.randint(places, (images[0], kept))
    return x, weight, bias, index


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_equals_the_reference_with_gradients(shape: tuple) -> None:
    x, weight, bias, index = inputs(*shape)
    got = visible_patch_embedding(x, weight, bias, index)
    expected = reference.visible_patch_embedding(x, weight, bias, index)
    assert got.shape == expected.shape and OPERATOR.choose(got.device) == "cpu"
    grad, tensors = torch.randn_like(expected), (x, weight, bias)
    # fp32 sums in another order: a few units in the last place of the largest terms
    assert torch.allclose(got, expected, rtol=1e-5, atol=2e-5)
    for mine, theirs in zip(torch.autograd.grad(got, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=5e-5)


def test_reference_is_a_convolution_whose_stride_is_its_kernel() -> None:
    x, weight, bias, index = inputs((2, 3, 12, 10), (4, 5), 7, 4)
    everywhere = F.conv2d(x, weight, bias, stride=(4, 5)).flatten(2).transpose(1, 2)
    kept = everywhere.gather(1, index[..., None].expand(-1, -1, 7))
    assert torch.allclose(reference.visible_patch_embedding(x, weight, bias), everywhere, atol=1e-5)
    assert torch.allclose(reference.visible_patch_embedding(x, weight, bias, index), kept, atol=1e-5)
    assert torch.allclose(reference.visible_patch_embedding(x, weight, None, index), kept - bias, atol=1e-5)


def test_patches_are_counted_in_raster_order() -> None:
    images = torch.randn(2, 3, 24, 32)
    picked = patches(images, (8, 8), torch.tensor([[3], [11]]))
    assert torch.equal(picked[0, 0], images[0, :, :8, 24:]) and torch.equal(picked[1, 0], images[1, :, 16:, 24:])


def test_gradcheck_of_the_reference() -> None:
    x, weight, bias, index = inputs((2, 2, 4, 6), (2, 3), 3, 3, torch.float64)
    assert torch.autograd.gradcheck(reference.visible_patch_embedding, (x, weight, bias, index))
    assert torch.autograd.gradcheck(reference.visible_patch_embedding, (x, weight, bias))


def test_images_of_any_strides() -> None:
    x, weight, bias, index = inputs((2, 3, 16, 16), (4, 4), 8, 5)
    last = x.detach().contiguous(memory_format=torch.channels_last)
    cut = torch.randn(2, 5, 20, 24)[:, 1:4, 2:18, 3:19]
    for images in (last, cut):
        got = visible_patch_embedding(images, weight, bias, index)
        assert torch.allclose(got, visible_patch_embedding(images.contiguous(), weight, bias, index), atol=1e-5)


@pytest.mark.parametrize("kept", [None, 40])
def test_compile_and_export(kept: int | None) -> None:
    x, weight, bias, index = inputs((2, 3, 32, 40), (4, 4), 24, kept)
    x, weight, bias = x.detach(), weight.detach(), bias.detach()

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, index: Tensor | None) -> Tensor:
            return visible_patch_embedding(x, weight, bias, index)

    expected = Layer()(x, index)
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, index), expected, atol=1e-4)
    assert torch.allclose(torch.export.export(Layer(), (x, index)).module()(x, index), expected, atol=1e-4)


def test_autocast_follows_linear() -> None:
    x, weight, bias, index = inputs((2, 3, 16, 16), (4, 4), 8, 5)
    expected = visible_patch_embedding(x, weight, bias, index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = visible_patch_embedding(x, weight, bias, index)
    assert got.dtype == torch.bfloat16
    got.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    # inputs and result keep 8 bits; sums of 48 terms of size 1
    assert torch.allclose(got.float(), expected, rtol=0.02, atol=0.1)


def test_what_does_not_fit_is_refused() -> None:
    x, weight, bias, index = inputs((2, 3, 8, 8), (4, 4), 6, 2)
    for arguments, message in [
        ((x[0], weight), r"images must be \(B, C, H, W\) .* not \(3, 8, 8\) and \(6, 3, 4, 4\)"),
        ((x[:, :2], weight), r"not \(2, 2, 8, 8\) and \(6, 3, 4, 4\)"),
        ((x[:, :, :7], weight), r"images of \(2, 3, 7, 8\) are not divisible into the patches of weight \(6, 3, 4, 4\)"),
        ((x.long(), weight), "must be floating point, not torch.int64"),
        ((x.double(), weight), "images are torch.float64, weight is torch.float32"),
        ((x, weight, bias[:5]), r"bias must be \(6,\) .* not \(5,\)"),
        ((x, weight, bias.double()), "bias must be .* torch.float64"),
        ((x, weight, bias, index[:1]), r"index must be \(2, K\) int64 .* not \(1, 2\)"),
        ((x, weight, bias, index.int()), "torch.int32"),
        ((x, weight, bias, index + 3), r"index holds 3 … \d; the raster has places 0 … 3"),
        ((x, weight, bias, index - 4), "index holds -"),
        ((x, weight, bias.to("meta")), "bias is on meta, images are on cpu"),
    ]:
        with pytest.raises(ValueError, match=message):
            visible_patch_embedding(*arguments)


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with use(visible_patch_embedding="triton"), pytest.raises(ValueError, match="cannot take a tensor on cpu"):
        visible_patch_embedding(*inputs((1, 1, 4, 4), (2, 2), 3, 2))


def test_only_kept_patches_cost_operations() -> None:
    x, weight, bias, index = inputs((2, 3, 32, 32), (4, 4), 8, 40)
    with FlopCounterMode(display=False) as counter:
        visible_patch_embedding(x.detach(), weight, bias, index)
    assert counter.get_total_flops() == 2 * 2 * 40 * 48 * 8
