"""A shared folder read through a node's cache gives what the folder gives, whatever happens to the cache; the cache stays within
its limit, and each shard is read from the folder once."""

import errno
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swath.shards.errors import InputError
from swath.shards.manifest import Shard
from swath.shards.stores.cache import CacheOptions
from swath.shards.stores.folder import Folder
from swath.shards.stores.store import LocalStore, StagedStore

pytestmark = pytest.mark.timeout(60)
SIZE = 100_003


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    folder, made = tmp_path / "shards", []
    folder.mkdir()
    for number in range(6):
        data = np.random.default_rng(number).bytes(SIZE + number)
        (folder / f"s{number}.tar").write_bytes(data)
        made.append(Shard(name=f"s{number}.tar", samples=1, bytes=len(data), sha256=sha256(data).hexdigest()))
    (folder / "manifest.json").write_text("{}")
    return made


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was copied from the folder."""
    counted: Counter[str] = Counter()
    stream = Folder.stream

    def counting(self: Folder, name: str, **known: Any) -> Iterator[tuple[int, bytes]]:
        counted[name] += 1
        return stream(self, name, **known)

    monkeypatch.setattr(Folder, "stream", counting)
    return counted


def staged(tmp_path: Path, limit: int = 10 * SIZE, **more: Any) -> StagedStore:
    return StagedStore(tmp_path / "shards", CacheOptions(tmp_path / "cache", limit), **more)


def held(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").iterdir()} - {"lock"}


def bytes_held(tmp_path: Path) -> int:
    return sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())


def until(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.005)


def same(store: StagedStore, shards: list[Shard]) -> None:
    for shard in shards:
        assert store.shard(shard) == (store.source.folder / shard.name).read_bytes()


def test_what_a_folder_gives_from_the_copy(tmp_path: Path, shards: list[Shard], read: Counter[str]):
    with staged(tmp_path) as store, staged(tmp_path) as other:
        same(store, shards)
        same(other, shards)
        assert held(tmp_path) == {shard.sha256 for shard in shards}
        index = shards[0]
        assert store.path(index.name, index.bytes, index.sha256).parent == tmp_path / "cache"
        assert store.path("manifest.json") == tmp_path / "shards" / "manifest.json"
        assert store.read("manifest.json") == b"{}"
        for shard in shards:
            (tmp_path / "shards" / shard.name).unlink()
        assert sha256(store.shard(shards[3])).hexdigest() == shards[3].sha256
    assert read == {shard.name: 1 for shard in shards}
    with pytest.raises(InputError, match=r"s9\.tar"):
        store.shard(Shard(name="s9.tar", samples=1, bytes=5, sha256="0" * 64))


def test_filling_is_shared_and_goes_on_where_it_was(tmp_path: Path, shards: list[Shard], read: Counter[str]):
    with staged(tmp_path) as store:
        same(store, shards[:2])
    with staged(tmp_path) as one, staged(tmp_path) as other:
        one.fill(shards)
        other.fill(shards)
        until(lambda: held(tmp_path) == {shard.sha256 for shard in shards})
    assert read == {shard.name: 1 for shard in shards}


def test_what_is_needed_next_goes_before_what_fills(
    tmp_path: Path, shards: list[Shard], read: Counter[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("swath.shards.stores.store._THREADS", 1)
    stream, let = Folder.stream, threading.Semaphore(0)

    def slowly(self: Folder, name: str, **known: Any) -> Iterator[tuple[int, bytes]]:
        let.acquire()
        return stream(self, name, **known)

    monkeypatch.setattr(Folder, "stream", slowly)
    with staged(tmp_path, 20 * SIZE) as store:
        store.fill(shards[:4])
        store.prefetch(shards[4:])
        for _ in shards:
            let.release()
        until(lambda: len(held(tmp_path)) == 6)
    assert {"s4.tar", "s5.tar"} <= set(list(read)[:3]), "one may have begun before"


def test_never_over_its_limit(tmp_path: Path, shards: list[Shard], caplog: pytest.LogCaptureFixture):
    with staged(tmp_path, 3 * SIZE + 100) as store:
        kept = [store.shard(shard) for shard in shards]
        assert bytes_held(tmp_path) <= 3 * SIZE + 100 and len(held(tmp_path)) == 3, "those in use stay"
        assert [sha256(view).hexdigest() for view in kept] == [shard.sha256 for shard in shards]
    (said,) = caplog.messages
    assert "are in use; reading that from" in said


@pytest.mark.parametrize("when", ["reserving", "writing"])
def test_a_full_disk_is_said_once(
    when: str, tmp_path: Path, shards: list[Shard], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate" if when == "reserving" else "pwrite", full)
    with staged(tmp_path) as store, staged(tmp_path, speaks=False) as silent, caplog.at_level(logging.WARNING):
        same(store, shards)
        same(silent, shards)
        assert store.path(shards[0].name, shards[0].bytes, shards[0].sha256) == tmp_path / "shards" / "s0.tar"
    assert not held(tmp_path)
    (said,) = caplog.messages
    assert "no space left" in said and f"reading that from {tmp_path / 'shards'} itself" in said


def test_a_damaged_copy_is_made_again_a_damaged_shard_is_read_where_it_is(
    tmp_path: Path, shards: list[Shard], caplog: pytest.LogCaptureFixture
):
    with staged(tmp_path) as store:
        same(store, shards[:1])
        (tmp_path / "cache" / shards[0].sha256).write_bytes(bytes(SIZE))
        assert store.forget(shards[0]) and not caplog.messages
        same(store, shards[:1])
        damaged = tmp_path / "shards" / "s1.tar"
        damaged.write_bytes(b"?" + damaged.read_bytes()[1:])
        assert store.shard(shards[1])[:1] == b"?", "its other samples may be whole: who reads them checks each"
        assert not store.forget(shards[1]), "there is no other copy"
        damaged.write_bytes(b"short")
        with pytest.raises(InputError, match=r"s1\.tar has 5 bytes instead of 100004"):
            LocalStore(tmp_path / "shards").shard(shards[1])
    with staged(tmp_path) as store, pytest.raises(InputError, match=r"s1\.tar has 5 bytes instead of 100004"):
        store.shard(shards[1])
    assert held(tmp_path) == {shards[0].sha256}
    assert "do not match the SHA-256" in caplog.messages[0]


def test_a_process_that_dies_while_copying_blocks_nobody(tmp_path: Path, shards: list[Shard], read: Counter[str]):
    code = f"""
import os
from pathlib import Path
from swath.shards.manifest import Shard
from swath.shards.stores import folder
from swath.shards.stores.cache import CacheOptions
from swath.shards.stores.store import StagedStore
folder.BLOCK = 1000
store = StagedStore(Path({str(tmp_path / "shards")!r}), CacheOptions(Path({str(tmp_path / "cache")!r}), {10 * SIZE}))
store.shard(Shard.model_validate({shards[0].model_dump()!r}))
write, left = os.pwrite, [50]
def dying(*given):
    left[0] -= 1
    return write(*given) if left[0] else os._exit(9)
os.pwrite = dying
store.shard(Shard.model_validate({shards[1].model_dump()!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert held(tmp_path) == {shards[0].sha256, shards[1].sha256 + ".partial"}
    with staged(tmp_path) as store:
        same(store, shards)
    assert held(tmp_path) == {shard.sha256 for shard in shards} and read["s0.tar"] == 0
