"""Whether the ranks of a run still move, and who was late where they do not.

Each rank says what it is at (`watch.at("data", step)`), and a thread looks at it every few seconds. A rank that has been at one
thing for longer than is allowed raises an alarm in the store that all ranks share. Then each writes its Python stacks, and what
it was at, to `hang-rank-NNNNN.txt` in the run folder, and tells the others how many collectives it has begun. Late are those that
do not answer, else those that have begun fewest, and of these those that have come least far: the others wait for them. The late
end at once with the line that says so, the others `HOLD` seconds later, so that whoever started the ranks sees a late one fail
first. A rank that ends of an error of its own raises the same alarm, so that ranks that would not notice end too. Where the
network is cut, a question to the store is not answered for minutes: the thread goes on without, and a rank that then waits for
too long ends by itself.
"""

import faulthandler
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch.distributed as dist

from swath.pretrain.world import START, World, is_echo
from swath.shards.errors import Elsewhere

T = TypeVar("T")
log = logging.getLogger("swath")
HOLD = 10.0  # seconds in which the rank whose fault it is ends before the others do
MARGIN = 60.0  # seconds that a collective may last beyond the limit, so that the watch, which knows more, speaks first
BEAT = 5.0  # seconds between looks, at most
ANSWER = 5.0  # seconds that a question to the store is waited for


@dataclass(frozen=True)
class Doing:
    """What a rank is at: `what` of `step` (the one in hand, counted from 1)."""

    what: str
    step: int


@dataclass(frozen=True)
class State:
    """What a rank answers to an alarm: `seconds` at what it is at, collectives that it has `begun`, things it has `come` to."""

    what: str
    step: int
    seconds: float
    begun: int
    come: int

    def __str__(self) -> str:
        return f"at {self.what} of step {self.step} for {self.seconds:.0f} s"


class Watch:
    """Context manager: watches while inside. Where nothing moves for `limit` seconds after the first step, all ranks end."""

    def __init__(self, run: Path, world: World, limit: float) -> None:
        self.run, self.world, self.limit = run, world, limit
        self._allowed = START.total_seconds()
        self._doing, self._come = Doing("the start", 0), 0
        self._waited = 0.0
        self._beat = min(BEAT, limit / 4)
        # a connection of its own, since the other may be waiting; torch's stubs do not know of it
        shared: Any = world.store
        self._store: dist.Store | None = None if shared is None else shared.clone()
        self._asking = threading.Thread()  # the store, and may not get an answer
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="swath-watch", daemon=True)

    def at(self, what: str, step: int) -> None:
        """This rank has come to something else."""
        self._doing = Doing(what, step)
        self._come += 1

    def allow(self, *, long: bool) -> None:
        """How long anything may take from now on: `long` where something is compiled, or shards come for the first time."""
        allowed = START.total_seconds() if long else self.limit
        if allowed != self._allowed:
            self._allowed = allowed
            self.world.allow(allowed + MARGIN)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if error is not None and not is_echo(error) and not isinstance(error, Elsewhere):
            self._alarm(failed=f"{type(error).__name__}: {error}".splitlines()[0])

    # --- the thread ---

    def _look(self) -> None:
        doing, last = self._doing, time.monotonic()
        try:
            while not self._stop.wait(self._beat):
                # where not even this thread comes to run, because something keeps the interpreter: to stderr, the rank's log
                faulthandler.dump_traceback_later(self._allowed + 2 * self._beat, file=2)
                now = time.monotonic()
                if doing is not self._doing:
                    doing, self._waited = self._doing, 0.0
                self._waited += min(now - last, 2 * self._beat)  # a process that was stopped has not waited
                last = now
                over = self._waited > self._allowed
                if over:
                    self._alarm()
                told = self._told()
                if told is not None or over:
                    self._end(told or {})
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _ask(self, question: Callable[[dist.Store], T], seconds: float = ANSWER) -> T | None:
        """What the store says; None where it has not answered in time, and until it does nothing else is asked."""
        store, answers = self._store, list[T]()
        if store is None or self._asking.is_alive():
            return None

        def ask() -> None:
            try:
                answers.append(question(store))
            except RuntimeError:  # it is gone, and with it rank 0 or its launcher; each is by itself now
                self._store = None

        self._asking = threading.Thread(target=ask, name="swath-watch-store", daemon=True)
        self._asking.start()
        self._asking.join(seconds)
        return answers[0] if answers else None

    def _alarm(self, **why: str) -> None:
        """The first one stands."""
        self._ask(lambda store: store.compare_set("alarm", "", json.dumps({"rank": self.world.rank, **why})))

    def _told(self) -> dict[str, Any] | None:
        """The alarm, if there is one."""
        return self._ask(lambda store: json.loads(store.get("alarm")) if store.check(["alarm"]) else None)

    def _end(self, told: dict[str, Any]) -> None:
        """Ends this process, unless it does so by itself."""
        first = False
        if "failed" in told:
            log.error("rank %d failed: %s; rank %d ends with it", told["rank"], told["failed"], self.world.rank)
        else:
            state = State(**asdict(self._doing), seconds=self._waited, begun=self.world.begun(), come=self._come)
            self._dump(state)
            states = self._answers(state)
            silent = [rank for rank in range(self.world.size) if rank not in states]
            least = min((one.begun, one.come) for one in states.values())
            late = silent or [rank for rank, one in states.items() if (one.begun, one.come) == least]
            first = self.world.rank in (late if not silent else [min(states)])
            log.error("%s", sentence(late, states, self.run))
        if first or not self._stop.wait(HOLD):
            os._exit(1)

    def _dump(self, state: State) -> None:
        try:
            with (self.run / f"hang-rank-{self.world.rank:05d}.txt").open("w") as file:
                where = f"rank {self.world.rank} of {self.world.size} on {socket.gethostname()}, process {os.getpid()}"
                file.write(f"{time.strftime('%F %T')} {where}: {state}, {state.begun} collectives begun\n\n")
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError as error:
            log.error("the stacks of rank %d cannot be written: %s", self.world.rank, error)

    def _answers(self, mine: State) -> dict[int, State]:
        """What each rank is at; ranks that do not answer soon are left out."""
        states = {self.world.rank: mine}
        patience = 3 * self._beat + 1
        deadline = time.monotonic() + patience

        def collect(store: dist.Store) -> None:
            store.set(f"state/{self.world.rank}", json.dumps(asdict(mine)))
            while len(states) < self.world.size and time.monotonic() < deadline:
                for rank in range(self.world.size):
                    if rank not in states and store.check([f"state/{rank}"]):
                        states[rank] = State(**json.loads(store.get(f"state/{rank}")))
                time.sleep(0.1)

        self._ask(collect, patience + ANSWER)
        return dict(sorted(states.items()))


def sentence(late: list[int], states: dict[int, State], run: Path) -> str:
    """Who was late, at what, and what one of the others was at meanwhile."""
    told = [f"rank {rank} {states.get(rank, 'does not answer')}" for rank in late[:4]]
    more = f" and {len(late) - 4} more" if len(late) > 4 else ""
    other = next((rank for rank in states if rank not in late), None)
    waiting = "" if other is None else f"; rank {other} waits {states[other]}"
    return f"nothing moves, late: {', '.join(told)}{more}{waiting}; the stacks are in {run}/hang-rank-*.txt"
