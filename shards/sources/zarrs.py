"""Zarr v2 and v3 in a folder, a zip, or the bytes of a zip: arrays of numbers (and fixed-width text), no pickles, no bombs.

Chunks are decompressed by the zarr library, after what each one declares has been held against the size of a chunk.
"""

import io
import math
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, Self

import numpy as np

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.sources.archive import BROKEN, open_zip, zip_members
from swath.shards.sources.cube import Window, check_dtype, take

MAX_CHUNK = 1 << 28  # bytes that must be decompressed to see one value
MAX_TEXT = 1 << 22  # bytes of an array of texts
# what can be decoded without running anything that the file brings along (numcodecs has pickles), to a size known before
_CODECS = {"blosc", "zstd", "bytes", "transpose", "crc32c", "shuffle", "numcodecs.shuffle"}
_METADATA = (".zarray", ".zgroup", ".zattrs", ".zmetadata", "zarr.json")
_UNITS = {
    "nanoseconds": "ns", "microseconds": "us", "milliseconds": "ms", "seconds": "s", "minutes": "m", "hours": "h", "days": "D",
}  # fmt: skip


class Zarr:
    """The root group of a folder, a zip file, or the bytes of a zip. `where` names it in messages.

    InputError for a zip file that tries something; DecodeError for whatever cannot be read.
    """

    def __init__(self, place: Path | bytes, where: str) -> None:
        zarr = load_zarr()
        self.where = where
        self._packed: dict[str, tuple[set[str], int]] = {}  # array → codecs, bytes of a chunk
        self._store = _store(place, where)
        try:
            self._group = zarr.open_group(_checked(self._store, self._packed), mode="r")
            self.names = sorted(name for name, _ in self._group.arrays())
        except Exception as error:  # metadata from strangers: zarr raises whatever its parser stumbles on
            raise DecodeError(f"{where} is no Zarr group ({error})") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    def numbers(self, name: str) -> Any:
        """zarr's array `name`; `values` reads it, guarding against damage."""
        found = self._array(name)
        check_dtype(found.dtype)
        return found

    def is_numbers(self, name: str) -> bool:
        return self._array(name).dtype.kind in "uifb"

    def values(self, name: str, *at: int) -> np.ndarray:
        """The numbers at `at`, everything without it."""
        return _read(self.numbers(name), self.where, at)

    def chip(self, name: str, axes: str, *, n: int = 0, window: Window | None = None) -> np.ndarray:
        """`cube.take` of the array `name`."""
        found = self.numbers(name)
        try:
            return take(found, axes, n=n, window=window)
        except (DecodeError, InputError):
            raise
        except Exception as error:  # codecs raise whatever they like
            raise DecodeError(f"{self.where} is damaged ({error or type(error).__name__})") from None

    def texts(self, name: str) -> list[str]:
        """All of an array of fixed-width texts."""
        found = self._array(name)
        if found.dtype.kind not in "US" or found.size * found.dtype.itemsize > MAX_TEXT:
            raise DecodeError(f"{self.where}: {name} holds {found.dtype}, not short texts")
        return [v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in _read(found, self.where, ()).ravel()]

    def times(self, name: str, *at: int) -> list[str | None]:
        """ISO 8601: nanoseconds since 1970 unless the attribute `units` says otherwise; without units, 0 is none."""
        found = self._array(name)
        if found.dtype.kind not in "iuM":
            raise DecodeError(f"{self.where}: {name} holds {found.dtype}, not times")
        read = _read(found, self.where, at).ravel()
        units = found.attrs.get("units")
        said = re.fullmatch(r"(\w+) since (\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d:\d\d)(?:\.\d+)?)?Z?", str(units))
        if units is not None and (said is None or said[1] not in _UNITS):
            raise DecodeError(f"{self.where}: {name} in {units!r} is not understood")
        start = np.datetime64(f"{said[2]}T{said[3] or '00:00:00'}" if said else 0, "ns")
        steps = np.asarray(read.astype("i8")).astype(f"m8[{_UNITS[said[1]] if said else 'ns'}]")
        known = [t != 0 or units is not None for t in read.astype("i8")]
        return [str((start + step).astype("M8[s]")) if k else None for step, k in zip(steps, known, strict=True)]

    def _array(self, name: str) -> Any:
        try:
            found = self._group[name]
            meta, packed = found.metadata.to_dict(), math.prod(found.chunks) * found.dtype.itemsize
            if meta["zarr_format"] == 2:
                codecs = {c["id"] for c in (meta.get("compressor"), *(meta.get("filters") or ())) if c}
            else:
                codecs = {c["name"] for c in meta["codecs"]}
        except Exception as error:  # as above; a group has no chunks
            raise DecodeError(f"{self.where} has no array {name!r} that can be read ({error})") from None
        if codecs - _CODECS or found.dtype.kind not in "uifbMmUS":
            raise DecodeError(
                f"{self.where}: {name} holds {found.dtype} packed with {', '.join(sorted(codecs)) or 'nothing'}; "
                "numbers packed with blosc or zstd are read"
            )
        if packed > MAX_CHUNK:
            raise DecodeError(f"{self.where}: {name} has chunks of {packed} bytes, beyond the limit of {MAX_CHUNK}")
        self._packed[name] = codecs, packed
        return found


