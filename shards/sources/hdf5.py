"""HDF5 (and with it MATLAB 7.3 and NetCDF-4): arrays of numbers only, nothing outside the file, no pickles."""

from pathlib import Path
from typing import Any

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.sources.cube import check_dtype, check_size

MAX_CHUNK = 1 << 28  # bytes that must be decompressed to see one value
MAX_WHOLE = 1 << 28  # values of an array that is read at once
MAX_NAMES = 10_000
_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def is_hdf5(path: Path) -> bool:
    """By the signature, which lies at byte 0 or, behind a user block as in MATLAB 7.3, at 512 · 2ⁿ."""
    with path.open("rb") as file:
        for offset in (0, 512, 1024, 2048, 4096):
            file.seek(offset)
            if file.read(8) == _SIGNATURE:
                return True
    return False


def open_file(path: Path) -> Any:
    """h5py's file, to be closed. Raises InputError for what is no HDF5, and for metadata that are pickles."""
    h5py = _load_h5py()
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        raise InputError(f"{path} cannot be read as HDF5 ({error})") from None
    if "pickle" in file.attrs:  # GEO-Bench v1 keeps its metadata so
        file.close()
        raise InputError(f"{path} keeps its metadata as a pickle, which is never loaded; convert it to another form first")
    return file


def dataset(file: Any, name: str, *, whole: bool = False) -> Any:
    """The array `name` (groups joined by '/'), checked: inside this file, plain numbers, sizes within limits, filters known.

    Raises InputError.
    """
    h5py = _load_h5py()
    where, place = f"{file.filename}: {name}", file
    for part in name.split("/"):
        link: Any = place.get(part, getlink=True) if isinstance(place, h5py.Group) else None
        if isinstance(link, h5py.ExternalLink | h5py.SoftLink):
            target = link.filename if isinstance(link, h5py.ExternalLink) else link.path
            raise InputError(f"{where} is a link to {target}, which is not followed; name the file and array that it leads to")
        if link is None:
            raise InputError(f"{where} is not there; the file has {', '.join(names(file)[:20]) or 'no arrays'}")
        place = place[part]
    if not isinstance(place, h5py.Dataset):
        raise InputError(f"{where} is a group; name an array in it: {', '.join(list(place)[:20])}")
    if place.external or place.is_virtual:
        raise InputError(f"{where} lies in another file; links are not followed")
    try:
        check_dtype(place.dtype)
    except DecodeError as error:
        raise InputError(f"{where} {error}") from None
    check_size(place.shape, MAX_WHOLE if whole else 1 << 48, where)
    if place.chunks is not None:
        check_size(place.chunks, MAX_CHUNK // place.dtype.itemsize, f"{where} (one chunk)")
    _check_filters(place, where)
    return place


def names(file: Any) -> list[str]:
    """All arrays of numbers below hard links, sorted; links and damaged branches are passed over."""
    h5py = _load_h5py()
    found: list[str] = []
    seen: set[Any] = set()
    stack = [("", file)]
    while stack and len(found) < MAX_NAMES:
        prefix, group = stack.pop()
        if group.id in seen:  # two hard links can make a circle
            continue
        seen.add(group.id)
        for part in group:
            if not isinstance(group.get(part, getlink=True), h5py.HardLink) or part.startswith("#"):
                continue
            entry = group[part]
            if isinstance(entry, h5py.Group):
                stack.append((f"{prefix}{part}/", entry))
            elif isinstance(entry, h5py.Dataset) and entry.dtype.kind in "uifb" and entry.shape is not None:
                found.append(prefix + part)
    return sorted(found)


def read_errors() -> tuple[type[Exception], ...]:
    """Whatever reading a damaged chunk may raise."""
    return OSError, ValueError, RuntimeError, KeyError


def _check_filters(array: Any, where: str) -> None:
    h5py = _load_h5py()
    plan = array.id.get_create_plist()
    for position in range(plan.get_nfilters()):
        code, *_, label = plan.get_filter(position)
        if h5py.h5z.filter_avail(code):
            continue
        try:
            __import__("hdf5plugin")  # registers its filters
        except ImportError:
            raise InputError(
                f"{where} is packed with filter {code} ({label.decode(errors='replace') or 'unnamed'}); pip install hdf5plugin"
            ) from None
        if not h5py.h5z.filter_avail(code):
            raise InputError(f"{where} is packed with filter {code}, which not even hdf5plugin has; repack it")


def _load_h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise InputError("reading HDF5 needs h5py: pip install 'swath[arrays]'") from None
    return h5py
