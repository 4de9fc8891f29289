"""MAE beyond parity: invalid pixels, odd sizes, one objective whatever the batch is cut into."""

from typing import Any

import pytest
import torch
from torch import Tensor

from swath.backbones.base import Context, create, registry
from swath.pretrain.masking import encode, mask_images, visible
from swath.pretrain.objective import Objective, build
from swath.pretrain.objectives.mae import MAE
from swath.pretrain.pixels import PixelHead
from swath.shards.draw import Draw
from swath.shards.prepare import Batch


def model(size: tuple[int, int] = (32, 32), bands: int = 3, **options: object) -> Objective:
    torch.manual_seed(0)
    backbone = create("vit_tiny_patch8", bands=bands, image_size=32, width=48, depth=2, heads=3)
    task = {"decoder_width": 32, "decoder_depth": 2, "decoder_heads": 2, **options}
    return build("mae", backbone, size, {"image": bands}, **task)


def batch_of(images: Tensor, valid: Tensor | None = None, first: int = 0) -> tuple[Batch, Draw]:
    ids = torch.arange(first, first + len(images))
    visits = torch.zeros_like(ids)
    masks = {} if valid is None else {"image": valid}
    return Batch({"image": images}, masks, ids, visits, torch.ones(len(images))), Draw(3, ids, visits)


def gradients(objective: Objective, images: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    objective.zero_grad()
    outcome = objective(*batch_of(images, valid))
    outcome.numerator.backward()
    return outcome.numerator.detach(), outcome.weight, {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("filler", [0.0, 1e6, float("nan"), float("inf")])
def test_invalid_pixels_change_nothing(filler: float) -> None:
    objective, images = model(), torch.randn(4, 3, 32, 32)
    valid = torch.ones(4, 1, 32, 32, dtype=torch.bool)
    valid[0, :, :11, :19] = False
    valid[2, :, 20:] = False
    expected = gradients(objective, torch.where(valid, images, 0.0), valid)
    got = gradients(objective, torch.where(valid, images, filler), valid)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert all(torch.equal(got[2][name], expected[2][name]) for name in expected[2])


def test_all_valid_equals_no_mask() -> None:
    objective, images = model(), torch.randn(4, 3, 32, 32)
    plain = gradients(objective, images, None)
    masked = gradients(objective, images, torch.ones(4, 1, 32, 32, dtype=torch.bool))
    assert torch.allclose(plain[0], masked[0], rtol=1e-6) and torch.equal(plain[1], masked[1])
    for name, gradient in plain[2].items():
        assert torch.allclose(masked[2][name], gradient, rtol=1e-4, atol=1e-6), name


def test_sample_with_too_little_valid_does_not_count() -> None:
    objective, images = model(), torch.randn(2, 3, 32, 32)
    valid = torch.ones(2, 1, 32, 32, dtype=torch.bool)
    valid[1] = False
    valid[1, :, :8, :16] = True  # two valid tokens, four would be encoded
    outcome = objective(*batch_of(images, valid))
    alone = objective(*batch_of(images[:1], valid[:1]))
    assert outcome.weight == alone.weight
    assert torch.allclose(outcome.numerator, alone.numerator, rtol=1e-6)
    nothing = objective(*batch_of(images, torch.zeros_like(valid)))
    assert nothing.weight == 0 and nothing.numerator == 0


def test_half_invalid_tokens_are_no_targets() -> None:
    """Twelve valid tokens of sixteen, four encoded: eight targets, not twelve."""
    objective = model()
    valid = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    valid[..., :8, :] = False
    assert objective(*batch_of(torch.randn(1, 3, 32, 32), valid)).weight == 8


def test_loss_does_not_depend_on_how_the_batch_is_cut() -> None:
    objective, images = model(), torch.randn(6, 3, 32, 32)
    whole = objective(*batch_of(images))
    parts = [objective(*batch_of(images[i : i + 2], first=i)) for i in (0, 2, 4)]
    assert sum(p.weight for p in parts) == whole.weight
    assert torch.allclose(torch.stack([p.numerator for p in parts]).sum(), whole.numerator, rtol=1e-5)


@pytest.mark.parametrize(("size", "bands"), [((32, 32), 1), ((24, 40), 13), ((16, 16), 2)])
@pytest.mark.parametrize("normalise", [True, False])
def test_sizes_and_bands(size: tuple[int, int], bands: int, normalise: bool) -> None:
    objective = model(size, bands, normalise_patches=normalise)
    outcome = objective(*batch_of(torch.randn(2, bands, *size)))
    outcome.numerator.backward()
    assert torch.isfinite(outcome.numerator)
    assert all(torch.isfinite(p.grad).all() for p in objective.parameters() if p.grad is not None)
    assert outcome.picture is not None
    assert {k: v.shape for k, v in outcome.picture().items()} == dict.fromkeys(
        ("input", "seen", "reconstruction"), (2, bands, *size)
    )


def test_constant_image_has_finite_gradients() -> None:
    objective = model()
    objective(*batch_of(torch.full((2, 3, 32, 32), 7.0))).numerator.backward()
    assert all(torch.isfinite(p.grad).all() for p in objective.parameters() if p.grad is not None)


def test_picture_keeps_visible_pixels() -> None:
    objective, images = model(), torch.randn(2, 3, 32, 32)
    outcome = objective(*batch_of(images))
    assert outcome.picture is not None
    picture = outcome.picture()
    seen = ~picture["seen"].isnan()
    assert torch.equal(picture["reconstruction"][seen], images[seen])
    assert torch.equal(picture["seen"][seen], images[seen])
    assert abs(seen.float().mean().item() - 0.25) < 1e-6


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.97])
def test_mask_that_leaves_nothing_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="mask_ratio"):
        model(mask_ratio=ratio)


