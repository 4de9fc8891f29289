"""Latent prediction: whom the teacher follows, what it is asked, what the backbone must not see, and that nothing collapses."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swath.backbones.base import create
from swath.launch.recipes import find
from swath.pretrain import health
from swath.pretrain.checkpoint import read_checkpoint
from swath.pretrain.config import read_recipe
from swath.pretrain.objective import build
from swath.pretrain.objectives.latent import AREA, ASPECT, BlockDraws, Latent
from swath.pretrain.optimizer import adamw
from swath.pretrain.trainer import pretrain
from swath.shards.draw import Draw
from tests.shard_folders import make_shards
from tests.small_objectives import batch_of, small, smooth_images

SPARSE, PRODUCT, PYRAMID, DATES = "vit_base_patch16", "less_base_patch16", "vmamba_base", "temporal_vit_base_patch16"
NO, YES = torch.tensor(False), torch.tensor(True)


def model(backbone: str = SPARSE, **options: Any) -> Latent:
    objective = small("latent", backbone, **options)
    assert isinstance(objective, Latent)
    return objective.train()


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(objective: Latent) -> dict[str, Tensor]:
    """Move every weight of the backbone; what the teacher was before."""
    before = state(objective.teacher)
    with torch.no_grad():
        for parameter in objective.backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return before


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.999])
def test_the_teacher_follows(progress: float) -> None:
    """teacher ← m · teacher + (1 - m) · backbone, m from 0.9 linearly to 1 over the run."""
    objective = model(momentum=0.9)
    before = moved(objective)
    objective.progress = progress
    objective.after_step(NO)
    m = 0.9 + 0.1 * progress
    ours = objective.backbone.state_dict()
    for name, tensor in objective.teacher.state_dict().items():
        assert torch.allclose(tensor, m * before[name] + (1 - m) * ours[name], atol=1e-6), name
        assert not torch.equal(tensor, before[name]), name


def test_a_skipped_step_moves_no_teacher() -> None:
    """Nor does what a broken step left behind: statistics that are not a number."""
    objective = model("lwganet_l0")  # it normalises by statistics of batches
    before = moved(objective)
    for buffer in objective.backbone.buffers():
        buffer.fill_(float("nan") if buffer.is_floating_point() else 7)
    objective.after_step(YES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.teacher.state_dict().items())


def test_the_teacher_is_saved_and_not_trained() -> None:
    objective = model()
    assert not any(module.training for module in objective.teacher.modules()) and objective.backbone.training
    owned = {id(p) for group in adamw(objective, weight_decay=0.1, betas=(0.9, 0.95)).param_groups for p in group["params"]}
    assert not owned & {id(p) for p in objective.teacher.parameters()}
    assert owned == {id(p) for p in objective.parameters() if p.requires_grad}
    assert {f"teacher.{name}" for name in objective.backbone.state_dict()} < objective.state_dict().keys()
    objective(*batch_of(smooth_images(objective, 2))).numerator.backward()
    assert all(p.grad is None for p in objective.teacher.parameters())
    assert not objective.eval().teacher.training


def listen(objective: Latent) -> dict[str, Tensor]:
    """What is predicted, as forward() makes it."""
    heard: dict[str, Tensor] = {}
    objective.head.register_forward_hook(lambda _module, _inputs, made: heard.update(made=made.detach()))
    objective.predictor.register_forward_pre_hook(lambda _module, inputs: heard.update(masked=inputs[2].masked_bm))
    return heard


@pytest.mark.parametrize("backbone", [SPARSE, PRODUCT, PYRAMID, DATES])
@pytest.mark.parametrize("blocks", [0, 4])
def test_the_loss_from_first_principles(backbone: str, blocks: int) -> None:
    """Smooth L1 of what the teacher makes of the whole image, each token standardised: x² / 2 below 1, |x| - 1/2 above."""
    objective = model(backbone, blocks=blocks, momentum=0.0)
    moved(objective)
    objective.after_step(NO)  # the last norm has weights now, so features are no longer standardised by it
    moved(objective)  # and the backbone is another again
    images = smooth_images(objective, 3)
    heard = listen(objective)
    batch, draw = batch_of(images)
    outcome = objective(replace(batch, weight=torch.tensor([1.0, 0.0, 2.0])), draw)
    with torch.no_grad():
        features = objective.teacher(images)
    tokens_bnd = features.tokens if "sparse" in objective.backbone.traits else features.maps[max(features.maps)].flatten(2).mT
    total, count = 0.0, 0.0
    for sample, weight in enumerate((1.0, 0.0, 2.0)):
        for prediction, place in zip(heard["made"][sample], heard["masked"][sample], strict=True):
            token = tokens_bnd[sample, place].double()
            target = (token - token.mean()) / (token.var(correction=0) + 1e-5).sqrt()
            off = (prediction.double() - target).abs()
            total += weight * torch.where(off < 1, off**2 / 2, off - 0.5).mean().item()
            count += weight
    assert outcome.weight.item() == count > 0
    assert outcome.numerator.item() == pytest.approx(total, rel=1e-5)  # sums of fp32


@pytest.mark.parametrize("backbone", [SPARSE, PRODUCT, PYRAMID, DATES])
def test_the_backbone_does_not_see_what_is_masked(backbone: str) -> None:
    """Other pixels behind the mask: the same predictions bit for bit, and other targets."""
    objective = model(backbone).eval()
    images = smooth_images(objective, 2)
    heard = listen(objective)
    first = objective(*batch_of(images))
    assert first.picture is not None
    made, picture = heard["made"], first.picture()
    hidden = picture["seen"].isnan()
    assert torch.equal(picture["input"], images) and torch.equal(picture["seen"][~hidden], images[~hidden])
    share = hidden.float().mean().item()
    assert share == pytest.approx(0.5, abs=1e-6)
    second = objective(*batch_of(torch.where(hidden, 3 - 2 * images, images)))
    assert torch.equal(heard["made"], made)
    assert not torch.allclose(second.numerator, first.numerator, rtol=1e-4)
    objective(*batch_of(torch.where(hidden, images, 3 - 2 * images)))
    assert not torch.allclose(heard["made"], made, rtol=1e-4)


def masks(rows: int, columns: int, blocks: int, samples: int, groups: int = 1) -> Tensor:
    """(samples, groups, rows, columns) numbers of BlockDraws."""
    ids = torch.arange(samples)
    made = BlockDraws(Draw(1, ids, ids), (rows, columns), blocks).uniform("mask", groups * rows * columns)
    return made.unflatten(1, (groups, rows, columns))


@pytest.mark.parametrize(("rows", "columns"), [(14, 14), (9, 16), (4, 4), (1, 7), (2, 3), (1, 1)])
def test_a_block_is_a_block(rows: int, columns: int) -> None:
    """One block: above one half lie a rectangle's numbers alone, of the published size and shape, anywhere in the image."""
    inside = masks(rows, columns, 1, 4000)[:, 0] >= 0.5
    high, wide = inside.any(dim=2).sum(dim=1), inside.any(dim=1).sum(dim=1)
    assert torch.equal(inside.sum(dim=(1, 2)), high * wide)
    by_row, by_column = inside.any(dim=2).int(), inside.any(dim=1).int()
    assert (by_row.diff(dim=1).abs().sum(dim=1) <= 2).all() and (by_column.diff(dim=1).abs().sum(dim=1) <= 2).all()
    assert inside.any(dim=0).all(), "every place is hidden in some sample"
    area = rows * columns
    lowest, highest = ((area * share * aspect) ** 0.5 for share, aspect in zip(AREA, ASPECT, strict=True))
    assert high.min() >= 1 and high.max() <= max(1, min(rows - 1, round(highest)))
    assert high.min() >= min(max(1, rows - 1), max(1, round(lowest)))


