"""Tars as archives of samples: listed once, then read member by member."""

import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError

MAX_BYTES = 1 << 28  # of one member


@dataclass(frozen=True, slots=True)
class Member:
    """`key` is the name up to the first dot after the last slash, as WebDataset cuts it; `suffix` is what follows."""

    key: str
    suffix: str
    offset: int
    size: int


def members(path: Path) -> list[Member]:
    """The plain files of an uncompressed tar, in its order. InputError for one that is damaged or tries something."""
    found: list[Member] = []
    seen: set[str] = set()
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.isdir():
                    continue
                name = PurePosixPath(info.name)
                if not info.isreg() or info.sparse or name.is_absolute() or ".." in name.parts or info.size > MAX_BYTES:
                    raise InputError(f"{path}: member {info.name!r} is no plain file with a plain path and size")
                if info.name in seen:
                    raise InputError(f"{path}: member {info.name!r} is there twice")
                seen.add(info.name)
                stem, _, suffix = name.name.partition(".")
                if stem and suffix:
                    found.append(Member(str(name.with_name(stem)), suffix, info.offset_data, info.size))
            end = tar.offset
        with path.open("rb") as file:  # tarfile takes a header that it cannot read for the end
            file.seek(end)
            if file.read(512).strip(b"\0"):
                raise InputError(f"{path} is damaged after {found[-1].key if found else 'its start'}; copy it again")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{path} cannot be read as a tar ({error}); copy it again") from None
    if found and found[-1].offset + found[-1].size > path.stat().st_size:
        raise InputError(f"{path} is cut short in {found[-1].key}; copy it again")
    return found


def read(path: Path, member: Member) -> bytes:
    """The bytes of one member. Raises DecodeError."""
    try:
        with path.open("rb") as file:
            file.seek(member.offset)
            data = file.read(member.size)
    except OSError as error:
        raise DecodeError(f"{path.name}: {error.strerror or error}") from None
    if len(data) != member.size:
        raise DecodeError(f"{path.name} is cut short in {member.key}")
    return data