def test_the_published_number_of_tokens_is_kept() -> None:
    """0.9 of 576 tokens leaves 57 and 0.85 of 196 leaves 29: Python floats, truncated."""
    from swath.pretrain.masking import kept

    assert (kept(576, 0.9), kept(196, 0.85), kept(196, 0.75)) == (57, 29, 49)


def test_published_parameter_counts() -> None:
    """Trainable parameters of MAE B, L and H (He et al. 2022; counted on the published models)."""
    counts = {"vit_base_patch16": 111_655_680, "vit_large_patch16": 329_239_296, "vit_huge_patch14": 656_613_964}
    for name, expected in counts.items():
        with torch.device("meta"):
            objective = build("mae", create(name, bands=3), (224, 224), {"image": 3})
        assert sum(p.numel() for p in objective.parameters()) == expected
        assert isinstance(objective, MAE)


def test_bf16_autocast_is_close() -> None:
    objective, images = model(), torch.randn(4, 3, 32, 32)
    exact = objective(*batch_of(images)).numerator
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = objective(*batch_of(images)).numerator
    assert rough.dtype == torch.float32
    assert torch.allclose(exact, rough, rtol=0.02)  # bf16 keeps 8 bits; the loss averages many of them


def of_family(name: str, **options: Any) -> tuple[Objective, Tensor]:
    """A small one of a family, and images in which enough units can be masked."""
    torch.manual_seed(0)
    tiny = registry.entry(name).build.tiny
    backbone = create(name, **tiny)
    side = tiny["image_size"] if "sparse" in backbone.traits else 4 * backbone.mask_unit
    small: dict[str, Any] = {"decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2, **options}
    return build("mae", backbone, (side, side), {"image": tiny["bands"]}, **small), torch.randn(2, tiny["bands"], side, side)


FAMILIES = list(registry.families().values())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_trained(name: str) -> None:
    """A finite loss, gradients that reach the embedding, and pictures in which what was seen is the input."""
    objective, images = of_family(name)
    outcome = objective(*batch_of(images))
    (outcome.numerator / outcome.weight).backward()
    grads = [p.grad for p in objective.backbone.parameters() if p.grad is not None]
    assert grads and all(torch.isfinite(g).all() for g in grads) and torch.isfinite(outcome.numerator)
    assert outcome.picture is not None
    picture = outcome.picture()
    seen = ~picture["seen"].isnan()
    assert abs(seen.float().mean().item() - 0.25) < 0.13, "groups of unequal bands differ by draw"
    assert torch.equal(picture["reconstruction"][seen], images[seen])
    assert not torch.equal(picture["reconstruction"], images)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_masked_is_not_seen(name: str) -> None:
    objective, images = of_family(name)
    objective.eval()
    batch, draw = batch_of(images)
    picture = objective(batch, draw).picture
    assert picture is not None
    masked = picture()["seen"].isnan()
    mask = mask_images(objective.backbone, images, None, draw, 0.75)
    changed = torch.where(masked, images + 9, images)
    with torch.no_grad():
        ctx = Context()
        before, after = (visible(encode(objective.backbone, x, ctx, mask)[1], mask)[0] for x in (images, changed))
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", FAMILIES)
def test_invalid_pixels_change_nothing_in_any_family(name: str) -> None:
    objective, images = of_family(name)
    dates = objective.backbone.grid(*images.shape[2:])[0]
    valid = torch.ones(2, dates, *images.shape[2:], dtype=torch.bool)
    side = images.shape[2]
    valid[0, -1, : side // 4, : side // 3] = False
    each = valid.repeat_interleave(images.shape[1] // dates, dim=1)
    expected = gradients(objective, torch.where(each, images, 0.0), valid)
    got = gradients(objective, torch.where(each, images, float("nan")), valid)
    assert expected[1] > 0 and torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert all(torch.equal(got[2][name], expected[2][name]) for name in expected[2])


def test_hidden_pixels_need_enough_units() -> None:
    backbone = create("vmamba_tiny", **registry.entry("vmamba_tiny").build.tiny)
    with pytest.raises(ValueError, match="32, of which 64×64 pixels have 4; 16 are needed"):
        build("mae", backbone, (64, 64), {"image": backbone.config.bands})


def test_predictions_of_a_group_are_compared_with_its_own_bands() -> None:
    objective, images = of_family("group_vit_base_patch8")
    head = objective.get_submodule("heads.image")
    assert isinstance(head, PixelHead)
    made = [torch.zeros(2, 1, 64 * len(bands)) for bands in objective.backbone.channels]
    for group, bands in enumerate(objective.backbone.channels):
        first = torch.full((2, 1), group * 16)  # of 4 × 4 places
        error = head.error(made, images, first, None, False)[0]
        assert torch.allclose(error[:, 0], images[:, list(bands), :8, :8].square().mean(dim=(1, 2, 3)), rtol=1e-5)
