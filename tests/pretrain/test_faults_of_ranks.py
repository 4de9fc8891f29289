"""What becomes of a run when a rank hangs, dies or fails: who is named, who ends first, and that nothing is lost.

docs/reliability.md is the table of all faults; each row names its test.
"""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from swath.pretrain import trainer, watch
from swath.pretrain.config import read_recipe
from swath.pretrain.trainer import _Trainer, pretrain
from swath.pretrain.world import World, is_echo
from tests.ranks import run
from tests.shard_folders import make_shards

RECIPE = """
backbone: {name: vit_tiny_patch8, width: 24, depth: 1, heads: 3}
objective: {name: mae, decoder_width: 24, decoder_depth: 1, decoder_heads: 3}
train: {global_batch: 8, max_steps: 8, precision: fp32, device: cpu, threads: 1, hang_after: 1.2}
checkpoint: {every: 2}
health: {every: 100, samples: 8}
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("faults") / "shards", samples=40)


def train(run_dir: Path, shards: Path, *overrides: str) -> None:
    pretrain(read_recipe(RECIPE, [f"run.dir={run_dir}", f"data.train={shards}", *overrides], name="test"))


def hang() -> None:
    time.sleep(600)


def stop() -> None:
    """As a machine that is swapping, or a debugger: not even the watch comes to run."""
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise RuntimeError("of its own")


def pause() -> None:
    """Stopped for longer than a hang lasts, and continued."""
    subprocess.Popen(["sh", "-c", f"kill -STOP {os.getpid()}; sleep 2.5; kill -CONT {os.getpid()}"])
    time.sleep(0.5)


def with_fault(run_dir: Path, shards: Path, fault: Any, rank: int, hold: float, *overrides: str) -> None:
    """Trains; in the third step, when it asks for data, something happens to one rank."""
    watch.HOLD = trainer.HOLD = hold
    at = watch.Watch.at

    def watched(self: watch.Watch, what: str, step: int) -> None:
        at(self, what, step)
        if (what, step, self.world.rank) == ("data", 3, rank):
            fault()

    watch.Watch.at = watched  # type: ignore[method-assign]
    train(run_dir, shards, *overrides)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_that_hangs_is_named_and_ends_first(strategy: str, shards: Path, tmp_path: Path) -> None:
    said, place = tmp_path / "said", tmp_path / "run"
    codes = run(
        3, with_fault, place, shards, hang, 1, 60, f"train.strategy={strategy}", "train.global_batch=9", grace=1, said=said
    )
    assert codes == [-9, 1, -9], "the others were still there"
    words = said.read_text()
    assert "late: rank 1 at data of step 3 for 1 s; rank 0 waits at forward and backward of step 3" in words
    assert "Traceback" not in words
    stacks = [(place / f"hang-rank-{rank:05d}.txt").read_text() for rank in range(3)]
    assert "rank 1 of 3" in stacks[1] and "at data of step 3" in stacks[1] and "in hang\n" in stacks[1]
    assert all("at forward and backward of step 3" in stacks[rank] and "in _one_step" in stacks[rank] for rank in (0, 2))


def test_the_others_end_by_themselves(shards: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    assert run(2, with_fault, tmp_path / "run", shards, hang, 0, 0.5, grace=20, said=said) == [1, 1]
    assert said.read_text().count("late: rank 0 at data of step 3") == 2


def test_a_rank_that_does_not_answer_is_named(shards: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    assert run(2, with_fault, tmp_path / "run", shards, stop, 1, 60, grace=0.5, said=said) == [1, -9]
    assert "late: rank 1 does not answer; rank 0 waits at forward and backward of step 3" in said.read_text()


def test_one_process_that_hangs_ends_too(shards: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    assert run(1, with_fault, tmp_path / "run", shards, hang, 0, 60, said=said) == [1]
    assert "late: rank 0 at data of step 3" in said.read_text()
    assert "in hang\n" in (tmp_path / "run" / "hang-rank-00000.txt").read_text()


def test_a_process_that_was_stopped_for_a_while_goes_on(shards: Path, tmp_path: Path) -> None:
    assert run(1, with_fault, tmp_path / "run", shards, pause, 0, 60) == [0]
    assert not (tmp_path / "run" / "hang-rank-00000.txt").exists()


@pytest.mark.parametrize(("fault", "code"), [(die, -9), (fail, 1)])
def test_a_dead_rank_ends_the_run_with_its_own_error(fault: Any, code: int, shards: Path, tmp_path: Path) -> None:
    """The others wait to be ended, and have no error of their own to show."""
    said = tmp_path / "said"
    began = time.monotonic()
    assert run(3, with_fault, tmp_path / "run", shards, fault, 1, 60, "train.global_batch=9", grace=0.5, said=said) == [
        -9,
        code,
        -9,
    ]
    assert time.monotonic() - began < 30
    words = said.read_text()
    assert words.count("a collective failed, since another rank ended or was late") == 2
    assert words.count("Traceback") == words.count("RuntimeError: of its own") == (fault is fail)


def late(seconds: float) -> None:
    world = World.join("cpu")
    world.allow(0.5)
    if world.rank == 1:
        time.sleep(seconds)
        os._exit(0)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="Timed out waiting 500ms") as caught:
        world.sum(torch.ones(1))
    assert is_echo(caught.value) and time.monotonic() - began < seconds and dist.is_initialized()
    os._exit(0)


def test_a_collective_may_last_as_long_as_was_said(tmp_path: Path) -> None:
    assert run(2, late, 1.5) == [0, 0]
