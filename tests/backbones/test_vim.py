"""Vim's own: counts, its residual stream, published names. What it shares with the Mamba column is in test_mamba.py."""

import pytest
import torch
import torch.nn.functional as F

from swath.backbones.base import create
from swath.backbones.vim import RMSNorm, Vim, VimConfig, from_published


@pytest.mark.parametrize(("name", "millions"), [("vim_tiny", 7.15), ("vim_small", 25.8), ("vim_base", 97.6)])
def test_published_parameter_counts(name: str, millions: float) -> None:
    """With the classifier of 1000 classes."""
    with torch.device("meta"):
        backbone = create(name, bands=3)
        count = sum(p.numel() for p in backbone.parameters()) + 1000 * (backbone.width + 1)
    assert round(count / 1e6, 2 if millions < 10 else 1) == millions


def small(image_size: int = 24) -> Vim:
    torch.manual_seed(0)
    return Vim(VimConfig(bands=3, image_size=image_size, patch=8, width=16, depth=2)).eval()


def test_rms_norm() -> None:
    norm, x_bd = RMSNorm(8), torch.randn(3, 8)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(8))
    assert torch.allclose(norm(x_bd), x_bd / (x_bd.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.weight, atol=1e-6)


def test_forward_and_backward_from_first_principles() -> None:
    """An image turned by half a turn, with positions and directions exchanged, has the same features in reverse order."""
    backbone, turned = small(image_size=32), small(image_size=32)
    with torch.no_grad():
        # 16 patches: the class token, after 8 of them, is in the middle both ways
        weight = backbone.patch_embed.proj.weight
        turned.patch_embed.proj.weight.copy_(weight.flip(2, 3))
        turned.pos_embed.copy_(torch.cat([backbone.pos_embed[:, :1], backbone.pos_embed[:, 1:].flip(1)], dim=1))
        for one, other in zip(turned.blocks, backbone.blocks, strict=True):
            source = dict(other.mixer.named_parameters())  # type: ignore[union-attr]
            for name, parameter in one.mixer.named_parameters():  # type: ignore[union-attr]
                if "proj" in name:
                    parameter.copy_(source[name])
                else:
                    parameter.copy_(source[name].view(2, -1).flip(0).view_as(parameter))
        images = torch.randn(1, 3, 32, 32)
        straight, reverse = backbone(images), turned(images.flip(2, 3))
    assert torch.allclose(straight.tokens, reverse.tokens.flip(1), atol=1e-6)
    assert torch.allclose(straight.pooled, reverse.pooled, atol=1e-6)


def test_residuals_stay_in_fp32() -> None:
    backbone = small().bfloat16()
    features = backbone.encode(backbone.tokenize(torch.randn(1, 3, 24, 24).bfloat16()), taps=[1])
    assert features.taps[1].dtype == torch.float32 and features.tokens.dtype == torch.bfloat16


def test_published_names_are_read_strictly() -> None:
    backbone = small()
    first, *others = backbone.pos_embed.split([1, 4, 5], dim=1)
    state = {"cls_token": backbone.cls_token, "pos_embed": torch.cat([others[0], first, others[1]], dim=1)}
    state |= {"patch_embed.proj.weight": backbone.patch_embed.proj.weight, "patch_embed.proj.bias": torch.zeros(16)}
    state |= {"norm_f.weight": torch.ones(16), "head.weight": torch.zeros(2, 16)}
    for i in range(2):
        state[f"layers.{i}.norm.weight"] = torch.ones(16)
        state |= {
            f"layers.{i}.mixer.{n}": torch.zeros(s) for n, s in (("in_proj.weight", (64, 16)), ("out_proj.weight", (16, 32)))
        }
        for s in ("", "_b"):
            shapes = {f"A{s}_log": (32, 16), f"D{s}": (32,), f"conv1d{s}.weight": (32, 1, 4), f"conv1d{s}.bias": (32,),
                      f"x_proj{s}.weight": (33, 32), f"dt_proj{s}.weight": (32, 1), f"dt_proj{s}.bias": (32,)}  # fmt: skip
            state |= {f"layers.{i}.mixer.{n}": torch.full(shape, float(len(s))) for n, shape in shapes.items()}
    ours = from_published(state, backbone.config)
    backbone.load_state_dict(ours)
    assert torch.equal(ours["pos_embed"], backbone.pos_embed)
    assert F.one_hot(torch.tensor([0, 1]))[:, 1].repeat_interleave(32).mul(2).equal(ours["blocks.1.mixer.D"].long())
    del state["layers.1.mixer.D_b"]
    with pytest.raises(ValueError, match=r"layers\.1\.mixer\.D_b is missing"):
        from_published(state, backbone.config)
