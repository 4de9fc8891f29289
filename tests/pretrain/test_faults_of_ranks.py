"""What becomes of a run when a rank hangs, dies or fails, or its disk or clock does: who is named, who ends first, and that
nothing is lost. docs/reliability.md is the table of all faults; each row names its test.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from swath.launch.cli import main
from swath.launch.jobs.local import run_here
from swath.pretrain import checkpoint, owner, trainer, watch
from swath.pretrain.config import read_recipe
from swath.pretrain.record import read_lines
from swath.pretrain.trainer import pretrain
from swath.pretrain.world import World, is_echo
from swath.shards.errors import InputError
from swath.shards.reader import ShardReader
from tests.ranks import run
from tests.shard_folders import make_shards

RECIPE = """
backbone: {name: vit_tiny_patch8, width: 24, depth: 1, heads: 3}
objective: {name: mae, decoder_width: 24, decoder_depth: 1, decoder_heads: 3}
train: {global_batch: 12, max_steps: 8, precision: fp32, device: cpu, threads: 1}
checkpoint: {every: 2}
health: {every: 100, samples: 8}
"""
SOON = "train.hang_after=1.2"  # where something is to hang; elsewhere a busy machine may take its time
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("faults") / "shards", samples=40)


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run that nothing happens to."""
    place = tmp_path_factory.mktemp("whole") / "run"
    train(place, shards)
    return losses(place)


def losses(place: Path) -> list[float]:
    rows = read_lines(place / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "each step once"
    return [row["loss"] for row in rows]


def train(place: Path, shards: Path, *overrides: str) -> None:
    pretrain(read_recipe(RECIPE, [f"run.dir={place}", f"data.train={shards}", *overrides], name="test"))


def command(place: Path, shards: Path) -> None:
    """As a user sees it: one line and an exit code."""
    recipe = shards.parent / "recipe.yaml"
    recipe.write_text(RECIPE)
    os._exit(main(["pretrain", str(recipe), f"run.dir={place}", f"data.train={shards}"]))


# --- in a step ---


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


def asked() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def asked_to_end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def clock_back() -> None:
    true = time.time
    time.time = lambda: true() - 1e7  # type: ignore[assignment]


def clock_ahead() -> None:
    true = time.time
    time.time = lambda: true() + 1e7  # type: ignore[assignment]


DATA = "data"
COLLECTIVE = "the exchange of numbers"


def with_fault(
    place: Path, shards: Path, fault: Callable[[], None], rank: int = 0, *overrides: str, hold: float = 60, when: str = DATA
) -> None:
    """Trains; from the third step on, when it comes to something, something happens to one rank."""
    watch.HOLD = trainer.HOLD = hold
    at, still = watch.Watch.at, True

    def watched(self: watch.Watch, what: str, step: int) -> None:
        nonlocal still
        at(self, what, step)
        if still and step >= 3 and (what, self.world.rank) == (when, rank):
            still = False
            fault()

    watch.Watch.at = watched  # type: ignore[method-assign]
    train(place, shards, *overrides, *([SOON] if fault in (hang, stop, pause) else []))


def in_collective(place: Path, shards: Path, fault: Callable[[], None], rank: int) -> None:
    with_fault(place, shards, fault, rank, when=COLLECTIVE)


def in_phase(place: Path, shards: Path, fault: Callable[[], None], rank: int, when: str) -> None:
    with_fault(place, shards, fault, rank, when=when)


def not_held(place: Path, shards: Path, fault: Callable[[], None], rank: int) -> None:
    with_fault(place, shards, fault, rank, hold=0.5)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=slow), pytest.param("deepspeed", marks=slow)])
def test_a_rank_that_hangs_is_named_and_ends_first(strategy: str, shards: Path, tmp_path: Path) -> None:
    if strategy == "deepspeed":
        pytest.importorskip("deepspeed", reason="pip install 'swath[deepspeed]'")
    said, place = tmp_path / "said", tmp_path / "run"
    assert run(3, with_fault, place, shards, hang, 1, f"train.strategy={strategy}", grace=0.5, said=said) == [-9, 1, -9]
    words = said.read_text()
    assert "late: rank 1 at data of step 3 for 1 s; rank 0 waits at forward and backward of step 3" in words
    assert "Traceback" not in words
    stacks = [(place / f"hang-rank-{rank:05d}.txt").read_text() for rank in range(3)]
    assert "rank 1 of 3" in stacks[1] and "at data of step 3" in stacks[1] and "in hang\n" in stacks[1]
    assert all("at forward and backward of step 3" in stacks[rank] and "in _one_step" in stacks[rank] for rank in (0, 2))


