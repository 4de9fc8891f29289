"""A folder on this machine, read the way `Remote` is: for copies of its files that are checked on the way."""

import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from swath.shards.errors import InputError
from swath.shards.stores.remote import BLOCK, Closed, Patience


class Folder:
    """What of `Remote` a store needs. Nothing is tried again: the file system has done that."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.patience = folder, Patience()
        self.stop = threading.Event()

    def wait(self, seconds: float) -> None:
        """Sleep; Closed at once when `stop` is set."""
        if self.stop.wait(seconds):
            raise Closed

    def address(self, name: str) -> str:
        return str(self.folder / name)

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return (self.folder / name).stat().st_size

    def stream(self, name: str, *, limit: int, size: int | None = None, digest: str | None = None) -> Iterator[tuple[int, bytes]]:
        """(offset, data) of one file from its beginning to its end, in large blocks.

        InputError where it cannot be read, or at the end is not of `size` bytes and SHA-256 `digest`; Closed after `stop`.
        """
        have, hasher = 0, sha256()
        try:
            with (self.folder / name).open("rb", buffering=0) as file:
                while data := file.read(BLOCK):
                    if self.stop.is_set():
                        raise Closed
                    if have + len(data) > limit:
                        break
                    hasher.update(data)
                    yield have, data
                    have += len(data)
        except OSError as error:
            raise InputError(f"{self.address(name)} cannot be read ({error.strerror})") from None
        if size not in (None, have + len(data)):
            raise InputError(f"{self.address(name)} has not the {size} bytes that the manifest says; copy it there again")
        if digest not in (None, hasher.hexdigest()):
            raise InputError(f"the bytes of {self.address(name)} do not match the SHA-256 in the manifest; copy it there again")
