"""A run over several image sizes: sizes and rates are a function of the step, whatever stops the run, wherever it continues."""

import json
import logging
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from swath.hub.load import load_backbone
from swath.pretrain.checkpoint import read_checkpoint
from swath.pretrain.config import read_recipe
from swath.pretrain.trainer import Result, _Trainer, pretrain
from swath.shards.bands import Band
from swath.shards.errors import InputError
from tests.shard_folders import make_shards

RECIPE = """
backbone: {name: spectral_vit_base_patch8, width: 32, depth: 1, heads: 4}
objective: {name: spectralgpt, mask_ratio: 0.75, decoder_width: 16, decoder_depth: 1, decoder_heads: 2}
data: {augment: {crop: [0.5, 1.0]}}
train:
  global_batch: 8
  micro_batch: 4
  stages: [{size: 24, epochs: 1}, {size: 40, epochs: 1, lr_per_256: 8.0e-3}, {size: 32, epochs: 0.6}]
  lr_per_256: 1.6e-2
  warmup_epochs: 0.4
  precision: fp32
  threads: 1
checkpoint: {every: 3, keep: 9}
health: {every: 100, samples: 8}
"""
SIZES = [24] * 5 + [40] * 5 + [32] * 3  # five steps of eight are an epoch of forty


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bands = tuple(Band(name=f"b{n}") for n in range(6))
    return make_shards(tmp_path_factory.mktemp("stages") / "shards", samples=40, bands=bands)


def go(run: Path, shards: Path, *overrides: str) -> Result:
    return pretrain(read_recipe(RECIPE, [f"run.dir={run}", f"data.train={shards}", *overrides], name="test"))


