"""Energy of oriented gradients: zero where flat, larger where oriented, of valid pixels only; the published descriptor."""

import pytest
import torch
import torch.nn.functional as F

from swath.kernels.hog import hog_descriptor, hog_energy
from tests.parity.fixtures import ROOT, read


@pytest.mark.skipif(not (ROOT / "selectivemae" / "meta.json").exists(), reason="no golden fixtures here")
def test_published_descriptor() -> None:
    """The published score, the mean of the standardised descriptor, is rounding noise; ours tells patches apart."""
    fixture = read(ROOT / "selectivemae")
    images, expected = fixture.tensors["in.x"], fixture.tensors["out.hog_desc"]
    got = hog_descriptor(images, (16, 16), cell=8, bins=9, window=16)
    assert (got - expected).abs().max() <= fixture.meta["tensors"]["out.hog_desc"]["atol"]
    score = ((got - got.mean(dim=2, keepdim=True)) / (got.var(dim=2, keepdim=True) + 1e-6).sqrt()).mean(dim=2)
    assert (score - fixture.tensors["out.hog_scores"]).abs().max() <= 1e-5
    energy = hog_energy(images, (16, 16))
    # the upper half of these images is nearly flat
    assert energy.shape == score.shape and (energy[:, :84].amax(dim=1) < energy[:, 112:].amin(dim=1)).all()


def slow_energy(image_chw: torch.Tensor, patch: int, cell: int, bins: int) -> torch.Tensor:
    """One pixel after the other, in float64."""
    across = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]).double()
    bands, height, width = image_chw.shape
    padded = F.pad(image_chw.double()[None], (1, 1, 1, 1), mode="reflect")[0]
    histogram = torch.zeros(bands, height // cell, width // cell, bins).double()
    for c, y, x in ((c, y, x) for c in range(bands) for y in range(height) for x in range(width)):
        window = padded[c, y : y + 3, x : x + 3]
        gx, gy = (window * across).sum(), (window * across.T).sum()
        orientation = int(torch.floor(torch.atan2(gx, gy) / torch.pi * bins)) % bins
        histogram[c, y // cell, x // cell, orientation] += (gx**2 + gy**2).sqrt()
    side = patch // cell
    length = histogram.square().sum(dim=3).sqrt().mean(dim=0)
    return length.unfold(0, side, side).unfold(1, side, side).sum(dim=(2, 3)).flatten() / patch**2


@pytest.mark.parametrize(("cell", "bins"), [(4, 9), (2, 6), (4, 1)])
def test_from_first_principles(cell: int, bins: int) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 2, 8, 12)
    expected = torch.stack([slow_energy(image, 4, cell, bins) for image in images])
    assert torch.allclose(hog_energy(images.double(), (4, 4), cell=cell, bins=bins), expected)
    assert torch.allclose(hog_energy(images, (4, 4), cell=cell, bins=bins).double(), expected, rtol=1e-5)


def test_flat_is_zero_and_contrast_is_proportional() -> None:
    torch.manual_seed(0)
    images = torch.full((1, 3, 16, 32), 7.0)
    images[..., 16:] = torch.randn(1, 3, 16, 16)
    flat, rough = hog_energy(images[..., :24], (16, 8))[0, 0], hog_energy(images, (16, 16))[0]
    assert flat == 0 and rough[1] > rough[0]
    assert torch.allclose(hog_energy(5 * images, (16, 16))[0], 5 * rough)
    assert torch.allclose(hog_descriptor(5 * images, (16, 16)), hog_descriptor(images, (16, 16)), atol=1e-5)


def test_edges_count_more_than_noise_of_the_same_gradient() -> None:
    torch.manual_seed(0)
    noise, stripes = torch.randn(1, 1, 16, 16), torch.sin(torch.arange(16.0)).expand(1, 1, 16, 16)
    total = [hog_energy(x, (16, 16), bins=1)[0, 0] for x in (noise, stripes)]  # with one bin, the mean gradient itself
    ratio = [hog_energy(x, (16, 16))[0, 0] / t for x, t in zip((noise, stripes), total, strict=True)]
    assert ratio[0] < 0.6 and ratio[1] > 0.95


@pytest.mark.parametrize("filler", [0.0, 1e6, float("nan"), float("inf")])
def test_only_valid_pixels_count(filler: float) -> None:
    torch.manual_seed(0)
    images, valid = torch.randn(1, 2, 16, 32), torch.ones(1, 1, 16, 32, dtype=torch.bool)
    valid[..., 20:] = False
    got = hog_energy(torch.where(valid, images, filler), (8, 8), valid_b1hw=valid)
    assert torch.equal(got, hog_energy(torch.where(valid, images, 0.0), (8, 8), valid_b1hw=valid))
    whole = hog_energy(images, (8, 8))
    assert torch.allclose(got[0, [0, 1, 4, 5]], whole[0, [0, 1, 4, 5]]), "untouched patches"
    assert (got[0, [3, 7]] == 0).all() and got[0, 2] > 0, "no gradient at the edge of what is missing, and none beyond"
    striped = torch.sin(torch.arange(32.0)).expand(1, 2, 16, 32)
    half = hog_energy(striped, (16, 16), cell=16, valid_b1hw=valid)[0, 1]
    assert torch.isclose(half, hog_energy(striped, (16, 16), cell=16)[0, 1], rtol=0.3), "per counted pixel, not per pixel"
    assert torch.allclose(whole, hog_energy(images, (8, 8), valid_b1hw=torch.ones_like(valid)))


def test_no_gradient_any_precision_compile_and_export() -> None:
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    energy = hog_energy(images, (8, 8))
    assert not energy.requires_grad and energy.shape == (2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(hog_energy(images, (8, 8)), energy)
        assert torch.equal(hog_energy(images.bfloat16(), (8, 8)), hog_energy(images.bfloat16().float(), (8, 8)))

    class Score(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return hog_energy(images, (8, 8))

    still = images.detach()
    assert torch.allclose(torch.compile(Score(), fullgraph=True, backend="aot_eager")(still), energy)
    assert torch.allclose(torch.export.export(Score(), (still,)).module()(still), energy)
    assert hog_energy(torch.zeros(0, 3, 16, 16), (8, 8)).shape == (0, 4)


def test_what_does_not_fit_is_refused() -> None:
    images, valid = torch.randn(2, 3, 16, 16), torch.ones(2, 1, 16, 16, dtype=torch.bool)
    for call, message in [
        (lambda: hog_energy(images[0], (8, 8)), r"images must be floating point \(B, C, H, W\) .* not \(3, 16, 16\)"),
        (lambda: hog_energy(images.long(), (8, 8)), "torch.int64"),
        (lambda: hog_energy(images, (5, 8)), r"\(2, 3, 16, 16\) are not divisible into patches of \(5, 8\)"),
        (lambda: hog_energy(images, (4, 8)), r"cell 8 does not divide patch \(4, 8\)"),
        (lambda: hog_energy(images, (8, 8), bins=0), "bins must be at least 1, not 0"),
        (
            lambda: hog_energy(images, (8, 8), valid_b1hw=valid[:1]),
            r"valid must be \(2, 1, 16, 16\) bool .* not \(1, 1, 16, 16\)",
        ),
        (lambda: hog_energy(images, (8, 8), valid_b1hw=valid.float()), "torch.float32"),
        (lambda: hog_descriptor(images, (8, 8), window=5), r"window 5 does not divide images of \(2, 3, 16, 16\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
