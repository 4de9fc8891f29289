"""Jobs without a cluster: the batch script under a shell whose SLURM is a few stand-ins, ranks that end in every way, status."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swath.launch.cli import main
from swath.launch.jobs import slurm
from swath.launch.jobs.local import run_here
from swath.launch.jobs.slurm import seconds
from swath.launch.jobs.status import status

LOGGED = '#!/bin/bash\necho "$(basename "$0") $*" >>"$CALLS"\n'


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLURM of stand-ins first on the path; the file of their calls. The job is number 7, running on one node."""
    commands = {
        "sbatch": "echo 8",
        "scancel": "",
        "sleep": "",
        "squeue": 'echo "$QUEUED"',
        "scontrol": 'case $2 in hostnames) echo n1 ;; node) echo "   NodeAddr=10.0.0.1 NodeHostName=n1" ;; esac',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    }
    for name, body in commands.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(LOGGED + body + "\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("QUEUED", "")
    given = {"JOB_ID": "7", "JOB_NODELIST": "n1", "JOB_NUM_NODES": "1", "JOB_NAME": "swath-run"}
    for name, value in given.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "calls"


def launch(*words: object) -> int:
    return main(["launch", "slurm", "mae_vit_tiny", "data.train=shards", "run.dir=run", *map(str, words)])


def venv(folder: Path, body: str) -> Path:
    """Whose python is the shell script `body`; $LOGS is the folder of the start's logs."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\nLOGS=$(sed "s/.*--logs //; s/ .*//" <<<"$*")\n{body}\n')
    python.chmod(0o755)
    return folder


def run_job(folder: Path) -> tuple[int, str]:
    done = subprocess.run(["bash", folder / "run/launch/job.sbatch"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def test_the_script_says_what_was_asked(calls: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--nodes", 4, "--gpus-per-node", 8, "--time", "24:00:00", "--account", "me", "--sbatch", "mem=100G",
             "--sbatch", "exclusive", "train.epochs=2", "--sbatch", "dependency=afterok:3"]  # fmt: skip
    assert launch(*words) == 0
    assert "job 8 submitted" in capsys.readouterr().out
    text = Path("run/launch/job.sbatch").read_text()
    for line in (
        "--nodes=4", "--gpus-per-node=8", "--time=1-00:00:00", "--account=me", "--mem=100G", "--exclusive", "--requeue",
        "--signal=B:USR1@300", "--dependency=afterok:3,singleton", "--ntasks-per-node=1", "--open-mode=append",
    ):  # fmt: skip
        assert f"\n#SBATCH {line}\n" in text
    assert "\nprocesses=8\n" in text and "epochs: 2" in Path("run/launch/recipe.yaml").read_text()
    assert [line.split()[:2] for line in calls.read_text().splitlines()][::2] == [
        ["sbatch", "--test-only"],
        ["sbatch", "--parsable"],
    ]


def test_dry_run_submits_nothing_and_a_run_in_the_queue_is_refused(
    calls: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launch("--time", "10", "--dry-run") == 0 and "--parsable" not in calls.read_text()
    monkeypatch.setenv("QUEUED", "5")
    assert launch("--time", "10") == 2 and "job 5 of this run is in the queue" in capsys.readouterr().err
    assert "--parsable" not in calls.read_text()


def test_another_recipe_in_the_same_folder_is_refused_before_the_queue(calls: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--time", "10", "--dry-run") == 0
    Path("run/launch/recipe.yaml").rename("run/recipe.yaml")
    assert launch("--time", "10", "train.epochs=31") == 0
    assert launch("--time", "10", "run.seed=5") == 2 and "run.seed: 0 in the run, 5 now" in capsys.readouterr().err


def test_slurm_refuses_the_script(calls: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/bash\necho 'no such partition' >&2; exit 1\n")
    assert launch("--time", "10") == 2
    error = capsys.readouterr().err
    assert "no such partition" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--time", "soon"], "24:00:00"),
        (["--time", "5", "--stop-before", "280"], "60 to 240 s"),
        (["--time", "9", "--nodes", "0"], "at least one node"),
        (["--time", "9", "--sbatch", "nodes=3"], "--nodes says it"),
        (["--time", "9", "--sbatch", "-p x"], "mem=100G"),
        (["--time", "9", "--sbatch", "comment=a\nrm -rf x"], "cannot stand"),
        (["--time", "9", "--env", "A=secret"], "name of a variable"),
        (["--time", "9", "--container", "none.sif"], "no such image"),
        (["--time", "9", "--venv", "none"], "none/bin/python"),
        (["--time", "9", "data.val=https://me:word@there/x"], "data.val holds a password"),
        (["--time", "9", "train.epoch=3"], "did you mean train.epochs?"),
    ],
)
def test_refused(words: list[str], message: str, calls: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(*words) == 2
    assert message in capsys.readouterr().err and not Path("run").exists() and not calls.exists()


def test_unknown_words_are_refused() -> None:
    for words in (["--tme", "9"], ["--time", "9", "--gpu"]):
        with pytest.raises(SystemExit) as stop:
            launch(*words)
        assert stop.value.code == 2


def test_times() -> None:
    said = {"5": 300, "5:30": 330, "1:00:00": 3600, "2-12": 216000, "1-00:30": 88200, "1-00:00:30": 86430}
    assert {text: seconds(text) for text in said} == said


# --- what the job does, by how training ends ---


@pytest.mark.parametrize("mode", ["requeue", "chain"])
def test_done(mode: str, calls: Path, tmp_path: Path) -> None:
    assert launch("--time", "10", "--continue", mode, "--venv", venv(tmp_path / "v", "true")) == 0
    calls.unlink()
    code, said = run_job(tmp_path)
    assert code == 0 and said.endswith("done\n")
    assert ("scancel 8" in calls.read_text()) == (mode == "chain") and "scontrol requeue" not in calls.read_text()


@pytest.mark.parametrize("end", ["touch $LOGS/stopped", "exit 1", "kill -9 $$"])
def test_goes_on_while_it_saves_and_gives_up_when_it_does_not(
    end: str, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = "step-000000$((SLURM_RESTART_COUNT + 8))0"
    saves = f"mkdir -p run/checkpoints; [ $SLURM_RESTART_COUNT -lt 2 ] && echo {step} >run/checkpoints/latest"
    assert launch("--time", "10", "--venv", venv(tmp_path / "v", f"{saves}; {end}")) == 0
    monkeypatch.setenv("QUEUED", "RUNNING")
    for restart in range(5):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        calls.write_text("")
        code, said = run_job(tmp_path)
        assert (("scontrol requeue" in calls.read_text()), "giving up" in said) == (
            (True, False) if restart < 4 else (False, True)
        ), said
        assert code != 0
    assert [line.split()[2] for line in Path("run/launch/starts").read_text().splitlines()] == ["0", "80", "90", "90", "90"]


def test_a_chain_goes_on_and_gives_up(calls: Path, tmp_path: Path) -> None:
    assert launch("--time", "10", "--continue", "chain", "--venv", venv(tmp_path / "v", "exit 1")) == 0
    for number in range(4):
        calls.write_text("")
        code, said = run_job(tmp_path)
        gave_up = number >= 2
        assert code == 1 and ("giving up" in said) == gave_up == (number == 3 or "scancel 8" in calls.read_text())
        assert ("sbatch --parsable" in calls.read_text()) == (number < 3) and "scontrol requeue" not in calls.read_text()


@pytest.mark.parametrize("mode", ["requeue", "chain"])
def test_ranks_that_do_not_stop_before_the_limit(mode: str, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that runs into its limit is not requeued by SLURM, so the script does it before; a chain has its next job."""
    body = "trap '' USR1; kill -USR1 $PPID; /bin/sleep 0.5; exit 1"
    assert launch("--time", "10", "--continue", mode, "--venv", venv(tmp_path / "v", body)) == 0
    monkeypatch.setenv("QUEUED", "RUNNING")
    _, said = run_job(tmp_path)
    assert "asked to stop" in said and ("still not stopped" in said) == (mode == "requeue")
    assert calls.read_text().count("scontrol requeue 7") == (2 if mode == "requeue" else 0)  # its end is one more here


@pytest.mark.parametrize("state", ["COMPLETING", "PENDING", ""])
def test_what_slurm_has_decided_stands(state: str, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch("--time", "10", "--venv", venv(tmp_path / "v", "touch $LOGS/stopped")) == 0
    monkeypatch.setenv("QUEUED", state)
    code, said = run_job(tmp_path)
    assert code == 85 and "left to it" in said and "scontrol requeue" not in calls.read_text()


def test_wrong_input_is_not_tried_again_but_a_held_run_is(calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch("--time", "10", "--venv", venv(tmp_path / "v", "touch $LOGS/refused; exit 2")) == 0
    monkeypatch.setenv("QUEUED", "RUNNING")
    assert run_job(tmp_path)[0] == 2 and "scontrol requeue" not in calls.read_text()
    Path("run/owner.json").write_text(json.dumps({"host": "elsewhere"}))
    assert run_job(tmp_path)[0] == 2 and "scontrol requeue 7" in calls.read_text()
    assert calls.read_text().count("sleep 5\n") == 30


def test_secrets_are_not_logged(calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MY_TOKEN", "Api_Key", "PASSWORD", "SSH_SECRET_X"):
        monkeypatch.setenv(name, "first line\nsesame")
    monkeypatch.setenv("PROXY", "http://me:sesame@there")
    monkeypatch.setenv("PLAIN", "a b")
    assert launch("--time", "10", "--env", "MY_TOKEN", "--venv", venv(tmp_path / "v", "true")) == 0
    assert run_job(tmp_path)[0] == 0
    kept = next(Path("run/launch/logs").glob("*/environment.txt")).read_text()
    assert "PLAIN=a\\ b" in kept
    for path in Path("run").rglob("*"):
        assert not path.is_file() or "sesame" not in path.read_text()
    assert ",MY_TOKEN\n" in Path("run/launch/job.sbatch").read_text()


def test_container(calls: Path, tmp_path: Path) -> None:
    Path("image.sif").touch()
    runtime = tmp_path / "bin" / "apptainer"
    runtime.write_text(LOGGED)
    runtime.chmod(0o755)
    assert launch("--time", "10", "--gpus-per-node", 1, "--container", "image.sif") == 0
    assert run_job(tmp_path)[0] == 0
    binds = f"{tmp_path},{tmp_path / 'run'},{tmp_path / 'shards'}"
    started = next(line for line in calls.read_text().splitlines() if line.startswith("apptainer"))
    assert started.startswith(f"apptainer exec --nv --bind {binds} --pwd {tmp_path} {tmp_path / 'image.sif'} python -m swath.")
    assert "--master 10.0.0.1:20007 " in started


# --- ranks ---

PROGRAM = """
import os, signal, sys, time
rank, how = int(os.environ["RANK"]), sys.argv[1]
if how == "fails":
    print("rank", rank)
    if rank == 1:
        raise RuntimeError("boom")
    time.sleep(60)
asked = []
signal.signal(signal.SIGUSR1, lambda n, f: asked.append(n))
while not asked:
    time.sleep(0.02)
sys.exit(85)
"""


def test_the_rank_that_failed_first_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    began = time.monotonic()
    assert run_here("program", ["fails"], processes=2, logs=tmp_path / "logs") == 1
    assert time.monotonic() - began < 50, "the others are ended"
    told = json.loads(next((tmp_path / "logs").glob("failure-*.json")).read_text())
    assert (told["rank"], told["exit_code"], told["message"]) == (1, 1, "RuntimeError: boom")
    assert "Traceback" in (tmp_path / "logs" / "rank-00001.log").read_text()
    error = capfd.readouterr().err
    assert "rank 1 on" in error and "[0] rank 0" in error and "ChildFailedError" not in error


def test_ranks_are_asked_to_stop(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "swath.launch.jobs.local", "--processes", "2", "--logs", "logs", "program", "waits"]
    path = f"{tmp_path}:{Path(__file__).parents[2]}"
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE)
    while not list(tmp_path.glob("logs/rank-*")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)  # while they are starting, which none of them must die of
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and (tmp_path / "logs" / "stopped").exists(), error


def test_launch_local_trains(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from tests.launch.test_cli import TINY
    from tests.shard_folders import make_shards

    shards = make_shards(tmp_path / "shards")
    run = tmp_path / "run"
    assert main(["launch", "local", "mae_vit_tiny", "--processes", "1", f"data.train={shards}", f"run.dir={run}", *TINY]) == 0
    assert "2 steps done" in next((run / "launch" / "logs").glob("local-*/rank-00000.log")).read_text()
    assert "2 of 2 (100%), loss " in status(run)
    assert main(["launch", "local", "mae_vit_tiny", "run.dir=x", f"data.train={shards}", "--processes", "0"]) == 2


# --- status ---


def test_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    run = tmp_path / "run"
    (run / "launch" / "logs").mkdir(parents=True)
    assert "none yet" in status(run)
    rows = [{"step": s + 1, "loss": 0.5, "seconds": 6.0, "samples_per_second": 100.0} for s in range(950, 1000)]
    early = [{"step": s + 1, "loss": 9.0, "seconds": 99.0, "samples_per_second": 1.0} for s in range(950)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in early + rows) + '{"step": 1001, "lo')
    saved = run / "checkpoints" / "step-00000020"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text(json.dumps({"step": 20, "total_steps": 1090}))
    (run / "checkpoints" / "latest").write_text(saved.name)
    (run / "launch" / "starts").write_text("2026-01-01T00:00:00 7.0 0\n2026-01-01T01:00:00 7.1 20\n2026-01-01T02:00:00 7.2 20\n")
    for number, start in enumerate(("7.1", "7.2")):
        for rank, node in ((5, "n2"), (3, "n1")):
            told = {"rank": rank, "node": node, "exit_code": 1, "time": number + rank, "message": f"boom {start}"}
            (run / "launch" / "logs" / start).mkdir(exist_ok=True)
            (run / "launch" / "logs" / start / f"failure-{node}.json").write_text(json.dumps(told))
        os.utime(run / "launch" / "logs" / start, (number, number))
    assert main(["launch", "status", str(run)]) == 0
    said = capsys.readouterr().out
    for part in (
        "no SLURM here", "1000 of 1090 (92%), loss 0.5000", "100 samples/s, 6 s a step, 9 min of training left",
        "of step 20, 0 min ago", "3, the last 2 without a new checkpoint", "rank 3 on n1: boom 7.2 (exit code 1; ",
    ):  # fmt: skip
        assert part in said, said
    assert main(["launch", "status", str(tmp_path)]) == 2


def test_status_asks_slurm(calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run" / "launch").mkdir(parents=True)
    monkeypatch.setenv("QUEUED", "7|RUNNING|1:00|59:00|n[1-2]")
    assert "job 7 RUNNING, 1:00 of its time gone, 59:00 left n[1-2]" in status(tmp_path / "run")
    assert f"--name {slurm.job_name(tmp_path / 'run')}" in calls.read_text()
