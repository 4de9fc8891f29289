"""Training goes on while a checkpoint is written: it holds its own step's values, and no rank gets past an error in it."""

import errno
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.tensor import DTensor

from swath.launch.cli import main
from swath.pretrain import checkpoint
from swath.pretrain.checkpoint import Saver, _share, _Writer, find_latest, read_checkpoint
from swath.pretrain.config import read_recipe
from swath.pretrain.record import read_lines
from swath.pretrain.trainer import _Trainer, pretrain
from swath.pretrain.world import World
from swath.shards.errors import InputError
from tests.ranks import run
from tests.shard_folders import make_shards

LATEST = Path("checkpoints") / "latest"


def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before this event is set."""
    honest, go = _Writer.write_data, threading.Event()

    def write_data(self: _Writer, *given: Any) -> Any:
        assert go.wait(60)
        return honest(self, *given)

    monkeypatch.setattr(_Writer, "write_data", write_data)
    return go


def failing(*, first: int = 1) -> Any:
    """A write_data for _Writer that finds the disk full from the `first` save on."""
    honest, count = _Writer.write_data, [0]

    def write_data(self: _Writer, *given: Any) -> Any:
        count[0] += 1
        if count[0] >= first:
            raise OSError(errno.ENOSPC, "No space left on device")
        return honest(self, *given)

    return write_data


def test_what_is_written_is_of_the_step_of_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = held(monkeypatch)
    tensors = {"a": torch.full((3, 2), 1.0), "b": torch.tensor(1), "c": torch.ones(4, 4, dtype=torch.bfloat16).t()}
    with Saver(tmp_path, keep=2, permanent_every=None) as saver:
        saver.save(1, tensors, {"step": 1})
        for tensor in tensors.values():
            tensor.fill_(2)
        assert not (tmp_path / LATEST).exists(), "it moves when all is there"
        go.set()
        saver.wait()
        assert (tmp_path / LATEST).read_text() == "step-00000001"
        places = {name: copy.data_ptr() for name, copy in saver._copies.items()}
        saver.save(2, tensors, {"step": 2})
        assert places == {name: copy.data_ptr() for name, copy in saver._copies.items()}, "copied to the same place again"
    for step in (1, 2):
        state, read = read_checkpoint(tmp_path / "checkpoints" / checkpoint.name_of(step))
        assert state == {"step": step} and all((tensor == step).all() for tensor in read.values()) and len(read) == 3


def test_the_next_save_and_the_end_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    honest, finish = _Writer.write_data, _Writer.finish

    def write_data(self: _Writer, *given: Any) -> Any:
        events.append("begins")
        threading.Event().wait(0.1)
        return honest(self, *given)

    def finished(self: _Writer, **given: Any) -> None:
        finish(self, **given)
        events.append("ends")

    monkeypatch.setattr(_Writer, "write_data", write_data)
    monkeypatch.setattr(_Writer, "finish", finished)
    with Saver(tmp_path, keep=3, permanent_every=None) as saver:
        for step in (1, 2, 3):
            saver.save(step, {"a": torch.tensor(step)}, {})
    assert events == ["begins", "ends"] * 3
    for step in (1, 2, 3):
        read = read_checkpoint(tmp_path / "checkpoints" / checkpoint.name_of(step))[1]
        assert read["a"] == step, "not copied over before it was written"


def test_a_rank_copies_what_it_writes_alone() -> None:
    tensors = {f"{n}": torch.zeros(size) for n, size in enumerate([5, 70, 60, 8, 50, 50])}
    shares = [_share(tensors, World(rank, 3)) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(tensors)
    sizes = [sum(tensors[name].numel() for name in share) for share in shares]
    assert max(sizes) - min(sizes) <= 70, "no more than the largest of them apart"


def test_an_error_waits_for_what_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = held(monkeypatch)

    def broken() -> None:
        with Saver(tmp_path, keep=1, permanent_every=None) as saver:
            saver.save(1, {"a": torch.ones(2)}, {})
            threading.Timer(0.2, go.set).start()
            raise RuntimeError("of training")

    with pytest.raises(RuntimeError, match="of training"):
        broken()
    assert find_latest(tmp_path) is not None


def test_an_error_hides_none_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_Writer, "write_data", failing())

    def broken() -> None:
        with Saver(tmp_path, keep=1, permanent_every=None) as saver:
            saver.save(1, {"a": torch.ones(2)}, {})
            raise RuntimeError("of training")

    with pytest.raises(RuntimeError, match="of training"):
        broken()
    assert "the last checkpoint is not there either: no space left while writing a checkpoint" in caplog.text


def test_what_a_failed_one_left_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(InputError, match="no space left"):
        patch.setattr(_Writer, "write_data", failing())
        checkpoint.save(tmp_path, 1, {"a": torch.ones(2)}, {}, keep=1, permanent_every=None)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [".step-00000001.partial"]
    checkpoint.save(tmp_path, 2, {"a": torch.ones(2)}, {}, keep=1, permanent_every=None)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000002"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "swath-test", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("mounting takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("size", [90_000, 1000])  # tensors are most of it, or everything else is
def test_a_disk_that_is_full(size: int, small_disk: Path) -> None:
    with Saver(small_disk, keep=99, permanent_every=None) as saver:
        saver.save(1, {"a": torch.ones(size)}, {})
        with pytest.raises(InputError, match=f"^no space left while writing a checkpoint in {small_disk}/checkpoints; free some"):
            for step in range(2, 99):
                saver.save(step, {"a": torch.ones(size)}, {})
    latest = find_latest(small_disk)
    assert latest is not None and latest.name == (small_disk / LATEST).read_text()


@pytest.fixture
def read_only_disk(small_disk: Path) -> Path:
    checkpoint.save(small_disk, 1, {"a": torch.ones(9)}, {}, keep=1, permanent_every=None)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    return small_disk


def test_a_disk_that_became_read_only(read_only_disk: Path) -> None:
    with pytest.raises(InputError, match=r"is not permitted \(Read-only file system\); choose a folder you may write"):
        checkpoint.save(read_only_disk, 2, {"a": torch.ones(9)}, {}, keep=1, permanent_every=None)
    assert find_latest(read_only_disk) == read_only_disk / "checkpoints" / "step-00000001"


# --- killed ---

POINTS = ["write_data", "complete", "latest"]
MORE = [pytest.param(point, marks=pytest.mark.slow) for point in ("prepare_global_plan", "finish", "files.json")]


def killed_at(folder: Path, point: str) -> None:
    """Saves step 1, and is killed in the save of step 2: as a method of the writer begins, or before a file is written."""

    def kill(*given: Any, **named: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    write_bytes, write_json = checkpoint.write_bytes, checkpoint.write_json
    with Saver(folder, keep=1, permanent_every=None) as saver:
        saver.save(1, {"a": torch.full((5,), 1.0)}, {"step": 1})
        saver.wait()
        if hasattr(_Writer, point):
            setattr(_Writer, point, kill)
        checkpoint.write_bytes = lambda path, data: kill() if path.name == point else write_bytes(path, data)  # pyright: ignore
        checkpoint.write_json = lambda path, value: kill() if path.name == point else write_json(path, value)  # pyright: ignore
        saver.save(2, {"a": torch.full((5,), 2.0)}, {"step": 2})


@pytest.mark.parametrize("point", POINTS + MORE)
def test_killed_at_any_moment_a_whole_one_is_there(point: str, tmp_path: Path) -> None:
    assert run(1, killed_at, tmp_path, point) == [-signal.SIGKILL]
    state, tensors = read_checkpoint(tmp_path)
    whole = 2 if point == "latest" else 1  # the folder has its name before `latest` moves
    assert state == {"step": whole} and (tensors["a"] == whole).all()
    assert (tmp_path / LATEST).read_text() == "step-00000001"


# --- in a run ---


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("async") / "shards", samples=40)


def recipe(run_dir: Path, shards: Path, *, every: int, steps: int, strategy: str = "ddp") -> str:
    return yaml.safe_dump(
        {
            "run": {"dir": str(run_dir)}, "data": {"train": str(shards)},
            "backbone": {"name": "vit_tiny_patch8", "width": 24, "depth": 2, "heads": 3},
            "objective": {"name": "mae", "decoder_width": 24, "decoder_depth": 1, "decoder_heads": 3},
            "train": {"global_batch": 4, "max_steps": steps, "precision": "fp32", "device": "cpu", "threads": 1,
                      "strategy": strategy, "lr_per_256": 3e-2},
            "checkpoint": {"every": every, "keep": 9}, "health": {"every": 1000, "samples": 8},
        }
    )  # fmt: skip


def test_a_failure_ends_the_run_before_the_next_save(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Writer, "write_data", failing(first=2))
    with pytest.raises(InputError, match="no space left while writing a checkpoint"):
        pretrain(read_recipe(recipe(tmp_path, shards, every=10, steps=40), [], name="test"))
    assert 20 <= len(read_lines(tmp_path / "metrics.jsonl")) < 30
    assert (tmp_path / LATEST).read_text() == "step-00000010"


def full_on_one_rank(text: str, rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        _Writer.write_data = failing(first=2)
    os._exit(main(["pretrain", text]))


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_what_one_rank_cannot_write_ends_all_alike(rank: int, shards: Path, tmp_path: Path) -> None:
    place = tmp_path / "recipe.yaml"
    place.write_text(recipe(tmp_path / "run", shards, every=10, steps=40))
    assert run(2, full_on_one_rank, str(place), rank, said=tmp_path / "said") == [2, 2]
    said = [line for line in (tmp_path / "said").read_text().splitlines() if "checkpoint" in line]
    where = tmp_path / "run" / "checkpoints"
    assert said == [
        f"swath pretrain: no space left while writing a checkpoint in {where}; free some and run the same command again"
    ]
    assert 20 <= len(read_lines(tmp_path / "run" / "metrics.jsonl")) < 30
    assert (tmp_path / "run" / LATEST).read_text() == "step-00000010"


def moving_on(text: str, folder: Path) -> None:
    """Trains four steps, saves after the second, and writes that when the last one is done. What a step's tensors were, and which
    files each rank measured, goes to `folder`."""
    rank, done = int(os.environ["RANK"]), threading.Event()
    write_data, save, one_step, measure = _Writer.write_data, Saver.save, _Trainer._one_step, checkpoint._measure

    def late(self: _Writer, *given: Any) -> Any:
        assert done.wait(60)
        return write_data(self, *given)

    def noted(self: Saver, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}
        if rank == 0:
            torch.save(whole, folder / f"{step}.pt")
        save(self, step, tensors, state)

    def stepping(self: _Trainer, batches: Any) -> dict[str, Any]:
        row = one_step(self, batches)
        if self.step == 3:
            done.set()
        return row

    def measuring(path: Path) -> list[Any]:
        with (folder / f"{rank}.measured").open("a") as file:
            file.write(f"{path.parent.name}/{path.name}\n")
        return measure(path)

    _Writer.write_data, Saver.save, _Trainer._one_step = late, noted, stepping  # type: ignore[method-assign]
    checkpoint._measure = measuring
    pretrain(read_recipe(text, [], name="test"))


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_ranks_write_and_measure_their_shares_of_that_step(strategy: str, shards: Path, tmp_path: Path) -> None:
    assert run(2, moving_on, recipe(tmp_path / "run", shards, every=2, steps=4, strategy=strategy), tmp_path) == [0, 0]
    for step in (2, 4):
        place = tmp_path / "run" / "checkpoints" / checkpoint.name_of(step)
        _, read = read_checkpoint(place)
        expected = torch.load(tmp_path / f"{step}.pt")
        assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in read)
        listed = json.loads((place / "files.json").read_text())
        assert set(listed) == {str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()} - {"files.json", "complete"}
        shares = [listed[f"tensors/__{rank}_0.distcp"][0] for rank in (0, 1)]
        assert max(shares) < 1.2 * min(shares), "half each"
    measured = [set((tmp_path / f"{rank}.measured").read_text().splitlines()) for rank in (0, 1)]
    assert measured[1] == {"tensors/__1_0.distcp"}
    assert "tensors/__1_0.distcp" not in measured[0]
