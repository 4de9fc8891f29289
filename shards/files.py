"""Writing so that nothing is ever half there: temporary name, fsync, rename, fsync of the folder."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swath.shards.errors import InputError


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, or leave it as it was."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # a link that somebody left there must not be followed
    with partial.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


@contextmanager
def disk_errors(what: str, folder: Path) -> Iterator[None]:
    """Turn a full disk, a read-only or a forbidden folder into one line for the user."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"no space left while {what} in {folder}; free some and run the same command again") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(f"{what} in {folder} is not permitted ({error.strerror}); choose a folder you may write") from None
        if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO):
            raise InputError(f"{what} in {folder} failed ({error.strerror}: {error.filename})") from None
        raise


@contextmanager
def whole_folder(to: Path, what: str) -> Iterator[Path]:
    """A folder to fill, which is `to` afterwards, or is gone where filling it failed. Its parent, gone in both cases, may hold
    what belongs to the making only. `what` is being done, for messages about the disk."""
    with disk_errors(what, to.parent):
        to.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".swath-partial-", dir=to.parent))
        try:
            folder = scratch / "whole"
            folder.mkdir()
            yield folder
            sync_folder(folder)
            folder.rename(to)
            sync_folder(to.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
