"""The masked patch loss from first principles, with its gradient, invalid pixels, compiled, exported and under autocast."""

import pytest
import torch
from torch import Tensor

from swath.kernels.dispatch import use
from swath.kernels.patch_loss import masked_patch_loss, reference

# (batch, bands, height, width), (p, q), masked patches
SHAPES = [
    ((1, 1, 6, 6), (3, 2), 1),
    ((2, 3, 12, 20), (4, 4), 5),
    ((3, 13, 8, 8), (4, 4), 3),
    ((1, 2, 28, 28), (2, 2), 196),
    ((2, 1, 37, 4), (1, 4), 37),
]


def inputs(
    images: tuple[int, ...], patch: tuple[int, int], masked: int, valid: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    torch.manual_seed(0)
    batch, bands, height, width = images
    places = (height // patch[0]) * (width // patch[1])
    index = torch.stack([torch.randperm(places)[:masked] for _ in range(batch)]) if batch else torch.zeros(0, masked).long()
    prediction = torch.randn(batch, masked, bands * patch[0] * patch[1], dtype=dtype, requires_grad=True)
    valid_b1hw = torch.rand(batch, 1, height, width) > 0.4 if valid else None
    return prediction, 3 * torch.randn(images, dtype=dtype) + 5, index, valid_b1hw


def one_patch(
    prediction: Tensor, pixels_cpq: Tensor, valid_pq: Tensor, normalise: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Written for a single patch, as the definition reads."""
    count = valid_pq[None].expand_as(pixels_cpq).permute(1, 2, 0).flatten()
    values = pixels_cpq.permute(1, 2, 0).flatten()[count]
    mean, spread = torch.zeros(()), torch.ones(())
    if normalise and len(values):
        mean = values.sum() / len(values)
        spread = (((values - mean) ** 2).sum() / max(1, len(values) - 1) + eps).sqrt()
    elif normalise:
        spread = torch.tensor(eps).sqrt()
    wrong = (prediction[count] - (values - mean) / spread) ** 2
    return wrong.sum() / max(1, len(values)), mean, spread


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_from_first_principles(shape: tuple, valid: bool, normalise: bool) -> None:
    prediction, images, index, valid_b1hw = inputs(*shape, valid=valid)
    (p, q), columns = shape[1], images.shape[3] // shape[1][1]
    got = masked_patch_loss(prediction, images, index, patch=(p, q), normalise=normalise, eps=1e-3, valid_b1hw=valid_b1hw)
    mask = torch.ones_like(images[:, :1], dtype=torch.bool) if valid_b1hw is None else valid_b1hw
    rows = []
    for b, m in ((b, m) for b in range(len(index)) for m in range(index.shape[1])):
        row, column = divmod(int(index[b, m]), columns)
        window = (b, ..., slice(row * p, row * p + p), slice(column * q, column * q + q))
        rows.append(one_patch(prediction[b, m], images[window], mask[window][0], normalise, 1e-3))
    for mine, theirs in zip(got, zip(*rows, strict=True), strict=True):
        # the same sums of up to 208 terms of size 30 in another order
        assert mine.dtype == torch.float32 and torch.allclose(mine.flatten(), torch.stack(theirs), rtol=1e-5, atol=1e-5)
    assert not got[1].requires_grad and not got[2].requires_grad
    (grad,) = torch.autograd.grad(got[0].sum(), prediction)
    (expected,) = torch.autograd.grad(torch.stack([row[0] for row in rows]).sum(), prediction)
    assert torch.allclose(grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("valid", [False, True])
def test_gradcheck_of_the_reference(valid: bool) -> None:
    prediction, images, index, valid_b1hw = inputs((2, 2, 4, 6), (2, 3), 2, valid, torch.float64)
    images.requires_grad_()

    def error(prediction: Tensor) -> Tensor:
        return reference.masked_patch_loss(prediction, images, index, patch=(2, 3), valid_b1hw=valid_b1hw)[0]

    assert error(prediction).dtype == torch.float64 and torch.autograd.gradcheck(error, prediction)
    error(prediction).sum().backward()
    assert images.grad is None, "targets are data"


@pytest.mark.parametrize("filler", [1e6, float("nan"), float("inf")])
def test_what_invalid_pixels_hold_does_not_matter(filler: float) -> None:
    prediction, images, index, valid = inputs((2, 3, 12, 20), (4, 4), 5, True)
    assert valid is not None
    valid[0, :, :4] = False  # whole patches too
    expected = masked_patch_loss(prediction, torch.where(valid, images, 0.0), index, patch=(4, 4), valid_b1hw=valid)
    before = images.clone()
    got = masked_patch_loss(prediction, torch.where(valid, images, filler), index, patch=(4, 4), valid_b1hw=valid)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))
    assert torch.equal(images, before), "the images are not written to"


def test_all_valid_equals_no_mask() -> None:
    prediction, images, index, _ = inputs((2, 3, 12, 20), (4, 4), 5)
    plain = masked_patch_loss(prediction, images, index, patch=(4, 4))
    masked = masked_patch_loss(prediction, images, index, patch=(4, 4), valid_b1hw=torch.ones(2, 1, 12, 20, dtype=torch.bool))
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(plain, masked, strict=True))


def test_constant_single_and_empty_patches() -> None:
    prediction, _, index, _ = inputs((2, 3, 8, 8), (4, 4), 3)
    error, mean, spread = masked_patch_loss(prediction, torch.full((2, 3, 8, 8), 7.0), index, patch=(4, 4))
    assert (
        torch.allclose(error, prediction.square().mean(dim=2))
        and (mean == 7).all()
        and torch.allclose(spread, torch.tensor(1e-3))
    )
    prediction, images, index, _ = inputs((2, 1, 2, 2), (1, 1), 2)
    error, _, _ = masked_patch_loss(prediction, images, index, patch=(1, 1))
    assert torch.allclose(error, prediction[..., 0] ** 2), "a single value has no spread"
    for shape in (((2, 3, 8, 8), (4, 4), 0), ((0, 3, 8, 8), (4, 4), 2)):
        prediction, images, index, _ = inputs(*shape)
        assert masked_patch_loss(prediction, images, index, patch=(4, 4))[0].shape == index.shape


@pytest.mark.parametrize("valid", [False, True])
def test_compile_and_export(valid: bool) -> None:
    class Loss(torch.nn.Module):
        def forward(self, prediction: Tensor, images: Tensor, index: Tensor, valid_b1hw: Tensor | None) -> tuple[Tensor, ...]:
            return masked_patch_loss(prediction, images, index, patch=(4, 4), valid_b1hw=valid_b1hw)

    prediction, *others = inputs((2, 3, 12, 20), (4, 4), 5, valid)
    expected = Loss()(prediction, *others)
    got = torch.compile(Loss(), fullgraph=True, backend="aot_eager")(prediction, *others)
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(got, expected, strict=True))
    (grad,) = torch.autograd.grad(got[0].sum(), prediction)
    assert torch.allclose(grad, torch.autograd.grad(expected[0].sum(), prediction)[0], rtol=1e-5)
    exported = torch.export.export(Loss(), (prediction, *others)).module()(prediction, *others)
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(exported, expected, strict=True))


def test_autocast_and_half_precision_predictions() -> None:
    prediction, images, index, _ = inputs((2, 3, 12, 20), (4, 4), 5)
    rough = prediction.detach().bfloat16().requires_grad_()
    expected = masked_patch_loss(rough.float(), images, index, patch=(4, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = masked_patch_loss(rough, images, index, patch=(4, 4))
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    got[0].sum().backward()
    assert rough.grad is not None and rough.grad.dtype == torch.bfloat16


def test_what_does_not_fit_is_refused() -> None:
    prediction, images, index, _ = inputs((2, 3, 8, 8), (4, 4), 2)
    valid = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    for changed, message in [
        ({"images_bchw": images[0]}, r"images must be \(B, C, H, W\) divisible into patches of \(4, 4\), not \(3, 8, 8\)"),
        ({"patch": (3, 4)}, r"divisible into patches of \(3, 4\), not \(2, 3, 8, 8\)"),
        ({"patch": (0, 4)}, r"patches of \(0, 4\)"),
        ({"prediction_bmv": prediction[..., 1:]}, r"prediction must be \(2, M, 48\) .* not \(2, 2, 47\)"),
        ({"prediction_bmv": prediction.long()}, "must be floating point, not torch.int64"),
        ({"index_bm": index[:, :1]}, r"index must be \(2, 2\) int64 .* not \(2, 1\)"),
        ({"index_bm": index.int()}, "torch.int32"),
        ({"index_bm": index + 3}, r"index holds \d … \d; the raster has places 0 … 3"),
        ({"index_bm": index - 4}, "index holds -"),
        ({"valid_b1hw": valid[:, 0]}, r"valid must be \(2, 1, 8, 8\) bool .* not \(2, 8, 8\)"),
        ({"valid_b1hw": valid.float()}, "torch.float32"),
        ({"valid_b1hw": valid.to("meta")}, "valid is on meta, images are on cpu"),
    ]:
        arguments = {"prediction_bmv": prediction, "images_bchw": images, "index_bm": index, "patch": (4, 4), **changed}
        with pytest.raises(ValueError, match=message):
            masked_patch_loss(**arguments)


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    prediction, images, index, _ = inputs((2, 3, 8, 8), (4, 4), 2)
    with use(masked_patch_loss="triton"), pytest.raises(ValueError, match="cannot take a tensor on cpu"):
        masked_patch_loss(prediction, images, index, patch=(4, 4))
