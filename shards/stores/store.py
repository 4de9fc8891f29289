"""Where shards come from: a local folder, mapped as it is, or a remote one, through a bounded cache with prefetch. A folder on
a shared file system may be read through such a cache, too (`StagedStore`)."""

import itertools
import logging
import mmap
import os
import re
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Self

from swath.shards.errors import InputError
from swath.shards.manifest import Shard
from swath.shards.stores.cache import Cache, CacheFull, CacheOptions
from swath.shards.stores.folder import Folder
from swath.shards.stores.remote import Closed, Patience, Remote, is_remote

log = logging.getLogger("swath")
_MAPPED = 512  # shards at once, each costs a file descriptor
_THREADS = 4


@dataclass
class _Mapping:
    view: memoryview
    used: int


class Store(ABC):
    """A folder of shards. Threads may share one; each process opens its own. Close it when done.

    `capacity` is how many bytes of shards it can have at hand at once; half of it may be mapped, which is what the shards of
    one window must fit into, and half fetched ahead.
    """

    def __init__(self, capacity: int = sys.maxsize) -> None:
        self.capacity = capacity
        self._mapped: dict[str, _Mapping] = {}
        self._clock = itertools.count()
        self._opening = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def read(self, name: str, limit: int = 64 << 20) -> bytes:
        """A small file; InputError where it is missing or has more than `limit` bytes."""

    @abstractmethod
    def path(self, name: str, size: int | None = None, digest: str | None = None) -> Path:
        """A file to be memory-mapped, such as the index. A remote one is downloaded whole, once per node, and checked for
        `size` bytes and SHA-256 `digest` where those are given."""

    def shard(self, shard: Shard) -> memoryview:
        """The bytes of a tar, memory-mapped, its size checked; a remote one also for its SHA-256 when it is downloaded.

        Waits for a download. The view stays valid however long it is kept, whatever is opened meanwhile. InputError names the
        shard, what is wrong with it and the remedy.
        """
        mapping = self._mapped.get(shard.name)
        if mapping is None:
            mapping = self._map(shard)
        mapping.used = next(self._clock)
        return mapping.view

    def prefetch(self, shards: Iterable[Shard]) -> None:  # noqa: B027
        """Fetch these next, in this order, in the background, instead of what was asked before. Errors show where needed."""

    def fill(self, shards: Iterable[Shard]) -> None:  # noqa: B027
        """Fetch these, in this order, in the background, whenever there is nothing to prefetch, until the cache is full."""

    def forget(self, shard: Shard) -> bool:
        """After damage in a mapped shard: drop our copy of it. Whether another one can be had by `shard` now."""
        return False

    def close(self) -> None:
        """End what goes on in the background, without waiting for it. Views that were given out stay valid."""
        self._mapped.clear()

    def _map(self, shard: Shard) -> _Mapping:
        view = self._open(shard)
        with self._opening:
            mapping = self._mapped.setdefault(shard.name, _Mapping(view, next(self._clock)))
            mapping.used = next(self._clock)
            bytes_mapped = sum(len(m.view) for m in self._mapped.values())
            while len(self._mapped) > 1 and (len(self._mapped) > _MAPPED or bytes_mapped > self.capacity // 2):
                oldest = min(self._mapped, key=lambda name: self._mapped[name].used)
                bytes_mapped -= len(self._mapped.pop(oldest).view)
            return mapping

    @abstractmethod
    def _open(self, shard: Shard) -> memoryview: ...


def open_store(place: str | Path, cache: CacheOptions | None = None, patience: Patience | None = None) -> Store:
    """The store at `place`: a folder, or an address s3://, gs://, https://, http://. `cache` and `patience` are for the latter.

    InputError: an address that cannot be one or holds credentials, a library that is not installed, a cache that cannot be
    written. Nothing is asked of the server yet.
    """
    if is_remote(place):
        return RemoteStore(Remote(str(place), patience), cache or CacheOptions())
    return LocalStore(Path(place))


def _plain(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(f"{name!r} is no name of a file in a folder of shards; right would be letters, digits, '.', '_', '-'")
    return name


def _mapping_of(handle: int) -> memoryview:
    """The file as a view; closes `handle`. The mapping keeps the file open, and the lock on it, until the last view goes."""
    try:
        return memoryview(mmap.mmap(handle, 0, access=mmap.ACCESS_READ))
    finally:
        os.close(handle)


class LocalStore(Store):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def read(self, name: str, limit: int = 64 << 20) -> bytes:
        path = self.path(name)
        try:
            with path.open("rb") as file:
                data = file.read(limit + 1)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); copy it there, or correct the folder") from None
        if len(data) > limit:
            raise InputError(f"{path} is longer than {limit} bytes; correct the folder")
        return data

    def path(self, name: str, size: int | None = None, digest: str | None = None) -> Path:
        return self.folder / _plain(name)

    def _open(self, shard: Shard) -> memoryview:
        path = self.folder / shard.name
        try:
            view = _mapping_of(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except (OSError, ValueError) as error:
            raise InputError(f"shard {path} cannot be opened ({error}); copy it again or make the shards again") from None
        if len(view) != shard.bytes:
            raise InputError(f"shard {path} has {len(view)} bytes instead of {shard.bytes}; copy it again")
        return view


class RemoteStore(Store):
    """Shards are cached under their SHA-256, so that what is there is what the manifest means, whatever its address."""

    def __init__(self, remote: Remote | Folder, options: CacheOptions) -> None:
        self.remote = remote
        self.cache = Cache(options, pause=remote.wait)
        super().__init__(self.cache.limit)
        self._kept: dict[str, memoryview] = {}  # of `path`: in use as long as we are open
        self._read = sha256()
        self._wanted: deque[Shard] = deque()
        self._later: deque[Shard] = deque()
        self._work = threading.Condition()
        self._threads: list[threading.Thread] = []

    def read(self, name: str, limit: int = 64 << 20) -> bytes:
        data = bytearray()
        for offset, block in self.remote.stream(_plain(name), limit=limit):
            data[offset:] = block
        self._read.update(data)
        return bytes(data)

    def path(self, name: str, size: int | None = None, digest: str | None = None) -> Path:
        """Without `digest` the copy belongs to what was read before it (the manifest): another manifest gets another copy."""
        size = self.remote.size(_plain(name)) if size is None else size
        whose = f"{self.remote.address(name)} {size} {self._read.hexdigest()}"
        key = digest or sha256(whose.encode()).hexdigest()
        view = _mapping_of(self._fetch(name, key, size, digest))
        if name not in self._kept:
            self.capacity = max(0, self.capacity - size)
        self._kept[name] = view
        return self.cache.folder / key

    def prefetch(self, shards: Iterable[Shard]) -> None:
        room, wanted = self.capacity // 2, deque[Shard]()
        for shard in shards:
            if shard.name in self._mapped:
                continue
            room -= shard.bytes
            if room < 0:
                break
            wanted.append(shard)
        with self._work:
            self._wanted = wanted
            self._wake()

    def fill(self, shards: Iterable[Shard]) -> None:
        with self._work:
            self._later = deque(shards)
            self._wake()

    def _wake(self) -> None:
        while len(self._threads) < min(_THREADS, len(self._wanted) + len(self._later)):
            thread = threading.Thread(target=self._fetch_ahead, name="swath-prefetch", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._work.notify_all()

    def forget(self, shard: Shard) -> bool:
        self._mapped.pop(shard.name, None)
        self.cache.drop(shard.sha256)
        return True

    def close(self) -> None:
        self.remote.stop.set()
        with self._work:
            self._wanted.clear()
            self._later.clear()
            self._work.notify_all()
        self._kept.clear()
        super().close()

    def _open(self, shard: Shard) -> memoryview:
        return _mapping_of(self._fetch(shard.name, shard.sha256, shard.bytes, shard.sha256))

    def _fetch(self, name: str, key: str, size: int, digest: str | None, *, can_wait: bool = False) -> int:
        if size < 1:
            raise InputError(f"{self.remote.address(name)} is empty; copy it there again")
        stream = lambda: self.remote.stream(name, limit=size, size=size, digest=digest)  # noqa: E731
        return self.cache.open(key, size, stream, patience=2 * self.remote.patience.allowed(size), can_wait=can_wait)

    def _fetch_ahead(self) -> None:
        while True:
            with self._work:
                self._work.wait_for(lambda: self._wanted or self._later or self.remote.stop.is_set())
                if self.remote.stop.is_set():
                    return
                shard = (self._wanted or self._later).popleft()
            try:
                os.close(self._fetch(shard.name, shard.sha256, shard.bytes, shard.sha256, can_wait=True))
            except (InputError, CacheFull):
                continue  # whoever needs the shard will be told
            except Closed:
                return


class StagedStore(RemoteStore):
    """A folder on a shared file system, through copies on a disk of the node. Which of both is read changes nothing else: what
    cannot be copied (full disk, damaged shard, everything in use) is read where it is, as a LocalStore would. The first time that
    happens one line is logged, if it `speaks`."""

    def __init__(self, folder: Path, options: CacheOptions, *, speaks: bool = True) -> None:
        self.source = LocalStore(folder)
        self.speaks = speaks
        self._direct: set[str] = set()  # shards that are mapped from where they are
        super().__init__(Folder(folder), options)

    def read(self, name: str, limit: int = 64 << 20) -> bytes:
        return self.source.read(name, limit)

    def path(self, name: str, size: int | None = None, digest: str | None = None) -> Path:
        """Without `digest` nothing could tell whether a copy is still right."""
        if digest is not None:
            try:
                return super().path(name, size, digest)
            except (InputError, CacheFull) as error:
                self._say(error)
        return self.source.path(name)

    def forget(self, shard: Shard) -> bool:
        return shard.name not in self._direct and super().forget(shard)

    def _open(self, shard: Shard) -> memoryview:
        try:
            view = _mapping_of(self._fetch(shard.name, shard.sha256, shard.bytes, shard.sha256, can_wait=True))
            self._direct.discard(shard.name)
            return view
        except (InputError, CacheFull) as error:
            self._say(error)
            self._direct.add(shard.name)
            return self.source._open(shard)

    def _say(self, error: Exception) -> None:
        if self.speaks:
            reason = f"all {self.cache.limit} bytes of {self.cache.folder} are in use" if isinstance(error, CacheFull) else error
            log.warning("data.stage: %s; reading that from %s itself", reason, self.source.folder)
        self.speaks = False
