"""Where shards come from: a folder, HTTP with and without ranges, and S3, all giving the same bytes; the cache stays bounded."""

import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from swath.shards.errors import InputError
from swath.shards.manifest import Shard
from swath.shards.skips import Skips
from swath.shards.stores.cache import Cache, CacheFull, CacheOptions
from swath.shards.stores.remote import BLOCK, Patience, Remote
from swath.shards.stores.store import Store, open_store
from tests.fault_server import FaultServer, flip, hang, serving
from tests.s3_server import s3_server

pytest.importorskip("aiohttp")
pytestmark = pytest.mark.timeout(60)

SIZE = 100_003


def write_shards(folder: Path, count: int = 6, size: int = SIZE) -> list[Shard]:
    """Files of random bytes under the names of shards: a store does not look inside."""
    folder.mkdir()
    (folder / "manifest.json").write_text('{"a": 1}')
    shards = []
    for number in range(count):
        data = np.random.default_rng(number).bytes(size)
        (folder / f"s{number}.tar").write_bytes(data)
        shards.append(Shard(name=f"s{number}.tar", samples=1, bytes=size, sha256=sha256(data).hexdigest()))
    (folder / "index.bin").write_bytes(b"index" * 1000)
    return shards


def held(folder: Path) -> int:
    """Bytes of all files in a cache."""
    return sum(path.stat().st_size for path in folder.iterdir())


def until(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.005)


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    return write_shards(tmp_path / "shards")


@pytest.fixture
def server(tmp_path: Path, shards: list[Shard]) -> Iterator[FaultServer]:
    with serving(tmp_path / "shards") as server:
        yield server


@pytest.fixture
def options(tmp_path: Path) -> CacheOptions:
    return CacheOptions(tmp_path / "cache", 10 * SIZE)


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """An S3 server on loopback; the call uploads the folder and gives its address."""
    with s3_server(monkeypatch) as client:

        def upload() -> str:
            client.create_bucket(Bucket="archive")
            for path in (tmp_path / "shards").iterdir():
                client.put_object(Bucket="archive", Key=f"made/set/{path.name}", Body=path.read_bytes())
            return "s3://archive/made/set"

        yield upload


def same_as_local(store: Store, shards: list[Shard], folder: Path) -> None:
    local = open_store(folder)
    assert store.read("manifest.json") == local.read("manifest.json") == b'{"a": 1}'
    assert store.path("index.bin").read_bytes() == local.path("index.bin").read_bytes()
    for shard in shards:
        assert store.shard(shard) == local.shard(shard) == (folder / shard.name).read_bytes()
        assert store.shard(shard) is store.shard(shard)
    for one in (store, local):
        with pytest.raises(InputError, match="longer than 7 bytes"):
            one.read("manifest.json", limit=7)
        with pytest.raises(InputError, match=r"none\.json"):
            one.read("none.json")
        with pytest.raises(InputError, match="is no name of a file"):
            one.path("../index.bin")


@pytest.mark.parametrize("ranges", [True, False])
def test_http_gives_what_a_folder_gives(ranges: bool, tmp_path: Path, shards: list[Shard], options: CacheOptions):
    with serving(tmp_path / "shards", ranges=ranges) as server, open_store(server.place + "/", options) as store:
        same_as_local(store, shards, tmp_path / "shards")
        assert [server.count(shard.name) for shard in shards] == [1] * 6


def test_s3_gives_what_a_folder_gives(s3: Callable[[], str], tmp_path: Path):
    shards = write_shards(tmp_path / "shards", count=2, size=2 * BLOCK + 1)
    options = CacheOptions(tmp_path / "cache", 100 * BLOCK)
    with open_store(s3(), options) as store:
        same_as_local(store, shards, tmp_path / "shards")
        missing = shards[0].model_copy(update={"name": "none.tar", "sha256": "0" * 64})
        with pytest.raises(InputError, match=r"s3://archive/made/set/none.tar is not there \(404\)"):
            store.shard(missing)


def test_gs_gives_what_a_folder_gives(server: FaultServer, shards: list[Shard], options: CacheOptions, monkeypatch):
    pytest.importorskip("gcsfs")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.place)
    with open_store("gs://archive/made/set", options) as store:
        same_as_local(store, shards, server.folder)
        server.faults["s0.tar"] = [flip]
        store.forget(shards[0])
        assert store.shard(shards[0]) == (server.folder / "s0.tar").read_bytes()


def test_s3_wrong_key_is_not_shown(s3: Callable[[], str], shards: list[Shard], options: CacheOptions, monkeypatch):
    place = s3()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    store = open_store(place, options, Patience(attempts=2, first_wait=0))
    with pytest.raises(InputError, match=r"s3://archive/made/set/s0\.tar cannot be read") as caught:
        store.shard(shards[0])
    assert "swath-secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_second_start_downloads_nothing(server: FaultServer, shards: list[Shard], options: CacheOptions):
    for _ in range(2):
        with open_store(server.place, options) as store:
            store.read("manifest.json")
            store.path("index.bin", size=5000)
            assert [len(store.shard(shard)) for shard in shards] == [SIZE] * 6
    assert all(server.count(shard.name) == 1 for shard in shards)
    assert server.count("index.bin") == 1