def test_sizes_of_blocks_are_the_published_ones() -> None:
    """On a raster so fine that rounding does not matter: areas and shapes are uniform between their ends."""
    inside = masks(100, 100, 1, 800)[:, 0] >= 0.5
    high, wide = inside.any(dim=2).sum(dim=1).double(), inside.any(dim=1).sum(dim=1).double()
    for made, (low, top) in ((high * wide / 10_000, AREA), (high / wide, ASPECT)):
        slack = 0.05 * top  # of rounded sides
        assert low - slack < made.min() < low + slack and top - slack < made.max() < top + slack
        assert made.mean().item() == pytest.approx((low + top) / 2, rel=0.02)


def test_blocks_hide_neighbours_and_all_groups_alike() -> None:
    """Of masked tokens more neighbours are masked than at random, where it is half; groups hide the same places."""
    numbers = masks(12, 12, 4, 200, groups=3)
    assert numbers.min() >= 0 and numbers.max() <= 1
    rank = (numbers * 5).floor()
    assert torch.equal(rank[:, 0], rank[:, 1]) and torch.equal(rank[:, 0], rank[:, 2])
    hidden = (numbers[:, 0].flatten(1).argsort(dim=1).argsort(dim=1) >= 72).unflatten(1, (12, 12))
    together = (hidden[:, 1:] & hidden[:, :-1]).sum() / hidden[:, 1:].sum()
    assert together > 0.75


def test_random_masks_are_those_of_the_masked_autoencoder() -> None:
    objective, heard = model(blocks=0), {}
    objective.predictor.register_forward_pre_hook(lambda _module, inputs: heard.update(mask=inputs[2]))
    batch, draw = batch_of(smooth_images(objective, 3))
    objective(batch, draw)
    assert torch.equal(heard["mask"].seen_bk, draw.order("mask", 16)[:, :8].sort(dim=1).values)


def test_tokens_less_than_half_valid_are_no_targets() -> None:
    """Of 16 tokens a row of four is invalid and another has too few valid pixels: 8 stay, 8 would be encoded, so none is left;
    with one more row there are four targets."""
    objective = model()
    images = smooth_images(objective, 2)
    valid = torch.ones(2, 1, 32, 32, dtype=torch.bool)
    valid[:, :, :8] = False
    valid[1, :, 8:13] = False
    outcome = objective(*batch_of(images, valid))
    assert outcome.weight == 4 and torch.isfinite(outcome.numerator)


