"""Temporal ViT: dates and frames, published weights reproduce published features, parameter counts."""

import datetime
from typing import Any

import pytest
import torch

from swath.backbones.base import Context, create, gather
from swath.backbones.temporal_vit import TemporalViT, TemporalViTConfig, from_published
from tests.backbones.test_group_vit import decoder_parameters, encoder_state
from tests.parity.fixtures import folders, read

FIXTURES = [folder for folder in folders() if folder.name.startswith("satmae_temporal")]


def small(**options: Any) -> TemporalViT:
    torch.manual_seed(0)
    return TemporalViT(TemporalViTConfig(bands=6, width=32, heads=2, depth=1, date_width=8, image_size=32, **options)).eval()


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_published_weights_give_published_features(folder: Any) -> None:
    fixture = read(folder)
    c, frames = fixture.config, fixture.tensors["in.x"]
    config = TemporalViTConfig(
        bands=c["in_chans"] * frames.shape[1], frames=frames.shape[1], image_size=c["img_size"], patch=c["patch_size"],
        width=c["embed_dim"], depth=c["depth"], heads=c["num_heads"], mlp_ratio=c["mlp_ratio"],
    )  # fmt: skip
    backbone = TemporalViT(config).eval()
    backbone.load_state_dict(from_published(encoder_state(fixture), config))
    order = fixture.tensors["draw.noise"].argsort(dim=1)
    shuffled = order[:, : int(order.shape[1] * (1 - c["mask_ratio"]))]
    ctx, keep = Context(time=fixture.tensors["in.ts"]), shuffled.sort(dim=1).values
    with torch.no_grad():
        features = backbone.encode(backbone.tokenize(frames.flatten(1, 2), ctx, keep))
    latent = torch.cat([features.prefix, gather(features.tokens, shuffled.argsort(dim=1).argsort(dim=1))], dim=1)
    assert (latent - fixture.tensors["out.latent"]).abs().max() <= fixture.meta["tensors"]["out.latent"]["atol"]


def test_parameters_are_as_many_as_published() -> None:
    with torch.device("meta"):
        backbone = create("temporal_vit_large_patch16")
    tables = 197 * (1024 - 384) + 197 * (512 - 192)  # fixed, and counted in the published total
    decoder = decoder_parameters(1024, 512, 8, 768)
    assert sum(p.numel() for p in backbone.parameters()) + decoder + tables == 329_428_416


def test_seconds_are_dated() -> None:
    backbone, images = small(), torch.randn(1, 6, 32, 16)
    days = [datetime.datetime(y, m, 29, h, 59, tzinfo=datetime.UTC) for y, m, h in ((2004, 2, 0), (2019, 12, 23), (1999, 1, 5))]
    seconds = torch.tensor([[day.timestamp() for day in days]], dtype=torch.float64)
    codes = torch.tensor([[[2, 1, 0], [17, 11, 23], [-3, 0, 5]]])
    dated = backbone(images, Context(time=seconds)).pooled
    assert torch.equal(dated, backbone(images, Context(time=codes)).pooled)
    assert not torch.allclose(dated, backbone(images, Context(time=codes.flip(1))).pooled, atol=1e-3)
    frames = torch.tensor([[[0, 0, 0], [0, 0, 1], [0, 0, 2]]])
    assert torch.equal(backbone(images).pooled, backbone(images, Context(time=frames)).pooled)


def test_frames_and_dates_move_together() -> None:
    """The order of frames means nothing but their dates."""
    backbone, images = small(), torch.randn(2, 6, 32, 16)
    codes = torch.randint(0, 12, (2, 3, 3))
    swapped = images.unflatten(1, (3, 2)).flip(1).flatten(1, 2)
    there, back = backbone(images, Context(time=codes)), backbone(swapped, Context(time=codes.flip(1)))
    assert torch.allclose(there.pooled, back.pooled, atol=1e-5)
    assert backbone.tokenize(images).grid == (3, 1, 2, 1) and there.maps[16].shape == (2, 32, 2, 1)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="4 bands cannot be those of 3 frames; 3 could be"):
        create("temporal_vit_base_patch16", bands=4)
    with pytest.raises(ValueError, match=r"ctx.time must be \(1, 3\) seconds or \(1, 3, 3\) codes"):
        small()(torch.zeros(1, 6, 32, 32), Context(time=torch.zeros(1)))
    with pytest.raises(ValueError, match="date_width 128"):
        create("temporal_vit_base_patch16", width=192)