def test_another_manifest_gets_another_index(server: FaultServer, shards: list[Shard], options: CacheOptions):
    with open_store(server.place, options) as store:
        store.read("manifest.json")
        old = store.path("index.bin")
        (server.folder / "manifest.json").write_text('{"a": 2}')
        (server.folder / "index.bin").write_bytes(b"xedni" * 1000)
    with open_store(server.place, options) as store:
        store.read("manifest.json")
        assert store.path("index.bin").read_bytes() == b"xedni" * 1000 != old.read_bytes()


def test_the_cache_stays_within_its_limit(server: FaultServer, shards: list[Shard], tmp_path: Path):
    """And what was opened longest ago goes first."""
    folder = tmp_path / "cache"
    store = open_store(server.place, CacheOptions(folder, 4 * SIZE))
    for number in (0, 1, 2, 3, 0, 2, 3, 4):
        assert len(store.shard(shards[number])) == SIZE
        assert held(folder) <= 4 * SIZE
    assert {path.name for path in folder.iterdir()} - {"lock"} == {shards[n].sha256 for n in (0, 2, 3, 4)}
    assert [server.count(shard.name) for shard in shards] == [1] * 5 + [0]
    store.shard(shards[1])
    assert server.count("s1.tar") == 2


def test_a_view_outlives_its_file(server: FaultServer, shards: list[Shard], tmp_path: Path):
    """A view in use keeps its file from being removed; and if somebody removes it all the same, its bytes stay."""
    folder = tmp_path / "cache"
    store = open_store(server.place, CacheOptions(folder, 3 * SIZE))
    store.shard(shards[0])
    store.close()
    store = open_store(server.place, CacheOptions(folder, 3 * SIZE))
    view = store.shard(shards[0])  # out of the cache
    for shard in shards[1:]:
        store.shard(shard)
        assert (folder / shards[0].sha256).exists()
    for path in folder.iterdir():
        path.unlink()
    store.close()
    assert view == (server.folder / "s0.tar").read_bytes()


def test_in_use_beyond_the_limit_warns_and_goes_on(server: FaultServer, shards: list[Shard], tmp_path: Path):
    store = open_store(server.place, CacheOptions(tmp_path / "cache", 2 * SIZE))
    views = [store.shard(shard) for shard in shards[:2]]
    with pytest.warns(UserWarning, match="goes over its limit of 200006 bytes: 200006 are in use"):
        views.append(store.shard(shards[2]))
    cache = Cache(CacheOptions(tmp_path / "cache", 2 * SIZE))
    with pytest.raises(CacheFull):
        cache.open("0" * 64, SIZE, lambda: iter([]), patience=1, can_wait=True)
    del views


def test_one_shard_larger_than_the_cache(server: FaultServer, shards: list[Shard], tmp_path: Path):
    with open_store(server.place, CacheOptions(tmp_path / "cache", SIZE - 1)) as store:
        with pytest.raises(InputError, match=r"may hold 100002 bytes, one file has 100003"):
            store.shard(shards[0])
    assert server.requests == []


def test_prefetch_is_bounded_and_in_order(server: FaultServer, shards: list[Shard], tmp_path: Path):
    with open_store(server.place, CacheOptions(tmp_path / "cache", 6 * SIZE)) as store:
        store.prefetch(shards)
        until(lambda: all((tmp_path / "cache" / shard.sha256).exists() for shard in shards[:3]))
        assert sorted(name for name, _ in server.requests) == ["s0.tar", "s1.tar", "s2.tar"]
        for shard in shards[:3]:
            store.shard(shard)
        store.prefetch(shards)
        until(lambda: all((tmp_path / "cache" / shard.sha256).exists() for shard in shards))
        assert len(server.requests) == 6


def test_prefetch_never_keeps_a_store_from_closing(server: FaultServer, shards: list[Shard], options: CacheOptions):
    server.faults["s0.tar"] = [hang]
    before = threading.active_count()
    store = open_store(server.place, options)
    store.prefetch(shards[:1])
    until(lambda: server.count("s0.tar") == 1)
    started = time.monotonic()
    store.close()
    assert time.monotonic() - started < 1
    server.released.set()
    until(lambda: threading.active_count() <= before + 1)  # fsspec's own
    assert not list((options.folder or Path()).glob("*.partial"))


def test_a_download_that_fails_ahead_is_told_when_needed(server: FaultServer, shards: list[Shard], options: CacheOptions):
    server.faults["s0.tar"] = [404]
    with open_store(server.place, options) as store:
        store.prefetch(shards[:2])
        until(lambda: server.count("s1.tar") == 1 and server.count("s0.tar") == 1)
        assert store.shard(shards[0]) == (server.folder / "s0.tar").read_bytes()


