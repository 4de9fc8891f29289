"""SatMAE++ beyond parity: every scale against the same pixels, bands in their place, the masked area, invalid pixels."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swath.backbones.base import create, registry
from swath.pretrain.masking import mask_images
from swath.pretrain.objective import Outcome, build, context
from swath.pretrain.objectives.satmae_pp import SatMAEPP, halves
from swath.shards.draw import Draw
from swath.shards.prepare import Batch

TINY: dict[str, Any] = {"width": 32, "depth": 1, "heads": 2, "patch": 8, "image_size": 16}
DECODER: dict[str, Any] = {"decoder_width": 48, "decoder_depth": 1, "decoder_heads": 2, "group_width": 8}
GROUPS = ((0, 2), (3, 1), (4,))  # of unequal size, out of order


def model(size: tuple[int, int] = (16, 16), **options: object) -> SatMAEPP:
    torch.manual_seed(0)
    backbone = create("group_vit_base_patch8", bands=5, groups=GROUPS, group_width=8, **TINY)
    objective = build("satmae_pp", backbone, size, {"image": 5}, **{**DECODER, **options})
    assert isinstance(objective, SatMAEPP)
    return objective


def rgb(**options: object) -> SatMAEPP:
    torch.manual_seed(0)
    objective = build("satmae_pp", create("vit_tiny_patch8", bands=3, **TINY), (16, 16), {"image": 3}, **{**DECODER, **options})
    assert isinstance(objective, SatMAEPP)
    return objective


def batch_of(images: Tensor, valid: Tensor | None = None, ids: Tensor | None = None) -> tuple[Batch, Draw]:
    ids = torch.arange(len(images)) if ids is None else ids
    visits = torch.zeros_like(ids)
    masks = {} if valid is None else {"image": valid}
    return Batch({"image": images}, masks, ids, visits, torch.ones(len(images))), Draw(3, ids, visits)


def gradients(objective: SatMAEPP, images: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    objective.zero_grad()
    outcome = objective(*batch_of(images, valid))
    outcome.numerator.backward()
    return outcome.numerator.detach(), outcome.weight, {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}


def told(objective: SatMAEPP, images: Tensor, made: list[Tensor], valid: Tensor | None = None) -> dict[str, float]:
    """The mean of every term when the prediction is `made`."""
    objective.predict = lambda *_: made  # type: ignore[method-assign]
    outcome: Outcome = objective(*batch_of(images, valid))
    terms = {name.removesuffix("/image"): float(amount / count) for name, (amount, count) in outcome.terms.items()}
    finer = [value for name, value in terms.items() if name != "pixels"]
    total = 0.6 * terms["pixels"] + 0.4 * sum(finer) / len(finer)
    assert abs(float(outcome.numerator / outcome.weight) - total) < 1e-6 * (1 + total)
    return terms


def test_images_of_all_scales_show_the_same_place() -> None:
    images = torch.zeros(1, 1, 16, 24)
    images[0, 0, 5, 18] = 1.0
    scales = halves(images, None, 2).images
    assert [tuple(image.shape[2:]) for image in scales] == [(4, 6), (8, 12), (16, 24)]
    assert scales[1][0, 0, 2, 9] == 1 / 4 and scales[1].sum() == 1 / 4
    assert scales[0][0, 0, 1, 4] == 1 / 16 and scales[0].sum() == 1 / 16
    photo = torch.randn(2, 3, 16, 24)
    half = F.interpolate(photo, scale_factor=0.5, mode="bilinear", align_corners=False)
    assert torch.allclose(halves(photo, None, 1).images[0], half, atol=1e-6), "bilinear by ½"


def test_invalid_pixels_are_in_no_mean() -> None:
    images, valid = torch.randn(1, 2, 8, 8), torch.ones(1, 1, 8, 8, dtype=torch.bool)
    valid[..., 0, :2] = False  # half of one 2 × 2
    valid[..., 2:4, :3] = False  # all of one, half of the next
    images = torch.where(valid, images, 0.0)
    scales = halves(images, valid, 1)
    assert torch.allclose(scales.images[0][0, :, 0, 0], images[0, :, 1, :2].mean(1))
    assert torch.equal(scales.images[0][0, :, 1, 0], torch.zeros(2))
    assert scales.valid[0] is not None
    assert scales.valid[0][0, 0, :2].tolist() == [[True] * 4, [False, True, True, True]]


def test_every_block_is_compared_with_the_pixels_at_its_scale() -> None:
    objective, images = model(), torch.randn(3, 5, 64, 64)
    truth = halves(images, None, 2).images
    assert told(objective, images, truth) == {"pixels": 0, "l1_2x": 0, "l1_4x": 0}
    for number, name in enumerate(("pixels", "l1_2x", "l1_4x")):
        for wrong in (truth[number].flip(3), truth[number].roll(1, dims=1), truth[number].roll(1, dims=2)):
            terms = told(objective, images, [*truth[:number], wrong, *truth[number + 1 :]])
            assert terms.pop(name) > 0.1 and not any(terms.values())
    off = [truth[0] + 2, truth[1] + 3, truth[2] - 4]
    assert told(objective, images, off) == pytest.approx({"pixels": 4, "l1_2x": 3, "l1_4x": 4}, rel=1e-5)


def test_every_scale_is_predicted_where_it_stands() -> None:
    """The prediction of a token reaches the finer images around its own place, and nowhere far off."""
    objective = model((32, 48))
    made = torch.zeros(1, 5, 32, 48)
    impulse = made.clone()
    impulse[0, 3, 9, 40] = 5.0
    with torch.no_grad():
        for scale, before, after in zip((2, 4), objective.up["image"](made), objective.up["image"](impulse), strict=True):
            row, column = (before - after).abs().sum(dim=(0, 1)).nonzero().float().unbind(1)
            centre = torch.stack([(row.min() + row.max()) / 2, (column.min() + column.max()) / 2])
            assert torch.allclose(centre, torch.tensor([9.5 * scale - 0.5, 40.5 * scale - 0.5]), atol=1), scale


def test_bands_enter_the_blocks_in_their_place() -> None:
    for compat, order in ((None, [0, 1, 2, 3, 4]), ("order", [0, 2, 3, 1, 4])):
        objective = model(compat=compat)
        for linear, group in zip(objective.heads["image"].linear, GROUPS, strict=True):  # type: ignore[arg-type, union-attr]
            torch.nn.init.zeros_(linear.weight)
            linear.bias.data = (torch.tensor(group) + 1.0).repeat(64)
        batch, draw = batch_of(torch.randn(2, 5, 64, 64))
        image = halves(batch.images["image"], None, 2).images[0]
        mask = mask_images(objective.backbone, image, None, draw, 0.75)
        made = objective.predict(image, "image", mask, context(batch, "image", objective.backbone, draw))
        assert [tuple(one.shape) for one in made] == [(2, 5, 16, 16), (2, 5, 32, 32), (2, 5, 64, 64)]
        value = (torch.tensor(order) + 1.0)[None, :, None, None]
        assert torch.equal(made[0], value.expand_as(made[0]))
        constant = (torch.arange(5) + 1.0)[None, :, None, None].expand(2, 5, 64, 64)
        pixels, _ = objective(*batch_of(constant)).terms["pixels/image"]
        assert (pixels == 0) == (compat is None)


def test_the_masked_area_alone() -> None:
    objective, everywhere, images = model(masked_only=True), model(), torch.randn(2, 5, 64, 64)
    picture = objective(*batch_of(images)).picture
    assert picture is not None
    hidden = picture()["seen"].isnan()
    truth = halves(images, None, 2).images
    outside, inside = (
        [
            torch.where(where.repeat_interleave(2**n, 2).repeat_interleave(2**n, 3), one + 3, one) if n else one
            for n, one in enumerate(truth)
        ]
        for where in (~hidden, hidden)
    )
    share = hidden.float().mean().item()
    close: Any = {"rel": 1e-4, "abs": 1e-6}
    assert told(objective, images, outside) == pytest.approx({"pixels": 0, "l1_2x": 0, "l1_4x": 0}, **close)
    assert told(objective, images, inside)["l1_4x"] == pytest.approx(3, **close), "over the masked area, not all of it"
    for name in ("l1_2x", "l1_4x"):  # the share of samples with as many masked values is their mean
        assert told(everywhere, images, outside)[name] == pytest.approx(3 * (1 - share), **close)
        assert told(everywhere, images, inside)[name] == pytest.approx(3 * share, **close)


@pytest.mark.parametrize("filler", [1e6, float("nan")])
@pytest.mark.parametrize("options", [{}, {"masked_only": True}, {"compat": "order", "spatial_mask": True}])
def test_invalid_pixels_change_nothing(filler: float, options: dict[str, Any]) -> None:
    objective, images = model((16, 24), **options), torch.randn(3, 5, 64, 96)
    valid = torch.ones(3, 1, 64, 96, dtype=torch.bool)
    valid[0, :, :41, :19] = False
    valid[2, :, 33:, 70:] = False
    expected = gradients(objective, torch.where(valid, images, 0.0), valid)
    got = gradients(objective, torch.where(valid, images, filler), valid)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert all(torch.equal(got[2][name], expected[2][name]) for name in expected[2])
    assert torch.isfinite(got[0]) and got[1] == 3


def test_tokens_less_than_half_valid_are_no_targets_at_any_scale() -> None:
    objective, images = model(), torch.randn(1, 5, 64, 64)
    valid = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    valid[..., :32, 8:32] = False  # a quarter of a token is valid
    truth = halves(torch.where(valid, images, 0.0), valid, 2).images
    wrong = [one.clone() for one in truth]
    for number, one in enumerate(wrong):
        one[..., : 8 * 2**number, : 8 * 2**number] += 5
    assert told(objective, images, wrong, valid) == {"pixels": 0, "l1_2x": 0, "l1_4x": 0}


def test_invalid_pixels_of_valid_tokens_are_no_targets_at_any_scale() -> None:
    objective, images = model(), torch.randn(2, 5, 64, 64)
    valid = torch.ones(2, 1, 64, 64, dtype=torch.bool)
    valid[..., 4:12, 8:24] = False
    valid[..., 40:44, 20:52] = False
    scales = halves(torch.where(valid, images, 0.0), valid, 2)
    wrong = [torch.where(where, one, 9.0) for one, where in zip(scales.images, scales.valid, strict=True) if where is not None]
    assert told(objective, images, wrong, valid) == {"pixels": 0, "l1_2x": 0, "l1_4x": 0}
    off = [one + 3 for one in wrong]
    assert told(objective, images, off, valid) == pytest.approx({"pixels": 9, "l1_2x": 3, "l1_4x": 3}, rel=1e-5)


@pytest.mark.parametrize("masked_only", [True, False])
def test_all_valid_equals_no_mask(masked_only: bool) -> None:
    objective, images = model(masked_only=masked_only), torch.randn(2, 5, 64, 64)
    plain = gradients(objective, images, None)
    masked = gradients(objective, images, torch.ones(2, 1, 64, 64, dtype=torch.bool))
    assert torch.allclose(plain[0], masked[0], rtol=1e-6) and torch.equal(plain[1], masked[1])
    for name, gradient in plain[2].items():
        assert torch.allclose(masked[2][name], gradient, rtol=1e-4, atol=1e-6), name


def test_batches_may_be_cut_and_permuted() -> None:
    """Samples of which half is invalid too: each term is a mean within its sample."""
    for objective in (model(), model(masked_only=True)):
        images, ids = torch.randn(5, 5, 64, 64), torch.arange(5)
        valid = torch.ones(5, 1, 64, 64, dtype=torch.bool)
        valid[1, :, :33] = False
        whole = objective(*batch_of(images, valid))
        parts = [objective(*batch_of(images[i], valid[i], ids[i])) for i in torch.tensor([3, 1, 0, 2, 4]).split([1, 2, 2])]
        assert sum(part.weight for part in parts) == whole.weight == 5
        assert torch.allclose(torch.stack([part.numerator for part in parts]).sum(), whole.numerator, rtol=1e-5)


def test_nodata_and_constant_samples() -> None:
    objective = model()
    nothing = objective(*batch_of(torch.full((2, 5, 64, 64), float("nan")), torch.zeros(2, 1, 64, 64, dtype=torch.bool)))
    flat = objective(*batch_of(torch.full((1, 5, 64, 64), 7.0)))
    (nothing.numerator + flat.numerator).backward()
    assert nothing.numerator == 0 and nothing.weight == 0 and flat.weight == 1
    assert all(torch.isfinite(p.grad).all() for p in objective.parameters() if p.grad is not None)


@pytest.mark.parametrize(("blocks", "size"), [(1, (24, 40)), (3, (8, 16)), (2, (8, 24))])
def test_sizes_and_blocks(blocks: int, size: tuple[int, int]) -> None:
    objective = model(size, blocks=blocks, mask_ratio=0.5)
    assert objective.scale == 2**blocks
    images = torch.randn(2, 5, size[0] * objective.scale, size[1] * objective.scale)
    outcome = objective(*batch_of(images))
    outcome.numerator.backward()
    assert torch.isfinite(outcome.numerator) and len(outcome.terms) == 1 + blocks and outcome.picture is not None
    assert {tuple(image.shape) for image in outcome.picture().values()} == {(2, 5, *size)}
    with pytest.raises(ValueError, match="times as large"):
        objective(*batch_of(images[..., 1:]))


@pytest.mark.parametrize(
    "options", [{"mask_ratio": 1.0}, {"blocks": 0}, {"group_width": 46}, {"mask_ratio": 0.8, "spatial_mask": True}]
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"mask_ratio|blocks|decoder_width"):
        model(**options)


def test_compat_is_for_groups() -> None:
    with pytest.raises(ValueError, match="several groups"):
        rgb(compat="order")


def test_recomputed_blocks_give_the_same_gradients() -> None:
    objective, images = rgb(blocks=1), torch.randn(2, 3, 32, 32)
    plain = gradients(objective, images, None)
    assert len(objective.blocks()) == 3, "encoder, decoder, one of convolutions"
    for block in objective.blocks():
        block.recompute = True
    again = gradients(objective, images, None)
    assert torch.equal(plain[0], again[0])
    assert all(torch.allclose(plain[2][name], again[2][name], atol=1e-7) for name in plain[2])


LEGAL = {"vit", "group", "spectral", "wave", "mamba", "vim"}


@pytest.mark.parametrize("name", list(registry.families().values()))
def test_every_family_learns_or_is_refused(name: str) -> None:
    """Sparse and of one date: loss falls on a fixed batch. Others: one line, at the start."""
    torch.manual_seed(0)
    tiny = registry.entry(name).build.tiny
    backbone, side = create(name, **tiny), tiny["image_size"]
    arguments: Any = ("satmae_pp", backbone, (side, side), {"image": tiny["bands"]})
    if name.split("_")[0] not in LEGAL:
        with pytest.raises(ValueError, match="cannot train"):
            build(*arguments, **DECODER)
        return
    objective = build(*arguments, **DECODER, blocks=1)
    batch, draw = batch_of(torch.randn(2, tiny["bands"], 2 * side, 2 * side))
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
    tables = 145 * (512 + 384) + 3 * 256 + 4 * 128
    counts: list[tuple[str, int, int, int, int]] = [
        ("group_vit_base_patch8", 10, 96, 2, 111_741_548 - tables),
        ("group_vit_large_patch8", 10, 96, 2, 329_330_028 - tables - 145 * 256),
        ("vit_base_patch16", 3, 224, 1, 111_913_219 - 197 * (768 + 512)),
        ("vit_large_patch16", 3, 224, 1, 329_547_267 - 197 * (1024 + 512)),
    ]
    for name, bands, side, blocks, expected in counts:
        with torch.device("meta"):
            objective = build(
                "satmae_pp", create(name, bands=bands, image_size=side), (side, side), {"image": bands}, blocks=blocks
            )  # fmt: skip
        assert sum(p.numel() for p in objective.parameters()) == expected


def test_bf16_autocast_is_close() -> None:
    objective, images = model(), torch.randn(4, 5, 64, 64)
    exact = objective(*batch_of(images)).numerator
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = objective(*batch_of(images)).numerator
    assert rough.dtype == torch.float32
    assert torch.allclose(exact, rough, rtol=0.02)  # bf16 keeps 8 bits; the loss averages many of them
