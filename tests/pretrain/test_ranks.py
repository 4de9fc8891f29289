"""Several processes train what one does: the same samples, masks and losses, under every strategy and on any number of ranks.

The bound: gradients are sums of the same fp32 numbers in another order, which moves them by about 1e-7 of their size; AdamW
divides by the square root of small second moments, and such differences grow from step to step. Twelve steps stay within 2e-5.
"""

import json
import os
import random
import signal
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
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
from swath.pretrain.watch import Watch
from swath.shards.draw import Draw
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
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    **{f"zero{stage}": {"strategy": "deepspeed", "zero": stage} for stage in (1, 2, 3)},
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
    """Write down, step by step, which samples this rank trains on, and what it draws for each of them: masks, views."""
    step, uniform = _Trainer._one_step, Draw.uniform
    drawn: list[int] = []

    def noted(self: Draw, stream: str, n: int) -> torch.Tensor:
        made = uniform(self, stream, n)
        for key, row in zip(self._key_b.tolist(), made.numpy(), strict=True):
            drawn.append(zlib.crc32(row.tobytes(), zlib.crc32(f"{key} {stream}".encode())))
        return made

    def one_step(self: _Trainer, batches: Any) -> dict[str, Any]:
        drawn.clear()
        row = step(self, batches)
        ids = torch.cat(row["ids"]).tolist()
        with (seen / f"{self.world.rank}.jsonl").open("a") as file:
            file.write(json.dumps({"step": row["step"], "ids": ids, "drawn": drawn}) + "\n")
        return row

    Draw.uniform, _Trainer._one_step = noted, one_step  # type: ignore[method-assign]


def given(seen: Path) -> dict[int, tuple[list[int], list[int]]]:
    """step → (samples in the order of ranks, draws sorted), of the steps that all ranks have done."""
    ranks = [{row["step"]: row for row in map(json.loads, file.open())} for file in sorted(seen.iterdir())]
    return {
        step: ([one for rank in ranks for one in rank[step]["ids"]], sorted(one for rank in ranks for one in rank[step]["drawn"]))
        for step in sorted(set.intersection(*map(set, ranks)))
    }


def losses(run_dir: Path) -> list[float]:
    lines = read_lines(run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "each step once"
    return [line["loss"] for line in lines]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run_dir, "model.")[1]