def test_forget_fetches_again(server: FaultServer, shards: list[Shard], options: CacheOptions, tmp_path: Path):
    with open_store(server.place, options) as store:
        store.shard(shards[0])
        path = tmp_path / "cache" / shards[0].sha256
        path.write_bytes(bytes(SIZE))
        assert store.forget(shards[0])
        assert store.shard(shards[0]) == (server.folder / "s0.tar").read_bytes()
    assert not open_store(server.folder).forget(shards[0])


def test_local_sizes_are_checked(tmp_path: Path, shards: list[Shard]):
    store = open_store(tmp_path / "shards")
    with (tmp_path / "shards" / "s0.tar").open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match=r"s0.tar has 100004 bytes instead of 100003; copy it again"):
        store.shard(shards[0])
    (tmp_path / "shards" / "s1.tar").unlink()
    with pytest.raises(InputError, match=r"s1.tar cannot be opened"):
        store.shard(shards[1])


@pytest.mark.parametrize(
    "place",
    [
        "https://user:swath-secret@host/set", "https://swath-secret@host/set", "https://host/set?token=swath-secret",
        "https://host/set#swath-secret", "s3://key:swath-secret@bucket/set", "ftp://host/set", "file:///etc", "https://",
        "s3:///set", "https://[::1/set", "simplecache::https://host/set", "https://host/a b", "https://host/a\nb", "memory://set",
        "zip://x.tar::https://host/set.zip",
    ],
)  # fmt: skip
def test_addresses_refused(place: str, options: CacheOptions):
    with pytest.raises(InputError) as caught:
        open_store(place, options)
    assert "swath-secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_not_installed_is_named(options: CacheOptions, monkeypatch: pytest.MonkeyPatch):
    import fsspec

    def missing(scheme: str, **_: object) -> None:
        raise ImportError("Please install gcsfs", name="gcsfs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(InputError, match=r"gs:// need gcsfs: pip install 'swath\[gcs\]'"):
        open_store("gs://bucket/set", options)


def test_passwords_come_from_netrc(server: FaultServer, options: CacheOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password swath-secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with open_store(server.place, options) as store:
        store.read("manifest.json")
    assert server.headers[0]["Authorization"].startswith("Basic ")


def test_sixteen_threads_download_once(server: FaultServer, shards: list[Shard], options: CacheOptions):
    with open_store(server.place, options) as store:
        seen: list[bytes] = []
        threads = [threading.Thread(target=lambda n=n: seen.append(bytes(store.shard(shards[n % 2])[:100]))) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(seen) == 16 and len(set(seen)) == 2
    assert len(server.requests) == 2


def test_descriptors_do_not_pile_up(server: FaultServer, shards: list[Shard], tmp_path: Path):
    with open_store(server.place, CacheOptions(tmp_path / "cache", 3 * SIZE)) as store:
        store.shard(shards[5])
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(5):
            for shard in shards:
                store.shard(shard)
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3


def test_waits_double_with_jitter():
    """0.5, 1, 2 … seconds times 0.5 to 1, never above the longest."""
    patience = Patience(first_wait=0.5, longest_wait=5)
    assert [patience.wait(n, 1.0) for n in range(1, 7)] == [0.5, 1, 2, 4, 5, 5]
    assert [patience.wait(n, 0.0) for n in range(1, 7)] == [0.25, 0.5, 1, 2, 2.5, 2.5]
    waits: list[float] = []
    remote = Remote("http://127.0.0.1:1", Patience(attempts=4), pause=waits.append, jitter=lambda: 1.0)
    with pytest.raises(InputError, match=r"http://127.0.0.1:1/x.tar cannot be read: .*\(4 attempts in a row"):
        list(remote.stream("x.tar", limit=1))
    assert waits == [0.5, 1.0, 2.0]


def test_skips_are_counted_and_limited():
    skips = Skips(3)
    for sample in ("a", "b", "b", "a", "c"):
        skips.add("s0.tar" if sample != "c" else "s1.tar", sample, "its bytes do not match")
    assert len(skips) == 3 and skips.report() == {"s0.tar": 2, "s1.tar": 1}
    with pytest.raises(InputError, match=r"sample d in shard s1.tar is damaged \(cut short\), and 3 others were skipped before"):
        skips.add("s1.tar", "d", "cut short")
    skips.add("s0.tar", "a", "again")
    with pytest.raises(InputError, match=r"sample a in shard s0\.tar .* none may be skipped"):
        Skips().add("s0.tar", "a", "cut short")
    with pytest.raises(InputError, match="must be 0 or more"):
        Skips(-1)


def test_skips_of_many_threads():
    skips = Skips(1000)
    threads = [threading.Thread(target=lambda: [skips.add("s.tar", str(n), "bad") for n in range(500)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(skips) == 500
