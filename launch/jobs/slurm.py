"""Jobs of a SLURM cluster: a readable batch script in the run folder, checked, submitted; what it does is said in docs/launch.md.

The script is a head of `#SBATCH` lines, the values of this run, and `job.sh`, which is the same for all of them.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import yaml

from swath.launch.recipes import find
from swath.pretrain.config import Recipe, flatten, read_recipe, refuse_changes
from swath.shards.errors import InputError
from swath.shards.files import disk_errors, write_bytes
from swath.shards.stores.remote import is_remote

PROGRAM = ("swath.launch.cli", "pretrain")
PATIENCE = 3  # starts in a row that save nothing new before a run is given up
EXPORTED = ("HOME", "USER", "LOGNAME", "SHELL", "PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "SLURM_CONF")
OURS = {
    "job-name": "the run's name", "nodes": "--nodes", "ntasks": "one per node", "ntasks-per-node": "one per node",
    "gpus-per-node": "--gpus-per-node", "time": "--time", "signal": "--stop-before", "requeue": "--continue",
    "no-requeue": "--continue", "open-mode": "append", "output": "the run folder", "error": "the run folder", "export": "--env",
    "chdir": "where the command is given", "array": "one run is one job",
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What is asked of the cluster for one run. `time` and `stop_before` in seconds; `env`: names of variables to pass on."""

    run: Path
    nodes: int
    processes: int
    gpus: int
    time: int
    stop_before: int
    mode: Literal["requeue", "chain"]
    options: tuple[tuple[str, str], ...] = ()
    env: tuple[str, ...] = ()
    container: Path | None = None
    binds: tuple[Path, ...] = ()
    python: str = sys.executable

    @property
    def script(self) -> Path:
        return self.run / "launch" / "job.sbatch"


def job_name(run: Path) -> str:
    """Of all jobs of the run in this folder, and of no other: SLURM lets one of a name run at a time (singleton)."""
    place = str(run.resolve())
    return f"swath-{re.sub(r'[^A-Za-z0-9_.-]', '_', run.resolve().name)}-{hashlib.sha256(place.encode()).hexdigest()[:6]}"


