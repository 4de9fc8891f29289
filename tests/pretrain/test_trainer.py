"""The trainer in one process: what is not finite is skipped, accumulation means the same, health speaks only of the sick."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from swath.pretrain import augment
from swath.pretrain.checkpoint import read_checkpoint
from swath.pretrain.config import read_recipe
from swath.pretrain.objective import Outcome
from swath.pretrain.objectives.mae import MAE
from swath.pretrain.trainer import _Trainer, pretrain
from swath.pretrain.world import ALONE
from swath.shards.draw import Draw
from swath.shards.errors import InputError
from swath.shards.prepare import prepare
from tests.shard_folders import make_shards

RECIPE = """
backbone: {name: vit_tiny_patch8, width: 48, depth: 2}
objective: {name: mae, decoder_width: 24, decoder_depth: 1, decoder_heads: 3}
train: {global_batch: 8, max_steps: 6, lr_per_256: 3.0e-2, precision: fp32, threads: 1}
health: {every: 100, samples: 16}
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("trainer") / "shards", samples=40)


def go(run: Path, shards: Path, *overrides: str) -> list[dict[str, Any]]:
    pretrain(read_recipe(RECIPE, [f"run.dir={run}", f"data.train={shards}", *overrides], name="test"))
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def break_steps(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
    """Make the loss of the training steps in `bad` (from 1) not a number."""
    honest, step = MAE.forward, [0]

    def forward(self: MAE, batch: Any, draw: Any) -> Outcome:
        outcome = honest(self, batch, draw)
        # neither the rehearsal, before the first parameter has moved, nor looks at health are training steps
        if self.training and torch.is_grad_enabled() and batch.images["image"].any():
            step[0] += 1
            if step[0] in bad:
                outcome.numerator = outcome.numerator * float("nan")
        return outcome

    monkeypatch.setattr(MAE, "forward", forward)


def test_a_step_that_is_not_finite_moves_nothing(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(tmp_path / "short", shards, "train.max_steps=6", "checkpoint.every=1", "checkpoint.keep=9")
    break_steps(monkeypatch, {3})
    rows = go(tmp_path / "run", shards, "checkpoint.every=1", "checkpoint.keep=9")
    assert [row["skipped"] for row in rows] == [False, False, True, False, False, False]
    assert rows[2]["loss"] is None and all(row["loss"] is not None for row in rows if row["step"] != 3)
    folder = tmp_path / "run" / "checkpoints"
    before, after = (read_checkpoint(folder / f"step-{n:08d}")[1] for n in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before), "weights and moments stayed"
    following = read_checkpoint(folder / "step-00000004")[1]
    assert any(not torch.equal(after[name], following[name]) for name in after)
    assert len(json.loads((tmp_path / "run" / "skipped-step-00000003.json").read_text())["sample_ids"]) == 8


def test_too_many_in_a_row_stop_the_run(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_steps(monkeypatch, {2, 3, 4, 5, 6})
    with pytest.raises(InputError, match=r"3 steps in a row .* up to step 4"):
        go(tmp_path / "run", shards, "train.max_bad_steps=3")


def test_accumulation_means_the_same(shards: Path, tmp_path: Path) -> None:
    """Sums of fp32 in another order: 1e-4 relative after six steps of a high learning rate."""
    whole = go(tmp_path / "whole", shards)
    cut = go(tmp_path / "cut", shards, "train.micro_batch=2")
    assert [r["loss"] for r in cut] == pytest.approx([r["loss"] for r in whole], rel=1e-4)
    assert [r["grad_norm"] for r in cut] == pytest.approx([r["grad_norm"] for r in whole], rel=1e-3)


@pytest.mark.parametrize("switch", ["train.activation_checkpointing=true", "data.workers=0", "data.workers=3"])
def test_switches_that_change_no_number(switch: str, shards: Path, tmp_path: Path) -> None:
    assert [r["loss"] for r in go(tmp_path / "on", shards, switch)] == [r["loss"] for r in go(tmp_path / "off", shards)]


def test_clipping(shards: Path, tmp_path: Path) -> None:
    """With Adam a global factor hardly shows, so the norm is checked where it enters: moments after one step."""
    free = go(tmp_path / "free", shards, "train.max_steps=1")
    limit = free[0]["grad_norm"] / 10
    go(tmp_path / "clipped", shards, "train.max_steps=1", f"train.clip_norm={limit}")
    moments = [read_checkpoint(tmp_path / run, "optimizer.")[1] for run in ("free", "clipped")]
    for name, value in moments[0].items():
        if name.endswith("exp_avg"):
            assert torch.allclose(value / 10, moments[1][name], rtol=1e-4, atol=1e-9), name


def test_health_is_silent_on_a_healthy_run_and_loud_on_a_collapse(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = ["health.every=10", "train.max_steps=40", "train.lr_per_256=1.0e-2"]
    go(tmp_path / "healthy", shards, *often)
    assert "health at step" not in caplog.text
    from swath.backbones.vit import ViT

    honest = ViT.encode

    def collapsing(self: ViT, tokens: Any, keep: Any = None, taps: Any = ()) -> Any:
        features = honest(self, tokens, keep, taps)
        if tokens.keep is None and not self.training and (tmp_path / "sick" / "metrics.jsonl").read_bytes():
            features.pooled = features.pooled.mean(dim=0, keepdim=True) + features.pooled * 1e-4
        return features

    monkeypatch.setattr(ViT, "encode", collapsing)
    go(tmp_path / "sick", shards, *often)
    assert "health at step 20: the deviation of pooled features fell below a tenth" in caplog.text


def test_loss_falls(shards: Path, tmp_path: Path) -> None:
    rows = go(tmp_path / "run", shards, "train.max_steps=60", "train.warmup_epochs=2", "train.lr_per_256=3.0e-2")
    losses = [row["loss"] for row in rows]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_bf16_trains(shards: Path, tmp_path: Path) -> None:
    exact, rough = go(tmp_path / "a", shards), go(tmp_path / "b", shards, "train.precision=bf16")
    assert [r["loss"] for r in rough] == pytest.approx([r["loss"] for r in exact], rel=0.03)  # bf16 keeps 8 bits


def test_chips_of_a_constant_band_and_one_sample_batches(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "few", samples=3)
    rows = go(tmp_path / "run", shards, "train.global_batch=1", "train.max_steps=7")
    assert [row["epoch"] for row in rows][2] == 1.0 and all(row["loss"] is not None for row in rows)


def test_compiled_blocks_are_the_same(shards: Path, tmp_path: Path) -> None:
    plain = go(tmp_path / "plain", shards, "train.max_steps=2")
    compiled = go(tmp_path / "compiled", shards, "train.max_steps=2", "train.compile=true")
    assert [r["loss"] for r in compiled] == pytest.approx([r["loss"] for r in plain], rel=1e-4)  # fused sums round otherwise


def test_the_gradient_is_of_the_loss_over_the_whole_batch(shards: Path, tmp_path: Path) -> None:
    """AdamW hides a wrong factor, so its first moment after one step is held against autograd of numerator / weight."""
    go(tmp_path / "run", shards, "train.max_steps=1", "train.micro_batch=2")
    _, moments = read_checkpoint(tmp_path / "run", "optimizer.")
    recipe = read_recipe(RECIPE, [f"run.dir={tmp_path / 'fresh'}", f"data.train={shards}"], name="test")
    recipe.run.dir.mkdir()
    trainer = _Trainer(recipe, ALONE, "cpu")
    chips = next(trainer.data.batches(global_batch=8, micro_batch=8, step=0, device=torch.device("cpu"))).chips
    draw = Draw(0, chips.id, chips.visit)
    view = augment.view(recipe.data.augment, draw, chips.stored["image"].size)
    batch = prepare(chips, trainer.data.contracts, trainer.size, view)
    outcome = trainer.model(batch, draw)
    (outcome.numerator / outcome.weight).backward()
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is not None
        got = moments[f"{name}.exp_avg"] / 0.1  # 1 - beta1
        # fp32 sums of four micro-batches in another order
        assert torch.allclose(got, parameter.grad, rtol=1e-3, atol=1e-6), name
