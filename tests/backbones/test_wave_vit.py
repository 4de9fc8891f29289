"""Wavelength-conditioned ViT: any sensor's bands, in any order; bands of one wavelength are one band."""

import math
from typing import Any

import pytest
import torch

from swath.backbones.base import Context, create
from swath.backbones.wave_vit import WaveViT, WaveViTConfig

NM = torch.tensor([443.0, 490.0, 560.0, 665.0, 842.0, 1610.0, 2190.0])


def small(**options: Any) -> WaveViT:
    torch.manual_seed(0)
    own: dict[str, Any] = {"bands": 3, "image_size": 32, "width": 32, "depth": 1, "heads": 2, "mixture": 4, "hidden": 16}
    return WaveViT(WaveViTConfig(**{**own, **options})).eval()


def test_any_number_of_bands_enters() -> None:
    backbone = small()
    for count in (1, 4, 7):
        features = backbone(torch.randn(2, count, 32, 16), Context(wavelength_nm=NM[:count]))
        assert features.maps[16].shape == (2, 32, 2, 1)


def test_order_of_bands_means_nothing() -> None:
    backbone, images, order = small(), torch.randn(2, 7, 32, 32), torch.randperm(7)
    there = backbone(images, Context(wavelength_nm=NM)).pooled
    assert torch.allclose(there, backbone(images[:, order], Context(wavelength_nm=NM[order])).pooled, atol=1e-5)
    assert not torch.allclose(there, backbone(images[:, order], Context(wavelength_nm=NM)).pooled, atol=1e-3)


def test_a_band_twice_is_that_band() -> None:
    backbone, images = small(), torch.randn(2, 3, 32, 32)
    twice = backbone(images.repeat(1, 2, 1, 1), Context(wavelength_nm=NM[:3].repeat(2))).pooled
    assert torch.allclose(backbone(images, Context(wavelength_nm=NM[:3])).pooled, twice, atol=1e-5)


def test_weights_are_smooth_in_the_wavelength() -> None:
    embed = small().patch_embed
    at = embed.weights(torch.tensor([560.0, 565.0, 1610.0])).detach()
    near, far = (at[:, 0] - at[:, 1]).norm(), (at[:, 0] - at[:, 2]).norm()
    assert near < 0.3 * far


def test_bands_without_wavelength() -> None:
    backbone, images = small(), torch.randn(2, 3, 32, 32)
    radar = torch.tensor([560.0, math.nan, math.nan])
    with_radar = backbone(images, Context(wavelength_nm=radar)).pooled
    assert torch.isfinite(with_radar).all()
    assert not torch.allclose(with_radar, backbone(images[:, [0, 2, 1]], Context(wavelength_nm=radar)).pooled, atol=1e-3)
    nothing = backbone(images).pooled
    assert torch.equal(nothing, backbone(images, Context(wavelength_nm=torch.full((3,), math.nan))).pooled)
    named = small(wavelength_nm=(490.0, 560.0, 665.0))
    assert torch.equal(named(images).pooled, backbone(images, Context(wavelength_nm=NM[1:4])).pooled)


def test_wavelengths_are_learned_from() -> None:
    backbone = small()
    backbone(torch.randn(2, 7, 32, 32), Context(wavelength_nm=NM)).pooled.square().sum().backward()
    gradients = {n: p.grad for n, p in backbone.patch_embed.named_parameters() if n != "unknown"}
    assert all(g is not None and torch.isfinite(g).all() and g.any() for g in gradients.values())


def test_scale_of_embedded_patches() -> None:
    """An image of unit deviation whose bands agree gives tokens of about unit deviation, however many bands."""
    for name in ("wave_vit_small_patch16", "wave_vit_base_patch16"):
        torch.manual_seed(0)
        embed = create(name, bands=7, depth=0).patch_embed
        assert isinstance(embed, torch.nn.Module)
        tokens = embed(torch.randn(2, 1, 64, 64).expand(-1, 7, -1, -1), NM)
        assert 0.3 < tokens.std() < 3


@pytest.mark.parametrize(("name", "low", "high"), [("small", 21e6, 26e6), ("base", 85e6, 93e6)])
def test_sizes(name: str, low: float, high: float) -> None:
    with torch.device("meta"):
        backbone = create(f"wave_vit_{name}_patch16", bands=13)
    assert low < sum(p.numel() for p in backbone.parameters()) < high


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(B, 7, H, W\), one for each wavelength of the context"):
        small()(torch.zeros(1, 3, 32, 32), Context(wavelength_nm=NM))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), as the configuration says"):
        small()(torch.zeros(1, 7, 32, 32))
    with pytest.raises(ValueError, match="must hold 3, one for each band, not 7"):
        small(wavelength_nm=tuple(NM.tolist()))
    with pytest.raises(ValueError, match=r"must be \(C,\)"):
        small()(torch.zeros(1, 7, 32, 32), Context(wavelength_nm=NM[None]))
