"""DynamicVis: what a block picks and adds, from first principles; masked pixels stay masked; any size; published layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from swath.backbones.base import create
from swath.backbones.dynamicvis import Block, DynamicVis, DynamicVisConfig, from_published
from tests.parity.fixtures import ROOT


def small(**options: Any) -> DynamicVis:
    torch.manual_seed(0)
    backbone = create("dynamicvis_base", **{**DynamicVis.tiny, **options})
    assert isinstance(backbone, DynamicVis)
    return backbone.eval()


def block(**options: Any) -> Block:
    torch.manual_seed(0)
    made = Block(8, options.pop("ratio", 4), states=4, **options)
    nn.init.normal_(made.gate.weight)
    return made.eval()


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("spatial", [False, True])
def test_a_block_from_first_principles(spatial: bool, relative: bool) -> None:
    made, x = block(spatial=spatial, relative=relative), torch.randn(2, 24, 8)
    got = made(x, 4)
    for sample in range(2):
        score = x[sample] @ made.gate.weight[0]
        share = score.softmax(0)
        picked = sorted(range(24), key=lambda place: -score[place].item())[:6]
        picked = sorted(picked) if spatial else picked
        means = x[sample].view(4, 6, 8).mean(1)
        scanned = torch.cat([means, x[sample, picked]])
        y = made.mixer(made.norm(scanned[None]))[0, 4:]
        expected = x[sample] * (1 + share[:, None])
        expected[picked] += y * (share / share.max() if relative else share)[picked, None]
        assert torch.allclose(got[sample], expected, atol=1e-6)


def test_the_scan_goes_both_ways_with_the_same_weights() -> None:
    mixer, x = block().mixer, torch.randn(1, 7, 8)
    forth, back = (mixer(x, order[None]) for order in (torch.arange(7), torch.arange(7).flip(0)))
    assert torch.allclose(mixer(x), (forth + back) / 2, atol=1e-6)
    assert torch.allclose(back, mixer(x.flip(1), torch.arange(7)[None]).flip(1), atol=1e-6)


def test_noise_picks_others_in_training_only() -> None:
    made, x = block(noise=5.0), torch.randn(1, 64, 8)
    assert torch.equal(made.route(x)[1], made.route(x)[1])
    made.train()
    assert not torch.equal(made.route(x)[1], made.route(x)[1])
    score, kept = made.route(torch.ones(2, 64, 8))
    assert kept.shape == (2, 16) and score.std() < 1e-6


def test_equal_scores_are_picked_in_raster_order() -> None:
    assert block().route(torch.ones(1, 64, 8))[1].tolist() == [list(range(16))]


def test_the_gate_learns() -> None:
    made, x = block(), torch.randn(2, 24, 8)
    made(x, 4).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in made.parameters())
    assert made.gate.weight.grad is not None and made.gate.weight.grad.abs().max() > 0


def test_features_of_a_wide_image() -> None:
    backbone = small()
    features = backbone.encode(backbone.tokenize(torch.randn(2, 3, 64, 96)), taps=[-1, 0, 3])
    assert {stride: level.shape[1:] for stride, level in features.maps.items()} == {
        4: (8, 16, 24), 8: (12, 8, 12), 16: (16, 4, 6), 32: (24, 2, 3),
    }  # fmt: skip
    assert torch.equal(features.maps[32].flatten(2).mT, features.tokens) and features.pooled.shape == (2, 24)
    assert torch.allclose(features.pooled, features.tokens.mean(1)) and features.taps[0].shape == (2, 384, 8)
    assert torch.equal(backbone.norms[3](features.taps[3]), features.tokens)


def test_positions_interpolate() -> None:
    backbone = small()
    own, double = backbone.positions(16, 16), backbone.positions(32, 32)
    smooth = nn.functional.avg_pool2d(double.T.unflatten(1, (32, 32))[None], 2)[0].flatten(1).T
    assert torch.equal(own, backbone.pos_embed[0]) and (smooth - own).abs().mean() < own.abs().mean()


def test_no_masked_pixel_reaches_a_feature() -> None:
    backbone, hidden = small(), torch.rand(2, 2, 3) > 0.5
    hidden[:, 0, 0] = True
    nn.init.normal_(backbone.fill)
    one, other = (backbone(backbone.hide(images, hidden)) for images in _differing(hidden))
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.maps[4], other.maps[4])


def _differing(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(2, 3, 64, 96)
    where = hidden.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    return images, torch.where(where, 1e6, images)


def test_what_cannot_be_is_refused() -> None:
    backbone = small()
    with pytest.raises(ValueError, match="total stride 32; 64×96"):
        backbone(torch.zeros(1, 3, 64, 90))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        backbone(torch.zeros(1, 4, 64, 64))
    with pytest.raises(ValueError, match="mask pixels"):
        backbone.tokenize(torch.zeros(1, 3, 64, 64), keep=torch.zeros(1, 1).long())
    for options, message in (({"image_size": 70}, "32; 64×64"), ({"ratios": (0, 1, 1, 1)}, "at least 1")):
        with pytest.raises(ValueError, match=message):
            small(**options)


@pytest.mark.parametrize(("name", "widths", "depths"), [
    ("dynamicvis_base", (96, 192, 384, 768), (2, 4, 16, 4)), ("dynamicvis_large", (128, 256, 512, 1024), (2, 4, 32, 4)),
])  # fmt: skip
def test_parameters_from_first_principles(name: str, widths: tuple[int, ...], depths: tuple[int, ...]) -> None:
    with torch.device("meta"):
        counted = sum(p.numel() for p in create(name, bands=3).parameters())
    expected = 3 + 128 * 128 * widths[0]
    for before, d, depth, kernel in zip((3, *widths), widths, depths, (7, 3, 3, 3), strict=False):
        inner, rank = 2 * d, -(-d // 16)
        mixer = d * 2 * inner + 5 * inner + inner * (rank + 32) + inner * rank + inner + inner * 16 + inner + inner * d
        expected += depth * (2 * d + mixer) + kernel * kernel * before * d + d + 2 * d + 2 * d
    assert counted == expected


@pytest.mark.skipif(not (Path(ROOT) / "dynamicvis_block").is_dir(), reason="no golden fixtures; set SWATH_GOLDEN")
def test_published_layout_loads() -> None:
    """Names of the published backbone, around the fixture's mixer."""
    state = load_file(Path(ROOT) / "dynamicvis_block" / "tensors.safetensors")
    mixer = {name[6:]: tensor for name, tensor in state.items() if name.startswith("state.")}
    config = DynamicVisConfig(bands=3, image_size=32, widths=(24, 24, 24, 24), depths=(1, 1, 1, 1), pool_norm=True)
    published = {"pos_embed": torch.randn(1, 64, 24), "post_meanpool_norm.weight": torch.ones(24),
                 "post_meanpool_norm.bias": torch.ones(24)}  # fmt: skip
    for stage, (bands, kernel) in enumerate(((3, 7), (24, 3), (24, 3), (24, 3))):
        at = f"layers.{stage}."
        published |= {f"{at}1.0.spatial_mamba_mixer.mamba_layer.{name}": tensor for name, tensor in mixer.items()}
        published |= {
            f"{at}1.0.spatial_mamba_mixer.pre_norm.weight": torch.ones(24),
            f"{at}1.0.spatial_gate.weight": torch.ones(1, 24),
        }
        published |= {
            f"{at}0.projection.weight": torch.randn(24, bands, kernel, kernel),
            f"{at}0.projection.bias": torch.zeros(24),
        }
        published |= {f"{at}{part}.{name}": torch.ones(24) for part in ("0.norm", "2") for name in ("weight", "bias")}
    backbone = DynamicVis(config)
    backbone.load_state_dict(from_published(published, config))
    assert torch.equal(backbone.pos_embed, published["pos_embed"])
    with pytest.raises(ValueError, match="no parameter"):
        from_published(published | {"head.fc.weight": torch.ones(1)}, config)
