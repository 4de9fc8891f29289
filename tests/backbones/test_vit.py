"""ViT: keep means the same as gathering, any size, positions interpolate, recomputation and compilation change nothing."""

import pytest
import torch

from swath.backbones.base import Context, create, sincos_grid
from swath.backbones.vit import Block, ViT


def small(**options: object) -> ViT:
    torch.manual_seed(0)
    backbone = create("vit_tiny_patch8", **{"bands": 3, "image_size": 32, "width": 48, "depth": 2, "heads": 3, **options})
    assert isinstance(backbone, ViT)
    return backbone.eval()


@pytest.mark.parametrize("keep", [[[0], [5]], [[0, 3, 4], [7, 8, 11]], [list(range(20)), list(range(20))]])
def test_embedding_only_what_is_kept_changes_nothing(keep: list[list[int]]) -> None:
    backbone, images, index = small(), torch.randn(2, 3, 32, 40), torch.tensor(keep)
    late = backbone.encode(backbone.tokenize(images), index)
    early = backbone.encode(backbone.tokenize(images, keep=index))
    assert torch.allclose(late.tokens, early.tokens, atol=1e-6) and not early.maps


def test_features() -> None:
    backbone, images = small(), torch.randn(2, 3, 32, 48)
    features = backbone.encode(backbone.tokenize(images), taps=[0, 1])
    assert features.pooled.shape == (2, 48) and features.tokens.shape == (2, 24, 48) and features.prefix.shape == (2, 1, 48)
    assert features.maps[8].shape == (2, 48, 4, 6) and features.taps[0].shape == (2, 25, 48)
    assert torch.equal(features.maps[8].flatten(2).transpose(1, 2), features.tokens)
    box = backbone.tokenize(images).box
    assert box[7].tolist() == [8, 8, 8, 8] and box.shape == (24, 4)


@pytest.mark.parametrize(("pool", "width"), [("mean", 48), ("class", 48), ("texture", 144)])
def test_pooling(pool: str, width: int) -> None:
    backbone = small(pool=pool)
    constant = torch.zeros(2, 3, 32, 32, requires_grad=True)
    pooled = backbone(constant).pooled
    pooled.sum().backward()
    assert pooled.shape == (2, width) == (2, backbone.pooled_width)
    assert constant.grad is not None and torch.isfinite(constant.grad).all()


def test_texture_pool_from_first_principles() -> None:
    backbone = small(pool="texture")
    features = backbone(torch.randn(1, 3, 16, 24))
    grid = features.tokens[0].view(2, 3, 48)
    near = [(grid[0, c] - grid[1, c]).abs() for c in range(3)]
    near += [(grid[r, c] - grid[r, c + 1]).abs() for r in range(2) for c in range(2)]
    expected = torch.cat([features.tokens[0].mean(0), features.tokens[0].std(0, correction=0), torch.stack(near).mean(0)])
    assert torch.allclose(features.pooled[0], expected, atol=1e-5)  # 1e-6 is added under the root
    assert torch.isfinite(backbone(torch.randn(1, 3, 8, 8)).pooled).all()


@pytest.mark.parametrize("kind", ["sincos", "learned"])
def test_positions_interpolate(kind: str) -> None:
    backbone = small(positions=kind)
    own = backbone.positions(4, 4, torch.device("cpu"))
    double = backbone.positions(8, 8, torch.device("cpu")).view(8, 8, 48)
    assert own.shape == (16, 48) and double.shape == (8, 8, 48)
    middle = torch.nn.functional.avg_pool2d(double.permute(2, 0, 1)[None], 2)[0].permute(1, 2, 0)
    near = 0.05 if kind == "sincos" else 0.02  # a curve's chord midpoints, and bicubic overshoot, are near it, not on it
    assert (middle.reshape(16, 48) - own).abs()[5].max() < near


def test_sincos_table_has_columns_first() -> None:
    table = sincos_grid(8, torch.arange(2), torch.arange(3)).view(2, 3, 8)
    assert torch.equal(table[0, :, :4], table[1, :, :4]) and not torch.equal(table[0, 0, :4], table[0, 1, :4])
    assert torch.equal(table[:, 0, 4:], table[:, 2, 4:]) and not torch.equal(table[0, 0, 4:], table[1, 0, 4:])


def test_patches_equal_a_convolution() -> None:
    backbone, images = small(), torch.randn(2, 3, 24, 32)
    project = backbone.patch_embed.proj
    by_conv = project(images).flatten(2).transpose(1, 2)
    assert torch.allclose(backbone.patch_embed(images), by_conv, atol=1e-5)


def test_recomputation_gives_the_same_gradients() -> None:
    backbone, images = small().train(), torch.randn(2, 3, 32, 32)
    weights = list(backbone.blocks.parameters())
    kept = torch.autograd.grad(backbone(images).pooled.sum(), weights)
    for block in backbone.blocks:
        assert isinstance(block, Block)
        block.recompute = True
    again = torch.autograd.grad(backbone(images).pooled.sum(), weights)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 30}, "not divisible by patch 8; 32"),
        ({"width": 50}, "divisible by heads"),
        ({"bands": 0}, "at least 1"),
        ({"widht": 64}, "did you mean width"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_wrong_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not divisible by patch 8; 32×32"):
        small()(torch.zeros(1, 3, 33, 32))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        small()(torch.zeros(1, 4, 32, 32))
    with pytest.raises(ValueError, match="did you mean vit_base_patch16"):
        create("vit_base_patch_16", bands=3)


def test_context_is_added_to_every_token() -> None:
    plain, informed = small(), small(context=True)
    informed.load_state_dict(plain.state_dict(), strict=False)
    images, here = torch.randn(2, 3, 32, 32), Context(lat=torch.tensor([46.9, -3.0]), lon=torch.tensor([7.4, 37.0]))
    without, known = informed.tokenize(images).x, informed.tokenize(images, here).x
    offset = known - plain.tokenize(images).x
    assert torch.allclose(offset, offset[:, :1].expand_as(offset), atol=1e-5), "one vector per sample"
    assert not torch.allclose(known[0] - without[0], known[1] - without[1], atol=1e-3), "another place, another vector"


def test_texture_pooling_needs_every_token() -> None:
    backbone = small(pool="texture")
    tokens = backbone.tokenize(torch.randn(1, 3, 32, 32))
    tokens.present = torch.ones(1, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match="texture pooling needs all tokens"):
        backbone.encode(tokens)
