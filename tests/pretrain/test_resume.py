"""A run killed at any moment and started again is the uninterrupted run, bit for bit (one machine, threads, precision)."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from swath.pretrain.checkpoint import find_latest, read_checkpoint
from tests.shard_folders import make_shards

RECIPE = """
run: {dir: unset, seed: 5}
data: {train: unset, augment: {crop: [0.5, 1.0], flip: both, quarter_turns: true}}
backbone: {name: vit_tiny_patch8, width: 96, depth: 3}
objective: {name: mae, decoder_width: 48, decoder_depth: 1, decoder_heads: 3}
train: {global_batch: 16, micro_batch: 8, max_steps: 60, lr_per_256: 1.0e-2, warmup_epochs: 4, precision: fp32, threads: 1}
checkpoint: {every: 4}
health: {every: 25, samples: 16}
"""


def command(folder: Path, run: str, *overrides: str) -> list[str]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    given = [f"run.dir={folder / run}", f"data.train={folder / 'shards'}", *overrides]
    return [sys.executable, "-m", "swath.launch.cli", "pretrain", str(recipe), *given]


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "every step once, in order"
    return [row["loss"] for row in rows]


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards and one uninterrupted run."""
    folder = tmp_path_factory.mktemp("resume")
    make_shards(folder / "shards", samples=50)
    subprocess.run(command(folder, "whole"), check=True, capture_output=True)
    return folder


def wait_until(what: object, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run did not get there in time"
        time.sleep(0.001)


def signalled(
    folder: Path, run: str, number: signal.Signals, owner: str, method: str, calls: int
) -> subprocess.CompletedProcess[bytes]:
    """The run, sent a signal by itself just before that call of a method: a watcher could be late."""
    module, _, name = owner.rpartition(".")
    code = f"""
import os, sys
from swath.launch import cli
from {module} import {name} as owner
count, method = 0, owner.{method}
def counted(*args, **kwargs):
    global count
    count += 1
    if count == {calls}:
        os.kill(os.getpid(), {int(number)})
    return method(*args, **kwargs)
owner.{method} = counted
sys.exit(cli.main(sys.argv[1:]))
"""
    words = command(folder, run)
    return subprocess.run([words[0], "-c", code, *words[3:]], capture_output=True, check=False)


def test_killed_and_continued(finished: Path) -> None:
    """Before the first checkpoint, in the middle of steps, and during a save."""
    run = finished / "killed"
    step, saved = ("swath.pretrain.record.Record", "step"), ("swath.pretrain.checkpoint._Writer", "finish")
    for (owner, method), calls, left in ((step, 3, 2), (step, 16, 15), (saved, 7, 40)):
        done = signalled(finished, "killed", signal.SIGKILL, owner, method, calls)
        assert done.returncode == -signal.SIGKILL and lines(run) >= left
    assert any((run / "checkpoints").glob(".*.partial"))
    subprocess.run(command(finished, "killed"), check=True, capture_output=True)
    assert losses(run) == losses(finished / "whole")
    _, expected = read_checkpoint(finished / "whole")
    _, got = read_checkpoint(run)
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)


def test_signal_saves_and_says_so(finished: Path) -> None:
    """SIGTERM ends with exit code 85 and a checkpoint of the step in hand; the run then continues to the same end."""
    run = finished / "asked"
    done = signalled(finished, "asked", signal.SIGTERM, "swath.pretrain.record.Record", "step", 10)
    assert done.returncode == 85 and b"the same command continues it" in done.stdout
    latest = find_latest(run)
    assert latest is not None and int(latest.name[5:]) == lines(run) < 60
    subprocess.run(command(finished, "asked"), check=True, capture_output=True)
    assert losses(run) == losses(finished / "whole")


def test_damaged_checkpoint_falls_back(finished: Path) -> None:
    """A flipped byte is found by its checksum; the checkpoint before is used, and the run ends in the same losses."""
    run = finished / "damaged"
    shutil.copytree(finished / "whole", run)
    newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    file = next(newest.glob("tensors/*.distcp"))
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    shutil.copy(run / "recipe.yaml", finished / "again.yaml")
    again = [sys.executable, "-m", "swath.launch.cli", "pretrain", str(finished / "again.yaml")]
    # the stored recipe is itself a recipe; only the folder differs, so the run is told apart by its own dir
    text = (finished / "again.yaml").read_text().replace(str(finished / "whole"), str(run))
    (finished / "again.yaml").write_text(text)
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace(str(finished / "whole"), str(run)))
    done = subprocess.run(again, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{newest} is damaged" in done.stderr and "checksum" in done.stderr
    assert losses(run) == losses(finished / "whole")


def test_second_owner_is_refused(finished: Path) -> None:
    long = command(finished, "owned", "train.max_steps=5000")  # longer than the second one takes to start
    process = subprocess.Popen(long, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: lines(finished / "owned") >= 1, process)
        second = subprocess.run(long, capture_output=True, text=True, check=False)
        assert second.returncode == 2 and f"owned by process {process.pid}" in second.stderr
        assert "Traceback" not in second.stderr
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr_per_256=0.5", "train.lr_per_256: 0.01 in the run, 0.5 now"),
        pytest.param("run.seed=6", "run.seed: 5 in the run, 6 now", marks=pytest.mark.slow),
        pytest.param("backbone.depth=4", "backbone.depth: 3 in the run, 4 now", marks=pytest.mark.slow),
    ],
)
def test_other_configuration_is_refused_with_a_diff(finished: Path, override: str, message: str) -> None:
    done = subprocess.run(command(finished, "whole", override), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_length_micro_batch_and_checkpoints_may_change(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "whole", finished / "longer")
    overrides = ["train.max_steps=62", "train.micro_batch=16", "checkpoint.every=50"]
    text = (finished / "longer" / "recipe.yaml").read_text().replace(str(finished / "whole"), str(finished / "longer"))
    (finished / "longer" / "recipe.yaml").write_text(text)
    done = subprocess.run(command(finished, "longer", *overrides), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert losses(finished / "longer")[:60] == losses(finished / "whole") and lines(finished / "longer") == 62


def test_other_data_are_refused(finished: Path) -> None:
    from tests.shard_folders import RGB

    shutil.copytree(finished / "whole", finished / "elsewhere")
    text = (finished / "elsewhere" / "recipe.yaml").read_text().replace(str(finished / "whole"), str(finished / "elsewhere"))
    (finished / "elsewhere" / "recipe.yaml").write_text(text)
    (finished / "shards").rename(finished / "kept")
    try:
        make_shards(finished / "shards", samples=50, bands=RGB[::-1])
        done = subprocess.run(command(finished, "elsewhere"), capture_output=True, text=True, check=False)
    finally:
        shutil.rmtree(finished / "shards")
        (finished / "kept").rename(finished / "shards")
    assert done.returncode == 2 and "band 1: red | blue" in done.stderr and "Traceback" not in done.stderr
