"""A bounded folder of downloaded files, shared by all processes of a node.

There are no lock files. A file that is being downloaded is `<key>.partial` under an exclusive flock; others wait for that.
A finished one is `<key>`, and whoever maps it holds a shared flock on it: the lock belongs to the open file, which the mapping
keeps, so it ends with the mapping, or with the process, however that dies. Room is made by removing the least recently opened
file on which an exclusive flock is to be had at once. Should one be removed between opening and locking, its mapping stays
valid all the same (Linux keeps the bytes of an unlinked file until the last mapping goes).
"""

import errno
import fcntl
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from swath.shards.errors import InputError
from swath.shards.files import disk_errors, sync_folder

_LARGEST_DEFAULT = 64 << 30
_PARTIAL = ".partial"
_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class CacheOptions:
    """`folder`: on a disk of the node (~/.cache/swath/shards). `limit`: bytes (64 GiB, at most half of what is free)."""

    folder: Path | None = None
    limit: int | None = None


class CacheFull(Exception):
    """Everything in the cache is in use, and what was asked for can wait."""


class Cache:
    """See the module. `pause(seconds)` is called while another process has the file; what it raises ends the waiting."""

    def __init__(self, options: CacheOptions, pause: Callable[[float], None] = time.sleep) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.folder = options.folder or home / "swath" / "shards"
        self.pause = pause
        with self._errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._accounts():
                free = os.statvfs(self.folder)
                disk = free.f_bavail * free.f_frsize + sum(size for _, size, _ in self._files())
            self.limit = min(_LARGEST_DEFAULT, disk // 2) if options.limit is None else options.limit

    def open(
        self,
        key: str,
        size: int,
        stream: Callable[[], Iterator[tuple[int, bytes]]],
        *,
        patience: float,
        can_wait: bool = False,
    ) -> int:
        """A descriptor of the file `key`, `size` bytes, under a shared lock; downloaded from `stream` where it is not here.

        Another process is waited for at most `patience` seconds. If everything is in use, the limit is exceeded with a warning,
        since training cannot go on without the file; with `can_wait` CacheFull is raised instead. InputError: the disk is full
        or not writable, the file alone is over the limit, and whatever `stream` raises.
        """
        if size > self.limit:
            raise InputError(
                f"the cache {self.folder} may hold {self.limit} bytes, one file has {size}; allow several times that"
            )
        end = time.monotonic() + patience
        with self._errors():
            while True:
                handle = self._finished(key, size)
                if handle is None and (handle := self._claimed(key, end)) is not None:
                    self._download(handle, key, size, stream, can_wait)
                if handle is not None:
                    return handle

    def drop(self, key: str) -> None:
        """Forget a file whose bytes have gone bad; who maps it keeps it."""
        with self._errors():
            (self.folder / key).unlink(missing_ok=True)

    def _finished(self, key: str, size: int) -> int | None:
        try:
            handle = os.open(self.folder / key, os.O_RDONLY | _FLAGS)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_SH)
            found = os.fstat(handle)
            if found.st_nlink and found.st_size == size:
                with suppress(PermissionError):  # of another user
                    os.utime(handle)
                return handle
            if found.st_nlink:
                self.drop(key)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        return None

    def _claimed(self, key: str, end: float) -> int | None:
        """The partial file, ours alone; None where somebody has finished or given up meanwhile: look again."""
        path = self.folder / f"{key}{_PARTIAL}"
        handle = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o644)
        try:
            while _same(handle, path) and not _lock_now(handle):  # once renamed, it stays locked as long as it is mapped
                if time.monotonic() > end:
                    raise InputError(
                        f"another process has been downloading {path} for too long; end it (`fuser {path}`), start again"
                    )
                self.pause(0.05)
            if _same(handle, path) and not (self.folder / key).exists():
                return handle
            if _same(handle, path):
                path.unlink()
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        return None

    def _download(
        self, handle: int, key: str, size: int, stream: Callable[[], Iterator[tuple[int, bytes]]], can_wait: bool
    ) -> None:
        partial = self.folder / f"{key}{_PARTIAL}"
        try:
            self._reserve(handle, size, can_wait)
            for offset, data in stream():
                rest = memoryview(data)
                while rest:
                    written = os.pwrite(handle, rest, offset)
                    rest, offset = rest[written:], offset + written
            os.fsync(handle)
            with self._accounts():  # nobody counts it twice, or not at all
                partial.rename(self.folder / key)
            sync_folder(self.folder)
            fcntl.flock(handle, fcntl.LOCK_SH)
        except BaseException:
            partial.unlink(missing_ok=True)
            os.close(handle)
            raise

    def _reserve(self, handle: int, size: int, can_wait: bool) -> None:
        """Make room, and take it at once, so that a full disk shows before the download and nobody else counts on it."""
        with self._accounts():
            os.ftruncate(handle, 0)
            files = sorted(self._files())
            used = sum(count for _, count, _ in files)
            for _, count, path in files:
                if used + size <= self.limit:
                    break
                used -= count * _removed(path)
            if used + size > self.limit:
                if can_wait:
                    raise CacheFull
                warnings.warn(
                    f"the cache {self.folder} goes over its limit of {self.limit} bytes: {used} are in use, {size} more are "
                    "needed; allow more, or choose a smaller window",
                    stacklevel=2,
                )
            while True:
                try:
                    os.posix_fallocate(handle, 0, size)
                    return
                except OSError as error:
                    os.ftruncate(handle, 0)
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    if not any(_removed(path) for _, _, path in sorted(self._files())):
                        raise

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last opening, bytes, path) of all files; on the way what a dead process left half is removed."""
        for entry in os.scandir(self.folder):
            path = Path(entry.path)
            if entry.name == "lock" or not entry.is_file(follow_symlinks=False):
                continue
            if entry.name.endswith(_PARTIAL) and _removed(path):
                continue
            with suppress(FileNotFoundError):
                found = entry.stat(follow_symlinks=False)
                yield found.st_mtime_ns, found.st_size, path

    @contextmanager
    def _accounts(self) -> Iterator[None]:
        """One process at a time counts, removes and reserves; it takes no time, and waits for nothing inside."""
        handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | _FLAGS, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with disk_errors("caching shards", self.folder):
                yield
        except OSError as error:
            raise InputError(f"caching shards in {self.folder} failed ({error}); choose another folder") from None


def _lock_now(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same(handle: int, path: Path) -> bool:
    try:
        found = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(handle), found)


def _removed(path: Path) -> bool:
    """Remove `path` if nobody uses it."""
    try:
        handle = os.open(path, os.O_RDWR | _FLAGS)
    except (FileNotFoundError, PermissionError):  # gone, or of another user
        return False
    try:
        if not (_lock_now(handle) and _same(handle, path)):
            return False
        path.unlink()
        return True
    finally:
        os.close(handle)
