"""Too many bad steps: back to the last checkpoint before them, and on without their samples, though the run be killed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swath.pretrain import returns
from swath.pretrain.config import read_recipe
from swath.pretrain.data import Data
from swath.pretrain.objective import Outcome
from swath.pretrain.objectives.mae import MAE
from swath.pretrain.record import read_lines
from swath.pretrain.trainer import pretrain
from swath.shards.errors import InputError
from tests.ranks import run
from tests.shard_folders import make_shards

RECIPE = """
backbone: {name: vit_tiny_patch8, width: 24, depth: 1, heads: 3}
objective: {name: mae, decoder_width: 24, decoder_depth: 1, decoder_heads: 3}
train: {global_batch: 4, max_steps: 22, lr_per_256: 3.0e-2, precision: fp32, device: cpu, threads: 1}
checkpoint: {every: 3}
health: {every: 100, samples: 4}
"""
BACK = ("train.max_bad_steps=3", "train.return_on_bad=1")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("returns") / "shards", samples=40)


def train(place: Path, shards: Path, *overrides: str) -> list[dict[str, Any]]:
    pretrain(read_recipe(RECIPE, [f"run.dir={place}", f"data.train={shards}", *BACK, *overrides], name="test"))
    return read_lines(place / "metrics.jsonl")


def poison(ids: list[int]) -> Callable[..., Outcome]:
    """MAE, were the pixels of these samples to break every training step that they count in."""
    forward = MAE.forward

    def broken(self: MAE, batch: Any, draw: Any) -> Outcome:
        outcome = forward(self, batch, draw)
        harm_b = torch.isin(batch.id, torch.tensor(ids)) & batch.images["image"].flatten(1).any(dim=1)
        return replace(outcome, numerator=outcome.numerator * float("nan")) if self.training and harm_b.any() else outcome

    return broken


@pytest.fixture
def bad(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first samples of steps 5, 6 and 7 are poisonous; ten steps are an epoch."""
    recipe = read_recipe(RECIPE, [f"run.dir={tmp_path}", f"data.train={shards}"], name="test")
    batches = Data(recipe.data, 0).batches(global_batch=4, micro_batch=4, step=0, device=torch.device("cpu"))
    ids = [int(next(batches).chips.id[0]) for _ in range(7)][4:]
    monkeypatch.setattr(MAE, "forward", poison(ids))
    return ids


def test_the_run_goes_back_and_leaves_them_out(shards: Path, tmp_path: Path, bad: list[int]) -> None:
    place = tmp_path / "run"
    rows = train(place, shards)
    (made,) = returns.read(place)
    assert (made["to"], made["from"], len(made["sample_ids"])) == (3, 5, 12) and set(bad) < set(made["sample_ids"])
    assert [row["step"] for row in rows] == list(range(1, 23))
    # of those three batches nothing is left; the next epoch has others, and what was left out is missing there
    assert [row["step"] for row in rows if row["loss"] is None] == [5, 6, 7]
    state = json.loads((place / "checkpoints" / "step-00000022" / "state.json").read_text())
    assert state["returns"] == [made] and state["bad"] == {}


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("noted", [False, True])
def test_killed_meanwhile_it_ends_the_same(
    noted: bool, shards: Path, tmp_path: Path, bad: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last of the bad steps, or when the return is noted and not done: the checkpoint of step 6 is of what is undone."""
    expected = train(tmp_path / "run", shards)
    note, place = returns.note, tmp_path / "killed"

    def kill(*args: Any) -> None:
        if noted:
            note(*args)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(returns, "note", kill)
        train(place, shards)
    assert (place / "checkpoints" / "step-00000006").exists()
    rows = train(place, shards)
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    assert returns.read(place) == returns.read(tmp_path / "run")


@pytest.mark.slow
def test_it_goes_back_so_often_only(shards: Path, tmp_path: Path, bad: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(returns, "leave_out", lambda batch, ids, contracts: batch)
    with pytest.raises(InputError, match=r"3 steps in a row .* up to step 7"):
        train(tmp_path / "run", shards, "train.return_on_bad=2")
    assert [made["to"] for made in returns.read(tmp_path / "run")] == [3, 3]


def with_poison(place: Path, shards: Path, ids: list[int], *overrides: str) -> None:
    MAE.forward = poison(ids)  # type: ignore[method-assign]
    train(place, shards, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [(), ("train.strategy=deepspeed", "train.zero=3")])
def test_all_ranks_go_back(strategy: tuple[str, ...], shards: Path, tmp_path: Path, bad: list[int]) -> None:
    if strategy:
        pytest.importorskip("deepspeed", reason="pip install 'swath[deepspeed]'")
    expected = train(tmp_path / "one", shards)
    assert run(2, with_poison, tmp_path / "two", shards, bad, *strategy) == [0, 0]
    assert returns.read(tmp_path / "two") == returns.read(tmp_path / "one")
    rows = read_lines(tmp_path / "two" / "metrics.jsonl")
    theirs = [row["loss"] or 0.0 for row in expected]
    assert [row["loss"] or 0.0 for row in rows] == pytest.approx(theirs, rel=1e-4)  # sums in another order, at a high rate
