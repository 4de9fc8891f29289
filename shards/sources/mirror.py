"""A remote archive as a folder on disk, which sources open like any other.

Small files and those of formats that are read as a whole are copied. Large GeoTIFFs on servers that give parts of files have
stand-ins (sources/parts.py), and what is read of them goes through a bounded cache of blocks beside the copy. In the folder:

    <hash of the address>/lock             shared by whoever reads, exclusive for whoever fetches
    <hash of the address>/blocks/          the cache of parts
    <hash of the address>/partial/         what is on its way; each file is renamed when it is whole
    <hash of the address>/files/<name>/    the copy; times are stamps of the files' versions
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

from swath.shards.errors import InputError
from swath.shards.files import disk_errors
from swath.shards.sources.folder import TIFF
from swath.shards.sources.parts import BLOCK, MAGIC, File, Servers, forget, stand_in
from swath.shards.sources.remote import Found, at_once, find_files, remote_items
from swath.shards.stores.cache import Cache, CacheOptions
from swath.shards.stores.remote import Patience, is_remote

_LARGEST_DEFAULT = 64 << 30
_SMALL = 2 * BLOCK  # bytes up to which a GeoTIFF is copied at once
_BLOCKS = 128 * BLOCK  # that the cache of parts has at least
_PATIENCE = 600.0  # seconds for another process that fetches the same archive
_log = logging.getLogger(__name__)
_locks: dict[Path, int] = {}  # of the copies that this process reads, until it ends


@dataclass(frozen=True)
class Mirror:
    """A copy of `address`: `path` is what is opened, at `top` or below. `parted`, by name below `top`, may have stand-ins.

    It may be sent to another process, which mounts it before it opens anything. `blocks` bytes of parts are kept.
    """

    address: str
    top: Path
    path: Path
    blocks: int
    parted: dict[str, File] = field(default_factory=dict, repr=False)
    patience: Patience | None = None

    def __str__(self) -> str:
        return self.address

    @property
    def home(self) -> Path:
        return self.top.parent.parent

    def mount(self) -> Path:
        """From now on this process may read the copy, as `path`. InputError where it has been removed meanwhile."""
        if self.home not in _locks:
            _locks[self.home] = _locked(self.home)
        if waiting := self._stand_ins():
            servers, cache = Servers(self.patience), Cache(CacheOptions(self.home / "blocks", self.blocks))
            for name, file in waiting.items():
                stand_in(self.top / name, file, servers, cache)
        return self.path

    def whole(self) -> Path:
        """As `mount`, with every file copied: for what is not read by way of rasterio."""
        if waiting := self._stand_ins():
            limit = self.blocks - _BLOCKS
            _check_size(self.address, waiting, limit, self.home.parent)
            _renew(self.address, self.top, _Wanted(waiting, all_of_it=False), Servers(self.patience))
        return self.mount()

    def _stand_ins(self) -> dict[str, File]:
        return {name: file for name, file in self.parted.items() if _is_stand_in(self.top / name)}


def located(source: str | Path | Mirror, cache: CacheOptions | None = None, patience: Patience | None = None) -> Path | Mirror:
    """What `source` is on disk: a path as it is; an address, or a STAC document with remote assets, as a copy, made or renewed.

    `cache` says where copies are (~/.cache/swath/archives) and how large they may be together. InputError: an address that cannot
    be one or holds credentials, a server that fails for long, an archive that is too large, a disk that is full.
    """
    if isinstance(source, Mirror):
        return source
    servers, options = Servers(patience), cache or CacheOptions()
    if is_remote(source):
        address = str(source).rstrip("/")
        return _mirror(address, find_files(str(source), servers), servers, options)
    path = Path(source)
    if path.suffix.lower() in (".json", ".geojson") and path.is_file() and (found := remote_items(path, servers)) is not None:
        return _mirror(str(path.resolve()), found, servers, options)
    return path


@dataclass(frozen=True)
class _Wanted:
    """What a copy must have: `files` whole, `parted` in any way, `texts`; with `all_of_it` nothing else."""

    files: dict[str, File]
    parted: dict[str, File] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    all_of_it: bool = True


def _mirror(address: str, found: Found, servers: Servers, options: CacheOptions) -> Mirror:
    base = options.folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swath" / "archives"
    base = base.absolute()
    home = base / sha256(address.encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]+", "_", unquote(PurePosixPath(address).name)).lstrip(".")[:100] or "archive"
    top = home / "files" / name
    parted = _parted(found.files)
    whole = {name: file for name, file in found.files.items() if name not in parted}
    with _errors(base):
        home.mkdir(parents=True, exist_ok=True)
        held = {path: _bytes(path) for path in base.iterdir() if _is_ours(path)}
        free = shutil.disk_usage(base).free
        limit = min(_LARGEST_DEFAULT, (free + sum(held.values())) // 2) if options.limit is None else options.limit
        need = _check_size(address, whole, limit - (_BLOCKS if parted else 0), base)
        _make_room(base, home, held, limit - need)
    _renew(address, top, _Wanted(whole, parted, found.texts), servers)
    return Mirror(address, top, top / found.entry, limit - need, parted, servers.patience)


def _parted(files: dict[str, File]) -> dict[str, File]:
    """Those that need not be copied: large GeoTIFFs, unless GDAL wants other files with them."""
    if any(name.lower().endswith(".vrt") for name in files):
        return {}
    return {
        name: file
        for name, file in files.items()
        if name.lower().endswith(TIFF)
        and file.facts.parts
        and file.facts.size > _SMALL
        and not any(f"{name}{end}" in files for end in (".aux.xml", ".msk"))
        and not any(f"{name.rpartition('.')[0]}{end}" in files for end in (".tfw", ".tifw", ".TFW", ".wld"))
    }


def _check_size(address: str, files: dict[str, File], limit: int, folder: Path) -> int:
    """Bytes of the files; InputError where they are too many."""
    need = sum(file.facts.size for file in files.values())
    if need > limit:
        raise InputError(
            f"{address}: {len(files)} files of {need / 1e9:.3g} GB must be copied as a whole, {max(0, limit) / 1e9:.3g} GB are "
            f"allowed in {folder}; --cache-gb allows more, --cache names a folder on a larger disk, or name a part of the archive"
        )
    return need


def _renew(address: str, top: Path, wanted: _Wanted, servers: Servers) -> None:
    """Fetch what is missing or has changed, remove what should not be there; this process then holds a shared lock."""
    home = top.parent.parent
    end = time.monotonic() + _PATIENCE
    with _errors(home):
        if (old := _locks.pop(home, None)) is not None:
            os.close(old)
        handle = _locked(home)
        try:
            while _work(top, wanted):
                if not _taken(handle, fcntl.LOCK_EX):
                    if time.monotonic() > end:
                        raise InputError(f"another process uses {address} in {home}; wait for it, or give another --cache")
                    time.sleep(0.05)
                    _share(handle, home)
                elif not _same(handle, home / "lock"):
                    os.close(handle)
                    handle = _locked(home)
                else:
                    _fetch(address, top, wanted, _work(top, wanted), servers)
                    _share(handle, home)
        except BaseException:
            os.close(handle)
            raise
        _locks[home] = handle


def _work(top: Path, wanted: _Wanted) -> list[str]:
    """Names of what is not as it should be."""
    made = [name for name, file in (wanted.files | wanted.parted).items() if not _is_copy(top / name, file)]
    made += [name for name in wanted.files if name.lower().endswith(TIFF) and _is_stand_in(top / name)]
    made += [name for name, text in wanted.texts.items() if not _is_text(top / name, text)]
    if wanted.all_of_it:
        made += [name for name in _names(top) if not (name in wanted.files or name in wanted.parted or name in wanted.texts)]
    return sorted(set(made))


def _fetch(address: str, top: Path, wanted: _Wanted, work: list[str], servers: Servers) -> None:
    partial = top.parent.parent / "partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that is gone
    for folder in (top, partial):
        folder.mkdir(parents=True, exist_ok=True)
    for name in work:
        if not (name in wanted.files or name in wanted.parted or name in wanted.texts):
            _remove(top, name)
    copies = [name for name in work if name in wanted.files]
    size = sum(wanted.files[name].facts.size for name in copies)
    if size > (free := shutil.disk_usage(top).free):
        raise InputError(f"{address}: {size / 1e9:.3g} GB are to be copied to {top}, {free / 1e9:.3g} GB are free; give --cache")
    _log.info("%s: %d files of %.3g MB are copied to %s", address, len(copies), size / 1e6, top)
    silent = not sys.stderr.isatty()

    with tqdm(total=size, unit="B", unit_scale=True, desc="fetching", disable=silent, leave=False) as bar:

        def make(name: str) -> None:
            path, new = top / name, partial / sha256(name.encode()).hexdigest()
            with new.open("wb") as out:
                if name in wanted.texts:
                    out.write(wanted.texts[name])
                elif name in wanted.parted:
                    out.write(MAGIC + wanted.parted[name].address.encode())
                    out.truncate(wanted.parted[name].facts.size)
                elif count := wanted.files[name].facts.size:
                    remote, there = servers.of(wanted.files[name].address)
                    for offset, data in remote.stream(there, limit=count, size=count):
                        out.seek(offset)
                        out.write(data)
                        bar.update(len(data))
                out.flush()
                os.fsync(out.fileno())
            file = wanted.files.get(name) or wanted.parted.get(name)
            stamp = int(sha256(wanted.texts[name]).hexdigest()[:7], 16) * 10**9 if file is None else file.stamp
            os.utime(new, ns=(stamp, stamp))
            path.parent.mkdir(parents=True, exist_ok=True)
            new.replace(path)
            if name in wanted.files:
                forget(path)

        at_once(make, [name for name in work if name in wanted.parted or name in wanted.texts], servers)
        at_once(make, copies, servers)


def _remove(top: Path, name: str) -> None:
    """With the folders that it was the last file of, whose name a file may have now."""
    (top / name).unlink()
    with suppress(OSError):
        for parent in PurePosixPath(name).parents:
            if parent.name:
                (top / parent).rmdir()


def _is_copy(path: Path, file: File) -> bool:
    try:
        found = path.stat(follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return (found.st_size, found.st_mtime_ns) == (file.facts.size, file.stamp)


def _is_text(path: Path, text: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(text) and path.read_bytes() == text


def _is_stand_in(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (FileNotFoundError, NotADirectoryError):
        return False


def _names(top: Path) -> Iterator[str]:
    for folder, _, names in os.walk(top):
        for name in names:
            yield Path(folder, name).relative_to(top).as_posix()


def _bytes(folder: Path) -> int:
    """On the disk, below a folder."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(place, name).stat(follow_symlinks=False).st_blocks * 512
    return total


