"""MATLAB files: version 5 by scipy, 7.3 (which is HDF5) by h5py. Arrays come in MATLAB's axis order from both."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from swath.shards.errors import InputError
from swath.shards.sources import hdf5

MAX_BYTES = 1 << 31  # of all variables of one file, decompressed: twelve times Pavia Centre as stored
_COMPRESSED = 15  # the type of a data element that is a zlib stream


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The arrays of numbers in a file with their shapes in MATLAB's order, without reading them. Raises InputError."""
    if hdf5.is_hdf5(path):
        with hdf5.open_file(path) as file:
            return {name: hdf5.dataset(file, name).shape[::-1] for name in hdf5.names(file)}
    io = _load_scipy()
    try:
        listed = io.whosmat(str(path))
    except Exception as error:  # scipy's parser raises whatever it stumbles on
        raise InputError(f"{path} cannot be read as a MATLAB file ({error})") from None
    numbers = ("double", "single", "logical", *(f"{s}int{n}" for s in ("", "u") for n in (8, 16, 32, 64)))
    return {name: tuple(int(n) for n in shape) for name, shape, kind in listed if kind in numbers}


def load(path: Path, name: str) -> Any:
    """One variable: an array of numbers in MATLAB's axis order, or in version 5 a struct as scipy gives it (see `field`).

    Nothing in the file is executed: scipy returns functions and objects as plain data. Raises InputError.
    """
    if hdf5.is_hdf5(path):
        with hdf5.open_file(path) as file:
            return hdf5.dataset(file, name, whole=True)[()].T
    io = _load_scipy()
    _check_inflated(path)
    try:
        found = io.loadmat(str(path), variable_names=[name], struct_as_record=True, squeeze_me=False)
    except Exception as error:  # scipy's parser raises whatever it stumbles on
        raise InputError(f"{path} cannot be read as a MATLAB file ({error})") from None
    if name not in found:
        raise InputError(f"{path} has no variable {name!r}; it has {', '.join(sorted(shapes(path))) or 'no arrays'}")
    return found[name]


def field(value: Any, *path: str | int, where: str) -> np.ndarray:
    """What lies at `path` in a version 5 struct: names of fields and, for cells and arrays of structs, places from 0."""
    for step in path:
        try:
            value = value.ravel(order="F")[step] if isinstance(step, int) else value[step].ravel()[0]
        except (IndexError, ValueError, AttributeError, TypeError, KeyError):
            raise InputError(f"{where} has no {'.'.join(map(str, path))}") from None
    if not isinstance(value, np.ndarray):
        raise InputError(f"{where}: {'.'.join(map(str, path))} is no array")
    return value


def _check_inflated(path: Path) -> None:
    """InputError if the file's variables are more than MAX_BYTES once inflated; a few kB can declare gigabytes."""
    total = 0
    with path.open("rb") as file:
        order = "<" if file.read(128)[126:128] == b"IM" else ">"
        while len(head := file.read(8)) == 8:
            kind, size = struct.unpack(order + "II", head)
            if kind != _COMPRESSED:
                total += size
                file.seek(size, 1)
            else:
                total += _inflated(file, size, MAX_BYTES - total, path)
            if total > MAX_BYTES:
                raise InputError(f"{path} holds more than the limit of {MAX_BYTES} bytes once inflated")


def _inflated(file: Any, size: int, limit: int, path: Path) -> int:
    stream, count = zlib.decompressobj(), 0
    while size > 0 and count <= limit:
        data = file.read(min(size, 1 << 16))
        if not data:
            break
        size -= len(data)
        try:
            while data and count <= limit:
                count += len(stream.decompress(data, 1 << 20))
                data = stream.unconsumed_tail
        except zlib.error as error:
            raise InputError(f"{path} is damaged ({error})") from None
    return count


def _load_scipy() -> Any:
    try:
        from scipy import io
    except ImportError:
        raise InputError("reading .mat needs scipy: pip install 'swath[arrays]'") from None
    return io
