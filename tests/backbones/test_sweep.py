"""Every registered family, swept: a small one trains, is saved and loaded, and its traits mean what they say."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from swath.backbones.base import Backbone, ProductKeep, Recomputed, create, gather, places, registry

FAMILIES = {name: build for build, name in registry.families().items()}


def small(name: str, **options: Any) -> Backbone:
    torch.manual_seed(0)
    return create(name, **FAMILIES[name].tiny | options)


def images(backbone: Backbone, batch: int = 2, scale: tuple[int, int] = (1, 1)) -> Tensor:
    side = backbone.config.image_size
    return torch.randn(batch, backbone.config.bands, side * scale[0], side * scale[1], generator=torch.Generator().manual_seed(1))


def keep_some(backbone: Backbone, x_bchw: Tensor) -> Tensor | ProductKeep:
    """Half of the places, another half for each sample, ascending; a product where one is needed."""
    dates, groups, rows, columns = backbone.grid(*x_bchw.shape[2:])

    def half(count: int) -> Tensor:
        drawn = torch.rand(len(x_bchw), count, generator=torch.Generator().manual_seed(2)).argsort(dim=1)
        return drawn[:, : max(1, count // 2)].sort(dim=1).values

    if "product" in backbone.traits:
        return ProductKeep(half(groups), half(rows * columns))
    return half(dates * groups * rows * columns)


@pytest.mark.parametrize("name", registry.names())
def test_every_name_builds(name: str) -> None:
    """At its own size, on the meta device: nothing is allocated."""
    bands = registry.entry(name).preset.get("bands", 4)
    with torch.device("meta"):
        backbone = create(name, bands=bands, image_size=224 // 14 * 14)
        side = 2 * math.lcm(backbone.mask_unit, 16)
        assert backbone(torch.zeros(1, bands, side, 2 * side)).pooled.shape == (1, backbone.pooled_width)


@pytest.mark.parametrize("name", FAMILIES)
def test_trains_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    backbone = small(name).train()
    x = images(backbone)
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = backbone(x).pooled.float().sub(1).square().mean()
        loss.backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in backbone.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    backbone.eval()
    save_file({key: tensor.contiguous() for key, tensor in backbone.state_dict().items()}, tmp_path / "weights.safetensors")
    again = small(name).eval()
    again.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    with torch.no_grad():
        first, second, third = backbone(x), again(x), backbone(x)
    assert torch.equal(first.pooled, second.pooled) and torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.pooled, third.pooled), "inference is the same each time"


@pytest.mark.parametrize("name", FAMILIES)
def test_features_have_the_shapes_that_are_declared(name: str) -> None:
    backbone = small(name).eval()
    for scale in ((1, 1), (1, 2), (2, 1)):
        x = images(backbone, scale=scale)
        features = backbone(x)
        assert features.pooled.shape == (2, backbone.pooled_width)
        grid = backbone.grid(*x.shape[2:])
        count = grid[0] * grid[1] * grid[2] * grid[3]
        assert features.tokens.shape[:2] == (2, count) and backbone.tokenize(x).box.shape == (count, 4)
        assert features.maps, "maps of the whole image"
        for stride, level in features.maps.items():
            assert level.shape[2:] == (x.shape[2] // stride, x.shape[3] // stride), stride


@pytest.mark.parametrize("name", [name for name, build in FAMILIES.items() if "sparse" in build.traits])
def test_sparse_embeds_only_what_is_kept(name: str) -> None:
    backbone = small(name).eval()
    x = images(backbone)
    keep = keep_some(backbone, x)
    early, late = backbone.encode(backbone.tokenize(x, keep=keep)), backbone.encode(backbone.tokenize(x), keep)
    assert early.tokens.shape == late.tokens.shape and torch.allclose(early.tokens, late.tokens, atol=1e-5)
    assert torch.allclose(early.pooled, late.pooled, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, build in FAMILIES.items() if "sparse" in build.traits])
def test_what_is_kept_is_all_with_the_others_absent(name: str) -> None:
    """Absent as attention keys, as identity steps of a scan, skipped by the window of a convolution; whatever stands there."""
    backbone = small(name).eval()
    x = images(backbone)
    keep = keep_some(backbone, x)
    kept = backbone.encode(backbone.tokenize(x, keep=keep))
    tokens = backbone.tokenize(x)
    index = places(keep, tokens.grid)
    tokens.present = torch.zeros(tokens.x.shape[:2], dtype=torch.bool).scatter(1, index, True)
    tokens.x = torch.where(tokens.present[..., None], tokens.x, float("nan"))
    masked = backbone.encode(tokens)
    assert torch.allclose(gather(masked.tokens, index), kept.tokens, atol=1e-5)
    assert torch.allclose(masked.pooled, kept.pooled, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, build in FAMILIES.items() if "sparse" not in build.traits])
def test_no_masked_pixel_reaches_a_feature(name: str) -> None:
    backbone = small(name).eval()
    x = images(backbone, scale=(2, 2))
    unit = backbone.mask_unit
    rows, columns = x.shape[2] // unit, x.shape[3] // unit
    hidden = torch.rand(2, rows, columns, generator=torch.Generator().manual_seed(3)) > 0.4
    pixels = hidden.repeat_interleave(unit, 1).repeat_interleave(unit, 2)[:, None]
    poisoned = torch.where(pixels, float("nan"), x)
    assert torch.isfinite(backbone(backbone.hide(poisoned, hidden)).pooled).all()
    assert backbone.fill.shape == (x.shape[1],) and isinstance(backbone.fill, torch.nn.Parameter)


@pytest.mark.parametrize("name", FAMILIES)
def test_recomputation_and_autocast(name: str) -> None:
    backbone = small(name).train()
    x = images(backbone)
    blocks = [block for block in backbone.modules() if isinstance(block, Recomputed)]
    assert blocks, "activation checkpointing is by blocks"
    weights = [p for p in backbone.parameters() if p.requires_grad]
    plain = torch.autograd.grad(backbone(x).pooled.sum(), weights, allow_unused=True)
    for block in blocks:
        block.recompute = True
    again = torch.autograd.grad(backbone(x).pooled.sum(), weights, allow_unused=True)
    for a, b in zip(plain, again, strict=True):
        assert (a is None) == (b is None) and (a is None or b is None or torch.allclose(a, b, atol=1e-6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(backbone(x).pooled).all()


PYRAMIDS = [name for name, build in FAMILIES.items() if not build.traits]  # the longest to trace


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in PYRAMIDS[1:] else n for n in FAMILIES])
def test_compile_and_export(name: str) -> None:
    backbone = small(name).eval()
    x = images(backbone)

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, x: Tensor) -> Tensor:
            return self.backbone(x).pooled

    with torch.no_grad():
        expected = backbone(x).pooled
        compiled = torch.compile(Pooled(), fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), expected, atol=1e-5)
        program = torch.export.export(Pooled(), (x,))
        assert torch.allclose(program.module()(x), expected, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_wrong_images_are_refused(name: str) -> None:
    backbone = small(name)
    x = images(backbone)
    with pytest.raises(ValueError, match="divisible"):
        backbone(torch.nn.functional.pad(x, (0, 1)))
    if "any_bands" not in backbone.traits:
        with pytest.raises(ValueError, match=str(backbone.config.bands)):
            backbone(torch.cat([x, x[:, :1]], dim=1))
    if "product" in backbone.traits:
        with pytest.raises(ValueError, match="ProductKeep"):
            backbone.encode(backbone.tokenize(x), torch.tensor([[0, 3], [1, 2]]))