@pytest.mark.parametrize("size", [(8, 16), (24, 40), (64, 8)])
def test_any_size_that_the_backbone_takes(size: tuple[int, int]) -> None:
    """Whatever the size was at the start: sizes change during a run."""
    objective = model()
    outcome = objective(*batch_of(torch.randn(2, 4, *size)))
    outcome.numerator.backward()
    tokens = size[0] * size[1] // 64
    assert outcome.weight == 2 * (tokens - tokens // 2) and torch.isfinite(outcome.numerator)


@pytest.mark.parametrize("options", [{"blocks": -1}, {"momentum": 1.5}, {"mask_ratio": 1.0}, {"mask_ratio": 0.0}])
def test_what_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        model(**options)


def test_bf16_autocast_is_close() -> None:
    objective = model()
    batch, draw = batch_of(smooth_images(objective, 4))
    exact = objective(batch, draw).numerator
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = objective(batch, draw).numerator
    assert rough.dtype == torch.float32
    assert torch.allclose(exact, rough, rtol=0.02)  # bf16 keeps 8 bits; the loss averages many of them


def test_nothing_collapses() -> None:
    """A fixed batch, a teacher that follows fast: after 80 steps features still differ from image to image and place to place."""
    objective = model(momentum=0.9)
    images = smooth_images(objective, 16)
    batch, draw = batch_of(images)
    optimizer = adamw(objective, weight_decay=0.05, betas=(0.9, 0.95))
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    looks, losses = [], []
    for step in range(81):
        if step % 40 == 0:
            features = objective.backbone(images)
            looks.append(health.measure(features.pooled.detach(), features.tokens.detach()))
        objective.progress = step / 81
        outcome = objective(batch, draw)
        optimizer.zero_grad()
        (outcome.numerator / outcome.weight).backward()
        optimizer.step()
        objective.after_step(NO)
        losses.append((outcome.numerator / outcome.weight).item())
    assert losses[-1] < 0.5 * losses[0]
    assert health.warnings(looks) == []
    assert looks[-1]["tokens_std"] > 0.5 * looks[0]["tokens_std"] and looks[-1]["pooled_std"] > 0.5 * looks[0]["pooled_std"]


RECIPE = """
run: {dir: unset, seed: 5}
data: {train: unset, augment: {crop: [0.5, 1.0], flip: both}}
backbone: {name: vit_tiny_patch8, width: 48, depth: 2}
objective: {name: latent, predictor_width: 24, predictor_depth: 1, predictor_heads: 2, momentum: 0.9}
train: {global_batch: 8, max_steps: 12, lr_per_256: 3.0e-2, warmup_epochs: 1, precision: fp32, threads: 1}
checkpoint: {every: 100}
health: {every: 4, samples: 16}
"""


def rows(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_stopped_and_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was told to stop and continued is the one that was not: losses, weights and teacher, bit for bit."""
    shards = make_shards(tmp_path / "shards", samples=40)

    def go(name: str) -> None:
        pretrain(read_recipe(RECIPE, [f"run.dir={tmp_path / name}", f"data.train={shards}"], name="test"))

    go("whole")
    honest, steps = Latent.after_step, [0]

    def after_step(self: Latent, skipped: Tensor) -> None:
        honest(self, skipped)
        steps[0] += 1
        if steps[0] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Latent, "after_step", after_step)
    go("stopped")
    assert len(rows(tmp_path / "stopped", "metrics.jsonl")) < 12
    go("stopped")
    assert [r["loss"] for r in rows(tmp_path / "stopped", "metrics.jsonl")] == [
        r["loss"] for r in rows(tmp_path / "whole", "metrics.jsonl")
    ]
    (_, expected), (_, got) = (read_checkpoint(tmp_path / name) for name in ("whole", "stopped"))
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    teacher = "model.teacher.blocks.0.mlp.fc1.weight"
    assert not torch.equal(got[teacher], got[teacher.replace("teacher", "backbone")])
    looks = [look for run in ("whole", "stopped") for look in rows(tmp_path / run, "health.jsonl")]
    assert len(looks) > 4 and all(look["warnings"] == [] for look in looks)


@pytest.mark.parametrize(
    "name", ["latent_vit_tiny", "latent_vit_base", "latent_vit_huge", "mae_vit_base", "mae_vit_large", "mae_vit_huge"]
)
def test_shipped_recipes(name: str) -> None:
    """They are read, and their models can be."""
    recipe = read_recipe(find(name)[0], ["data.train=shards"], name=name)
    size = recipe.data.size or 64
    with torch.device("meta"):
        backbone = create(**{"bands": 3, "image_size": size, **recipe.backbone})
        task = dict(recipe.objective)
        build(task.pop("name"), backbone, (size, size), {"image": 3}, **task)
