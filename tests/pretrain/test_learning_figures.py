"""What the figures of benchmarks/learning.py rest on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.learning import over_seeds, with_interval
from benchmarks.learning_data import CHIP, blocks
from benchmarks.plain import PlainMAE
from swath.backbones.base import create
from swath.pretrain.objectives.mae import MAE, MAEConfig
from tests.small_objectives import batch_of


@pytest.mark.parametrize("normalise", [True, False])
def test_the_plain_form_is_the_same_objective(normalise: bool) -> None:
    config = MAEConfig(decoder_width=16, decoder_depth=2, decoder_heads=2, normalise_patches=normalise)
    made = {}
    for form in (MAE, PlainMAE):
        torch.manual_seed(0)
        backbone = create("vit_tiny_patch8", bands=3, image_size=40, width=24, depth=2)
        objective = form(config, backbone, (40, 40), {"image": 3})
        batch, draw = batch_of(torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(1)))
        outcome = objective(replace(batch, weight=torch.tensor([1.0, 0.0, 1.0])), draw)
        (outcome.numerator / outcome.weight).backward()
        made[form] = (outcome, {name: p.grad for name, p in objective.named_parameters()})
    (ours, gradients), (plain, others) = made[MAE], made[PlainMAE]
    torch.testing.assert_close(plain.numerator, ours.numerator)
    assert plain.weight == ours.weight
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-6, rtol=1e-4, msg=name)  # sums in another order


def test_blocks_share_no_pixel() -> None:
    labels_hw = np.zeros((41, 54), int)
    labels_hw[:, 20:] = 3
    owner = np.full(labels_hw.shape, -1)
    found = blocks(labels_hw)
    assert {label for *_, label in found} == {3}
    for top, left, block, _ in found:
        pixels = owner[top : top + CHIP, left : left + CHIP]
        assert pixels.shape == (CHIP, CHIP)
        assert set(np.unique(pixels)) <= {-1, block}
        pixels[:] = block
    assert len({block for _, _, block, _ in found}) == 9


def test_a_paired_difference_is_drawn_by_block() -> None:
    before = np.array([0, 0, 1, 1] * 50, bool)
    block = np.repeat(np.arange(20), 10)
    assert with_interval(before.astype(float) - before, block) == [0.0, 0.0, 0.0]
    after = before | (np.arange(200) % 10 == 0)  # one more in each block, or none where it was right already
    mean, low, high = with_interval(after.astype(float) - before, block)
    assert 0 < low <= mean <= high < 0.1
    one_block = before | (block == 0)  # all that was gained lies in one block, and that may be drawn or not
    assert with_interval(one_block.astype(float) - before, block)[1] == 0


def test_seeds_are_averaged_by_sample_before_blocks_are_drawn(tmp_path: Path) -> None:
    """A block that one seed gains and another loses tells nothing; a gain that all blocks share is one for sure."""
    block = np.repeat(np.arange(10), 4)
    alike = np.arange(40) % 4 == 0
    pairs = []
    for seed, (before, after) in enumerate([((block == 0) & ~alike, alike), (np.zeros(40, bool), alike | (block == 0))]):
        pair = (tmp_path / f"before_{seed}.npz", tmp_path / f"after_{seed}.npz")
        for path, right in zip(pair, (before, after), strict=True):
            np.savez(path, knn=right, block=block)
        pairs.append(pair)
    assert over_seeds(pairs[:1], "knn")[1] < 0.25, "the first seed alone loses block 0"
    assert over_seeds(pairs, "knn") == [0.25, 0.25, 0.25]