def _is_ours(path: Path) -> bool:
    """A copy: a person may name a folder for the cache that holds other things, which are not to be touched."""
    shaped = re.fullmatch("[0-9a-f]{16}", path.name) is not None and not path.is_symlink()
    return shaped and (path / "lock").is_file() and (path / "files").is_dir()


def _make_room(base: Path, home: Path, held: dict[Path, int], room: int) -> None:
    """Remove copies of other archives, those that were used longest ago first, and none in use, until the rest fits `room`."""
    others = [path for path in held if path != home]
    total = sum(held[path] for path in others)
    for path in sorted(others, key=lambda path: (path / "lock").stat().st_mtime_ns):
        if total <= room:
            return
        handle = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if _taken(handle, fcntl.LOCK_EX):
                shutil.rmtree(path)
                total -= held[path]
        finally:
            os.close(handle)


def _locked(home: Path) -> int:
    """A shared lock on a copy, as long as the descriptor is open."""
    while True:
        home.mkdir(parents=True, exist_ok=True)
        handle = os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        _share(handle, home)
        if _same(handle, home / "lock"):
            os.utime(handle)
            return handle
        os.close(handle)


def _share(handle: int, home: Path) -> None:
    """Wait for a shared lock: whoever has the other goes on or ends, since no server is waited for without end."""
    told = False
    while not _taken(handle, fcntl.LOCK_SH):
        if not told:
            _log.info("another process copies to %s, which is waited for", home)
        told = True
        time.sleep(0.05)


def _taken(handle: int, lock: int) -> bool:
    try:
        fcntl.flock(handle, lock | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


@contextmanager
def _errors(folder: Path) -> Iterator[None]:
    try:
        with disk_errors("copying a remote archive", folder):
            yield
    except OSError as error:
        raise InputError(f"copying a remote archive to {folder} failed ({error}); choose another folder by --cache") from None
