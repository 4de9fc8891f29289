"""Files that stay on their server and are read in parts, and the servers that are asked for them.

In a copy of a remote archive such a file is a stand-in: of the size and the time that the file itself would have, with a few
words at its beginning instead of the data, so that whoever does not come through here finds no image in it. Which files are read
in parts is known to a process after `stand_in`; no file says so of itself, since an archive may come from anywhere.

rasterio reads them through its `opener`. What an opener raises is lost in GDAL, and may look like a sparse tile to it: hence
failures are kept until `reached` ends.
"""

import atexit
import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any
from weakref import WeakSet

from swath.shards.errors import InputError
from swath.shards.stores.cache import Cache
from swath.shards.stores.remote import Facts, Patience, Remote

BLOCK = 1 << 19  # bytes that are asked for at once: a tile or two
MAGIC = b"swath: this file is read from its server, "


@dataclass(frozen=True)
class File:
    """One file of an archive, and where it is."""

    address: str
    facts: Facts

    @property
    def key(self) -> str:
        """Another one for another content, as far as the server says."""
        return sha256(f"{self.address} {self.facts.size} {self.facts.version}".encode()).hexdigest()

    @property
    def stamp(self) -> int:
        """What a copy has for its time (ns), so that whoever looks for changes sees those on the server, and no others."""
        return int(self.key[:7], 16) * 10**9  # whole seconds before 1979, which every file system can keep


class Servers:
    """A `Remote` for each server or bucket that has been asked. Threads may share it, processes may not."""

    def __init__(self, patience: Patience | None = None) -> None:
        self.patience = patience
        self._remotes: dict[str, Remote] = {}
        self._lock = threading.Lock()

    def of(self, address: str) -> tuple[Remote, str]:
        """Who has the file, and its name there. InputError for what is no address."""
        scheme, _, rest = address.partition("://")
        host, _, name = rest.partition("/")
        if "?" in address or "#" in address or re.search(r"[\x00-\x1f]", address):
            Remote(address.replace("#", "?"))  # its refusal, which repeats no secret
            raise InputError(f"{host} has a file with ?, # or a control character in its name; rename it")
        with self._lock:
            place = f"{scheme}://{host}"
            if place not in self._remotes:
                self._remotes[place] = Remote(place, self.patience)
            return self._remotes[place], name

    def facts(self, address: str) -> Facts:
        remote, name = self.of(address)
        return remote.facts(name)

    def text(self, address: str, limit: int) -> bytes:
        """A document; InputError for one that is too long."""
        remote, name = self.of(address)
        data = bytearray()
        for offset, block in remote.stream(name, limit=limit):
            data[offset:] = block
        return bytes(data)

    def close(self) -> None:
        """Ends what is under way."""
        for remote in self._remotes.values():
            remote.stop.set()


@dataclass(frozen=True)
class _Served:
    file: File
    servers: Servers
    cache: Cache


_served: dict[str, _Served] = {}  # by path of the stand-in
_open: WeakSet[Any] = WeakSet()
_failed = threading.local()


def stand_in(path: Path, file: File, servers: Servers, cache: Cache) -> None:
    """From now on `path` is read from its server, in this process."""
    _served[str(path)] = _Served(file, servers, cache)


def forget(path: Path) -> None:
    """The file itself is there."""
    _served.pop(str(path), None)


def data_of(path: Path) -> IO[bytes]:
    """The bytes of a file, wherever they are, to be read a few at a time. OSError, or InputError of its server."""
    served = _served.get(str(path))
    return path.open("rb") if served is None else io.BufferedReader(_InParts(served, quiet=False))


def opener_of(path: str) -> Callable[..., Any] | None:
    """What rasterio opens the file with, None for a file on disk."""
    served = _served.get(path)
    if served is None:
        return None

    def opened(name: str, *_: object, **__: object) -> Any:
        if name == path:
            return _InParts(served, quiet=True)
        if name == "test":  # rasterio tries it once
            return io.BytesIO()
        raise FileNotFoundError(name)  # files beside it

    return opened


def closed_at_exit(dataset: Any) -> Any:
    """GDAL would close what is open too late, when Python is gone, and crash."""
    _open.add(dataset)
    return dataset


@atexit.register
def _close() -> None:
    for dataset in list(_open):
        dataset.close()


@contextmanager
def reached() -> Iterator[None]:
    """Around what GDAL does: the InputError of a server that failed meanwhile, instead of whatever came of it."""
    _failed.error = None
    try:
        yield
    finally:
        if (error := _failed.error) is not None:
            _failed.error = None
            raise error from None


class _InParts(io.RawIOBase):
    """By blocks through the cache. `quiet`: an error ends the file, and is kept for `reached`."""

    def __init__(self, served: _Served, *, quiet: bool) -> None:
        super().__init__()
        self._served, self._quiet, self._at = served, quiet, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._served.file.facts.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._served.file.facts.size - self._at))
        done = 0
        try:
            while done < wanted:
                number, inner = divmod(self._at, BLOCK)
                data = self._block(number, inner, wanted - done)
                view[done : done + len(data)] = data
                done, self._at = done + len(data), self._at + len(data)
        except BaseException as error:
            if not self._quiet:
                raise
            _failed.error = error
            return 0
        return done

    def _block(self, number: int, inner: int, most: int) -> bytes:
        """Some bytes of a block, at least one."""
        file, size = self._served.file, self._served.file.facts.size
        start, end = number * BLOCK, min((number + 1) * BLOCK, size)
        remote, name = self._served.servers.of(file.address)

        def fetched() -> Iterator[tuple[int, bytes]]:
            yield 0, remote.part(name, start, end, file.facts.version)

        patience = 2 * remote.patience.allowed(BLOCK)
        handle = self._served.cache.open(f"{file.key}-{number}", end - start, fetched, patience=patience)
        try:
            data = os.pread(handle, min(most, end - start - inner), inner)
        finally:
            os.close(handle)
        if not data:
            raise InputError(f"a block of {file.address} in {self._served.cache.folder} is damaged; remove that folder")
        return data
