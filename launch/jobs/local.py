"""The processes of one machine, started as torchrun starts them (torch.distributed.launcher), for one node or as one of several.

torchrun itself turns every exit code but 0 into 1, dies of SIGUSR1, and kills the others 30 s after a SIGTERM. A run that saves
and continues later needs the opposite: SIGTERM and SIGUSR1 are passed on to every rank, all the time that saving takes is
given, and "stopped after saving" is not a failure. So the same engine is driven from here. `python -m swath.launch.jobs.local`
is what a SLURM job starts on each of its nodes.
"""

import argparse
import json
import logging
import multiprocessing
import os
import platform
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType

import torch
from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import swath
from swath.shards.errors import InputError

STOPPED, REFUSED = 85, 2  # exit codes of `swath pretrain`: a signal asked it to save and leave; the user's input is wrong
AGAIN = 3.0  # seconds until a rank that has not left is asked again: it may just have been starting
JOIN = 900  # seconds that nodes wait for each other at the start


def run_here(
    module: str, argv: list[str], *, processes: int, logs: Path, nodes: int = 1, node: int = 0, master: str | None = None
) -> int:
    """Run `python -m module argv` as `processes` ranks here, the ranks of node `node` of `nodes`; returns its exit code.

    `master` is HOST:PORT on node 0, where all meet; with one node a free port is found. Each rank writes `rank-NNNNN.log` in
    `logs`; the first one's lines are shown here too. What ended the run is left there for others to read: `stopped` where
    ranks left with exit code 85, `refused` where it was 2, `failure-NODE.json` naming the rank that failed first.
    """
    logs.mkdir(parents=True, exist_ok=True)
    if processes > 1:  # as torchrun does, but with the cores that there are
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    config = LaunchConfig(
        min_nodes=nodes, max_nodes=nodes, nproc_per_node=processes, run_id=str(logs), max_restarts=0, monitor_interval=0.05,
        start_method="spawn", signals_to_handle="SIGQUIT", logs_specs=_Logs(logs), log_line_prefix_template="[${rank}] ",
        # static: ranks are numbered in the order of the nodes
        rdzv_backend="c10d" if master is None else "static", rdzv_endpoint=master or "localhost:0",
        rdzv_configs={"rank": node, "timeout": JOIN}, local_addr="localhost" if master is None else None,
    )  # fmt: skip
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)  # said better below
    previous = {n: signal.signal(n, _pass_on) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)}
    previous[signal.SIGINT] = signal.signal(signal.SIGINT, lambda number, frame: None)  # a terminal asks the ranks itself
    # SLURM may signal all processes of a job, and a rank that is just starting would die of SIGUSR1. So it is blocked here, which
    # ranks inherit until they can mind it, and taken by a thread that waits for nothing else.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    over = threading.Event()
    threading.Thread(target=_take, args=(over,), name="swath-signals", daemon=True).start()
    try:
        codes = elastic_launch(config, _rank)(module, argv, str(logs))
    except ChildFailedError as error:
        refused = {rank: failure for rank, failure in error.failures.items() if failure.exitcode == REFUSED}
        # what all ranks refuse the first one tells
        rank, failure = min(refused.items()) if len(refused) == len(error.failures) else error.get_first_failure()
        return _report(rank, failure, logs)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        over.set()
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    if STOPPED in codes.values():
        (logs / "stopped").touch()
        return STOPPED
    return 0


def _take(over: threading.Event) -> None:
    """Where SIGUSR1 arrives; Python runs its handler in the main thread."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    over.wait()


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Ask every rank to save and leave, and ask again later."""
    for rank in multiprocessing.active_children():
        if rank.pid is not None:
            os.kill(rank.pid, signal.SIGUSR1)
    signal.setitimer(signal.ITIMER_REAL, AGAIN)


def _rank(module: str, argv: list[str], logs: str) -> int:
    """One rank, in its own process. Returns 0 or STOPPED; anything else is a failure, and leaves by SystemExit."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until the trainer listens, and after it has; it will be asked again
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    log = os.open(_log(Path(logs), int(os.environ["RANK"])), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = [module, *argv]
    code: object = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except Exception:
        traceback.print_exc()
        code = 1
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # what the program made of it is undone while Python ends
    sys.stdout.flush()
    if code in (0, STOPPED):
        return int(code)  # type: ignore[call-overload]
    sys.exit(code)  # type: ignore[arg-type]


def _log(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank:05d}.log"


class _Logs(LogsSpecs):
    """Ranks write their own files; rank 0's is shown too."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        nothing = dict.fromkeys(envs, "")
        shown = {local: str(_log(self.folder, 0)) for local, env in envs.items() if env["RANK"] == "0"}
        return LogsDest(stdouts=nothing, stderrs=nothing, tee_stderrs=shown, error_files=nothing)

    @property
    def root_log_dir(self) -> str:
        return str(self.folder)


def _report(rank: int, failure: ProcessFailure, logs: Path) -> int:
    """Say which rank failed first and of what; returns its exit code, 128 + number for a signal as shells do."""
    name = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    last = _last_line(_log(logs, rank))
    code = failure.exitcode
    if code < 0:
        last, code = f"killed by {signal.Signals(-code).name}", 128 - code
    told = {"rank": rank, "node": name, "exit_code": code, "time": time.time(), "message": last}
    (logs / f"failure-{name}.json").write_text(json.dumps(told))
    if code == REFUSED:
        (logs / "refused").touch()
    print(f"rank {rank} on {name} ended with exit code {code}: {last}\n  its log: {_log(logs, rank)}", file=sys.stderr)
    return code


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")


def launch_local(recipe: str, overrides: list[str], processes: int | None) -> int:
    """`swath launch local`: train on this machine, with as many processes as there are GPUs, or one. Returns the exit code."""
    from swath.launch.recipes import find
    from swath.pretrain.config import read_recipe

    text, name = find(recipe)
    run = read_recipe(text, overrides, name=name).run.dir
    count = max(1, torch.cuda.device_count()) if processes is None else processes
    if count < 1:
        raise InputError(f"--processes {count}: at least one is needed")
    logs = run / "launch" / "logs" / f"local-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    return run_here("swath.launch.cli", ["pretrain", recipe, *overrides], processes=count, logs=logs)


def main(argv: list[str] | None = None) -> int:
    """One node's share of a job. Ends with 0 where the run has stopped after saving (see `stopped` in the logs): other nodes
    may still be at it, and srun would kill them for the exit code of the first."""
    parser = argparse.ArgumentParser(prog="python -m swath.launch.jobs.local", description=__doc__)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--node", type=int, default=int(os.environ.get("SLURM_NODEID", 0)), help="of this one (SLURM_NODEID)")
    parser.add_argument("--processes", type=int, default=1, help="on each node")
    parser.add_argument("--master", metavar="HOST:PORT", help="on node 0, where all nodes meet")
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("module", help="run as python -m MODULE ARGUMENTS")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    name = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(
        f"{name}: swath {swath.__version__}, python {platform.python_version()}, torch {torch.__version__}, "
        f"CUDA {torch.version.cuda}, {len(gpus)} GPUs {sorted(set(gpus))}, {len(os.sched_getaffinity(0))} cores",
        file=sys.stderr,
    )
    code = run_here(
        args.module, args.arguments, processes=args.processes, logs=args.logs,
        nodes=args.nodes, node=args.node, master=args.master,
    )  # fmt: skip
    return 0 if code == STOPPED else code


if __name__ == "__main__":
    sys.exit(main())
