"""What the four transformers over a grid share: subsets, sizes, compilation, export, precision, recomputation, errors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swath.backbones.base import Backbone, Context, ProductKeep, create, registry
from swath.backbones.base import places as numbers
from swath.backbones.group_vit import GridBlock, GridViT, KroneckerAttention

FAMILIES = {
    "group": "group_vit_base_patch8",
    "spectral": "spectral_vit_base_patch8",
    "temporal": "temporal_vit_base_patch16",
    "wave": "wave_vit_base_patch16",
}
KINDS = [(f, "joint") for f in FAMILIES] + [(f, a) for f in ("group", "spectral", "temporal") for a in ("axial", "kronecker")]
every = pytest.mark.parametrize(("family", "attention"), KINDS)
each = pytest.mark.parametrize("family", list(FAMILIES))


def small(family: str, attention: str = "joint", **options: Any) -> GridViT:
    torch.manual_seed(0)
    name = FAMILIES[family]
    backbone = create(name, **{**registry.entry(name).build.tiny, "attention": attention, **options})
    assert isinstance(backbone, GridViT)
    # every parameter shifted, so that no zero hides anything
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return backbone.eval()


def images_for(backbone: Backbone, height: int = 16, width: int = 24, count: int = 2) -> Tensor:
    return torch.randn(count, backbone.config.bands, height, width, generator=torch.Generator().manual_seed(1))


def product_for(backbone: GridViT) -> ProductKeep:
    dates, groups = backbone.grid(16, 24)[:2]
    kept_groups = torch.tensor([[0], [0]]) if dates * groups == 1 else torch.tensor([[0, 2], [1, 2]])
    return ProductKeep(kept_groups, torch.tensor([[0, 1, 5], [2, 3, 4]]))


@every
def test_embedding_only_what_is_kept_changes_nothing(family: str, attention: str) -> None:
    backbone = small(family, attention, context=True)
    images, keep = images_for(backbone), product_for(backbone)
    late = backbone.encode(backbone.tokenize(images), keep)
    early = backbone.encode(backbone.tokenize(images, keep=keep))
    assert torch.allclose(late.tokens, early.tokens, atol=2e-6) and torch.allclose(late.pooled, early.pooled, atol=2e-6)
    assert not early.maps and "sparse" in backbone.traits
    assert not torch.allclose(late.tokens[0], late.tokens[1], atol=1e-2)


@pytest.mark.parametrize(("family", "attention"), [kind for kind in KINDS if kind[1] != "kronecker"])
@pytest.mark.parametrize("scattered", [True, False])
def test_a_subset_is_all_with_the_rest_masked(family: str, attention: str, scattered: bool) -> None:
    backbone = small(family, attention)
    images = images_for(backbone)
    tokens = backbone.tokenize(images)
    keep = torch.tensor([[0, 1, 5], [1, 3, 4]]) if scattered else product_for(backbone)
    if scattered and tokens.x.shape[1] > 6:
        keep = torch.tensor([[0, 3, 7, 12, 17], [1, 2, 8, 13, 14]])
    index = numbers(keep, tokens.grid)
    tokens.present = torch.zeros(tokens.x.shape[:2], dtype=torch.bool).scatter(1, index, True)
    masked = backbone.encode(tokens)
    kept = backbone.encode(backbone.tokenize(images, keep=keep))
    there = masked.tokens.gather(1, index[..., None].expand(-1, -1, backbone.width))
    assert torch.allclose(there, kept.tokens, atol=2e-6)
    assert torch.allclose(masked.pooled, kept.pooled, atol=2e-6) and torch.allclose(masked.prefix, kept.prefix, atol=2e-6)
    tokens.x = torch.where(tokens.present[..., None], tokens.x, 100.0)
    assert torch.allclose(backbone.encode(tokens).pooled, masked.pooled, atol=2e-6)


@every
def test_features_and_gradients(family: str, attention: str) -> None:
    backbone = small(family, attention, context=True)
    images = images_for(backbone, 40, 24)
    features = backbone.encode(backbone.tokenize(images), taps=[-1, 1])
    dates, groups, rows, columns = grid = backbone.grid(40, 24)
    count, prefix = dates * groups * rows * columns, 0 if family == "spectral" else 1
    assert (rows, columns) == (5, 3) and backbone.tokenize(images).grid == grid
    assert features.tokens.shape == (2, count, 32) and features.prefix.shape == (2, prefix, 32)
    assert features.taps[1].shape == features.taps[-1].shape == (2, prefix + count, 32)
    assert torch.allclose(features.maps[8].mean(dim=(2, 3)), features.pooled, atol=1e-5)
    of_groups = features.tokens.unflatten(1, (dates * groups, rows, columns))
    assert torch.allclose(features.maps[8][:, :, 1, 2], of_groups[:, :, 1, 2].mean(dim=1), atol=1e-6)
    box = backbone.tokenize(images).box
    assert box.shape == (count, 4) and box[count - 1].tolist() == [32, 16, 8, 8]
    features.pooled.square().sum().backward()
    gradients = {n: p.grad for n, p in backbone.named_parameters() if not n.startswith("context.")}
    idle = {n for n, g in gradients.items() if g is None or not torch.isfinite(g).all() or not g.any()}
    if attention == "axial":  # the class token asks, and is not asked
        idle.discard("cls_token")
    # without wavelengths, bands are known by their place
    assert idle <= {"patch_embed.enter.weight", "patch_embed.enter.bias"}, idle


@every
def test_recomputation_gives_the_same_gradients(family: str, attention: str) -> None:
    backbone = small(family, attention).train()
    images, weights = images_for(backbone), list(backbone.blocks.parameters())
    kept = torch.autograd.grad(backbone(images).pooled.square().sum(), weights)
    for block in backbone.blocks:
        assert isinstance(block, GridBlock)
        block.recompute = True
    again = torch.autograd.grad(backbone(images).pooled.square().sum(), weights)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


class Pooled(nn.Module):
    """What is compiled and exported: tensors in, a tensor out."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor, keep: Tensor | None = None, lat: Tensor | None = None) -> Tensor:
        return self.backbone.encode(self.backbone.tokenize(images, Context(lat=lat, lon=lat), keep)).pooled


