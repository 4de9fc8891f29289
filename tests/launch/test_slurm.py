"""Runs on a real SLURM cluster of four nodes: each meets one mishap, ends by itself, and has done every step once.

Training is stood in for by tests/launch/counter.py, a few processes that count together, but for one run.
"""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from swath.launch.cli import main
from swath.launch.jobs import slurm
from swath.launch.jobs.status import status
from swath.pretrain.record import read_lines
from tests.launch.cluster import Cluster, missing, wait
from tests.shard_folders import make_shards

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    why = missing()
    if why is not None:
        pytest.skip(why)
    with Cluster(4) as made:
        yield made


class Launched:
    """One run given to `swath launch slurm`, and what its files and SLURM say of it."""

    def __init__(self, cluster: Cluster, run: Path, capsys: pytest.CaptureFixture[str], steps: int, *options: str) -> None:
        self.cluster, self.run, self.steps = cluster, run, steps
        shards = run.parent / "shards"
        if not shards.exists():
            make_shards(shards)
        words = [
            "mae_vit_tiny", f"run.dir={run}", f"data.train={shards}", f"train.max_steps={steps}", "train.epochs=null",
            "checkpoint.every=10", *options, "--env", "PYTHONPATH", "--env", "GLOO_SOCKET_IFNAME", "--env", "OMP_NUM_THREADS",
        ]  # fmt: skip
        assert main(["launch", "slurm", *words]) == 0, capsys.readouterr().err
        self.number = capsys.readouterr().out.split("job ")[1].split()[0]

    @property
    def done(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    @property
    def state(self) -> str:
        return self.cluster.job(self.number)["JobState"]

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted((self.run / "launch").glob("job-*.log")))

    @property
    def starts(self) -> int:
        return len((self.run / "launch" / "starts").read_text().splitlines())

    def reaches(self, step: int, seconds: float = 180) -> None:
        wait(f"step {step}\n{self.log}", lambda: self.done >= step, seconds)

    def ends(self, seconds: float = 400) -> None:
        """Waits until no job of this run is left; requeued ones need not wait for their two minutes."""

        def nothing_left() -> bool:
            name = slurm.job_name(self.run)
            numbers = self.cluster.run("squeue", "--noheader", "--name", name, "--format", "%i").split()
            for number in numbers:
                self.cluster.hurry(number)
            return not numbers

        try:
            wait("the end", nothing_left, seconds)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.log}\n{status(self.run)}") from None

    def every_step_once(self) -> None:
        steps = [row["step"] for row in read_lines(self.run / "metrics.jsonl")]
        assert steps == list(range(1, self.steps + 1)), self.log
        assert f"{self.steps} of {self.steps} (100%)" in status(self.run)


Launch = Callable[..., Launched]


@pytest.fixture
def launch(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Launch]:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def start(steps: int, *options: str, program: tuple[str, ...] = ("tests.launch.counter",)) -> Launched:
        monkeypatch.setattr(slurm, "PROGRAM", program)
        return Launched(cluster, tmp_path / "run", capsys, steps, *options)

    yield start
    subprocess.run(["scancel", "--user", "root"], timeout=60)
    wait("an idle cluster", lambda: not cluster.run("squeue", "--noheader"), 60)


