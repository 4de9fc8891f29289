"""LWGANet: diagonals stand upright after shearing and come back; what is pooled goes back where it stood; published layout."""

from typing import Any

import pytest
import torch
from torch import nn

from swath.backbones.base import create
from swath.backbones.lwganet import LWGANet, LWGANetConfig, blur, from_published, pool, shear, unpool, unshear


def small(**options: Any) -> LWGANet:
    torch.manual_seed(0)
    backbone = create("lwganet_small", **{**LWGANet.tiny, **options})
    assert isinstance(backbone, LWGANet)
    return backbone.eval()


@pytest.mark.parametrize("size", [(3, 3), (2, 5), (5, 2), (1, 4)])
def test_shear_by_hand_and_back(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    moved = shear(x)
    assert moved.shape[2:] == (size[0], size[0] + size[1] - 1) and torch.equal(unshear(moved), x)
    for row in range(size[0]):
        assert torch.equal(moved[:, :, row, row : row + size[1]], x[:, :, row])
        assert moved[:, :, row, :row].eq(0).all() and moved[:, :, row, row + size[1] :].eq(0).all()


def test_unpool_puts_the_largest_back() -> None:
    x = torch.randn(2, 3, 4, 6)
    back = unpool(*pool(x))
    assert torch.equal(back, nn.functional.max_unpool2d(*nn.functional.max_pool2d(x, 2, return_indices=True), (2, 2)))
    assert torch.equal(back[back != 0], x[back != 0]) and (back != 0).sum() == x.numel() // 4


def test_features_of_a_wide_image() -> None:
    backbone = small()
    features = backbone.encode(backbone.tokenize(torch.randn(2, 3, 64, 96)), taps=[-1, 3])
    assert {stride: level.shape[1:] for stride, level in features.maps.items()} == {
        4: (16, 16, 24), 8: (32, 8, 12), 16: (64, 4, 6), 32: (128, 2, 3),
    }  # fmt: skip
    assert torch.equal(features.maps[32].flatten(2).mT, features.tokens) and torch.equal(features.taps[3], features.tokens)
    assert torch.allclose(features.pooled, features.tokens.mean(1)) and features.taps[-1].shape == (2, 384, 16)
    assert backbone(torch.randn(1, 3, 32, 32)).tokens.shape == (1, 1, 128)


def test_no_masked_pixel_reaches_a_feature() -> None:
    backbone, hidden = small(), torch.tensor([[[True, False, True], [False, True, True]]])
    nn.init.normal_(backbone.fill)
    images = torch.randn(1, 3, 64, 96)
    other = torch.where(hidden.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None], 1e6, images)
    assert torch.equal(backbone(backbone.hide(images, hidden)).tokens, backbone(backbone.hide(other, hidden)).tokens)


def test_gradients_reach_every_weight() -> None:
    backbone = small().train()
    features = backbone(torch.randn(2, 3, 64, 96))
    features.tokens.square().sum().backward()
    missing = [name for name, weight in backbone.named_parameters() if weight.grad is None or not weight.grad.isfinite().all()]
    assert missing == ["fill"]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="total stride 32; 64×96"):
        small()(torch.zeros(1, 3, 64, 90))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        small()(torch.zeros(1, 4, 64, 64))
    with pytest.raises(ValueError, match="mask pixels"):
        small().tokenize(torch.zeros(1, 3, 64, 64), keep=torch.zeros(1, 1).long())
    with pytest.raises(ValueError, match="divisible by 8"):
        small(width=20)


def test_published_layout_loads() -> None:
    """Ours, renamed as a published classifier's, is loaded back; its head is left out, another blur refused."""
    config = LWGANetConfig(**{**LWGANet.tiny, "depths": (1, 2, 1, 1)})
    ours = LWGANet(config).state_dict()
    published = {"head.weight": torch.ones(2), "avgpool_pre_head.1.weight": torch.ones(2)}
    globals_ = ("GA12", "GA12", "GA3", "GA4")
    for name, tensor in ours.items():
        kind, stage, rest = name.split(".", 2) if name != "fill" else ("fill", "", "")
        if kind == "stem":
            published[f"Stem.{('proj', 'norm')[int(stage)]}.{rest}"] = tensor
        elif kind == "downs":
            published[f"stages.{2 * int(stage) + 1}.{rest}"] = tensor
        elif kind == "stages":
            rest = rest.replace(".LA.", ".LA.conv.").replace(".GA.", f".{globals_[int(stage)]}.")
            published[f"stages.{2 * int(stage)}.blocks.{rest}"] = tensor
    published["stages.0.blocks.0.MRA.max_m2.filt"] = blur(4)
    again = from_published(published, config)
    assert again.keys() == ours.keys() and all(torch.equal(again[name], ours[name]) for name in ours)
    with pytest.raises(ValueError, match="binomial"):
        from_published({"stages.0.blocks.0.MRA.max_m2.filt": torch.ones(4, 1, 4, 4)}, config)