@slow
@pytest.mark.parametrize(
    ("when", "step"), [("forward and backward", 3), ("reading the numbers", 3), ("the look at health", 8), ("saving", 4)]
)
def test_a_rank_that_hangs_in_any_phase_is_named(when: str, step: int, shards: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    assert run(2, in_phase, tmp_path / "run", shards, hang, 1, when, grace=0.5, said=said) == [-9, 1]
    words = said.read_text()
    assert f"late: rank 1 at {when} of step {step} for " in words and "; rank 0 waits at " in words


@slow
def test_a_rank_that_hangs_before_a_collective_is_named(shards: Path, tmp_path: Path) -> None:
    """All are at the same thing; only the number of collectives tells them apart."""
    said = tmp_path / "said"
    assert run(2, in_collective, tmp_path / "run", shards, hang, 1, grace=0.5, said=said) == [-9, 1]
    assert f"late: rank 1 at {COLLECTIVE} of step 3" in said.read_text()


@slow
def test_the_others_end_by_themselves(shards: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    assert run(2, not_held, tmp_path / "run", shards, hang, 0, grace=20, said=said) == [1, 1]
    assert said.read_text().count("late: rank 0 at data of step 3") == 2


@slow
def test_a_rank_that_does_not_answer_is_named(shards: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    assert run(2, with_fault, tmp_path / "run", shards, stop, 1, grace=0.5, said=said) == [1, -9]
    assert "late: rank 1 does not answer; rank 0 waits at forward and backward of step 3" in said.read_text()


@slow
def test_one_process_that_hangs_ends_too(shards: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    assert run(1, with_fault, tmp_path / "run", shards, hang, said=said) == [1]
    assert "late: rank 0 at data of step 3" in said.read_text()
    assert "in hang\n" in (tmp_path / "run" / "hang-rank-00000.txt").read_text()


def cannot_restore(place: Path, shards: Path) -> None:
    watch.START, checkpoint.load_into = timedelta(seconds=1), lambda *_: hang()
    train(place, shards)


@slow
def test_one_that_hangs_at_restoring_ends_too(shards: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    train(tmp_path / "run", shards, "train.max_steps=2")
    assert run(1, cannot_restore, tmp_path / "run", shards, said=said) == [1]
    assert "late: rank 0 at restoring of step 0" in said.read_text()


@slow
def test_a_process_that_was_stopped_for_a_while_goes_on(shards: Path, tmp_path: Path, whole: list[float]) -> None:
    assert run(1, with_fault, tmp_path / "run", shards, pause) == [0]
    assert losses(tmp_path / "run") == whole and not list((tmp_path / "run").glob("hang*"))


@pytest.mark.parametrize(
    ("work", "fault", "code"),
    [(with_fault, die, -9), pytest.param(with_fault, fail, 1, marks=slow), pytest.param(in_collective, die, -9, marks=slow)],
)
def test_a_dead_rank_ends_the_run_with_its_own_error(work: Any, fault: Any, code: int, shards: Path, tmp_path: Path) -> None:
    """The others wait to be ended, and have no error of their own to show."""
    said = tmp_path / "said"
    began = time.monotonic()
    assert run(3, work, tmp_path / "run", shards, fault, 1, grace=0.5, said=said) == [-9, code, -9]
    assert time.monotonic() - began < 30
    words = said.read_text()
    assert words.count("a collective failed, since another rank ended or was late") == 2
    assert words.count("Traceback") == words.count("\nRuntimeError: of its own\n") == (fault is fail)


PROGRAM = """
import sys
from pathlib import Path
from tests.pretrain import test_faults_of_ranks as faults
place, shards, fault = sys.argv[1:]
faults.with_fault(Path(place), Path(shards), getattr(faults, fault), 1, hold=20)
"""


@slow
@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("die", 137, "killed by SIGKILL"),
        ("fail", 1, "RuntimeError: of its own"),
        ("hang", 1, "nothing moves, late: rank 1 at data"),
    ],
)
def test_the_launcher_names_the_rank_whose_fault_it_was(
    fault: str, code: int, words: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    given = [str(tmp_path / "run"), str(shards), fault]
    assert run_here("program", given, processes=2, logs=tmp_path / "logs") == code
    told = json.loads(next((tmp_path / "logs").glob("failure-*.json")).read_text())
    assert told["rank"] == 1 and words in told["message"]


@slow
@pytest.mark.parametrize("ask", [asked, asked_to_end])
def test_a_signal_to_one_rank_stops_all_of_them(ask: Any, shards: Path, tmp_path: Path, whole: list[float]) -> None:
    """They agree in the exchange of the step after the one in hand."""
    place = tmp_path / "run"
    assert run(2, with_fault, place, shards, ask, 1) == [0, 0]
    assert (place / "checkpoints" / "latest").read_text() == "step-00000004"
    assert run(1, train, place, shards) == [0]
    assert losses(place) == pytest.approx(whole, rel=2e-5)  # sums in another order, as in test_ranks.py


@slow
@pytest.mark.parametrize("jump", [clock_back, clock_ahead])
def test_a_clock_that_jumps_changes_nothing(jump: Any, shards: Path, tmp_path: Path, whole: list[float]) -> None:
    assert run(1, with_fault, tmp_path / "run", shards, jump) == [0]
    assert losses(tmp_path / "run") == whole


def late(seconds: float, of_a_thread: bool) -> None:
    world = World.join("cpu")
    group = world.group() if of_a_thread else None
    world.allow(0.5)
    if world.rank == 1:
        time.sleep(seconds)
        os._exit(0)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="Timed out waiting 500ms") as caught:
        dist.all_reduce(torch.ones(1), group=group)
    assert is_echo(caught.value) and time.monotonic() - began < seconds and dist.is_initialized()
    os._exit(0)


@slow
@pytest.mark.parametrize("of_a_thread", [False, True])
def test_a_collective_may_last_as_long_as_was_said(of_a_thread: bool) -> None:
    """That of the thread that saves, in a group of its own, too."""
    assert run(2, late, 1.5, of_a_thread) == [0, 0]


def test_time_outs_are_long_until_the_first_step_of_a_size(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are read a step later, when the device has done the step; then, and not before, is it short."""
    said: list[tuple[str, int, bool]] = []
    monkeypatch.setattr(watch.Watch, "allow", lambda self, *, long: said.append((self._doing.what, self._doing.step, long)))
    stages = "train.stages=[{size: 16, epochs: 0.9}, {size: 32, epochs: 0.6}]"
    train(tmp_path / "run", shards, stages, "train.max_steps=null", "checkpoint.every=100")
    read = "reading the numbers"
    assert said == [(read, 1, False), (read, 2, False), (read, 2, True), (read, 3, False), (read, 4, False), (read, 5, False)]


# --- in a save ---

POINTS = {
    "before": ("os.mkdir", ".step-00000004.partial"),
    "tensors": ("open", ".step-00000004.partial/tensors/__0_0.distcp"),
    "metadata": ("open", ".step-00000004.partial/tensors/.metadata"),
    "state": ("open", "state.json.partial"),
    "sums": ("open", ".files.json.partial"),
    "marker": ("open", ".complete.partial"),
    "name": ("os.rename", ".step-00000004.partial"),
    "latest": ("open", ".latest.partial"),
    "old ones": ("shutil.rmtree", "checkpoints/step-00000002"),
    "half of an old one": ("os.remove", "__0_0.distcp"),
    "after": ("os.mkdir", ".step-00000006.partial"),
}
FILES = [name for name, (event, _) in POINTS.items() if event == "open"]


def at_point(
    place: Path, shards: Path, point: tuple[str, str], fault: Callable[[], None], rank: int = 0, half: bool = False
) -> None:
    """Trains; from the third step on, whenever this is about to be done to a file of this name, something happens. With `half`
    there is something in the file by then, and not all of it."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal half
        if event == point[0] and any(isinstance(arg, str | os.PathLike) and point[1] in str(arg) for arg in args):
            if half:
                half = False
                Path(args[0]).write_bytes(b'{"half')
            fault()

    def begin() -> None:
        if int(os.environ["RANK"]) == rank:
            sys.addaudithook(hook)

    with_fault(place, shards, begin, rank)


@slow
@pytest.mark.parametrize(("point", "half"), [(name, False) for name in POINTS] + [(name, True) for name in FILES])
def test_killed_in_a_save(point: str, half: bool, shards: Path, tmp_path: Path, whole: list[float]) -> None:
    """Before each phase of it, hence after each but the last, and in the middle of those that write a file."""
    place = tmp_path / "run"
    assert run(1, at_point, place, shards, POINTS[point], die, 0, half) == [-9]
    assert run(1, train, place, shards) == [0]
    assert losses(place) == whole
    assert not list((place / "checkpoints").glob(".*")), "what was half there is gone"


@slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_killed_in_a_save(rank: int, shards: Path, tmp_path: Path, whole: list[float]) -> None:
    place = tmp_path / "run"
    point = ("open", f".step-00000004.partial/tensors/__{rank}_0.distcp")
    codes = run(2, at_point, place, shards, point, die, rank, grace=0.5)
    assert codes == [-9, -9]
    assert run(2, train, place, shards) == [0, 0]
    assert losses(place) == pytest.approx(whole, rel=2e-5)


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only() -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def with_disk(place: Path, shards: Path, point: tuple[str, str], fault: Callable[[], None], rank: int = 0) -> None:
    """As a user sees it."""
    try:
        at_point(place, shards, point, fault, rank)
    except InputError as error:
        print(f"said: {error}", file=sys.stderr, flush=True)
        os._exit(2)


@slow
@pytest.mark.parametrize(
    ("point", "fault", "words"),
    [
        (POINTS["tensors"], full, "no space left while writing a checkpoint in"),
        (POINTS["latest"], full, "no space left while writing a checkpoint in"),
        (POINTS["before"], read_only, "is not permitted (Read-only file system); choose a folder you may write"),
    ],
)
def test_a_disk_that_fails(point: Any, fault: Any, words: str, shards: Path, tmp_path: Path, whole: list[float]) -> None:
    """One line, and the same command continues once the disk is in order."""
    said, place = tmp_path / "said", tmp_path / "run"
    assert run(1, with_disk, place, shards, point, fault, said=said) == [2]
    lines = [line for line in said.read_text().splitlines() if line.startswith("said: ")]
    assert len(lines) == 1 and words in lines[0]
    assert run(1, train, place, shards) == [0]
    assert losses(place) == whole


@slow
def test_one_rank_whose_disk_is_full_ends_all(shards: Path, tmp_path: Path, whole: list[float]) -> None:
    said, place = tmp_path / "said", tmp_path / "run"
    point = ("open", ".step-00000004.partial/tensors/__1_0.distcp")
    assert run(2, with_disk, place, shards, point, full, 1, said=said) == [2, 2]
    assert "no space left while writing a checkpoint" in said.read_text() and "Traceback" not in said.read_text()
    assert run(2, train, place, shards) == [0, 0]
    assert losses(place) == pytest.approx(whole, rel=2e-5)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "swath-test", folder], capture_output=True, check=False).returncode:
        pytest.skip("mounting takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


@slow
@pytest.mark.parametrize("size", ["16k", "200k", "1m"])
def test_a_disk_that_is_really_full(size: str, disk: Path, shards: Path, whole: list[float]) -> None:
    """At the start, at the first checkpoint, at a later one."""
    remount(disk, f"size={size}")
    said = disk.parent / "said"
    assert run(1, command, disk / "run", shards, said=said) == [2]
    lines = [line for line in said.read_text().splitlines() if line.startswith("swath pretrain: ")]
    assert len(lines) == 1 and "no space left while writing" in lines[0] and "Traceback" not in said.read_text()
    remount(disk, "size=16m")
    assert run(1, command, disk / "run", shards) == [0]
    assert losses(disk / "run") == whole


@slow
def test_a_disk_that_has_become_read_only(disk: Path, shards: Path, whole: list[float]) -> None:
    """A run that was stopped is not started again on it, in one line."""
    assert run(1, with_fault, disk / "run", shards, asked) == [0]
    remount(disk, "ro")
    said = disk.parent / "said"
    assert run(1, command, disk / "run", shards, said=said) == [2]
    lines = [line for line in said.read_text().splitlines() if line.startswith("swath pretrain: ")]
    assert len(lines) == 1 and "is not permitted (Read-only file system)" in lines[0] and "Traceback" not in said.read_text()
    remount(disk, "rw")
    assert run(1, command, disk / "run", shards) == [0]
    assert losses(disk / "run") == whole


# --- in the loader ---


def in_loader(place: Path, shards: Path, fault: Callable[[], None], rank: int) -> None:
    """From the third step on, whenever the loader's thread is to decode something, something happens."""

    def begin() -> None:
        ShardReader.chips = lambda *given: fault()  # type: ignore[method-assign,assignment]

    with_fault(place, shards, begin, rank, *([SOON] if fault is hang else []))


@slow
@pytest.mark.parametrize(
    ("fault", "codes", "words"),
    [
        (fail, [-9, 1], "RuntimeError: of its own"),
        (hang, [-9, 1], "late: rank 1 at data of step"),
        (die, [-9, -9], "a collective failed, since another rank ended"),
    ],
)
def test_a_loader_that_fails_or_hangs(fault: Any, codes: list[int], words: str, shards: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    assert run(2, in_loader, tmp_path / "run", shards, fault, 1, grace=0.5, said=said) == codes
    assert words in said.read_text() and said.read_text().count("Traceback") == (fault is fail)


@slow
def test_shards_that_are_cut_while_they_are_read(tmp_path: Path, whole: list[float]) -> None:
    """They are mapped: the kernel ends the process. The next start says what is wrong; with the shards back the run goes on."""
    shards, place, said = make_shards(tmp_path / "shards", samples=40), tmp_path / "run", tmp_path / "said"
    kept = {path: path.read_bytes() for path in shards.glob("*.tar")}
    assert run(1, with_fault, place, shards, partial(cut, shards)) == [-signal.SIGBUS]
    assert run(1, command, place, shards, said=said) == [2]
    assert "copy it again or make the shards again" in said.read_text() and "Traceback" not in said.read_text()
    for path, raw in kept.items():
        path.write_bytes(raw)
    assert run(1, train, place, shards) == [0]
    assert losses(place) == whole


def cut(shards: Path) -> None:
    for path in shards.glob("*.tar"):
        os.truncate(path, 0)


@slow
def test_a_damaged_sample_is_told_once_by_the_rank_that_meets_it(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "shards", samples=40)
    path = folder / "shard-000001.tar"
    raw = bytearray(path.read_bytes())
    raw[int(ShardReader(folder).index.members[20, 0]["offset"]) + 300] ^= 1
    path.write_bytes(raw)
    said = tmp_path / "said"
    codes = run(2, command, tmp_path / "run", folder, grace=0.5, said=said)
    assert sorted(codes) == [-9, 2], codes
    lines = [line for line in said.read_text().splitlines() if line.startswith("swath pretrain: ")]
    assert len(lines) == 1 and "sample chip20" in lines[0] and "Traceback" not in said.read_text()


# --- the lease ---


@pytest.mark.parametrize("clock", [-1e5, 1e5])
@pytest.mark.parametrize("alive", [True, False])
def test_a_lease_is_judged_by_its_beats_where_clocks_differ(
    clock: float, alive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process on another machine, whose clock is a day off, holds the run for as long as it gives signs of life."""
    monkeypatch.setattr(owner, "BEAT", 0.01)
    lease = tmp_path / "owner.json"

    def beat(number: int) -> None:
        owner.write_json(lease, {"host": "elsewhere", "pid": 1, "started": "0", "beat": time.time() + clock + number})

    beat(0)
    monkeypatch.setattr(owner.time, "sleep", lambda seconds: beat(1) if alive else None)
    if alive:
        with pytest.raises(InputError, match="owned by process 1 on elsewhere"):
            owner.Owner(tmp_path).__enter__()
        assert json.loads(lease.read_text())["host"] == "elsewhere"
    else:
        with owner.Owner(tmp_path):
            assert json.loads(lease.read_text())["pid"] == os.getpid()
