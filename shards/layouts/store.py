"""Where a layout's files lie: a folder, or a zip that is read in place."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.sources.archive import BROKEN, MAX_BYTES, open_zip, zip_members


class Store(Protocol):
    """Names are relative paths with '/'. `links` counts the symbolic links, which are not followed."""

    links: int

    def walk(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, what changes with the file), always in the same order; hidden files are passed over."""
        ...

    def open(self, name: str) -> BinaryIO:
        """DecodeError where it cannot be."""
        ...

    def read(self, name: str, limit: int = MAX_BYTES) -> bytes | None:
        """All bytes, None where there is no such file. DecodeError: it cannot be read, or is larger than `limit`."""
        ...


def open_store(path: Path) -> Store:
    """InputError where `path` is neither a folder nor a zip that is safe to read."""
    if not path.exists():
        raise InputError(f"{path} does not exist; give the folder or the zip of the data set")
    return Zip(path) if path.is_file() else Folder(path)


class Folder:
    """Streams, and keeps no list: BigEarthNet has eight million files."""

    def __init__(self, path: Path) -> None:
        self.path, self.links = path, 0

    def walk(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        self.links = 0
        yield from self._below(str(self.path), "")

    def _below(self, folder: str, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        try:
            with os.scandir(folder) as listed:
                entries = sorted((e for e in listed if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            raise InputError(f"{folder} cannot be read ({error.strerror}); allow it, or move it out of {self.path}") from None
        for entry in entries:
            if entry.is_symlink():
                self.links += 1
            elif entry.is_dir(follow_symlinks=False):
                yield from self._below(entry.path, f"{prefix}{entry.name}/")
            elif entry.is_file(follow_symlinks=False):
                status = entry.stat(follow_symlinks=False)
                yield prefix + entry.name, (status.st_size, status.st_mtime_ns)

    def open(self, name: str) -> BinaryIO:
        try:
            return os.fdopen(os.open(self.path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
        except OSError as error:
            raise DecodeError(f"{name} cannot be read: {error.strerror or error}") from None

    def read(self, name: str, limit: int = MAX_BYTES) -> bytes | None:
        if not (self.path / name).exists():
            return None
        with self.open(name) as file:
            return _limited(file, name, limit)


class Zip:
    """Every process opens the archive for itself: a shared file position would mix up their members."""

    links = 0

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive, self._owner = open_zip(path), os.getpid()
        self._members = zip_members(path, self._archive)

    def walk(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from sorted(self._members.items())

    def open(self, name: str) -> BinaryIO:
        if self._owner != os.getpid():
            self._archive, self._owner = open_zip(self.path), os.getpid()
        try:
            return self._archive.open(name)  # pyright: ignore[reportReturnType] - typeshed has IO[bytes]
        except BROKEN as error:
            raise DecodeError(f"{name} cannot be read: {error}") from None

    def read(self, name: str, limit: int = MAX_BYTES) -> bytes | None:
        if name not in self._members:
            return None
        with self.open(name) as file:
            return _limited(file, name, limit)


def _limited(file: BinaryIO, name: str, limit: int) -> bytes:
    try:
        data = file.read(limit + 1)
    except BROKEN as error:
        raise DecodeError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > limit:
        raise DecodeError(f"{name} is larger than the limit of {limit} bytes")
    return data
