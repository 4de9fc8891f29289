"""Several processes as torchrun would start them, but forked from one that has torch in memory already."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed, where it is installed, decides when it is imported
_context.set_forkserver_preload(["swath.pretrain.trainer", "swath.pretrain.objectives", "deepspeed"])


def run(
    size: int, work: Callable[..., Any], *args: Any, seconds: float = 120, grace: float = 5, said: Path | None = None
) -> list[int]:  # fmt: skip
    """The exit codes of `size` ranks that call `work(*args)`; where one fails the others are ended after `grace` seconds, as
    torchrun does. What they print to stderr is appended to `said`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [_context.Process(target=_rank, args=(rank, size, port, said, work, args)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    waiting = {rank.sentinel: rank for rank in ranks}
    while waiting:
        ended = wait(list(waiting), timeout=seconds)
        failed = not ended or any(waiting[sentinel].exitcode for sentinel in ended if isinstance(sentinel, int))
        for sentinel in ended:
            assert isinstance(sentinel, int)
            waiting.pop(sentinel)
        if failed:
            for rank in waiting.values():
                rank.join(grace)  # its own error, if it has one
                rank.kill()
    for rank in ranks:
        rank.join()
    return [rank.exitcode if rank.exitcode is not None else -1 for rank in ranks]


def _rank(rank: int, size: int, port: int, said: Path | None, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if said is not None:
        os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    try:
        work(*args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
