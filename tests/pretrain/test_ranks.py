"""Several processes train what one does: the same samples, masks and losses, under every strategy and on any number of ranks.

The bound: gradients are sums of the same fp32 numbers in another order, which moves them by about 1e-7 of their size; AdamW
divides by the square root of small second moments, and such differences grow from step to step. Twelve steps stay within 2e-5.
"""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from swath.launch.cli import main
from swath.pretrain.checkpoint import read_checkpoint
from swath.pretrain.config import read_recipe
from swath.pretrain.record import read_lines
from swath.pretrain.trainer import _Trainer, pretrain
from tests.ranks import run
from tests.shard_folders import make_shards

BOUND = 2e-5
STEPS = 12
MODELS: dict[str, dict[str, Any]] = {
    "mae": {
        "backbone": {"name": "vit_tiny_patch8", "width": 24, "depth": 2, "heads": 3},
        "objective": {"name": "mae", "decoder_width": 24, "decoder_depth": 1, "decoder_heads": 3},
    },
    "roma": {
        "backbone": {"name": "mamba_tiny", "patch": 8, "width": 24, "depth": 2, "cluster": 2},
        "objective": {"name": "roma", "decoder_width": 24, "decoder_depth": 2, "decoder_heads": 3, "windows": [2], "block": 2},
    },
    "latent": {
        "backbone": {"name": "vit_tiny_patch8", "width": 24, "depth": 2, "heads": 3},
        "objective": {"name": "latent", "predictor_width": 24, "predictor_depth": 1, "predictor_heads": 3},
    },
}
TRAIN = {"global_batch": 8, "precision": "fp32", "device": "cpu", "threads": 1, "lr_per_256": 3e-2, "clip_norm": 1.0}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("ranks") / "shards", samples=40)


def recipe(run_dir: Path, shards: Path, model: str, **train: Any) -> str:
    return yaml.safe_dump(
        {
            **MODELS[model], "run": {"dir": str(run_dir)}, "data": {"train": str(shards), "augment": {"flip": "both"}},
            "train": {**TRAIN, "epochs": 3, "max_steps": STEPS, **train}, "checkpoint": {"every": 4, "keep": 9},
            "health": {"every": 6, "samples": 8},
        }
    )  # fmt: skip


def train(text: str, seen: Path | None = None) -> None:
    """As `swath pretrain` does; what each rank was given goes to `seen`."""
    if seen is not None:
        listen(seen)
    pretrain(read_recipe(text, [], name="test"))


def listen(seen: Path) -> None:
    """Write down, step by step, which samples this rank trains on and which masks it draws."""
    step = _Trainer._one_step

    def one_step(self: _Trainer, batches: Any) -> dict[str, Any]:
        row = step(self, batches)
        ids = torch.cat(row["ids"]).tolist()
        with (seen / f"{self.world.rank}.jsonl").open("a") as file:
            file.write(json.dumps({"step": row["step"], "ids": ids}) + "\n")
        return row

    _Trainer._one_step = one_step  # type: ignore[method-assign]


def losses(run_dir: Path) -> list[float]:
    lines = read_lines(run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "each step once"
    return [line["loss"] for line in lines]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run_dir, "model.")[1]


