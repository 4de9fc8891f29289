"""SatMAE beyond parity: which band is compared with which, dates, masks of places, invalid pixels, batches cut otherwise."""

from typing import Any

import pytest
import torch
from torch import Tensor

from swath.backbones.base import create, registry
from swath.pretrain.masking import mask_images
from swath.pretrain.objective import build
from swath.pretrain.objectives.satmae import SatMAE, positions, standardised
from swath.shards.draw import Draw
from swath.shards.prepare import Batch

TINY: dict[str, Any] = {"width": 32, "depth": 1, "heads": 2, "patch": 8, "image_size": 32}
DECODER: dict[str, Any] = {"decoder_width": 48, "decoder_depth": 2, "decoder_heads": 2, "group_width": 8, "date_width": 8}
GROUPS = ((0, 1, 4), (5, 2), (3,))  # of unequal size, out of order


def of_groups(size: tuple[int, int] = (32, 32), groups: tuple[tuple[int, ...], ...] = GROUPS, **options: object) -> SatMAE:
    torch.manual_seed(0)
    bands = sum(map(len, groups))
    backbone = create("group_vit_base_patch8", bands=bands, groups=groups, group_width=8, **TINY)
    objective = build("satmae", backbone, size, {"image": bands}, **{**DECODER, **options})
    assert isinstance(objective, SatMAE)
    return objective


def of_dates(**options: object) -> SatMAE:
    torch.manual_seed(0)
    backbone = create("temporal_vit_base_patch16", bands=6, frames=3, date_width=4, **TINY)
    objective = build("satmae", backbone, (32, 32), {"image": 6}, **{**DECODER, **options})
    assert isinstance(objective, SatMAE)
    return objective


def batch_of(images: Tensor, valid: Tensor | None = None, ids: Tensor | None = None, **meta: Tensor) -> tuple[Batch, Draw]:
    ids = torch.arange(len(images)) if ids is None else ids
    visits = torch.zeros_like(ids)
    masks = {} if valid is None else {"image": valid}
    return Batch({"image": images}, masks, ids, visits, torch.ones(len(images)), dict(meta)), Draw(3, ids, visits)


