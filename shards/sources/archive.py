"""Zips that may have been made to harm: their member list is checked before anything is read."""

import lzma
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from swath.shards.errors import InputError

# what reading a damaged member raises, or one that is packed in a way that Python does not know
BROKEN = (OSError, zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error, lzma.LZMAError)
MAX_BYTES = 1 << 28  # of one member: far beyond any chip, and more than a band of a Sentinel-2 tile
MAX_RATIO = 200  # a deflated image hardly shrinks; what does by more than this is a bomb


def open_zip(path: Path) -> zipfile.ZipFile:
    """InputError where it is none."""
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is neither a folder nor a zip that can be read ({error})") from None


def zip_members(path: Path, archive: zipfile.ZipFile) -> dict[str, tuple[int, ...]]:
    """Name → (bytes, CRC-32) of the regular files; InputError for an archive that tries something."""
    found: dict[str, tuple[int, ...]] = {}
    for info in archive.infolist():
        name = PurePosixPath(info.filename)
        trouble = None
        if name.is_absolute() or ".." in name.parts or "\\" in info.filename or info.filename[1:2] == ":":
            trouble = "has a path that leads outside"
        elif stat.S_ISLNK(info.external_attr >> 16):
            trouble = "is a link"
        elif info.flag_bits & 1:
            trouble = "is encrypted"
        elif info.file_size > MAX_BYTES or info.file_size > MAX_RATIO * max(info.compress_size, 1 << 12):
            trouble = f"declares {info.file_size} bytes from {info.compress_size}, beyond the limits"
        elif info.filename in found:
            trouble = "is there twice"
        if trouble:
            raise InputError(f"{path}: member {info.filename!r} {trouble}; nothing was read")
        if not info.is_dir() and not any(p.startswith((".", "__MACOSX")) for p in name.parts):
            found[info.filename] = (info.file_size, info.CRC)
    return found
