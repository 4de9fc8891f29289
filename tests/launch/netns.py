"""Two network namespaces on this machine, and what lies between them: a link that can be slowed and cut, and a long way round.

`link` is a veth pair under `tbf` (netem is not in every kernel). `way` is a pair of TUN devices between which a thread carries
packets, each of them late: what a proxy would do to one connection it does to all. Needs root, iproute2 and CAP_NET_ADMIN.
"""

import fcntl
import os
import select
import shutil
import struct
import subprocess
import threading
import time
from collections import deque
from pathlib import Path
from typing import Self

from tests.launch.cluster import install

LINK, WAY = "swlink", "swway"  # devices, of the same name in both namespaces
ADDRESS = {LINK: "10.77.0.{}", WAY: "10.78.0.{}"}
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


def missing() -> str | None:
    """Why there can be no two networks here; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces on one machine are made by root only"
    install(("ip", "tc"), ("iproute2",))
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "there is no ip or tc here (apt-get install iproute2)"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun here, the way for packets that are to be late"
    tried = subprocess.run(["ip", "netns", "add", "swath-try"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", "swath-try"], capture_output=True)
    return f"network namespaces are not allowed here (CAP_NET_ADMIN): {tried.stderr.strip()}" if tried.returncode else None


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Networks:
    """Context manager: namespaces `names[0]` and `names[1]`, joined by `link` (with `megabits` a second) and `way`."""

    def __init__(self, megabits: float, delay: float) -> None:
        self.names = tuple(f"swath-{os.getpid()}-{side}" for side in "ab")
        self.megabits, self.delay = megabits, delay
        self._ends: list[int] = []
        self._stop = threading.Event()
        self._carrier = threading.Thread(target=self._carry, name="carrier")

    def __enter__(self) -> Self:
        try:
            for name in self.names:
                run("ip", "netns", "add", name)
            first, second = self.names
            run("ip", "link", "add", LINK, "netns", first, "type", "veth", "peer", "name", LINK, "netns", second)
            for side, name in enumerate(self.names):
                self._ends.append(self._tun(f"{WAY}{side}"))
                run("ip", "link", "set", f"{WAY}{side}", "netns", name, "name", WAY)
                for device in (LINK, WAY):
                    run("ip", "-n", name, "addr", "add", ADDRESS[device].format(side + 1) + "/24", "dev", device)
                for device in ("lo", LINK, WAY):
                    run("ip", "-n", name, "link", "set", device, "up")
                shape = ("tbf", "rate", f"{self.megabits}mbit", "burst", "16kb", "latency", "400ms")
                run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", LINK, "root", *shape)
            self._carrier.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._carrier.ident is not None:
            self._carrier.join()
        for end in self._ends:
            os.close(end)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def cut(self) -> None:
        run("ip", "-n", self.names[0], "link", "set", LINK, "down")

    def mend(self) -> None:
        run("ip", "-n", self.names[0], "link", "set", LINK, "up")

    def sent(self, side: int, device: str) -> int:
        """Bytes that have left by a device."""
        told = run("ip", "netns", "exec", self.names[side], "cat", f"/sys/class/net/{device}/statistics/tx_bytes")
        return int(told)

    def held_back(self, side: int) -> int:
        """How often the link let a packet wait."""
        told = run("ip", "netns", "exec", self.names[side], "tc", "-s", "qdisc", "show", "dev", LINK)
        return int(told.split("overlimits ")[1].split()[0])

    def command(self, side: int, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.names[side], *words]

    # --- the long way ---

    @staticmethod
    def _tun(name: str) -> int:
        end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
        return end

    def _carry(self) -> None:
        other = dict(zip(self._ends, self._ends[::-1], strict=True))
        way: deque[tuple[float, int, bytes]] = deque()
        while not self._stop.is_set():
            patience = min(0.2, max(0.0, way[0][0] - time.monotonic())) if way else 0.2
            for end in select.select(self._ends, [], [], patience)[0]:
                way.append((time.monotonic() + self.delay, other[end], os.read(end, 65536)))
            while way and way[0][0] <= time.monotonic():
                _, end, packet = way.popleft()
                os.write(end, packet)
