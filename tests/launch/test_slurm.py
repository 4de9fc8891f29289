"""Runs of `swath pretrain` on a real SLURM cluster of four nodes: each meets one mishap, ends by itself, and nothing is lost.

Two nodes train a tiny model, with tests/launch/heard.py listening: every step is done once, on the samples and with the losses of
a run that nothing happened to, bit for bit, since two ranks add the same numbers. Mishaps that take minutes happen to two runs at
once.
"""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from swath.launch.cli import main
from swath.launch.jobs import slurm
from swath.launch.jobs.status import status
from tests.launch import heard
from tests.launch.cluster import Cluster, missing, wait
from tests.ranks import run as run_ranks
from tests.shard_folders import make_shards

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
REPOSITORY = Path(__file__).parents[2]
SAMPLES, STEPS = 40, 160
PASSED_ON = ("PYTHONPATH", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "HEARD_PACE")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    why = missing()
    if why is not None:
        pytest.skip(why)
    with Cluster(4) as made:
        yield made


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("slurm") / "shards", samples=SAMPLES)


def words_of(run: Path, shards: Path, steps: int) -> list[str]:
    place = (f"run.dir={run}", f"data.train={shards}", f"train.max_steps={steps}", "checkpoint.every=10")
    return ["mae_vit_tiny", *heard.SMALL, *place]


def undisturbed(run: Path, shards: Path, steps: int, ranks: int) -> Path:
    assert run_ranks(ranks, heard.train, words_of(run, shards, steps), seconds=300) == [0] * ranks
    return run


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing happens to."""
    return undisturbed(tmp_path_factory.mktemp("whole") / "run", shards, STEPS, 2)


class Launched:
    """One run given to `swath launch slurm`, and what its files and SLURM say of it."""

    def __init__(self, cluster: Cluster, run: Path, capsys: pytest.CaptureFixture[str], steps: int, *words: str) -> None:
        self.cluster, self.run, self.steps = cluster, run, steps
        passed = [word for name in PASSED_ON for word in ("--env", name)]
        assert main(["launch", "slurm", *words, "--time", "30", *passed]) == 0, capsys.readouterr().err
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

    def reaches(self, step: int, seconds: float = 300) -> None:
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

    def lost_nothing(self, whole: Path) -> None:
        assert f"{self.steps} of {self.steps} (100%)" in status(self.run), self.log
        assert heard.losses(self.run) == heard.losses(whole)
        assert heard.samples(self.run, SAMPLES) == heard.samples(whole, SAMPLES)


Launch = Callable[..., Launched]


@pytest.fixture
def launch(
    cluster: Cluster, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Launch]:
    monkeypatch.setattr(slurm, "PROGRAM", ("tests.launch.heard",))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def start(*options: str, name: str = "run", steps: int = STEPS, pace: float = 0.25) -> Launched:
        """On two nodes, one rank each, unless the options say otherwise; a step lasts `pace` seconds at least."""
        monkeypatch.setenv("HEARD_PACE", str(pace))
        words = words_of(tmp_path / name, shards, steps)
        return Launched(cluster, tmp_path / name, capsys, steps, *words, "--nodes", "2", *options)

    yield start
    subprocess.run(["scancel", "--user", "root"], timeout=60)
    wait("an idle cluster", lambda: not cluster.run("squeue", "--noheader"), 60)


def test_two_nodes_of_two_processes(launch: Launch, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They train what one process does, within the bound of tests/pretrain/test_ranks.py. Each rank has its log, and what may be
    secret stands in no file, whether it was passed on or not."""
    monkeypatch.setenv("HF_TOKEN", "sesame-1")
    monkeypatch.setenv("NOT_ASKED_FOR", "sesame-2")
    monkeypatch.setenv("PROXY", "http://me:sesame-3@there")
    job = launch("--processes-per-node", "2", "--env", "HF_TOKEN", "--env", "PROXY", steps=12)
    alone = undisturbed(tmp_path / "alone", shards, 12, 1)
    job.ends()
    assert heard.losses(job.run) == pytest.approx(heard.losses(alone), rel=2e-5)
    assert heard.samples(job.run, SAMPLES) == heard.samples(alone, SAMPLES)
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
    hours, minutes, _ = job.cluster.job(job.number)["RunTime"].split(":")
    job.cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={int(hours) * 60 + int(minutes) + 2}")


