"""A run that starts from weights: its first loss is theirs, its numbers are normalised as theirs were, and others are refused."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swath.hub.load import load_backbone
from swath.pretrain import initial
from swath.pretrain.checkpoint import find_latest, read_checkpoint, read_state
from swath.pretrain.config import read_recipe
from swath.pretrain.trainer import pretrain
from swath.shards.errors import InputError
from swath.shards.manifest import read_manifest
from tests.shard_folders import RGB, make_shards

RECIPE = """
backbone: {name: vit_tiny_patch8, width: 48, depth: 1}
objective: {name: mae, decoder_width: 24, decoder_depth: 1, decoder_heads: 3}
train: {global_batch: 8, max_steps: 2, lr_per_256: 3.0e-2, precision: fp32, threads: 1}
health: {every: 100, samples: 16}
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("initial") / "shards", samples=24)


@pytest.fixture(scope="module")
def first(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("initial") / "first"
    go(run, shards)
    return run


def go(run: Path, shards: Path, *overrides: str) -> list[dict[str, Any]]:
    pretrain(read_recipe(RECIPE, [f"run.dir={run}", f"data.train={shards}", *overrides], name="test"))
    return [json.loads(line) for line in (run / "health.jsonl").read_text().splitlines()]


def test_the_first_loss_is_theirs(first: Path, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The held-out loss before the first step is the one after the last step of the run that they come from."""
    last = [json.loads(line) for line in (first / "health.jsonl").read_text().splitlines()][-1]
    with caplog.at_level(logging.INFO, logger="swath"):
        rows = go(tmp_path / "second", shards, f"train.init={first}")
    assert rows[0]["step"] == 0 and rows[0]["loss"] == last["loss"] and rows[-1]["loss"] != last["loss"]
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("starting from")]
    assert "the weights of objective mae too" in line
    latest = find_latest(tmp_path / "second")
    assert latest is not None
    start = read_state(latest)["start"]
    assert start["backbone"] == "vit_tiny_patch8" and start["objective"]["name"] == "mae" and "image" in start["contracts"]
    fresh = go(tmp_path / "third", shards, f"train.init={first}", "objective.decoder_depth=2")
    assert fresh[0]["loss"] != last["loss"]


def test_normalised_as_the_weights_were(first: Path, shards: Path, tmp_path: Path) -> None:
    """Shards with other statistics: the run, and its continuation, go on with those of the weights."""
    manifest = read_manifest(shards)
    contract = manifest.contracts["image"]
    other = contract.normalisation.model_copy(update={"mean": (10.0,) * 3})
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in shards.iterdir():
        (moved / path.name).symlink_to(path)
    (moved / "manifest.json").unlink()
    changed = {"image": contract.model_copy(update={"normalisation": other})}
    manifest.model_copy(update={"contracts": changed}).write(moved)
    rows = go(tmp_path / "run", moved, f"train.init={first}", "train.max_steps=1")
    last = [json.loads(line) for line in (first / "health.jsonl").read_text().splitlines()][-1]
    assert rows[0]["loss"] == last["loss"]
    assert load_backbone(tmp_path / "run").contract.normalisation == contract.normalisation
    go(tmp_path / "run", moved, f"train.init={first}", "train.max_steps=2")
    latest = find_latest(tmp_path / "run")
    assert latest is not None and read_state(latest)["step"] == 2


def test_another_objective_starts_anew_and_a_teacher_follows(first: Path, shards: Path, tmp_path: Path) -> None:
    task = "objective={name: latent, predictor_width: 24, predictor_depth: 1, predictor_heads: 3, momentum: 1.0}"
    go(tmp_path / "run", shards, f"train.init={first}", task, "train.max_steps=1")
    theirs = read_checkpoint(first, "model.backbone.")[1]
    teacher = read_checkpoint(tmp_path / "run", "model.teacher.")[1]
    assert theirs.keys() == teacher.keys() and all(torch.equal(theirs[name], teacher[name]) for name in theirs)


def test_what_does_not_fit_is_refused(first: Path, shards: Path, tmp_path: Path) -> None:
    swapped = make_shards(tmp_path / "swapped", samples=16, bands=RGB[::-1])
    with pytest.raises(InputError, match="input contracts differ"):
        go(tmp_path / "a", swapped, f"train.init={first}")
    with pytest.raises(InputError, match="heads is 3 there, 4 here"):
        go(tmp_path / "b", shards, f"train.init={first}", "backbone.heads=4")
    with pytest.raises(InputError, match="depth is 1 there, 2 here"):
        go(tmp_path / "c", shards, f"train.init={first}", "backbone.depth=2")
    with pytest.raises(InputError, match="not a run folder"):
        go(tmp_path / "d", shards, f"train.init={tmp_path}")
    with pytest.raises(InputError, match="another configuration"):
        go(first, shards, f"train.init={first}")
    assert not (first / initial.START).exists()
    assert np.isfinite([row["loss"] for row in go(tmp_path / "b", shards)]).all(), "a refused start leaves nothing behind"