@every
def test_compiled_exported_and_in_bf16(family: str, attention: str) -> None:
    backbone = small(family, attention, context=True, depth=1)
    model, images, lat = Pooled(backbone), images_for(backbone), torch.tensor([12.0, float("nan")])
    expected = model(images, None, lat)
    assert torch.equal(expected, model(images, None, lat))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(images, None, lat), expected, atol=1e-5)
    exported = torch.export.export(model, (images, None, lat)).module()
    assert torch.allclose(exported(images, None, lat), expected, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model(images, None, lat).float(), expected, atol=0.2)
    half = Pooled(small(family, attention, context=True, depth=1).to(torch.bfloat16))
    assert half(images.bfloat16(), None, lat).dtype == torch.bfloat16


@pytest.mark.parametrize("attention", ["joint", "axial"])
def test_a_kept_subset_compiles(attention: str) -> None:
    backbone = small("group", attention, depth=1)
    model, images, keep = Pooled(backbone), images_for(backbone), torch.tensor([[0, 3, 7], [1, 2, 17]])
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(images, keep), model(images, keep), atol=1e-5)


@each
def test_positions_interpolate(family: str) -> None:
    backbone = small(family)
    device = torch.device("cpu")

    def positions(side: int) -> Tensor:
        grid = backbone.grid(side, side)
        of_places = backbone.positions(grid, None, 1, device)[0].view(-1, *grid[2:], backbone.width)
        return of_places.permute(0, 3, 1, 2)

    middle = nn.functional.avg_pool2d(positions(64), 2)
    near = 0.05 if family != "spectral" else 0.1  # the learned table is noise here, of deviation 0.1
    assert (middle - positions(32))[:, :, 1:3, 1:3].abs().max() < near
    assert backbone(images_for(backbone, 64, 8)).maps[8].shape == (2, 32, 8, 1)


@each
def test_context_is_used_and_dropped(family: str) -> None:
    backbone = small(family, context=True)
    images = images_for(backbone)
    here, there = Context(lat=torch.zeros(2), lon=torch.zeros(2)), Context(lat=torch.zeros(2), lon=torch.full((2,), 90.0))
    of_here, of_there, nowhere = backbone(images, here).pooled, backbone(images, there).pooled, backbone(images).pooled
    assert not torch.allclose(of_here, of_there, atol=1e-3) and not torch.allclose(of_here, nowhere, atol=1e-3)
    drawn = Context(lat=here.lat, lon=here.lon, drop=torch.tensor([0.2, 0.7]))
    assert torch.equal(backbone(images, drawn).pooled, of_here)  # not in training: nothing is dropped
    trained = backbone.train()(images, drawn).pooled
    assert torch.allclose(trained[0], nowhere[0], atol=1e-5) and torch.allclose(trained[1], of_here[1], atol=1e-5)


