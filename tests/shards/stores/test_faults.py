"""Faults between a server and the reader: each is survived with nothing lost, or ends in one line; nothing hangs."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from swath.shards.errors import InputError
from swath.shards.manifest import Shard
from swath.shards.stores.cache import Cache, CacheOptions
from swath.shards.stores.remote import Patience, Remote
from swath.shards.stores.store import RemoteStore
from tests.fault_server import FaultServer, cut, drip, endless, flip, hang, serving
from tests.shards.stores.test_store import SIZE, held, until, write_shards

pytest.importorskip("aiohttp")
pytestmark = pytest.mark.timeout(60)

QUICK = Patience(attempts=4, timeout=0.4, min_speed=2000, deadline=5)


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    return write_shards(tmp_path / "shards", count=30)


@pytest.fixture
def server(tmp_path: Path, shards: list[Shard]) -> Iterator[FaultServer]:
    with serving(tmp_path / "shards") as server:
        yield server


class Opened:
    """A store that waits no time between attempts, but says how long it would have."""

    def __init__(self, place: str, cache: Path, patience: Patience = QUICK, limit: int = 10 * SIZE) -> None:
        self.waits: list[float] = []
        remote = Remote(place, patience, pause=self.waits.append, jitter=lambda: 1.0)
        self.store = RemoteStore(remote, CacheOptions(cache, limit))

    def refuses(self, shard: Shard, match: str) -> str:
        started = time.monotonic()
        with pytest.raises(InputError, match=match) as caught:
            self.store.shard(shard)
        assert time.monotonic() - started < 15
        assert shard.name in str(caught.value) and "\n" not in str(caught.value)
        assert not list(self.store.cache.folder.glob("*.partial"))
        return str(caught.value)


@pytest.fixture
def opened(server: FaultServer, tmp_path: Path) -> Opened:
    return Opened(server.place, tmp_path / "cache")


def named(fault: object) -> str:
    """The same in every process that collects the tests."""
    return getattr(fault, "__name__", str(fault))


@pytest.mark.parametrize("fault", [500, 502, 503, 429, 408, cut, hang, drip, flip], ids=named)
@pytest.mark.parametrize("times", [1, 3])
def test_survived(server: FaultServer, shards: list[Shard], opened: Opened, fault, times: int):
    server.faults["s0.tar"] = [fault] * times
    assert opened.store.shard(shards[0]) == (server.folder / "s0.tar").read_bytes()
    assert server.count("s0.tar") == times + 1
    assert len(opened.waits) == times
    if fault is not cut:  # which has come further meanwhile
        assert opened.waits == [0.5, 1.0, 2.0][:times]


@pytest.fixture
def opened_s3(server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "made")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.place)
    patience = Patience(attempts=4, timeout=0.4, min_speed=2 * SIZE, deadline=20)
    opened = Opened("s3://archive/made/set", tmp_path / "cache", patience)
    list(opened.store.remote.stream("manifest.json", limit=8, size=8))  # botocore takes a second to read its own files
    opened.waits.clear()
    return opened


@pytest.mark.parametrize("fault", [500, 503, cut, hang, drip, flip], ids=named)
def test_survived_on_s3(server: FaultServer, shards: list[Shard], opened_s3: Opened, fault):
    server.faults["s0.tar"] = [fault] * 2
    assert opened_s3.store.shard(shards[0]) == (server.folder / "s0.tar").read_bytes()
    assert server.count("s0.tar") == 3 and opened_s3.waits == [0.5, 1.0]


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (500, "s0.tar cannot be read"), (flip, "do not match the SHA-256"), (hang, "s0.tar cannot be read"),
        (404, r"s3://archive/made/set/s0.tar is not there \(404\)"), (403, "may not be read"),
    ],
    ids=["500", "flip", "hang", "404", "403"],
)  # fmt: skip
def test_given_up_on_s3(server: FaultServer, shards: list[Shard], opened_s3: Opened, fault, match: str):
    server.faults["s0.tar"] = [fault] * 10
    opened_s3.refuses(shards[0], match)
    assert server.count("s0.tar") == (1 if fault in (403, 404) else QUICK.attempts)


def test_different_faults_in_a_row(server: FaultServer, shards: list[Shard], tmp_path: Path):
    opened = Opened(server.place, tmp_path / "cache", Patience(attempts=7, timeout=0.4, min_speed=2000))
    server.faults["s0.tar"] = [500, cut, hang, flip, 503, cut]
    assert opened.store.shard(shards[0]) == (server.folder / "s0.tar").read_bytes()


def test_cut_bodies_are_resumed(server: FaultServer, shards: list[Shard], opened: Opened):
    server.faults["s0.tar"] = [cut] * 3
    opened.store.shard(shards[0])
    first = [start for _, start in server.requests]
    assert first[0] == 0 and first == sorted(first) and first[-1] >= SIZE // 2


def test_progress_is_no_failure(server: FaultServer, shards: list[Shard], tmp_path: Path):
    """Two attempts in a row are allowed, and five connections end; but each brings the file on."""
    server.faults["s0.tar"] = [cut] * 5
    patience = Patience(attempts=2, timeout=1, min_speed=1000)
    opened = Opened(server.place, tmp_path / "cache", patience)
    assert opened.store.shard(shards[0]) == (server.folder / "s0.tar").read_bytes()
    assert opened.waits == [0.5] * 5


@pytest.mark.parametrize("ranges", [True, False])
def test_the_index_is_never_of_two_halves(tmp_path: Path, shards: list[Shard], ranges: bool):
    """Without a checksum nothing would tell, so it begins again."""
    with serving(tmp_path / "shards", ranges=ranges) as server:
        server.faults["index.bin"] = [cut]
        path = Opened(server.place, tmp_path / "cache").store.path("index.bin", size=5000)
        assert path.read_bytes() == b"index" * 1000
        assert [start for _, start in server.requests] == [0, 0]


def test_a_server_without_ranges_begins_again(tmp_path: Path, shards: list[Shard]):
    with serving(tmp_path / "shards", ranges=False) as server:
        server.faults["s0.tar"] = [cut, hang]
        view = Opened(server.place, tmp_path / "cache").store.shard(shards[0])
        assert view == (server.folder / "s0.tar").read_bytes()


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (500, "s0.tar cannot be read: the server answers 500"),
        (flip, "s0.tar cannot be read: its bytes do not match the SHA-256 in the manifest"),
        (hang, "s0.tar cannot be read: (no answer in time|.*[Tt]imeout)"),
        (drip, "s0.tar cannot be read: (only .* bytes/s come in|took longer)"),
    ],
    ids=["500", "flip", "hang", "drip"],
)
def test_given_up_in_one_line(server: FaultServer, shards: list[Shard], opened: Opened, fault, match: str):
    server.faults["s0.tar"] = [fault] * 100
    line = opened.refuses(shards[0], match)
    assert "start again" in line
    server.faults["s0.tar"].clear()
    assert len(opened.store.shard(shards[0])) == SIZE


@pytest.mark.parametrize(("status", "match"), [(404, r"not there \(404\)"), (401, "may not be read"), (403, "may not be read")])
def test_no_second_try_where_none_helps(server: FaultServer, shards: list[Shard], opened: Opened, status: int, match: str):
    server.faults["s0.tar"] = [status]
    opened.refuses(shards[0], match)
    assert opened.waits == [] and len(server.requests) == 1


def test_missing_shard_and_missing_manifest(server: FaultServer, shards: list[Shard], opened: Opened):
    for name in ("s0.tar", "manifest.json"):
        (server.folder / name).unlink()
    opened.refuses(shards[0], rf"{server.place}/s0.tar is not there \(404\); copy it there")
    with pytest.raises(InputError, match=rf"{server.place}/manifest.json is not there \(404\)"):
        opened.store.read("manifest.json")


@pytest.mark.parametrize("change", [-1, 1, -SIZE + 1])
def test_of_another_length(server: FaultServer, shards: list[Shard], opened: Opened, change: int):
    data = (server.folder / "s0.tar").read_bytes()
    (server.folder / "s0.tar").write_bytes(data[:change] if change < 0 else data + b"x")
    opened.refuses(shards[0], f"ends after {SIZE + change} of {SIZE} bytes|416|is longer than {SIZE} bytes")


def test_connection_refused(server: FaultServer, shards: list[Shard], tmp_path: Path):
    server.shutdown()
    server.server_close()
    opened = Opened(server.place, tmp_path / "cache")
    opened.refuses(shards[0], "s0.tar cannot be read: .*4 attempts in a row")
    assert opened.waits == [0.5, 1.0, 2.0]


def test_a_deadline_ends_what_makes_a_little_progress(server: FaultServer, shards: list[Shard], tmp_path: Path):
    """50 bytes/s is fast enough for `min_speed`, each read comes in time, and all the same it ends."""
    server.faults["s0.tar"] = [drip] * 100
    patience = Patience(timeout=0.5, min_speed=1, deadline=-SIZE + 2)  # 2 s in all
    Opened(server.place, tmp_path / "cache", patience).refuses(shards[0], "s0.tar cannot be read: took longer than 2 s")


def test_an_endless_manifest(server: FaultServer, opened: Opened):
    (server.folder / "manifest.json").write_bytes(bytes(200 << 10))
    with pytest.raises(InputError, match=r"manifest.json is longer than 100000 bytes"):
        opened.store.read("manifest.json", limit=100_000)
    server.faults["manifest.json"] = [endless]
    with pytest.raises(InputError, match=r"manifest.json is longer than 100000 bytes"):
        opened.store.read("manifest.json", limit=100_000)


def test_damage_in_the_cache_is_healed_by_size(server: FaultServer, shards: list[Shard], opened: Opened, tmp_path: Path):
    opened.store.shard(shards[0])
    with (tmp_path / "cache" / shards[0].sha256).open("r+b") as file:
        file.truncate(SIZE // 2)
    again = Opened(server.place, tmp_path / "cache")
    assert again.store.shard(shards[0]) == (server.folder / "s0.tar").read_bytes()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "swath-test", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("mounting takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_makes_room_or_says_so(server: FaultServer, shards: list[Shard], small_disk: Path):
    opened = Opened(server.place, small_disk / "cache")
    for shard in shards[:8]:  # five fit, although the limit would allow ten: what nobody uses goes
        opened.store._mapped.clear()
        assert len(opened.store.shard(shard)) == SIZE
    (small_disk / "of somebody else").write_bytes(bytes(512 * 1024 - 4096 * 4 - held(small_disk / "cache")))
    opened.store._mapped.clear()
    views = [Opened(server.place, small_disk / "cache").store.shard(shard) for shard in shards[-3:]]
    with pytest.raises(InputError, match=rf"no space left while caching shards in {small_disk}/cache; free some") as caught:
        for shard in shards[:8]:
            views.append(opened.store.shard(shard))
    assert "\n" not in str(caught.value)
    assert not list((small_disk / "cache").glob("*.partial"))
    (small_disk / "of somebody else").unlink()
    assert len(opened.store.shard(shards[0])) == SIZE


def test_a_full_disk_without_mounting(server: FaultServer, shards: list[Shard], opened: Opened, monkeypatch):
    def full(handle: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match="no space left while caching shards in"):
        opened.store.shard(shards[0])
    assert server.requests == [] and not list(opened.store.cache.folder.glob("*.partial"))


def test_a_file_size_limit(server: FaultServer, shards: list[Shard], opened: Opened):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, before[1]))
    try:
        with pytest.raises(InputError, match=r"caching shards in .* failed \(.*File too large"):
            opened.store.shard(shards[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)


def test_a_cache_that_cannot_be_written(server: FaultServer, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"caching shards in .*/file/cache failed \(Not a directory"):
        Opened(server.place, tmp_path / "file" / "cache")
    with pytest.raises(InputError, match=r"caching shards in /proc/cache"):
        Opened(server.place, Path("/proc/cache"))


# --- several processes -------------------------------------------------------------------------------------------------

RANK = """
import sys, json, hashlib
from pathlib import Path
from swath.shards.stores.cache import Cache, CacheOptions
from swath.shards.manifest import Shard
from swath.shards.stores.remote import Patience
from swath.shards.stores.store import open_store
place, cache, limit, listing, order = sys.argv[1:]
shards = [Shard(**row) for row in json.loads(listing)]
store = open_store(place, CacheOptions(Path(cache), int(limit)), Patience(first_wait=0.05, timeout=20))
store.capacity = 4 * shards[0].bytes
for number in map(int, order.split(",")):
    view = store.shard(shards[number])
    assert (Path(cache) / shards[number].sha256).exists()
    assert hashlib.sha256(view).hexdigest() == shards[number].sha256
    print(number, flush=True)