def rows(run: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert go(run, shards).total == len(SIZES)
    return run


def test_sizes_and_rates_are_those_of_the_stages(whole: Path) -> None:
    """Every stage warms up over two steps and decays to nothing by itself; the second has a rate of its own."""
    assert [row["size"] for row in rows(whole)] == [[size, size] for size in SIZES]

    def rates(peak: float, steps: int) -> list[float]:
        return [peak * s / 2 if s < 2 else peak * 0.5 * (1 + math.cos(math.pi * (s - 2) / (steps - 2))) for s in range(steps)]

    expected = rates(5e-4, 5) + rates(2.5e-4, 5) + rates(5e-4, 3)
    assert [row["lr"] for row in rows(whole)] == pytest.approx(expected)


def test_cost_is_of_the_size_of_each_step(whole: Path) -> None:
    """12, 75 and 48 tokens: MFU over speed is the cost of a sample."""
    chosen = json.loads((whole / "choices.json").read_text())
    first, second, third = chosen["flops_per_sample"]
    assert 1.5 * first < third < second / 1.4
    for row in rows(whole):
        cost = {24: first, 40: second, 32: third}[row["size"][0]]
        assert row["mfu"] == pytest.approx(row["samples_per_second"] * cost / chosen["peak_flops"])


def test_checkpoints_are_of_the_size_that_was_trained(whole: Path) -> None:
    """One at a boundary is of the stage that ended, not of the next; health looks at that size too. Tables are of the last."""
    assert load_backbone(whole / "checkpoints" / "step-00000003").size == (24, 24)
    assert load_backbone(whole / "checkpoints" / "step-00000006").size == (40, 40)
    loaded = load_backbone(whole)
    assert loaded.size == (32, 32) and loaded.options["image_size"] == 32
    assert [row["size"] for row in rows(whole, "health")] == [[24, 24], [32, 32]]
    _, tensors = read_checkpoint(whole)
    assert {tensors[f"model.{n}pos_embed_spatial"].shape[1] for n in ("", "backbone.")} == {16}


def test_a_checkpoint_at_a_boundary(shards: Path, tmp_path: Path) -> None:
    go(tmp_path / "run", shards, "checkpoint.every=5", "train.max_steps=7")
    folder = tmp_path / "run" / "checkpoints"
    assert load_backbone(folder / "step-00000005").size == (24, 24)
    assert load_backbone(folder / "step-00000007").size == (40, 40), "max_steps ends the run in the second stage"


class Killed(Exception):
    pass


@pytest.mark.parametrize("how", ["asked", "killed"])
def test_stopped_and_continued_is_bit_exact(
    how: str, whole: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a stage (2, 7, 12 steps done) and at both boundaries (5, 10); a kill goes back to the last checkpoint."""
    honest = _Trainer._one_step
    moments = [2, 5, 7, 10, 12]

    def interrupted(self: _Trainer, batches: Any) -> dict[str, Any]:
        if how == "killed" and moments and self.step == moments[0]:
            moments.pop(0)
            raise Killed
        if how == "asked" and moments and self.step + 1 == moments[0]:
            moments.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, batches)

    monkeypatch.setattr(_Trainer, "_one_step", interrupted)
    run, stops = tmp_path / "run", []
    while moments:
        expected = moments[0]
        try:
            result = go(run, shards)
            assert result.stopped and result.step == expected
        except Killed:
            pass
        stops.append(expected)
    assert go(run, shards).step == len(SIZES) and stops == [2, 5, 7, 10, 12]
    kept = ("step", "loss", "lr", "grad_norm", "size")
    assert [[row[k] for k in kept] for row in rows(run)] == [[row[k] for k in kept] for row in rows(whole)]
    (_, got), (_, expected_tensors) = read_checkpoint(run), read_checkpoint(whole)
    assert got.keys() == expected_tensors.keys()
    assert all(torch.equal(got[name], value) for name, value in expected_tensors.items())


def test_one_stage_is_the_run_without_stages(shards: Path, tmp_path: Path) -> None:
    go(tmp_path / "plain", shards, "train.stages=null", "train.epochs=1", "data.size=24")
    go(tmp_path / "staged", shards, "train.stages=[{size: 24, epochs: 1}]")
    plain, staged = ([(row["loss"], row["lr"]) for row in rows(tmp_path / run)] for run in ("plain", "staged"))
    assert plain == staged and len(plain) == 5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.epochs=3"], "train.epochs: train.stages says it stage by stage; leave out one of them"),
        (["data.size=32"], "data.size: train.stages says it stage by stage"),
        (["train.stages=[{size: 32}]"], r"train.stages.0.epochs: needed"),
        (["train.stages=[{size: 32, epochs: 0}]"], r"train.stages.0.epochs: .*greater than 0"),
        (["train.stages=[{size: 32, epochs: 1, lr: 1}]"], r"train.stages.0.lr: unknown key"),
        (["train.stages=[{size: 36, epochs: 1}, {size: 32, epochs: 1}]"], "36×36 pixels is not divisible by patch 8"),
        (["train.stages=[{size: 32, epochs: 1}, {size: 36, epochs: 1}]"], "36 is not divisible by patch 8"),
        (["train.stages=[{size: 8, epochs: 1}, {size: 32, epochs: 1}]"], r"mask_ratio 0.75 keeps 0 of 2 tokens"),
        (
            ["train.stages=[{size: 32, epochs: 1}, {size: 24, epochs: 0.1}]"],
            "train.stages.1.epochs 0.1 of 40 samples are less than",
        ),
        (["train.stages=[]"], "train.epochs or train.max_steps: one of them is needed"),
    ],
)
def test_wrong_stages_are_refused_in_one_line(overrides: list[str], message: str, shards: Path, tmp_path: Path) -> None:
    """Before anything is computed, also where the stage would only have come later."""
    with pytest.raises(InputError, match=message) as caught:
        go(tmp_path / "run", shards, *overrides)
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "choices.json").exists()


def test_stages_of_a_run_stay(whole: Path, shards: Path) -> None:
    with pytest.raises(InputError, match=r"another configuration[^\n]*\n  train.stages"):
        go(whole, shards, "train.stages=[{size: 24, epochs: 1}, {size: 40, epochs: 2}]")


def test_the_log_says_what_will_come(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of three stages two, the second not to its end."""
    caplog.set_level(logging.INFO, "swath")
    go(tmp_path / "run", shards, "train.max_steps=6")
    assert "lr 0.0005 at 24×24 pixels to step 5, then lr 0.00025 at 40×40 pixels to step 6, fp32 on cpu" in caplog.text