def seconds(text: str) -> int:
    """SLURM's ways to write a time: minutes, minutes:seconds, h:m:s, days-h, days-h:m, days-h:m:s. ValueError otherwise."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ValueError(text)
    days, *parts = match.groups()
    given = [int(part) for part in parts if part is not None]
    scale = (3600, 60, 1) if days is not None or len(given) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(a * b for a, b in zip(given, scale, strict=False))


def plan(
    recipe: str, overrides: Sequence[str], *, nodes: int, gpus: int, processes: int | None, time: str, stop_before: int,
    mode: Literal["requeue", "chain"], options: Sequence[str], env: Sequence[str], container: Path | None, venv: Path | None,
) -> tuple[Job, Recipe]:  # fmt: skip
    """The job and the checked recipe; InputError, one line, for what the cluster would refuse later."""
    text, name = find(recipe)
    read = read_recipe(text, list(overrides), name=name)
    run = read.run.dir.absolute()
    if (run / "recipe.yaml").exists():
        refuse_changes(yaml.safe_load((run / "recipe.yaml").read_text()), read.resolved(), run)
    count = (gpus or 1) if processes is None else processes
    if nodes < 1 or count < 1 or gpus < 0:
        raise InputError(f"{nodes} nodes of {gpus} GPUs and {count} processes: at least one node and one process are needed")
    try:
        limit = seconds(time)
    except ValueError:
        raise InputError(f"--time {time} is not a time; 24:00:00 or 2-12 (days-hours) would be") from None
    if not 60 <= stop_before <= limit - 60:
        raise InputError(f"--stop-before {stop_before}: 60 to {limit - 60} s, a minute less than --time {time}, would do")
    secret = next((key for key, value in flatten(read.resolved()).items() if re.search(r"://[^/\s]*@", str(value))), None)
    if secret is not None:
        raise InputError(f"{secret} holds a password, which the run folder would show; a variable passed with --env would not")
    for variable in env:
        if not re.fullmatch(r"[A-Za-z_]\w*", variable) or variable not in os.environ:
            raise InputError(f"--env {variable}: it takes the name of a variable that is set here, and not its value")
    if container is not None and (venv is not None or not container.exists()):
        raise InputError(f"--container {container}: " + ("not together with --venv" if venv else "there is no such image"))
    python = sys.executable if venv is None else str(venv.absolute() / "bin" / "python")
    if not Path(python).exists():
        raise InputError(f"--venv {venv}: there is no {python}")
    job = Job(
        run=run, nodes=nodes, processes=count, gpus=gpus, time=limit, stop_before=stop_before, mode=mode,
        options=tuple(_option(o) for o in options), env=tuple(env), container=container and container.absolute(),
        binds=_binds(read, run), python="python" if container else python,
    )  # fmt: skip
    for value in (str(run), *(value for _, value in job.options)):
        if re.search(r"[\n\"'\\%]" if value == str(run) else r"[\n\"'\\]", value):
            raise InputError(f"{value!r} cannot stand in a batch script; leave out quotes, backslashes, new lines and %")
    return job, read


def _option(text: str) -> tuple[str, str]:
    """`mem=100G`, `--mem=100G` or `exclusive` as (name, value)."""
    name, _, value = text.removeprefix("--").partition("=")
    if not re.fullmatch(r"[a-z][a-z0-9-]+", name):
        raise InputError(f"--sbatch {text}: an option's long name is needed, for instance --sbatch mem=100G")
    if name in OURS:
        raise InputError(f"--sbatch {name} is not free: {OURS[name]} says it")
    return name, value


def _binds(recipe: Recipe, run: Path) -> tuple[Path, ...]:
    """The folders that a container must see."""
    data = recipe.data
    places = [*(one.path for one in data.train), *data.val, *([data.cache_dir] if data.cache_dir else [])]
    local = [Path(place).absolute() for place in places if not is_remote(place)]
    return tuple(dict.fromkeys([Path.cwd(), run, *local]))


def script(job: Job) -> str:
    """The batch script's text."""
    given = dict(job.options)
    after = given.pop("dependency", None)
    head = {
        "job-name": job_name(job.run),
        "nodes": str(job.nodes),
        "ntasks-per-node": "1",
        **({"gpus-per-node": str(job.gpus)} if job.gpus else {}),
        "time": f"{job.time // 86400}-{job.time // 3600 % 24:02}:{job.time // 60 % 60:02}:{job.time % 60:02}",
        "signal": f"B:USR1@{job.stop_before}",
        "requeue" if job.mode == "requeue" else "no-requeue": "",
        "dependency": "singleton" if after is None else f"{after},singleton",
        "open-mode": "append",
        "chdir": str(Path.cwd()),
        "output": str(job.run / "launch" / "job-%j.log"),
        "export": ",".join(dict.fromkeys([*(name for name in EXPORTED if name in os.environ), *job.env])),
        **given,
    }
    lines = [f"#SBATCH --{name}" + (f"={_quoted(value)}" if value else "") for name, value in head.items()]
    inside = [*(["--nv"] if job.gpus else []), "--bind", ",".join(map(str, job.binds)), "--pwd", str(Path.cwd())]
    values = {
        "run": shlex.quote(str(job.run)),
        "script": shlex.quote(str(job.script)),
        "program": f"({shlex.join([*PROGRAM, str(job.run / 'launch' / 'recipe.yaml')])})",
        "processes": str(job.processes),
        "python": shlex.quote(job.python),
        "container": shlex.quote(str(job.container or "")),
        "container_options": f"({shlex.join(inside) if job.container else ''})",
        "mode": job.mode,
        "stop_before": str(job.stop_before),
        "patience": str(PATIENCE),
    }
    body = (resources.files("swath.launch.jobs") / "job.sh").read_text()
    said = f"# Trains the run in {job.run} until it is done, over as many jobs as that takes. Written by swath launch slurm."
    return "\n".join(["#!/bin/bash", said, *lines, "", *(f"{k}={v}" for k, v in values.items()), "", body])


def _quoted(value: str) -> str:
    return f'"{value}"' if re.search(r"\s|#", value) else value


def write(job: Job, recipe: Recipe) -> None:
    """The script and the recipe it trains, into the run folder; InputError where bash or SLURM would not take the script."""
    folder = job.script.parent
    with disk_errors("writing the job", folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / "recipe.yaml", yaml.safe_dump(recipe.resolved(), sort_keys=False).encode())
        write_bytes(job.script, script(job).encode())
    checks = [["bash", "-n"], *([["sbatch", "--test-only"]] if shutil.which("sbatch") else [])]
    for check in checks:
        done = subprocess.run([*check, str(job.script)], capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"{' '.join(check)} does not take {job.script}: {' '.join(done.stderr.split())}")


def submit(job: Job) -> str:
    """The number of the submitted job. InputError where one of this run is in the queue already, or SLURM does not take it."""
    if shutil.which("sbatch") is None:
        raise InputError(f"there is no sbatch here; on the cluster, sbatch {job.script} submits it")
    name = job_name(job.run)
    queued = subprocess.run(["squeue", "--noheader", "--name", name, "--format", "%i"], capture_output=True, text=True)
    if numbers := queued.stdout.split():
        raise InputError(f"job {numbers[0]} of this run is in the queue already; scancel --name {name} takes it out")
    (job.script.parent / "starts").unlink(missing_ok=True)  # it counts anew
    done = subprocess.run(["sbatch", "--parsable", str(job.script)], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"sbatch does not take {job.script}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]