@pytest.fixture(scope="module")
def alone(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one process."""
    found = {}
    for model in MODELS:
        found[model] = tmp_path_factory.mktemp("alone") / model
        train(recipe(found[model], shards, model))
    return found


@pytest.mark.parametrize(
    ("model", "strategy", "size"),
    [("mae", "ddp", 2), ("mae", "ddp", 4), ("mae", "fsdp", 2), ("roma", "fsdp", 2)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("roma", "ddp", 2), ("roma", "ddp", 4), ("latent", "fsdp", 2))],
)
def test_ranks_train_what_one_process_does(
    model: str, strategy: str, size: int, alone: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "seen").mkdir()
    micro = 1 if size == 2 else None  # with accumulation
    text = recipe(tmp_path / "run", shards, model, strategy=strategy, micro_batch=micro)
    assert run(size, train, text, tmp_path / "seen") == [0] * size
    assert losses(tmp_path / "run") == pytest.approx(losses(alone[model]), rel=BOUND)
    ours, theirs = weights(tmp_path / "run"), weights(alone[model])
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=1e-3, rtol=1e-3), name
    shares = [[json.loads(line) for line in (tmp_path / "seen" / f"{rank}.jsonl").open()] for rank in range(size)]
    given = [[one for share in step for one in share["ids"]] for step in zip(*shares, strict=True)]
    assert all(len(set(step)) == 8 for step in given)
    assert len({one for step in given[:5] for one in step}) == 40, "an epoch is every sample once"


def until(text: str, step: int, killed: bool) -> None:
    """Trains to some step; then every rank is killed, or rank 1 alone is asked to stop."""
    one_step = _Trainer._one_step

    def watched(self: _Trainer, batches: Any) -> dict[str, Any]:
        if self.step == step and killed:
            os.kill(os.getpid(), signal.SIGKILL)
        self.asked = self.asked or (self.step == step and self.world.rank == min(1, self.world.size - 1))
        return one_step(self, batches)

    _Trainer._one_step = watched  # type: ignore[method-assign]
    result = pretrain(read_recipe(text, [], name="test"))
    assert result.stopped and result.step == step + min(2, int(os.environ["WORLD_SIZE"])), result


def test_a_run_moves_between_worlds_and_strategies(alone: dict[str, Path], shards: Path, tmp_path: Path) -> None:
    """1 → 4 → 2 → 1 processes, ddp → fsdp → ddp, killed or stopped each time: a step later than asked where several agree."""
    place = tmp_path / "run"
    ddp, fsdp = (recipe(place, shards, "mae", strategy=name) for name in ("ddp", "fsdp"))
    assert run(1, until, ddp, 2, False) == [0]  # stops at step 3
    assert set(run(4, until, fsdp, 6, True)) == {-signal.SIGKILL}  # falls back to step 4
    assert run(4, until, fsdp, 6, False) == [0] * 4  # stops at step 8
    assert set(run(2, until, ddp, 9, True)) == {-signal.SIGKILL}
    assert run(2, train, fsdp) == [0] * 2
    assert losses(place) == pytest.approx(losses(alone["mae"]), rel=BOUND)


def command(recipe: str) -> None:
    os._exit(main(["pretrain", recipe]))


def test_what_does_not_divide_is_refused_with_what_would(shards: Path, tmp_path: Path) -> None:
    """Rank 0 says it, in one line; the others end alike."""
    place = tmp_path / "recipe.yaml"
    place.write_text(recipe(tmp_path / "run", shards, "mae"))
    assert run(3, command, str(place), said=tmp_path / "said") == [2] * 3
    said = "swath pretrain: train.global_batch 8 does not divide by world size 3; 6 or 9 would\n"
    assert (tmp_path / "said").read_text() == said


def poisoned(text: str, rank: int) -> None:
    """Trains, with a NaN in the loss of one rank in the third step."""
    step = _Trainer._one_step

    def one_step(self: _Trainer, batches: Any) -> dict[str, Any]:
        forward = self.strategy.forward

        def broken(*given: Any) -> Any:
            outcome = forward(*given)
            return replace(outcome, numerator=outcome.numerator * float("nan"))

        if self.step == 2 and self.world.rank == rank:
            self.strategy.forward = broken  # pyright: ignore[reportAttributeAccessIssue]
        row = step(self, batches)
        self.strategy.forward = forward
        return row

    _Trainer._one_step = one_step  # type: ignore[method-assign]
    train(text)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_skip_what_one_rank_finds_not_finite(strategy: str, shards: Path, tmp_path: Path) -> None:
    text = recipe(tmp_path / "run", shards, "mae", strategy=strategy, max_steps=5)
    assert run(2, poisoned, text, 1) == [0, 0]
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["skipped"] for line in lines] == [False, False, True, False, False]
    listed = json.loads((tmp_path / "run" / "skipped-step-00000003.json").read_text())
    assert len(set(listed["sample_ids"])) == 8, "of all ranks"
