"""Reading samples back: any member of any sample is one slice of a memory-mapped tar, checked against its CRC-32."""

import json
import mmap
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from swath.shards.bands import InputContract
from swath.shards.codec import DecodeError, decode
from swath.shards.errors import InputError
from swath.shards.index import FORMATS, columns_of, open_index
from swath.shards.manifest import Manifest, read_manifest

VALID_NODATA, VALID_CLEAR, VALID_CLOUD, VALID_SHADOW = 0, 1, 2, 3


@dataclass
class Chips:
    """A batch as it is stored: DN, not yet scaled. Smaller samples are padded at the right and the bottom.

    `pixels` (B, C, H, W) in the stored dtype; `valid` (B, 1, H, W) uint8 codes or None where every pixel is clear;
    `size` (B, 2) rows and columns; `scale`, `add` (B,) float64; `id`, `visit`, `label` (B,) int64.
    """

    pixels: Tensor
    valid: Tensor | None
    size: Tensor
    scale: Tensor
    add: Tensor
    id: Tensor
    visit: Tensor
    label: Tensor

    def to(self, device: torch.device) -> "Chips":
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Chips(**moved)

    def part(self, rows: slice) -> "Chips":
        """Some of the samples."""
        return Chips(**{k: v[rows] if isinstance(v, Tensor) else v for k, v in vars(self).items()})


