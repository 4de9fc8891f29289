"""One owner per run folder: a lease with a heartbeat, taken over only when its owner is known to be gone."""

import json
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from swath.shards.errors import InputError
from swath.shards.files import write_json

BEAT, STALE = 10.0, 120.0  # seconds between heartbeats, and without one until another machine may take over


class Owner:
    """Context manager: owns `run` while inside. A second start is refused with one line."""

    def __init__(self, run: Path) -> None:
        self._path = run / "owner.json"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="swath-lease", daemon=True)

    def __enter__(self) -> Self:
        claim = self._path.with_name(f".owner.{socket.gethostname()}.{os.getpid()}")
        claim.write_text(json.dumps(self._lease()))
        try:
            self._take(claim)
        finally:
            claim.unlink()
        self._thread.start()
        return self

    def _take(self, claim: Path) -> None:
        """A hard link is made by one process only, however many start at once."""
        for _ in range(2):
            try:
                os.link(claim, self._path)
                return
            except FileExistsError:
                holder = self._read()
                if holder is not None and (_alive(holder) or self._beats(holder)):
                    raise InputError(
                        f"run {self._path.parent} is owned by process {holder['pid']} on {holder['host']}; stop it first, "
                        "or choose another run.dir"
                    ) from None
                self._path.unlink(missing_ok=True)
        raise InputError(f"run {self._path.parent} was taken by another process just now")

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            write_json(self._path, self._lease())

    def _beats(self, holder: dict[str, Any]) -> bool:
        """Clocks differ and jump, so a lease of another machine that looks old is watched for two beats before it is broken."""
        if holder.get("host") == socket.gethostname():
            return False
        time.sleep(2 * BEAT + 1)
        return self._read() not in (None, holder)

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._path.read_text())
        except (OSError, ValueError):
            return None

    @staticmethod
    def _lease() -> dict[str, Any]:
        pid = os.getpid()
        return {"host": socket.gethostname(), "pid": pid, "started": _started(pid), "beat": time.time()}


def _alive(holder: dict[str, Any]) -> bool:
    if holder.get("host") == socket.gethostname():
        return _started(int(holder["pid"])) == holder["started"]
    return abs(time.time() - float(holder.get("beat", 0))) < STALE


def _started(pid: int) -> str | None:
    """When process `pid` started, in the kernel's ticks; None if it is gone or a zombie. Tells a reused number apart."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
