"""Two nodes that are two network namespaces: what a slow link, a long one and a cut one do to training, which one machine under
SLURM cannot show. Started as a SLURM job starts its nodes (`python -m swath.launch.jobs.local`).

Losses are compared bit for bit with those of two ranks on the loopback device: two ranks add the same numbers.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.launch import heard, netns
from tests.launch.cluster import wait
from tests.ranks import run as run_ranks
from tests.shard_folders import make_shards

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
REPOSITORY = Path(__file__).parents[2]
SAMPLES, STEPS = 40, 20
MEGABITS, DELAY = 8, 0.02  # of the link; seconds that the long way takes, there and back twice that
HANG = 6.0  # train.hang_after


@pytest.fixture(scope="module")
def networks() -> Iterator[netns.Networks]:
    why = netns.missing()
    if why is not None:
        pytest.skip(why)
    with netns.Networks(MEGABITS, DELAY) as made:
        yield made


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("network") / "shards", samples=SAMPLES)


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing happens to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert run_ranks(2, heard.train, words_of(run, shards)) == [0, 0]
    return run


def words_of(run: Path, shards: Path) -> list[str]:
    place = (f"run.dir={run}", f"data.train={shards}", f"train.max_steps={STEPS}", f"train.hang_after={HANG}")
    return ["mae_vit_tiny", *heard.SMALL, *place, "checkpoint.every=5"]


class Nodes:
    """One start of a run, on both sides of a device."""

    def __init__(self, networks: netns.Networks, device: str, run: Path, shards: Path, pace: float = 0.0) -> None:
        self.logs = run / "launch" / f"{time.monotonic_ns()}"
        self.logs.mkdir(parents=True)
        master = f"{netns.ADDRESS[device].format(1)}:{29400 + time.monotonic_ns() % 500}"
        self.processes = []
        for node in (0, 1):
            words = [
                sys.executable, "-m", "swath.launch.jobs.local", "--nodes", "2", "--node", str(node), "--master", master,
                "--logs", str(self.logs), "tests.launch.heard", *words_of(run, shards),
            ]  # fmt: skip
            told = {"PYTHONPATH": str(REPOSITORY), "GLOO_SOCKET_IFNAME": device, "OMP_NUM_THREADS": "1"}
            told |= {"HEARD_PACE": str(pace), "SLURMD_NODENAME": f"node{node}"}
            with (self.logs / f"node{node}.log").open("w") as log:
                command = networks.command(node, *words)
                whole = {**os.environ, **told}
                self.processes.append(subprocess.Popen(command, env=whole, stderr=log, stdout=log, start_new_session=True))

    def ends(self, seconds: float) -> list[int]:
        """The exit codes; processes that are still there are killed, as an error."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # the ranks, too

    def said(self, node: int) -> str:
        return (self.logs / f"node{node}.log").read_text()


def lost_nothing(run: Path, whole: Path) -> None:
    assert heard.losses(run) == heard.losses(whole)
    assert heard.samples(run, SAMPLES) == heard.samples(whole, SAMPLES)


@pytest.mark.parametrize("device", [netns.LINK, netns.WAY])
def test_a_slow_and_a_long_link_change_no_loss(
    device: str, networks: netns.Networks, shards: Path, whole: Path, tmp_path: Path
) -> None:
    waits, sent = networks.held_back(0), networks.sent(0, device)
    nodes = Nodes(networks, device, tmp_path / "run", shards)
    assert nodes.ends(150) == [0, 0], nodes.said(0) + nodes.said(1)
    lost_nothing(tmp_path / "run", whole)
    assert networks.sent(0, device) - sent > STEPS * 4 * 1000, "a step's gradients, of more than a thousand weights"
    if device == netns.LINK:
        assert networks.held_back(0) - waits > STEPS, "the link was slow"
    else:
        rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert min(row["seconds"] for row in rows) > 2 * DELAY, "the way was long: gradients, then numbers"


def test_a_cut_link_ends_both_sides_and_the_run_goes_on(
    networks: netns.Networks, shards: Path, whole: Path, tmp_path: Path
) -> None:
    """No packet says so to anybody; each side waits for as long as it may, and says for whom."""
    run = tmp_path / "run"
    nodes = Nodes(networks, netns.LINK, run, shards, pace=0.5)
    try:
        path = run / "metrics.jsonl"
        wait("step 12", lambda: path.exists() and path.read_bytes().count(b"\n") >= 12, 120)
        networks.cut()
        began = time.monotonic()
        codes = nodes.ends(HANG + 60)
        took = time.monotonic() - began
    finally:
        networks.mend()
    for node, other in ((0, 1), (1, 0)):
        ended, late = f"rank {node} on node{node} ended with exit code 1: ", f"nothing moves, late: rank {other} does not answer"
        assert ended in nodes.said(node) and f"{late}; rank {node} waits at " in nodes.said(node), nodes.said(node)
        assert "Traceback" not in nodes.said(node)
        failed = json.loads((nodes.logs / f"failure-node{node}.json").read_text())
        assert failed["rank"] == node and "forward and backward of step 1" in failed["message"]
        assert "in _one_step" in (run / f"hang-rank-{node:05d}.txt").read_text()
    assert codes == [1, 1] and HANG < took < HANG + 30, "docs/reliability.md: half a minute after train.hang_after"
    assert (run / "checkpoints" / "latest").read_text() in ("step-00000010", "step-00000015")
    again = Nodes(networks, netns.LINK, run, shards)
    assert again.ends(150) == [0, 0], again.said(0) + again.said(1)
    assert "continuing from" in again.said(0)
    lost_nothing(run, whole)