@pytest.fixture(scope="module")
def alone(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """model → the run of one process, once; what it was given lies beside it."""

    @cache
    def found(model: str) -> Path:
        place = tmp_path_factory.mktemp("alone") / model
        (place.parent / "seen").mkdir()
        assert run(1, train, recipe(place, shards, model), place.parent / "seen") == [0]
        return place

    return found


def needs(*strategies: str) -> None:
    if any(name.startswith("zero") for name in strategies) and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: pip install 'swath[deepspeed]'")


FAST = {("mae", "ddp", 2), ("mae", "fsdp", 2), ("roma", "fsdp", 2), ("mae", "zero3", 2)}
CASES = [(model, name, size) for model in ("mae", "roma") for name in STRATEGIES for size in (2, 4)] + [("latent", "fsdp", 2)]


@pytest.mark.parametrize(
    ("model", "strategy", "size"), [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_ranks_train_what_one_process_does(
    model: str, strategy: str, size: int, alone: Callable[[str], Path], shards: Path, tmp_path: Path
) -> None:
    needs(strategy)
    (tmp_path / "seen").mkdir()
    micro = 1 if size == 2 else None  # with accumulation
    text = recipe(tmp_path / "run", shards, model, **STRATEGIES[strategy], micro_batch=micro)
    assert run(size, train, text, tmp_path / "seen") == [0] * size
    assert losses(tmp_path / "run") == pytest.approx(losses(alone(model)), rel=BOUND)
    ours, theirs = weights(tmp_path / "run"), weights(alone(model))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=1e-3, rtol=1e-3), name
    assert given(tmp_path / "seen") == given(alone(model).parent / "seen"), "the same samples in the same order, the same draws"
    steps = [ids for ids, _ in given(tmp_path / "seen").values()]
    assert len({one for step in steps[:5] for one in step}) == 40, "an epoch is every sample once"


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


def test_a_run_moves_between_worlds_and_strategies(alone: Callable[[str], Path], shards: Path, tmp_path: Path) -> None:
    """1 → 4 → 2 → 1 processes, ddp → fsdp → ddp, killed or stopped each time: a step later than asked where several agree."""
    place = tmp_path / "run"
    ddp, fsdp = (recipe(place, shards, "mae", strategy=name) for name in ("ddp", "fsdp"))
    assert run(1, until, ddp, 2, False) == [0]  # stops at step 3
    assert set(run(4, until, fsdp, 6, True)) == {-signal.SIGKILL}  # falls back to step 4
    assert run(4, until, fsdp, 6, False) == [0] * 4  # stops at step 8
    assert set(run(2, until, ddp, 9, True)) == {-signal.SIGKILL}
    assert run(2, train, fsdp) == [0] * 2
    assert losses(place) == pytest.approx(losses(alone("mae")), rel=BOUND)


def killed(text: str, seen: Path, where: tuple[str, int] | None, rank: int) -> None:
    """Trains until one rank comes to something in a step, where it is killed."""
    at = Watch.at

    def watched(self: Watch, what: str, step: int) -> None:
        at(self, what, step)
        if (what, step) == where and self.world.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    Watch.at = watched  # type: ignore[method-assign]
    train(text, seen)


PLACES = ("data", "forward and backward", "the exchange of numbers", "reading the numbers")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("model", "seed", "legs"),
    [
        ("mae", 1, [(1, "ddp"), (4, "zero2"), (2, "fsdp"), (2, "zero1")]),
        ("roma", 2, [(1, "ddp"), (4, "fsdp"), (2, "zero3"), (2, "ddp")]),
    ],
)
def test_a_run_killed_at_random_on_the_way_sees_every_sample_once(
    model: str, seed: int, legs: Sequence[tuple[int, str]], alone: Callable[[str], Path], shards: Path, tmp_path: Path
) -> None:
    """1 → 4 → 2 processes, one of them killed each time. Steps after the last whole checkpoint are done again, with the same
    samples, and count once."""
    needs(*(name for _, name in legs))
    chance = random.Random(seed)
    for leg, (size, name) in enumerate(legs):
        seen = tmp_path / f"seen{leg}"
        seen.mkdir()
        where = None if leg == len(legs) - 1 else (chance.choice(PLACES), chance.randint(2 + 3 * leg, 4 + 3 * leg))
        text = recipe(tmp_path / "run", shards, model, **STRATEGIES[name])
        codes = run(size, killed, text, seen, where, chance.randrange(size), grace=0.5, seconds=300)
        assert codes == [0] * size if where is None else -signal.SIGKILL in codes, (leg, where, codes)
    assert losses(tmp_path / "run") == pytest.approx(losses(alone(model)), rel=BOUND)
    whole = given(alone(model).parent / "seen")
    for leg in range(len(legs)):
        assert all(done == whole[step] for step, done in given(tmp_path / f"seen{leg}").items())
    samples = [one for ids, _ in whole.values() for one in ids]
    assert [len(set(samples[epoch : epoch + 40])) for epoch in (0, 40)] == [40, 40], "an epoch is every sample once"


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


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", *(pytest.param(f"zero{n}", marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_all_skip_what_one_rank_finds_not_finite(strategy: str, shards: Path, tmp_path: Path) -> None:
    needs(strategy)
    text = recipe(tmp_path / "run", shards, "mae", **STRATEGIES[strategy], max_steps=5)
    assert run(2, poisoned, text, 1) == [0, 0]
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["skipped"] for line in lines] == [False, False, True, False, False]
    listed = json.loads((tmp_path / "run" / "skipped-step-00000003.json").read_text())
    assert len(set(listed["sample_ids"])) == 8, "of all ranks"
