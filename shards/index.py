"""index.bin: where every member of every sample lies, so that each is one positioned read away (DESIGN §2.2).

Layout, little-endian: a 64-byte header, then (samples,) rows of SAMPLE, then (samples, members) rows of MEMBER. Keys are
in a blob of their own, keys.bin. Both files are memory-mapped; opening costs the same at a thousand and at a hundred
million samples.
"""

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from swath.shards.errors import InputError
from swath.shards.files import write_bytes
from swath.shards.manifest import FileState

NAME, KEYS = "index.bin", "keys.bin"
_MAGIC = b"SWATHIX2"
_HEADER = struct.Struct("<8sQI44x")

# lat and lon of the centre in degrees (float32 tells 2 m apart), gsd_m: NaN where unknown; time: UTC seconds since 1970;
# check: of the whole row and its members (`row_check`), last so that it can be left out of what it checks; 0 is not checked
SAMPLE = np.dtype(
    [
        ("id", "<i8"), ("key_start", "<u8"), ("key_length", "<u4"), ("label", "<i4"), ("block", "<i8"), ("time", "<i8"),
        ("lat", "<f4"), ("lon", "<f4"), ("gsd_m", "<f4"), ("check", "<u4"),
    ]
)  # fmt: skip
NO_TIME = np.iinfo(np.int64).min
MEMBER = np.dtype(
    [
        ("offset", "<u8"), ("length", "<u4"), ("shard", "<u4"), ("crc32", "<u4"), ("format", "<u4"),
        ("scale", "<f8"), ("add", "<f8"),
    ]
)  # fmt: skip
FORMATS = ("absent", "jpg", "png", "npy", "json", "txt")
VALID = ".valid"  # of a modality's validity mask: `<key>.<modality>.valid.npy`, and its column in the index


@dataclass
class Index:
    """`samples` (N,) of SAMPLE, `members` (N, M) of MEMBER with columns named by `columns`, `keys` the blob."""

    samples: np.ndarray
    members: np.ndarray
    keys: np.ndarray
    columns: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, number: int) -> str:
        row = self.samples[number]
        start = int(row["key_start"])
        return bytes(self.keys[start : start + int(row["key_length"])]).decode(errors="replace")

    def damaged(self, numbers: np.ndarray) -> np.ndarray:
        """Those of the samples `numbers` (B,) whose rows are not what was written."""
        samples, members = self.samples[numbers], self.members[numbers]
        rows = zip(samples["check"].tolist(), samples, members, strict=True)
        wrong = [stated != 0 and stated != row_check(sample, row) for stated, sample, row in rows]
        return numbers[np.array(wrong, dtype=bool)]

    def write(self, folder: Path) -> dict[str, FileState]:
        """Both files, each row with its check; returns what the manifest says of them."""
        samples = self.samples.copy()
        samples["check"] = [row_check(sample, row) for sample, row in zip(samples, self.members, strict=True)]
        header = _HEADER.pack(_MAGIC, len(self.samples), self.members.shape[1])
        made = {KEYS: self.keys.tobytes(), NAME: header + samples.tobytes() + self.members.tobytes()}
        for name, data in made.items():
            write_bytes(folder / name, data)
        return {name: FileState(bytes=len(data), sha256=sha256(data).hexdigest()) for name, data in made.items()}


def row_check(sample: np.ndarray, members_m: np.ndarray) -> int:
    """CRC-32 of an index row, () of SAMPLE without its `check`, and of its members; never 0."""
    return zlib.crc32(members_m.tobytes(), zlib.crc32(sample.tobytes()[: -SAMPLE["check"].itemsize])) or 1


def columns_of(modalities: list[str], maps: Iterable[str] = ()) -> tuple[str, ...]:
    """The members that a sample can have: each modality, the validity mask of each, label maps, and the JSON; `txt` there is the
    caption of a foreign sample without JSON."""
    return (*modalities, *(name + VALID for name in modalities), *maps, "json")


def open_index(index: Path, keys_blob: Path, columns: tuple[str, ...], place: str) -> Index:
    """Memory-map the two files, the index of `place`; InputError if one is missing, cut short or of another shape."""
    remedy = f"`swath index {place}` rebuilds it from the shards"
    try:
        raw = np.memmap(index, dtype=np.uint8, mode="r")
        keys = np.memmap(keys_blob, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise InputError(f"the index of {place} cannot be opened ({error}); {remedy}") from None
    if len(raw) < _HEADER.size:
        raise InputError(f"{place}/{NAME} is cut short; {remedy}")
    magic, count, width = _HEADER.unpack(raw[: _HEADER.size].tobytes())
    middle = _HEADER.size + count * SAMPLE.itemsize
    end = middle + count * width * MEMBER.itemsize
    if magic != _MAGIC or width != len(columns) or len(raw) != end:
        raise InputError(f"{place}/{NAME} is damaged or does not belong to its manifest; {remedy}")
    samples = raw[_HEADER.size : middle].view(SAMPLE)
    members = raw[middle:end].view(MEMBER).reshape(count, width)
    return Index(samples, members, keys, columns)