def test_two_nodes_of_two_processes(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank has its log, and what may be secret stands in no file, whether it was passed on or not."""
    monkeypatch.setenv("HF_TOKEN", "sesame-1")
    monkeypatch.setenv("NOT_ASKED_FOR", "sesame-2")
    monkeypatch.setenv("PROXY", "http://me:sesame-3@there")
    job = launch(20, "--nodes", "2", "--processes-per-node", "2", "--time", "10", "--env", "HF_TOKEN", "--env", "PROXY")
    job.ends()
    job.every_step_once()
    assert job.state == "COMPLETED" and job.starts == 1
    logs = next((job.run / "launch" / "logs").iterdir())
    assert len(list(logs.glob("rank-*.log"))) == 4 and "n2: swath" in job.log
    for rank in range(4):
        assert f'"rank": {rank}, "token": true' in (logs / f"rank-{rank:05d}.log").read_text()
    assert "SLURM_JOB_ID=" in (logs / "environment.txt").read_text()
    for path in job.run.rglob("*"):
        assert not path.is_file() or b"sesame" not in path.read_bytes(), path


def shorten(job: Launched) -> None:
    """Its limit is now one to two minutes away, so that the warning comes within a minute (SLURM looks every half minute)."""
    job.reaches(20)
    hours, minutes, _ = job.cluster.job(job.number)["RunTime"].split(":")
    job.cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={int(hours) * 60 + int(minutes) + 2}")


def test_a_run_into_the_time_limit_goes_on(launch: Launch) -> None:
    job = launch(800, "--time", "30", "--stop-before", "60")
    shorten(job)
    wait("the requeue", lambda: job.state == "PENDING", 150)
    assert 20 <= job.done < 800 and "asked to stop" in job.log
    job.cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")
    job.ends()
    job.every_step_once()
    assert job.state == "COMPLETED" and job.starts == 2


def test_a_chain_where_requeue_is_disabled(launch: Launch) -> None:
    job = launch(800, "--nodes", "2", "--time", "30", "--stop-before", "60", "--continue", "chain")
    shorten(job)
    job.ends()
    job.every_step_once()
    assert job.cluster.job(job.number)["Requeue"] == "0"
    assert len(list((job.run / "launch").glob("job-*.log"))) == job.starts == 2


def test_training_is_requeued(launch: Launch) -> None:
    """The real thing, one process, asked to stop as an administrator would."""
    small = ["backbone.width=48", "backbone.depth=1", "objective.decoder_width=24", "objective.decoder_depth=1",
             "train.global_batch=8", "train.precision=fp32", "train.threads=1", "health.samples=8"]  # fmt: skip
    job = launch(600, *small, "--time", "30", program=("swath.launch.cli", "pretrain"))
    job.reaches(20)
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    wait("the requeue", lambda: job.state == "PENDING", 60)
    assert 20 <= job.done < 600, job.log
    job.ends()
    job.every_step_once()
    assert job.cluster.job(job.number)["Restarts"] == "1" and "stopped after step" in job.log


def test_a_preempted_run_goes_on(launch: Launch) -> None:
    job = launch(300, "--nodes", "4", "--time", "30")
    job.reaches(10)
    high = job.cluster.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=4", "--output=/dev/null", "--wrap", "sleep 5"
    ).strip()
    wait("the other job's end", lambda: job.cluster.job(high)["JobState"] == "COMPLETED", 120)
    assert job.done < 300
    job.ends()
    job.every_step_once()
    assert job.state == "COMPLETED" and job.starts == 2


@pytest.mark.parametrize("which", ["first", "last"])
def test_a_node_that_is_lost(which: str, launch: Launch) -> None:
    """With the first node the batch script itself is lost to SLURM, and lives on for a while."""
    job = launch(700, "--nodes", "2", "--time", "30")
    job.reaches(15)
    lost = {"first": "n1", "last": "n2"}[which]
    job.cluster.kill(lost)
    try:
        wait("the loss to be noticed", lambda: job.state == "PENDING", 120)
        assert job.done < 700
        job.ends()
        job.every_step_once()
        assert job.starts >= 2
    finally:
        job.cluster.start(lost)
        wait("the node's return", lambda: lost in job.cluster.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split(), 60)


def test_cancelled_is_cancelled(launch: Launch) -> None:
    """The ranks save, and nothing is requeued."""
    job = launch(2000, "--nodes", "2", "--time", "30")
    job.reaches(15)
    job.cluster.run("scancel", job.number)
    wait("the end", lambda: not job.cluster.run("squeue", "--noheader"), 90)
    assert job.state == "CANCELLED" and job.starts == 1


def test_no_progress_three_times_is_the_end(launch: Launch) -> None:
    job = launch(100, "run.seed=13", "--nodes", "2", "--time", "30")
    job.ends()
    assert job.starts == 3 and "giving up" in job.log and job.state == "FAILED"
    assert "rank 1 on n2: RuntimeError: bad luck" in status(job.run)
