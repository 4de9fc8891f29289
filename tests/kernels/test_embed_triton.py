"""The Triton embedding in Triton's interpreter: equal to the reference with all gradients, and never out of bounds."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from swath.kernels.dispatch import interpreted, use
from swath.kernels.embed import op, reference, visible_patch_embedding

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs triton and TRITON_INTERPRET=1")

# (batch, bands, height, width), (p, q), width of the token, kept patches or None for all
SHAPES = [
    ((1, 1, 3, 5), (3, 5), 1, None),
    ((2, 3, 12, 20), (4, 4), 20, 5),
    ((3, 13, 8, 8), (4, 4), 33, 3),
    ((2, 5, 37, 8), (1, 4), 40, 37),
    ((1, 2, 28, 28), (2, 2), 7, 196),
    ((1, 1, 197, 2), (1, 2), 3, 197),
    ((4, 1, 40, 40), (2, 2), 5, 300),  # enough rows that the weight's gradient is split
    ((1, 3, 8, 16), (4, 8), 150, None),
    ((2, 2, 8, 8), (2, 2), 6, 0),
    ((0, 2, 8, 8), (2, 2), 6, 3),
]


def inputs(images: tuple[int, ...], patch: tuple[int, int], width: int, kept: int | None) -> tuple[Any, Any, Any, Any]:
    """(images, weight, bias, index or None)"""
    torch.manual_seed(0)
    x, weight = torch.randn(images, requires_grad=True), torch.randn(width, images[1], *patch, requires_grad=True)
    places = (images[2] // patch[0]) * (images[3] // patch[1])
    # with repetitions, whose gradients add
    index = None if kept is None else torch.randint(places, (images[0], kept))
    return x, weight, torch.randn(width, requires_grad=True), index


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_equals_the_reference_with_gradients(shape: tuple, biased: bool) -> None:
    x, weight, bias, index = inputs(*shape)
    wanted = [x, weight, bias] if biased else [x, weight]
    expected = reference.visible_patch_embedding(x, weight, bias if biased else None, index)
    with use(visible_patch_embedding="triton"):
        got = visible_patch_embedding(x, weight, bias if biased else None, index)
    grad = torch.randn_like(expected)
    # fp32 sums in another order: a few units in the last place of the largest terms, of up to 1200 rows for the weight
    assert got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-5, atol=2e-5)
    for mine, theirs in zip(torch.autograd.grad(got, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True):
        assert mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=1e-5, atol=2e-4)


def test_weight_gradient_is_split_and_the_same_twice() -> None:
    from swath.kernels.embed import triton

    x, weight, _, index = inputs((4, 1, 40, 40), (2, 2), 5, 300)
    grad = torch.randn(4, 300, 5)
    first = triton.backward_weight(grad, x.detach(), weight.detach(), index)
    assert torch.equal(first, triton.backward_weight(grad, x.detach(), weight.detach(), index))


def test_images_of_any_strides() -> None:
    _, weight, bias, index = inputs((2, 3, 16, 16), (4, 4), 8, 5)
    last = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    for images in (last, torch.randn(2, 5, 20, 24)[:, 1:4, 2:18, 3:19]):
        with use(visible_patch_embedding="triton"):
            got = visible_patch_embedding(images, weight, bias, index)
            (grad,) = torch.autograd.grad(got.square().sum(), weight)
        expected = reference.visible_patch_embedding(images, weight, bias, index)
        assert torch.allclose(got, expected, atol=1e-5)
        assert torch.allclose(grad, torch.autograd.grad(expected.square().sum(), weight)[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions(dtype: torch.dtype) -> None:
    *tensors, index = inputs((2, 3, 12, 20), (4, 4), 20, 5)
    x, weight, bias = (t.detach().to(dtype).requires_grad_() for t in tensors)
    exact = weight.detach().double().requires_grad_()
    expected = reference.visible_patch_embedding(x.double(), exact, bias.double(), index)
    with use(visible_patch_embedding="triton"):
        got = visible_patch_embedding(x, weight, bias, index)
    assert got.dtype == dtype
    # only the result is rounded, by the interpreter towards zero: one unit in the last place
    unit = torch.finfo(dtype).eps
    assert torch.allclose(got.double(), expected, rtol=unit, atol=1e-5)
    grad = torch.randn_like(got)
    (mine,) = torch.autograd.grad(got, weight, grad)
    (theirs,) = torch.autograd.grad(expected, exact, grad.double())
    assert mine.dtype == dtype and torch.allclose(mine.double(), theirs, rtol=unit, atol=1e-4)


def test_autocast_follows_linear() -> None:
    x, weight, bias, index = inputs((2, 3, 16, 16), (4, 4), 8, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = reference.visible_patch_embedding(x, weight, bias, index)
        with use(visible_patch_embedding="triton"):
            got = visible_patch_embedding(x, weight, bias, index)
    assert got.dtype == expected.dtype == torch.bfloat16
    # the interpreter does not round the pixels to 8 bits, the reference does; sums of 48 terms of size 1
    assert torch.allclose(got.float(), expected.float(), rtol=0.02, atol=0.1)
    got.sum().backward()
    assert x.grad is not None and weight.grad is not None and bias.grad is not None
    assert x.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32


def test_places_outside_the_raster_read_nothing() -> None:
    from swath.kernels.embed import triton

    x, weight, bias = (t.detach() for t in inputs((2, 1, 4, 4), (2, 2), 3, None)[:3])
    index = torch.tensor([[-1, 4, 0], [2**40, -(2**40), 3]])
    out = triton.forward(x, weight, bias, index)
    assert torch.equal(out[:, :2], bias.expand(2, 2, 3))
    inside = reference.visible_patch_embedding(x, weight, bias, torch.tensor([[0], [3]]))
    assert torch.allclose(out[:, 2:], inside, atol=1e-6)
    grad = torch.randn(2, 3, 3)
    expected = triton.backward_weight(grad[:, 2:], x, weight, torch.tensor([[0], [3]]))
    assert torch.allclose(triton.backward_weight(grad, x, weight, index), expected, atol=1e-6)


@pytest.mark.parametrize("kept", [None, 3])
def test_opcheck(kept: int | None) -> None:
    torch.library.opcheck(op.visible_patch_embedding, inputs((2, 2, 4, 4), (2, 2), 3, kept))


def test_compile_and_export() -> None:
    x, weight, bias, index = inputs((2, 2, 8, 4), (2, 2), 6, 3)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return visible_patch_embedding(x, self.weight, self.bias, index)

    with use(visible_patch_embedding="triton"):
        layer = Layer()
        expected = layer(x, index)
        got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, index)
        assert torch.equal(got, expected)
        wanted = [x, layer.weight, layer.bias]
        for mine, theirs in zip(torch.autograd.grad(got.sum(), wanted), torch.autograd.grad(expected.sum(), wanted), strict=True):
            assert torch.allclose(mine, theirs)
        exported = torch.export.export(layer, (x, index))
        assert any("swath" in str(node.target) for node in exported.graph.nodes)
        assert torch.equal(exported.module()(x, index), expected)


def test_operations_are_counted() -> None:
    x, weight, bias, index = inputs((2, 3, 8, 8), (4, 4), 8, 3)
    once = 2 * 2 * 3 * 48 * 8
    for images, times in ((x, 3), (x.detach(), 2)):
        with use(visible_patch_embedding="triton"), FlopCounterMode(display=False) as counter:
            visible_patch_embedding(images, weight, bias, index).sum().backward()
        assert counter.get_total_flops() == times * once