class ShardReader:
    """A folder of shards. Opening reads the manifest and maps the index; tars are mapped when first needed."""

    def __init__(self, folder: Path | str, modality: str | None = None) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder)
        self.contract: InputContract = self.manifest.contract(modality)
        self.index = open_index(self.folder, columns_of(list(self.manifest.contracts)))
        if len(self.index) != self.manifest.samples:
            raise InputError(
                f"{self.folder}: the index has {len(self.index)} samples, the manifest {self.manifest.samples}; "
                f"`swath index {self.folder}` rebuilds it"
            )
        self._pixels = self.index.columns.index(self.contract.modality)
        self._valid = self.index.columns.index("valid")
        self._json = self.index.columns.index("json")
        self._shard = lru_cache(maxsize=512)(self._open_shard)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shard_sizes(self) -> list[int]:
        return [shard.samples for shard in self.manifest.shards]

    @property
    def labels(self) -> np.ndarray:
        """(N,) int32 class numbers into `manifest.classes`; -1 where a sample has none."""
        return self.index.samples["label"]

    def pixels(self, number: int) -> np.ndarray:
        """(C, H, W) of one sample as stored."""
        return self._decode(number, self._pixels)

    def valid(self, number: int) -> np.ndarray | None:
        """(H, W) uint8 validity codes, or None where every pixel is clear."""
        if FORMATS[self.index.members[number, self._valid]["format"]] == "absent":
            return None
        return self._decode(number, self._valid)[0]

    def meta(self, number: int) -> dict[str, Any]:
        """The sample's JSON."""
        return json.loads(bytes(self._bytes(number, self._json)))

    def chips(self, numbers: Sequence[int] | np.ndarray, visits: np.ndarray | None = None) -> Chips:
        """The samples `numbers`, decoded into one batch."""
        count = len(numbers)
        samples, members = self.index.samples[numbers], self.index.members[numbers, self._pixels]
        pixels, size = self._batch(numbers)
        valid = None
        if (self.index.members[numbers, self._valid]["format"] != 0).any() or (size != size[0]).any():
            valid = np.zeros((count, 1, *pixels.shape[2:]), dtype=np.uint8)
            for row, number in enumerate(numbers):
                height, width = size[row]
                codes = self.valid(int(number))
                valid[row, 0, :height, :width] = VALID_CLEAR if codes is None else codes
        return Chips(
            pixels=torch.from_numpy(pixels),
            valid=None if valid is None else torch.from_numpy(valid),
            size=torch.from_numpy(size),
            scale=torch.from_numpy(members["scale"].astype(np.float64)),
            add=torch.from_numpy(members["add"].astype(np.float64)),
            id=torch.from_numpy(samples["id"].astype(np.int64)),
            visit=torch.from_numpy(np.zeros(count, np.int64) if visits is None else visits),
            label=torch.from_numpy(samples["label"].astype(np.int64)),
        )

    def _batch(self, numbers: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, C, H, W) and sizes (B, 2). Chips of one known size are decoded straight into their place."""
        bands = len(self.contract.bands)
        height, width = self.contract.height, self.contract.width
        if height is None or width is None:
            arrays = [self.pixels(int(number)) for number in numbers]
            size = np.array([a.shape[1:] for a in arrays], dtype=np.int64)
            out = np.zeros((len(arrays), bands, *size.max(axis=0)), dtype=self.contract.dtype)
            for row, array in enumerate(arrays):
                out[row, :, : array.shape[1], : array.shape[2]] = array
            return out, size
        size = np.tile(np.array([[height, width]], dtype=np.int64), (len(numbers), 1))
        is_jpeg = self.index.members[numbers, self._pixels]["format"] == FORMATS.index("jpg")
        if bands == 3 and is_jpeg.all():
            out_bhwc = np.empty((len(numbers), height, width, 3), dtype=np.uint8)
            for row, number in enumerate(numbers):
                self._jpeg_into(int(number), out_bhwc[row])
            return np.moveaxis(out_bhwc, 3, 1), size
        out = np.empty((len(numbers), bands, height, width), dtype=self.contract.dtype)
        for row, number in enumerate(numbers):
            array = self.pixels(int(number))
            if array.shape != out.shape[1:]:
                raise self._damaged(int(number), f"shape {array.shape} instead of {out.shape[1:]}")
            out[row] = array
        return out, size

    def _jpeg_into(self, number: int, place_hwc: np.ndarray) -> None:
        try:
            made = simplejpeg.decode_jpeg(self._bytes(number, self._pixels), buffer=place_hwc)
        except ValueError as error:
            raise self._damaged(number, str(error)) from None
        if made.shape != place_hwc.shape:
            raise self._damaged(number, f"shape {made.shape} instead of {place_hwc.shape}")

    def _decode(self, number: int, column: int) -> np.ndarray:
        kind = FORMATS[self.index.members[number, column]["format"]]
        try:
            return decode(self._bytes(number, column), kind)
        except DecodeError as error:
            raise self._damaged(number, str(error)) from None

    def _bytes(self, number: int, column: int) -> memoryview:
        member = self.index.members[number, column]
        start, length = int(member["offset"]), int(member["length"])
        shard = int(member["shard"])
        if shard >= len(self.manifest.shards):
            raise InputError(
                f"{self.folder}: the index has sample {self.index.key(number)} in shard number {shard}, the manifest has "
                f"{len(self.manifest.shards)} shards; `swath index {self.folder}` rebuilds it"
            )
        data = self._shard(shard)[start : start + length]
        if len(data) != length or zlib.crc32(data) != int(member["crc32"]):
            raise self._damaged(number, "its bytes do not match the checksum in the index")
        return data

    def _open_shard(self, number: int) -> memoryview:
        shard = self.manifest.shards[number]
        path = self.folder / shard.name
        try:
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise InputError(f"shard {path} cannot be opened ({error}); copy it again or make the shards again") from None
        if len(data) != shard.bytes:
            raise InputError(f"shard {path} has {len(data)} bytes instead of {shard.bytes}; copy it again")
        return memoryview(data)

    def _damaged(self, number: int, what: str) -> InputError:
        shard = self.manifest.shards[int(self.index.members[number, self._pixels]["shard"])].name
        return InputError(
            f"sample {self.index.key(number)} in shard {self.folder / shard} is damaged: {what}; "
            "copy the shard again or make it again"
        )