def gradients(objective: SatMAE, images: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    objective.zero_grad()
    outcome = objective(*batch_of(images, valid))
    outcome.numerator.backward()
    return outcome.numerator.detach(), outcome.weight, {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}


def probe(objective: SatMAE) -> list[Tensor]:
    """Per group, the bands that its outputs are drawn to: the head predicts 0, band k is everywhere k + 1, and the gradient of
    an output's bias is -(value of the band it is compared with), up to one factor per token and group."""
    for linear in objective.head.linear:
        torch.nn.init.zeros_(linear.weight)  # type: ignore[arg-type]
    bands = sum(map(len, objective.head.channels))
    images = (torch.arange(bands) + 1.0)[None, :, None, None].expand(4, -1, 32, 32)
    objective(*batch_of(images)).numerator.backward()
    found = []
    for linear in objective.head.linear:
        gradient_vc = linear.bias.grad.view(64, -1)  # type: ignore[union-attr]
        assert torch.allclose(gradient_vc, gradient_vc[:1].expand_as(gradient_vc))
        found.append(gradient_vc[0])
    return found


def test_every_band_is_compared_with_itself() -> None:
    for gradient_c, group in zip(probe(of_groups()), GROUPS, strict=True):
        band_c = torch.tensor(group) + 1.0
        assert torch.allclose(gradient_c / gradient_c[0], band_c / band_c[0])
        assert (gradient_c < 0).all()


def test_released_decoders_take_bands_in_the_order_of_the_image() -> None:
    """With the published groups, group 0 learns bands 0 … 3 and group 1 bands 4 … 7."""
    groups = ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9))
    objective = of_groups(groups=groups, compat="order")
    mask = mask_images(objective.backbone, torch.zeros(4, 10, 32, 32), None, batch_of(torch.zeros(4, 1, 1, 1))[1], 0.75)
    first, second, third = probe(objective)
    masked = torch.stack([(mask.masked_bm // 16 == group).sum() for group in range(3)]).float()
    # a band counts where its own group is masked, with the share of that group
    counted = torch.tensor([masked[0]] * 3 + [masked[1]] * 3 + [masked[0], masked[1]]) / 4
    expected = -2 * torch.arange(1, 9) * counted / 64
    assert torch.allclose(torch.cat([first, second]), expected)
    assert torch.allclose(third[1] / third[0], torch.tensor(10 / 9))


def test_a_perfect_prediction_costs_nothing_whatever_is_masked() -> None:
    objective = of_groups()
    for linear, group in zip(objective.head.linear, GROUPS, strict=True):
        torch.nn.init.zeros_(linear.weight)  # type: ignore[arg-type]
        linear.bias.data = (torch.tensor(group) + 1.0).repeat(64)  # type: ignore[union-attr]
    images = (torch.arange(6) + 1.0)[None, :, None, None].expand(2, -1, 32, 32)
    assert objective(*batch_of(images)).numerator == 0
    changed = images.clone()
    changed[:, 5] += 1  # half of group 1: an error of 1 in one of two bands of its masked tokens
    mask = mask_images(objective.backbone, images, None, batch_of(images)[1], 0.75)
    assert objective(*batch_of(changed)).numerator == (mask.masked_bm // 16 == 1).sum() / 2


def test_masks_of_places_hide_all_groups_and_of_tokens_do_not() -> None:
    for spatial in (True, False):
        objective = of_groups(spatial_mask=spatial)
        outcome = objective(*batch_of(torch.randn(3, 6, 32, 32)))
        assert outcome.picture is not None
        hidden_bchw = outcome.picture()["seen"].isnan()
        assert (hidden_bchw == hidden_bchw[:, :1]).all() == spatial
        assert outcome.weight == 3 * 36
        assert (hidden_bchw[:, [0]] == hidden_bchw[:, [1, 4]]).all(), "bands of one group go together"
    dates = of_dates(spatial_mask=True)(*batch_of(torch.randn(2, 6, 32, 32))).picture
    assert dates is not None
    hidden_bchw = dates()["seen"].isnan()
    assert (hidden_bchw == hidden_bchw[:, :1]).all()


def test_the_decoder_is_told_place_group_and_date() -> None:
    device = torch.device("cpu")
    table_nd, prefix = positions(48, (1, 3, 2, 4), device, 8)
    assert table_nd.shape == (24, 48) and len(table_nd.unique(dim=0)) == 24
    assert not prefix[..., :40].any() and prefix[..., 40:].any(), "the class token is one more group, at no place"
    assert torch.equal(table_nd[:8, :40], table_nd[16:, :40])
    time = torch.tensor([[0.0, 40e6, 80e6], [0.0, 40e6, 90e6]], dtype=torch.float64)
    table_bnd, prefix = positions(48, (3, 1, 2, 4), device, 8, 8, time)
    assert table_bnd.shape == (2, 24, 48) and not prefix.any()
    assert torch.equal(table_bnd[0, :16], table_bnd[1, :16]) and not torch.equal(table_bnd[0, 16:], table_bnd[1, 16:])
    unknown = positions(48, (3, 1, 2, 4), device, 8, 8, torch.full((2, 3), float("nan")))[0]
    assert torch.equal(unknown[0], positions(48, (3, 1, 2, 4), device, 8, 8)[0])


def test_dates_reach_the_loss() -> None:
    objective, images = of_dates(), torch.randn(2, 6, 32, 32)
    times = torch.arange(6, dtype=torch.float64).view(2, 3) * 40e6
    losses = [
        float(objective(*batch_of(images, time=time)).numerator.detach()) for time in (times, times + 3e7, times * float("nan"))
    ]
    assert len(set(losses)) == 3 and all(0 < loss < float("inf") for loss in losses)


@pytest.mark.parametrize("filler", [1e6, float("nan")])
@pytest.mark.parametrize("options", [{}, {"spatial_mask": True}, {"compat": "order", "normalise_patches": True}])
def test_invalid_pixels_change_nothing(filler: float, options: dict[str, Any]) -> None:
    objective, images = of_groups(**options), torch.randn(3, 6, 32, 32)
    valid = torch.ones(3, 1, 32, 32, dtype=torch.bool)
    valid[0, :, :11, :19] = False
    valid[2, :, 20:] = False
    expected = gradients(objective, torch.where(valid, images, 0.0), valid)
    got = gradients(objective, torch.where(valid, images, filler), valid)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert all(torch.equal(got[2][name], expected[2][name]) for name in expected[2])
    assert torch.isfinite(got[0]) and got[1] > 0


def test_dates_have_validity_of_their_own() -> None:
    objective, images = of_dates(), torch.randn(2, 6, 32, 32)
    valid = torch.ones(2, 3, 32, 32, dtype=torch.bool)
    valid[:, 1, :, :16] = False  # eight of 48 tokens
    each = valid.repeat_interleave(2, dim=1)
    expected = gradients(objective, torch.where(each, images, 0.0), valid)
    got = gradients(objective, torch.where(each, images, float("nan")), valid)
    assert got[1] == 2 * (40 - 12) and torch.equal(got[0], expected[0])
    assert all(torch.equal(got[2][name], expected[2][name]) for name in expected[2])


@pytest.mark.parametrize("options", [{}, {"normalise_patches": True}, {"compat": "order", "normalise_patches": True}])
def test_all_valid_equals_no_mask(options: dict[str, Any]) -> None:
    for objective, dates in ((of_groups(**options), 1), *([] if "compat" in options else [(of_dates(**options), 3)])):
        images = torch.randn(2, 6, 32, 32)
        plain = gradients(objective, images, None)
        masked = gradients(objective, images, torch.ones(2, dates, 32, 32, dtype=torch.bool))
        assert torch.allclose(plain[0], masked[0], rtol=1e-6) and torch.equal(plain[1], masked[1])
        for name, gradient in plain[2].items():
            assert torch.allclose(masked[2][name], gradient, rtol=1e-4, atol=1e-6), name


def test_standardised_is_over_all_bands_of_a_place() -> None:
    images = torch.randn(2, 3, 16, 24) * 5 + 2
    target, mean, spread = standardised(images, None, 8)
    patch_bv = target[:, :, 8:16, 16:24].flatten(1)
    assert torch.allclose(patch_bv.mean(1), torch.zeros(2), atol=1e-6) and torch.allclose(patch_bv.std(1), torch.ones(2))
    assert torch.allclose(target * spread + mean, images, atol=1e-5)


def test_batches_may_be_cut_and_permuted() -> None:
    for objective in (of_groups(), of_dates(), of_groups(compat="order")):
        images, ids = torch.randn(6, 6, 32, 32), torch.arange(6)
        valid = torch.ones(6, 1, 32, 32, dtype=torch.bool)
        valid[1, :, :17] = False
        whole = objective(*batch_of(images, valid))
        order = torch.tensor([3, 1, 5, 0, 2, 4])
        parts = [objective(*batch_of(images[i], valid[i], ids[i])) for i in order.split([1, 3, 2])]
        assert sum(part.weight for part in parts) == whole.weight
        assert torch.allclose(torch.stack([part.numerator for part in parts]).sum(), whole.numerator, rtol=1e-5)


def test_nodata_constant_and_single_samples() -> None:
    for objective, dates in ((of_groups(normalise_patches=True), 1), (of_dates(normalise_patches=True), 3)):
        objective.zero_grad()
        nothing = objective(*batch_of(torch.full((2, 6, 32, 32), float("nan")), torch.zeros(2, dates, 32, 32, dtype=torch.bool)))
        flat = objective(*batch_of(torch.full((1, 6, 32, 32), 7.0)))
        (nothing.numerator + flat.numerator).backward()
        assert nothing.numerator == 0 and nothing.weight == 0 and flat.weight == 36
        assert all(torch.isfinite(p.grad).all() for p in objective.parameters() if p.grad is not None)


@pytest.mark.parametrize("size", [(24, 40), (8, 48), (64, 16)])
def test_sizes(size: tuple[int, int]) -> None:
    for compat in (None, "order"):
        objective, images = of_groups(compat=compat), torch.randn(2, 6, *size)
        outcome = objective(*batch_of(images))
        outcome.numerator.backward()
        assert torch.isfinite(outcome.numerator) and outcome.picture is not None
        picture = outcome.picture()
        seen = ~picture["seen"].isnan()
        assert torch.equal(picture["reconstruction"][seen], images[seen]) and torch.equal(picture["seen"][seen], images[seen])
        assert not torch.equal(picture["reconstruction"], images)


def test_the_picture_shows_the_prediction_in_its_place() -> None:
    """A head that predicts band k as k + 1 everywhere."""
    objective = of_groups()
    for linear, group in zip(objective.head.linear, GROUPS, strict=True):
        torch.nn.init.zeros_(linear.weight)  # type: ignore[arg-type]
        linear.bias.data = (torch.tensor(group) + 1.0).repeat(64)  # type: ignore[union-attr]
    outcome = objective(*batch_of(torch.zeros(2, 6, 32, 32)))
    assert outcome.picture is not None
    picture = outcome.picture()
    hidden = picture["seen"].isnan()
    value = (torch.arange(6) + 1.0)[None, :, None, None].expand_as(hidden)
    assert torch.equal(picture["reconstruction"], torch.where(hidden, value, 0.0))


@pytest.mark.parametrize(
    "options",
    [{"mask_ratio": 0.0}, {"mask_ratio": 1.0}, {"mask_ratio": 0.98}, {"mask_ratio": 0.95, "spatial_mask": True},
     {"group_width": 46}, {"group_width": 7}],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"mask_ratio|decoder_width"):
        of_groups(**options)


def test_compat_is_for_groups() -> None:
    with pytest.raises(ValueError, match="several groups"):
        of_dates(compat="order")


@pytest.mark.parametrize("name", list(registry.families().values()))
def test_every_family_learns_or_is_refused(name: str) -> None:
    """Several groups or dates and sparse: loss falls on a fixed batch. Others: one line, at the start."""
    torch.manual_seed(0)
    tiny = registry.entry(name).build.tiny
    backbone, side = create(name, **tiny), tiny["image_size"]
    arguments: Any = ("satmae", backbone, (side, side), {"image": tiny["bands"]})
    if name.split("_vit")[0] not in ("group", "temporal", "spectral"):
        with pytest.raises(ValueError, match="cannot train"):
            build(*arguments, **DECODER)
        return
    objective = build(*arguments, **DECODER)
    batch, draw = batch_of(torch.randn(4, tiny["bands"], side, side))
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        outcome = objective(batch, draw)
        optimizer.zero_grad()
        (outcome.numerator / outcome.weight).backward()
        optimizer.step()
        losses.append(float(outcome.numerator.detach() / outcome.weight))
    assert losses[-1] < 0.97 * losses[0]
    assert all(p.grad is not None for name, p in backbone.named_parameters() if "proj" in name)


def test_published_parameter_counts() -> None:
    """Trainable parameters of the published models: their totals without the fixed tables."""
    counts = [
        ("group_vit_base_patch8", 10, 96, 111_624_448 - 145 * (512 + 384) - 3 * 256 - 4 * 128),
        ("group_vit_large_patch8", 10, 96, 329_212_928 - 145 * (768 + 384) - 3 * 256 - 4 * 128),
        ("temporal_vit_large_patch16", 9, 224, 329_428_416 - 197 * (640 + 320)),
    ]
    for name, bands, side, expected in counts:
        with torch.device("meta"):
            objective = build("satmae", create(name, bands=bands, image_size=side), (side, side), {"image": bands})
        assert sum(p.numel() for p in objective.parameters()) == expected


def test_bf16_autocast_is_close() -> None:
    objective, images = of_groups(), torch.randn(4, 6, 32, 32)
    exact = objective(*batch_of(images)).numerator
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = objective(*batch_of(images)).numerator
    assert rough.dtype == torch.float32
    assert torch.allclose(exact, rough, rtol=0.02)  # bf16 keeps 8 bits; the loss averages many of them