def load_zarr() -> Any:
    try:
        import zarr
        import zarr.storage
    except ImportError:
        raise InputError("reading Zarr needs zarr: pip install 'swath[arrays]'") from None
    return zarr


def _read(found: Any, where: str, at: tuple[int, ...]) -> np.ndarray:
    if math.prod(found.shape[len(at) :]) * found.dtype.itemsize > MAX_CHUNK:
        raise DecodeError(f"{where} declares an array of shape {found.shape}, beyond the limits")
    try:
        return np.asarray(found[at] if at else found[...])
    except Exception as error:  # codecs raise whatever they like
        raise DecodeError(f"{where} is damaged ({error or type(error).__name__})") from None


def _store(place: Path | bytes, where: str) -> Any:
    storage = load_zarr().storage
    if isinstance(place, bytes):  # small: one sample
        from zarr.core.buffer import default_buffer_prototype

        try:
            with zipfile.ZipFile(io.BytesIO(place)) as archive:
                zip_members(Path(where), archive)
                read = {info.filename: archive.read(info) for info in archive.infolist() if not info.is_dir()}
        except (ValueError, InputError, *BROKEN) as error:
            raise DecodeError(f"{where} is no zip that can be read ({error})") from None
        return storage.MemoryStore({k: default_buffer_prototype().buffer.from_bytes(v) for k, v in read.items()}, read_only=True)
    if place.is_dir():
        return storage.LocalStore(place, read_only=True)
    with open_zip(place) as archive:
        zip_members(place, archive)
    return storage.ZipStore(place, mode="r")


def _checked(store: Any, packed: dict[str, tuple[set[str], int]]) -> Any:
    """The store, which hands out chunks of known arrays only, and none that would inflate beyond a chunk of theirs."""
    from zarr.storage import WrapperStore

    class Checked(WrapperStore):
        async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
            if key.startswith("/") or ".." in key.split("/"):
                raise ValueError(f"{key} leads outside")
            data = await super().get(key, prototype, byte_range)
            if data is None or key.endswith(_METADATA):
                return data
            parts = key.split("/")
            codecs, limit = next((packed[n] for i in range(len(parts)) if (n := "/".join(parts[:i])) in packed), (set(), 0))
            size = _declared(data.to_bytes()[:18], len(data), codecs)
            if len(data) > limit + 4096 or size > limit:
                raise ValueError(f"chunk {key} of {len(data)} bytes declares {size}, a chunk has {limit}")
            return data

    return Checked(store)


def _declared(head: bytes, length: int, codecs: set[str]) -> int:
    """Bytes that a chunk says it will be once decompressed; more than any limit where it does not say."""
    if "blosc" in codecs:
        if len(head) < 16 or struct.unpack("<I", head[12:16])[0] > length:  # blosc would read on, beyond the buffer
            raise ValueError("a chunk is cut short")
        return struct.unpack("<I", head[4:8])[0]
    if "zstd" not in codecs:
        return 0
    if len(head) < 6:
        return 1 << 62
    # RFC 8878, 3.1.1.1: flags say where the content size is, and how wide
    single = head[4] >> 5 & 1
    width = (single, 2, 4, 8)[head[4] >> 6]
    start = 5 + (1 - single) + (0, 1, 2, 4)[head[4] & 3]
    return int.from_bytes(head[start : start + width], "little") + 256 * (width == 2) if width else 1 << 62
