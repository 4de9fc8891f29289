"""Processes that do the chunks of an ingest. What comes out does not depend on how many there are, nor on one that dies.

Every worker has a pipe of its own: what a killed one has half sent ends with it, and a worker whose main process is gone
reads the end of its pipe and leaves. concurrent.futures shares one pipe and its lock, and hangs when a worker dies in them.
"""

import logging
import os
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Self, cast

from swath.shards.errors import InputError
from swath.shards.ingestion.journal import Unfinished
from swath.shards.ingestion.work import Chunk, Job, Rules, make
from swath.shards.sources.mirror import Mirror
from swath.shards.sources.open import open_source
from swath.shards.sources.source import Options, Source

_AT_ONCE = 2  # chunks that a worker has: one that it does, one that waits
_AHEAD = 3  # chunks per worker that may be under way or done before their turn: what bounds the memory
_WORTH = 64  # jobs; fewer are done before a process has started
_DEATHS = 3  # of workers over one chunk, before it is given up
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opening:
    """How a worker comes to the same source: what was given to `open_source`, and what must come of it."""

    path: Path | Mirror
    options: Options
    recipe: str | None
    fingerprint: str


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    orders: list[int] = field(default_factory=list)  # numbers of chunks, oldest first


class Workers:
    """`count` processes; a context that ends them. With 0 or 1, or little to do, it is done in this process."""

    def __init__(self, count: int, opening: Opening, source: Source, rules: Rules) -> None:
        self.count, self.opening, self.source, self.rules = count, opening, source, rules
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.pipe.close()
            worker.process.terminate()  # nothing is lost: a worker writes no file
        for worker in self._workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers = []

    def run(self, chunks: Sequence[Sequence[Job]]) -> Iterator[Chunk]:
        """What each chunk comes to, in order. Raises InputError where one is bad, Unfinished when workers die over one."""
        if self.count < 2 or sum(len(chunk) for chunk in chunks) < _WORTH:
            return (make(self.source, chunk, self.rules) for chunk in chunks)
        return self._run(chunks)

    def _run(self, chunks: Sequence[Sequence[Job]]) -> Iterator[Chunk]:
        while len(self._workers) < min(self.count, len(chunks)):
            self._workers.append(self._start())
        done: dict[int, Chunk | Exception] = {}
        deaths: Counter[int] = Counter()
        sent = 0
        for turn in range(len(chunks)):
            while turn not in done:
                while sent < min(len(chunks), turn + _AHEAD * len(self._workers)):
                    free = min(self._workers, key=lambda worker: len(worker.orders))
                    if len(free.orders) >= _AT_ONCE:
                        break
                    self._order(free, sent, chunks[sent])
                    sent += 1
                for pipe in wait([worker.pipe for worker in self._workers]):
                    place = next(n for n, worker in enumerate(self._workers) if worker.pipe is pipe)
                    worker = self._workers[place]
                    try:
                        number, answer = worker.pipe.recv()
                    except (EOFError, OSError):
                        self._workers[place] = self._replace(worker, chunks, deaths)
                        continue
                    worker.orders.remove(number)
                    done[number] = answer
            answer = done.pop(turn)
            if isinstance(answer, Exception):
                raise answer
            yield answer

    def _start(self) -> _Worker:
        context = get_context("spawn")  # a fork would copy GDAL's open files and threads' locks
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self.opening, self.rules), daemon=True)
        resource_tracker.ensure_running()  # which would change the mask
        with _interrupted_later():
            process.start()
        theirs.close()
        return _Worker(process, cast(Connection, ours))

    @staticmethod
    def _order(worker: _Worker, number: int, chunk: Sequence[Job]) -> None:
        worker.orders.append(number)
        with suppress(OSError):  # it is dead: its pipe says so when it is read
            worker.pipe.send((number, [(job.number, job.key, job.split, job.label, job.block) for job in chunk]))

    def _replace(self, dead: _Worker, chunks: Sequence[Sequence[Job]], deaths: Counter[int]) -> _Worker:
        """A new worker with the orders of one that died."""
        dead.pipe.close()
        dead.process.join(5)
        code = dead.process.exitcode
        how = signal.Signals(-code).name if code is not None and -code in signal.valid_signals() else f"exit code {code}"
        if dead.orders:
            deaths[dead.orders[0]] += 1
            first = chunks[dead.orders[0]][0].item.lookup
            if deaths[dead.orders[0]] >= _DEATHS:
                raise Unfinished(
                    f"{_DEATHS} worker processes died ({how}) at {first} or soon after it; with too little memory, take "
                    "fewer --workers. What is done is kept: the same command continues"
                )
            _log.warning("a worker process died (%s) at %s or soon after it; its part is done again", how, first)
        fresh = self._start()
        for number in dead.orders:
            self._order(fresh, number, chunks[number])
        return fresh


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Ctrl-C reaches all processes. One that starts here is deaf to it, as it inherits the mask, and leaves the answer to the
    main process; that one answers afterwards, so that nobody is half started."""
    waiting: list[int] = []
    ours = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _: waiting.append(number)) if ours else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if ours:
            signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
        if waiting:
            signal.raise_signal(signal.SIGINT)


def _serve(pipe: Connection, opening: Opening, rules: Rules) -> None:
    """A worker's life: orders in, chunks or exceptions out, until the main process is gone."""
    with suppress(EOFError, ConnectionError):
        source: Source | Exception
        try:
            source = open_source(opening.path, opening.options, opening.recipe)
            if source.fingerprint != opening.fingerprint:
                source = InputError(f"{opening.path} has changed since it was opened; run the same command again")
        except Exception as error:
            source = _portable(error)
        while True:
            number, orders = pipe.recv()
            try:
                if isinstance(source, Exception):
                    raise source
                answer = make(source, [Job(n, source.items[n], *rest) for n, *rest in orders], rules)
                for statistics in answer.seen.statistics.values():
                    _ = statistics.count  # counts what waits: it would travel as pixels
            except Exception as error:
                answer = _portable(error)
            pipe.send((number, answer))


def _portable(error: Exception) -> Exception:
    """InputError as it is; of anything else, which is our fault, the trace."""
    if isinstance(error, InputError):
        return error
    return RuntimeError(f"in worker {os.getpid()}: {''.join(traceback.format_exception(error))}")