@each
def test_what_cannot_be_is_refused(family: str) -> None:
    bands = small(family).config.bands
    with pytest.raises(ValueError, match=r"not divisible by patch 8; 32×32"):
        small(family)(torch.zeros(1, bands, 33, 32))
    with pytest.raises(ValueError, match=rf"\(B, {bands}, H, W\)"):
        small(family)(torch.zeros(1, bands + 1, 32, 32))
    with pytest.raises(ValueError, match="not divisible by patch 8; 32"):
        small(family, image_size=30)
    with pytest.raises(ValueError, match="divisible by heads"):
        small(family, width=30)
    with pytest.raises(ValueError, match=r"ctx.lat must be \(2,\)"):
        backbone = small(family, context=True)
        backbone(images_for(backbone), Context(lat=torch.zeros(3), lon=torch.zeros(3)))


def test_attention_that_cannot_be_is_refused() -> None:
    backbone, keep = small("group", "kronecker"), torch.tensor([[0, 5], [1, 2]])
    assert backbone.traits == {"sparse", "product"} and small("group").traits == {"sparse"}
    with pytest.raises(ValueError, match="ProductKeep"):
        backbone.tokenize(images_for(backbone), keep=keep)
    with pytest.raises(ValueError, match="ProductKeep"):
        backbone.encode(backbone.tokenize(images_for(backbone)), keep)
    with pytest.raises(ValueError, match="heads must be even"):
        small("group", "axial", heads=1)
    with pytest.raises(ValueError, match="no class token"):
        small("spectral", pool="class")
    with pytest.raises(ValueError, match="must be joint"):
        small("wave", "axial")


def test_axial_attention_stays_on_its_axes() -> None:
    """After one block, a token is moved by those of its place and those of its group, and by no others."""
    backbone = small("spectral", "axial", depth=1)
    tokens = backbone.tokenize(images_for(backbone, count=1))
    before = backbone.encode(tokens).tokens
    tokens.x = tokens.x.clone()
    tokens.x[0, 6 + 2] += torch.randn(32)  # second cube, third place
    moved = (backbone.encode(tokens).tokens - before).abs().amax(dim=2).view(3, 6) > 1e-6
    expected = torch.zeros(3, 6, dtype=torch.bool)
    expected[1], expected[:, 2] = True, True
    assert torch.equal(moved, expected)


def test_axial_takes_the_published_parameters() -> None:
    assert small("group", "axial").state_dict().keys() == small("group").state_dict().keys()


@pytest.mark.parametrize("prefix", [0, 1])
def test_kronecker_attention_from_first_principles(prefix: int) -> None:
    """Token (i, j) gets, of every rank and head, (group i's share of values) ⊗ (place j's); a class token is group 0, place 0."""
    torch.manual_seed(0)
    heads, rank, groups, places = 2, 3, 4, 5
    attention = KroneckerAttention(16, heads, rank)
    x = torch.randn(1, prefix + groups * places, 16)
    got = attention(x, (groups, places), ())[0]
    grid = x[0, prefix:].view(groups, places, 16)
    by_group = torch.cat([x[0, :prefix], grid.mean(dim=1)])
    by_place = torch.cat([x[0, :prefix], grid.mean(dim=0)])

    def shares(layer: nn.Module, of: Tensor) -> Tensor:
        """(ranks, heads, length, head width)."""
        parts = layer(of).view(len(of), 2 * rank + 1, heads, -1)
        q, k, v = parts[:, :rank], parts[:, rank : 2 * rank], parts[:, 2 * rank]
        score = torch.einsum("irhe,jrhe->rhij", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("rhij,jhe->rhie", score.softmax(dim=-1), v)

    of_group, of_place = shares(attention.spectral, by_group), shares(attention.spatial, by_place)

    def token(i: int, j: int) -> Tensor:
        product = torch.einsum("rhc,rhs->hcs", of_group[:, :, i], of_place[:, :, j])
        return attention.proj(product.flatten())

    cells = [(prefix + i, prefix + j) for i in range(groups) for j in range(places)]
    expected = torch.stack([token(i, j) for i, j in [(0, 0)] * prefix + cells])
    assert torch.allclose(got, expected, atol=1e-5)
