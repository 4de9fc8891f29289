"""A real SLURM cluster of several nodes on this one machine: munged, slurmctld and one slurmd per node, as root, for tests.

It ends only processes that it started. Without SLURM it says so; with SWATH_INSTALL_SLURM=1 it asks apt-get for it first.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
PARTITIONS = """
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
SETTINGS = """
ClusterName=swath
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=10
MinJobAge=600
InactiveLimit=0
MessageTimeout=30
SlurmctldTimeout=30
SlurmdTimeout=20
"""


def missing() -> str | None:
    """Why no cluster can be started here; None where one can."""
    if os.geteuid() != 0:
        return "a SLURM cluster on one machine is started by root only"
    install(NEEDED, ("slurm-wlm", "munge"))
    absent = [name for name in NEEDED if shutil.which(name) is None]
    return f"SLURM is not installed: no {', '.join(absent)} (apt-get install slurm-wlm munge)" if absent else None


def install(commands: Sequence[str], packages: Sequence[str]) -> None:
    """Ask apt-get, if SWATH_INSTALL_SLURM=1 lets it, for packages whose commands are not there; whether it worked is to be seen.

    Lists of packages may be old or absent, as in a fresh container. No network must not hold the tests up for long."""
    if os.environ.get("SWATH_INSTALL_SLURM") != "1" or all(map(shutil.which, commands)) or shutil.which("apt-get") is None:
        return
    apt = ["apt-get", "-y", "-o", "Acquire::http::Timeout=20", "-o", "Acquire::Retries=1"]
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["install", *packages], ["update"], ["install", *packages]):
        with suppress(subprocess.TimeoutExpired):
            subprocess.run([*apt, *words], capture_output=True, check=False, env=quiet, timeout=180, stdin=subprocess.DEVNULL)
        if all(map(shutil.which, commands)):
            return


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody listens on."""
    for first in range(17100, 19900, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, one in enumerate(sockets):
                one.bind(("", first + offset))
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
        return first
    raise RuntimeError("no free ports")


def wait(what: str, until: Callable[[], object], seconds: float) -> None:
    """Look twice a second until it is so; TimeoutError otherwise."""
    end = time.monotonic() + seconds
    while not until():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.5)


class Cluster:
    """Nodes n1 … nN of one processor each; partitions `main` and, preempting it, `high`."""

    def __init__(self, nodes: int) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: a socket's path is
        self.root.chmod(0o755)
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        self.conf = self.root / "slurm.conf"
        host, port = socket.gethostname().partition(".")[0], free_ports(nodes + 2)
        places = {
            "SlurmctldHost": f"{host}(127.0.0.1)", "AuthInfo": f"socket={self.root}/munge/socket", "SlurmctldPort": port,
            "SlurmdPort": port + 1, "StateSaveLocation": self.root / "state", "SlurmdSpoolDir": self.root / "spool.%n",
            "SlurmctldPidFile": self.root / "slurmctld.pid", "SlurmdPidFile": self.root / "slurmd.%n.pid",
            "SlurmctldLogFile": self.root / "slurmctld.log", "SlurmdLogFile": self.root / "slurmd.%n.log",
        }  # fmt: skip
        machines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + 2 + i} CPUs=1 RealMemory=1000 State=UNKNOWN"
            for i, name in enumerate(self.nodes)
        ]
        given = [f"{key}={value}" for key, value in places.items()]
        self.conf.write_text("\n".join([SETTINGS, *given, *machines, PARTITIONS]))

    def __enter__(self) -> "Cluster":
        os.environ["SLURM_CONF"] = str(self.conf)
        munge = self.root / "munge"
        munge.mkdir(mode=0o755)
        (self.root / "state").mkdir()
        key = munge / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        names = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        try:
            self.run("munged", "--force", f"--socket={munge / 'socket'}", *names)
            wait("munged", (munge / "socket").exists, 20)
            self.run("slurmctld", "-c", "-f", str(self.conf))
            for name in self.nodes:
                self.start(name)
            wait(
                "nodes", lambda: len(self.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle").split("\n")) > len(self.nodes), 30
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        subprocess.run(["scancel", "--user", "root"], capture_output=True, timeout=60)
        time.sleep(2)
        for path in [*self.root.glob("slurmd.*.pid"), self.root / "slurmctld.pid", self.root / "munge" / "pid"]:
            self._end(path)
        del os.environ["SLURM_CONF"]
        shutil.rmtree(self.root, ignore_errors=True)

    def run(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    def start(self, node: str) -> None:
        (self.root / f"spool.{node}").mkdir(exist_ok=True)
        self.run("slurmd", "-f", str(self.conf), "-N", node)

    def kill(self, node: str) -> None:
        """The node's daemon dies; what it has started lives on, as on a real cluster."""
        os.kill(int((self.root / f"slurmd.{node}.pid").read_text()), signal.SIGKILL)

    def _end(self, path: Path) -> None:
        try:
            pid = int(path.read_text())
            os.kill(pid, signal.SIGTERM)
            for _ in range(100):
                if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                    return
                time.sleep(0.1)
        except (OSError, ValueError):
            return

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says of a job: JobState, Restarts, Reason, …"""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def hurry(self, number: str) -> None:
        """A requeued job waits for two minutes; not here."""
        if self.job(number)["Reason"] == "BeginTime":
            self.run("scontrol", "update", f"JobId={number}", "StartTime=now")