def test_runs_into_the_time_limit_go_on(launch: Launch, whole: Path) -> None:
    """One is requeued; the other's cluster does not do that, so it is a chain of jobs."""
    again = launch("--stop-before", "60", name="again", pace=0.7)
    chain = launch("--stop-before", "60", "--continue", "chain", name="chain", pace=0.7)
    for job in (again, chain):
        job.reaches(15)
        shorten(job)
    wait("the requeue", lambda: again.state == "PENDING", 150)
    assert 15 <= again.done < STEPS and "asked to stop" in again.log
    again.cluster.run("scontrol", "update", f"JobId={again.number}", "TimeLimit=30")
    for job in (again, chain):
        job.ends()
        assert job.starts == 2 and "stopped after step" in job.log
        job.lost_nothing(whole)
    assert again.state == "COMPLETED"
    assert chain.cluster.job(chain.number)["Requeue"] == "0"
    assert len(list((chain.run / "launch").glob("job-*.log"))) == 2


def test_a_requeued_run_goes_on(launch: Launch, whole: Path) -> None:
    """As an administrator would requeue it."""
    job = launch()
    job.reaches(15)
    job.cluster.run("scontrol", "requeue", job.number)
    wait("the requeue", lambda: job.state == "PENDING", 60)
    assert 15 <= job.done < STEPS, job.log
    job.ends()
    assert job.cluster.job(job.number)["Restarts"] == "1" and job.starts == 2
    job.lost_nothing(whole)


def test_a_preempted_run_goes_on(launch: Launch, whole: Path) -> None:
    job = launch()
    job.reaches(15)
    high = job.cluster.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=4", "--output=/dev/null", "--wrap", "sleep 5"
    ).strip()
    wait("the other job's end", lambda: job.cluster.job(high)["JobState"] == "COMPLETED", 120)
    assert 15 <= job.done < STEPS
    job.ends()
    assert job.state == "COMPLETED" and job.starts == 2
    job.lost_nothing(whole)


def test_runs_whose_nodes_are_lost_go_on(launch: Launch, whole: Path) -> None:
    """One loses its last node; the other its first, and with it, for SLURM, the batch script, which lives on for a while."""
    jobs = [launch(name=which, pace=0.5) for which in ("first", "last")]
    lost = []
    for job, which in zip(jobs, (0, -1), strict=True):
        job.reaches(15)
        nodes = job.cluster.run("scontrol", "show", "hostnames", job.cluster.job(job.number)["NodeList"]).split()
        lost.append(nodes[which])
    try:
        for node in lost:
            jobs[0].cluster.kill(node)
        for job in jobs:
            wait(f"the loss to be noticed\n{job.log}", lambda job=job: job.state == "PENDING", 120)
            assert job.done < STEPS
        for job in jobs:  # one after the other, on the two nodes that are left
            job.ends()
            assert job.starts >= 2
            job.lost_nothing(whole)
    finally:
        for node in lost:
            jobs[0].cluster.start(node)


def test_cancelled_is_cancelled(launch: Launch) -> None:
    """The ranks save, and nothing is requeued."""
    job = launch()
    job.reaches(15)
    job.cluster.run("scancel", job.number)
    wait("the end", lambda: not job.cluster.run("squeue", "--noheader"), 90)
    assert job.state == "CANCELLED" and job.starts == 1
    latest = (job.run / "checkpoints" / "latest").read_text()
    assert int(latest[5:]) == job.done, "the step in hand was saved"


def test_no_progress_three_times_is_the_end(launch: Launch) -> None:
    job = launch("run.seed=13")
    job.ends()
    assert job.starts == 3 and "giving up" in job.log and job.state == "FAILED"
    assert "rank 1 on n2: RuntimeError: bad luck" in status(job.run)
