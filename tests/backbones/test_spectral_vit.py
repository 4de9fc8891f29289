"""3-D spectral ViT: cubes are a 3-D convolution's, published weights reproduce published features, parameter counts."""

from typing import Any

import pytest
import torch

from swath.backbones.base import create, gather
from swath.backbones.spectral_vit import SpectralViT, SpectralViTConfig, from_published
from tests.backbones.test_group_vit import decoder_parameters, encoder_state
from tests.parity.fixtures import folders, read

FIXTURES = [folder for folder in folders() if folder.name.startswith("spectralgpt")]


def published(c: dict[str, Any]) -> SpectralViTConfig:
    return SpectralViTConfig(
        bands=c["num_frames"], cube=c["t_patch_size"], image_size=c["img_size"], patch=c["patch_size"], width=c["embed_dim"],
        depth=c["depth"], heads=c["num_heads"], mlp_ratio=c["mlp_ratio"],
    )  # fmt: skip


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_published_weights_give_published_features(folder: Any) -> None:
    fixture = read(folder)
    config = published(fixture.config)
    backbone = SpectralViT(config).eval()
    backbone.load_state_dict(from_published(encoder_state(fixture), config))
    order = fixture.tensors["draw.noise"].argsort(dim=1)
    shuffled = order[:, : int(order.shape[1] * (1 - fixture.config["mask_ratio"]))]
    with torch.no_grad():
        features = backbone.encode(backbone.tokenize(fixture.tensors["in.x"], keep=shuffled.sort(dim=1).values))
    latent = gather(features.tokens, shuffled.argsort(dim=1).argsort(dim=1))
    assert (latent - fixture.tensors["out.latent"]).abs().max() <= fixture.meta["tensors"]["out.latent"]["atol"]


@pytest.mark.skipif(not FIXTURES, reason="no fixtures here")
def test_other_weights_are_refused() -> None:
    fixture = read(FIXTURES[0])
    config, state = published(fixture.config), encoder_state(fixture)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.k\.bias is missing"):
        from_published({n: t for n, t in state.items() if n != "blocks.1.attn.k.bias"}, config)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.q\.weight is missing"):
        from_published({n: t for n, t in state.items() if n != "blocks.0.attn.q.weight"}, config)
    with pytest.raises(ValueError, match=r"no weights of this encoder: pos_embed$"):
        from_published({**state, "pos_embed": torch.zeros(1, 64, 48)}, config)


@pytest.mark.parametrize(
    ("name", "image_size", "total"),
    [("base", 96, 98_496_960), ("base", 128, 98_640_320), ("large", 96, 315_970_752), ("huge", 96, 643_558_336)],
)
def test_parameters_are_as_many_as_published(name: str, image_size: int, total: int) -> None:
    with torch.device("meta"):
        backbone = create(f"spectral_vit_{name}_patch8", bands=12, image_size=image_size)
    decoder = decoder_parameters(backbone.width, 512, 4, 192) + ((image_size // 8) ** 2 + 4) * 512
    assert sum(p.numel() for p in backbone.parameters()) + decoder == total


def test_cubes_equal_a_convolution() -> None:
    torch.manual_seed(0)
    backbone = SpectralViT(SpectralViTConfig(bands=12, image_size=16, width=32, heads=2, depth=0))
    images = torch.randn(2, 12, 16, 24)
    by_conv = backbone.patch_embed.proj(images[:, None]).flatten(2).transpose(1, 2)
    assert torch.allclose(backbone.patch_embed(images), by_conv, atol=1e-5)
    index = torch.tensor([[0, 7, 23], [5, 6, 12]])
    assert torch.allclose(backbone.patch_embed(images, index), gather(by_conv, index), atol=1e-5)


def test_wrong_band_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="13 bands cannot be cut into cubes of 3; 12 could be"):
        create("spectral_vit_base_patch8", bands=13)
