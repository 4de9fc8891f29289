"""A remote archive as a folder on disk, which sources open like any other.

Small files and those of formats that are read as a whole are copied. Large GeoTIFFs on servers that give parts of files have
stand-ins (sources/parts.py), and what is read of them goes through a bounded cache of blocks beside the copy. In the folder:

    <hash of the address>/lock       shared by whoever reads, exclusive for whoever fetches
    <hash of the address>/blocks/    the cache of parts
    <hash of the address>/partial/   what is on its way; each file is renamed when it is whole
    <hash of the address>/<name>/    the copy; times are stamps of the files' versions
"""

import fcntl
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from tqdm import tqdm

from swath.shards.cache import Cache, CacheOptions
from swath.shards.errors import InputError
from swath.shards.files import disk_errors
from swath.shards.remote import Patience, is_remote
from swath.shards.sources.folder import TIFF
from swath.shards.sources.parts import BLOCK, MAGIC, File, Servers, stand_in
from swath.shards.sources.remote import Found, at_once, find_files, remote_items

_LARGEST_DEFAULT = 64 << 30
_SMALL = 2 * BLOCK  # bytes up to which a GeoTIFF is copied at once
_BLOCKS = 128 * BLOCK  # that the cache of parts has at least
_PATIENCE = 600.0  # seconds for another process that fetches the same archive
_log = logging.getLogger(__name__)
_locks: dict[Path, int] = {}  # of the copies that this process reads, until it ends


@dataclass(frozen=True)
class Mirror:
    """A copy of `address`: `path` is what is opened, `parted` are the files that have stand-ins, by their path below `top`.

    It may be sent to another process, which mounts it before it opens anything.
    """

    address: str
    top: Path
    path: Path
    limit: int
    parted: dict[str, File] = field(default_factory=dict, repr=False)
    patience: Patience | None = None

    def __str__(self) -> str:
        return self.address

    def mount(self) -> Path:
        """From now on this process may read the copy. Returns `path`."""
        home = self.top.parent
        if home not in _locks:
            _locks[home] = _shared(home)
        if self.parted:
            servers = Servers(self.patience)
            cache = Cache(CacheOptions(home / "blocks", self.limit))
            for name, file in self.parted.items():
                stand_in(self.top / name, file, servers, cache)
        return self.path

    def whole(self) -> Path:
        """As `mount`, with all files copied: for what is not read by way of rasterio."""
        ...
        return self.path


def located(
    source: str | Path | Mirror, cache: CacheOptions | None = None, patience: Patience | None = None
) -> Path | Mirror:
    """What `source` is on disk: a path as it is; an address, or a STAC document with remote assets, as a copy, made or renewed.

    `cache` says where copies are (~/.cache/swath/archives) and how large they may be together. InputError: an address that cannot
    be one or holds credentials, a server that fails for long, an archive that is too large, a disk that is full.
    """
    if isinstance(source, Mirror):
        return source
    servers = Servers(patience)
    if is_remote(source):
        address = str(source)
        return _mirror(address, find_files(address, servers), servers, cache or CacheOptions())
    path = Path(source)
    if path.suffix.lower() in (".json", ".geojson") and path.is_file() and (found := remote_items(path, servers)) is not None:
        return _mirror(path.resolve().as_uri(), found, servers, cache or CacheOptions())
    return path
