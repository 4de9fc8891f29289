"""The Triton patch loss in Triton's interpreter: equal to the reference with its gradient, and never out of bounds."""

import pytest
import torch
from torch import Tensor

from swath.kernels.dispatch import interpreted, use
from swath.kernels.patch_loss import masked_patch_loss, op, reference

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs triton and TRITON_INTERPRET=1")

# (batch, bands, height, width), (p, q), masked patches
SHAPES = [
    ((1, 1, 6, 6), (3, 2), 1),
    ((2, 3, 12, 20), (4, 4), 5),
    ((3, 13, 8, 8), (4, 4), 3),
    ((1, 2, 28, 28), (2, 2), 196),
    ((1, 1, 37, 4), (1, 4), 37),
    ((1, 70, 8, 16), (8, 8), 2),  # 4480 values: several tiles, the last one partly filled
    ((2, 1, 2, 2), (1, 1), 2),
    ((2, 3, 8, 8), (4, 4), 0),
    ((0, 3, 8, 8), (4, 4), 2),
]


def inputs(
    images: tuple[int, ...], patch: tuple[int, int], masked: int, valid: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    torch.manual_seed(0)
    batch, bands, height, width = images
    places = (height // patch[0]) * (width // patch[1])
    index = torch.stack([torch.randperm(places)[:masked] for _ in range(batch)]) if batch else torch.zeros(0, masked).long()
    prediction = torch.randn(batch, masked, bands * patch[0] * patch[1], requires_grad=True)
    valid_b1hw = torch.rand(batch, 1, height, width) > 0.4 if valid else None
    return prediction, 3 * torch.randn(images) + 5, index, valid_b1hw


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_equals_the_reference_with_its_gradient(shape: tuple, valid: bool, normalise: bool) -> None:
    prediction, images, index, valid_b1hw = inputs(*shape, valid=valid)
    if valid_b1hw is not None and len(index):
        valid_b1hw[0, :, : shape[1][0]] = False  # whole patches too
        images = torch.where(valid_b1hw, images, float("nan"))
    options = {"patch": shape[1], "normalise": normalise, "valid_b1hw": valid_b1hw}
    expected = reference.masked_patch_loss(prediction, images, index, **options)
    with use(masked_patch_loss="triton"):
        got = masked_patch_loss(prediction, images, index, **options)
    for mine, theirs in zip(got, expected, strict=True):
        # fp32 sums of up to 4480 terms in another order
        assert mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    assert not got[1].requires_grad and not got[2].requires_grad
    grad = torch.randn_like(expected[0])
    (mine,), (theirs,) = (torch.autograd.grad(error, prediction, grad) for error in (got[0], expected[0]))
    assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_tensors_of_any_strides() -> None:
    prediction, _, index, valid = inputs((2, 3, 12, 20), (4, 4), 5, True)
    assert valid is not None
    last = torch.randn(2, 3, 12, 20).contiguous(memory_format=torch.channels_last)
    cut, cut_valid = torch.randn(2, 5, 16, 24)[:, 1:4, 2:14, 3:23], (torch.rand(2, 1, 24, 20) > 0.4)[:, :, ::2]
    wide = torch.randn(2, 48, 5).transpose(1, 2).requires_grad_()
    for predicted, images, mask in ((prediction, last, valid), (prediction, cut, cut_valid), (wide, last, valid)):
        expected = reference.masked_patch_loss(predicted, images, index, patch=(4, 4), valid_b1hw=mask)[0]
        with use(masked_patch_loss="triton"):
            got = masked_patch_loss(predicted, images, index, patch=(4, 4), valid_b1hw=mask)[0]
        assert torch.allclose(got, expected, rtol=1e-5)
        (mine,), (theirs,) = (torch.autograd.grad(error.sum(), predicted) for error in (got, expected))
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions(dtype: torch.dtype) -> None:
    prediction, images, index, valid = inputs((2, 3, 12, 20), (4, 4), 5, True)
    rough, images = prediction.detach().to(dtype).requires_grad_(), images.to(dtype)
    expected = reference.masked_patch_loss(rough, images, index, patch=(4, 4), valid_b1hw=valid)
    with use(masked_patch_loss="triton"), torch.autocast("cpu", dtype=torch.bfloat16):
        got = masked_patch_loss(rough, images, index, patch=(4, 4), valid_b1hw=valid)
    # read exactly, summed in fp32
    assert all(a.dtype == torch.float32 and torch.allclose(a, b, rtol=1e-5) for a, b in zip(got, expected, strict=True))
    (mine,), (theirs,) = (torch.autograd.grad(error[0].sum(), rough) for error in (got, expected))
    # the gradient alone is rounded, by the interpreter towards zero: one unit in the last place
    assert mine.dtype == dtype and torch.allclose(mine.float(), theirs.float(), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_places_outside_the_raster_read_nothing() -> None:
    from swath.kernels.patch_loss import triton

    prediction, images, _, valid = inputs((2, 1, 4, 4), (2, 2), 2, True)
    index = torch.tensor([[-1, 4], [2**40, -(2**40)]])
    for mask in (None, valid):
        error, mean, spread = triton.forward(prediction.detach(), images, index, (2, 2), True, 1e-6, mask)
        assert (error == 0).all() and (mean == 0).all()
        grad = triton.backward(torch.ones(2, 2), prediction.detach(), images, index, mean, spread, (2, 2), mask)
        assert (grad == 0).all()


@pytest.mark.parametrize("valid", [False, True])
def test_opcheck(valid: bool) -> None:
    prediction, images, index, valid_b1hw = inputs((2, 2, 4, 4), (2, 2), 3, valid)
    torch.library.opcheck(op.masked_patch_loss, (prediction, images, index, 2, 2, True, 1e-6, valid_b1hw))


def test_compile_and_export() -> None:
    class Loss(torch.nn.Module):
        def forward(self, prediction: Tensor, images: Tensor, index: Tensor) -> tuple[Tensor, ...]:
            return masked_patch_loss(prediction, images, index, patch=(4, 4))

    arguments = inputs((2, 3, 8, 8), (4, 4), 2)[:3]
    with use(masked_patch_loss="triton"):
        expected = Loss()(*arguments)
        got = torch.compile(Loss(), fullgraph=True, backend="aot_eager")(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        (mine,), (theirs,) = (torch.autograd.grad(error[0].sum(), arguments[0]) for error in (got, expected))
        assert torch.equal(mine, theirs)
        exported = torch.export.export(Loss(), arguments)
        assert any("swath" in str(node.target) for node in exported.graph.nodes)
        assert torch.equal(exported.module()(*arguments)[0], expected[0])