print("done", flush=True)
"""


@pytest.fixture
def rank(server: FaultServer, shards: list[Shard], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process that opens shards in `order`, each checked, and prints their numbers."""
    running: list[subprocess.Popen[str]] = []
    listing = "[" + ",".join(shard.model_dump_json() for shard in shards) + "]"

    def start(order: list[int], limit: int = 100 * SIZE) -> subprocess.Popen[str]:
        words = [server.place, str(tmp_path / "cache"), str(limit), listing, ",".join(map(str, order))]
        process = subprocess.Popen(
            [sys.executable, "-W", "error::UserWarning", "-c", RANK, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def finished(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        out, err = process.communicate(timeout=50)
        assert process.returncode == 0 and out.endswith("done\n"), err


def test_four_ranks_download_each_shard_once(server: FaultServer, shards: list[Shard], rank):
    finished(*[rank(list(range(30))) for _ in range(4)])
    assert [server.count(shard.name) for shard in shards] == [1] * 30


def test_four_ranks_in_a_cache_too_small_for_all(server: FaultServer, shards: list[Shard], rank, tmp_path: Path):
    """Each maps two shards and opens a third, so twelve places do; what is in use is never removed, and the limit holds."""
    limit, most = 12 * SIZE, 0
    ranks = [rank([n * step % 30 for n in range(1, 60)], limit=limit) for step in (1, 7, 11, 13)]
    cache = Cache(CacheOptions(tmp_path / "cache", limit))
    while any(process.poll() is None for process in ranks):
        with cache._accounts():
            most = max(most, held(cache.folder))
        time.sleep(0.001)
    finished(*ranks)
    assert 10 * SIZE < most <= limit
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_killed_while_downloading(server: FaultServer, shards: list[Shard], rank, tmp_path: Path):
    """The others, who wait for that download, go on at once; and so does the next start."""
    server.faults["s0.tar"] = [hang]
    first = rank([0])
    until(lambda: server.count("s0.tar") == 1)
    others = [rank([0, 1, 2]) for _ in range(3)]
    time.sleep(0.5)
    assert server.count("s0.tar") == 1
    first.kill()
    finished(*others)
    assert server.count("s0.tar") == 2
    server.faults["s3.tar"] = [hang]
    alone = rank([3])
    until(lambda: server.count("s3.tar") == 1)
    alone.kill()
    alone.wait()
    assert list((tmp_path / "cache").glob("*.partial"))
    finished(rank([4, 3]))
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_what_a_dead_process_left_is_removed_and_not_counted(server: FaultServer, shards: list[Shard], tmp_path: Path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / ("0" * 64 + ".partial")).write_bytes(bytes(3 * SIZE))
    (cache / (shards[0].sha256 + ".partial")).write_bytes(b"rubbish" * SIZE)
    opened = Opened(server.place, cache, limit=2 * SIZE)
    assert opened.store.shard(shards[0]) == (server.folder / "s0.tar").read_bytes()
    assert held(cache) == SIZE


def test_stopped_while_others_wait(server: FaultServer, shards: list[Shard], rank, tmp_path: Path):
    """A process that holds a download and does nothing does not hold the rest for ever."""
    server.faults["s0.tar"] = [hang]
    first = rank([0])
    until(lambda: server.count("s0.tar") == 1)
    first.send_signal(signal.SIGSTOP)
    patience = Patience(min_speed=SIZE, deadline=0)
    Opened(server.place, tmp_path / "cache", patience).store.shard(shards[1])
    with pytest.raises(InputError, match="another process has been downloading"):
        Opened(server.place, tmp_path / "cache", patience).store.shard(shards[0])
    first.kill()


def test_links_in_the_cache_are_not_followed(server: FaultServer, shards: list[Shard], tmp_path: Path):
    cache, target = tmp_path / "cache", tmp_path / "target"
    cache.mkdir()
    target.write_bytes(b"precious")
    (cache / f"{shards[0].sha256}.partial").symlink_to(target)
    with pytest.raises(InputError, match="caching shards in"):
        Opened(server.place, cache).store.shard(shards[0])
    assert target.read_bytes() == b"precious"
