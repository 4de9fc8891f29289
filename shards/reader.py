"""Reading samples back: any member of any sample is one slice of a memory-mapped tar, checked against its CRC-32."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import simplejpeg
import torch
from isal.isal_zlib import crc32  # zlib's, many times as fast
from torch import Tensor

from swath.shards.bands import InputContract
from swath.shards.codec import DecodeError, decode
from swath.shards.errors import InputError
from swath.shards.index import FORMATS, KEYS, NO_TIME, VALID, columns_of, open_index
from swath.shards.index import NAME as INDEX
from swath.shards.manifest import NAME as MANIFEST
from swath.shards.manifest import Manifest, Shard, parse_manifest, read_manifest
from swath.shards.skips import Skips
from swath.shards.stores.cache import CacheOptions
from swath.shards.stores.remote import is_remote
from swath.shards.stores.store import RemoteStore, StagedStore, Store, open_store
from swath.shards.writer import seconds

log = logging.getLogger("swath")
_Member = tuple[int, int, int, int, int, float, float]  # the fields of MEMBER, in its order
VALID_NODATA, VALID_CLEAR, VALID_CLOUD, VALID_SHADOW = 0, 1, 2, 3


@dataclass
class Stored:
    """One modality of a batch as it is stored: DN, not yet scaled. Smaller samples are padded at the right and the bottom.

    `pixels` (B, C, H, W) in the stored dtype, of a series (B, dates · C, H, W); `valid` (B, 1, H, W), of a series (B, dates, H,
    W), uint8 codes or None where every pixel is clear: a sample without this modality is nodata everywhere. `size` (B, 2) rows
    and columns; `scale`, `add` (B,) float64.
    """

    pixels: Tensor
    valid: Tensor | None
    size: Tensor
    scale: Tensor
    add: Tensor

    def each(self, change: Any) -> Self:
        """A copy with `change` applied to every tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: None if v is None else change(v) for name, v in values.items()})


@dataclass
class Chips:
    """A batch as it is stored: its modalities, and `id`, `visit`, `label` (B,) int64.

    `meta` holds float64: `lat`, `lon` in degrees of the centre, `gsd_m`, and `time` in UTC seconds since 1970, all (B,) and NaN
    where unknown; of a series `time` is (B, dates).
    """

    stored: dict[str, Stored]
    id: Tensor
    visit: Tensor
    label: Tensor
    meta: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Chips":
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def part(self, rows: slice) -> "Chips":
        """Some of the samples."""
        return self.each(lambda tensor: tensor[rows])

    def each(self, change: Any) -> "Chips":
        """A copy with `change` applied to every tensor."""
        return Chips(
            {name: stored.each(change) for name, stored in self.stored.items()},
            change(self.id), change(self.visit), change(self.label),
            {name: change(tensor) for name, tensor in self.meta.items()},
        )  # fmt: skip


class Damaged(InputError):
    """One sample cannot be read, whatever the rest is like."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class ShardReader:
    """A folder of shards, or the address of one (s3://, gs://, https://), whose files come through a `cache`.

    Opening reads the manifest and maps the index; tars are mapped when first needed. A damaged sample raises Damaged; with
    `skips` it is counted there instead and is nodata everywhere.
    """

    def __init__(
        self,
        place: Path | str,
        modalities: Sequence[str] | None = None,
        *,
        cache: CacheOptions | None = None,
        skips: Skips | None = None,
    ) -> None:
        self.place = str(place)
        self.store: Store = open_store(place, cache)
        self.manifest: Manifest = (
            parse_manifest(self.store.read(MANIFEST), self.place) if is_remote(place) else read_manifest(Path(place))
        )
        self.skips = skips
        self._skipped: set[int] = set()
        self.contracts = {name: self.manifest.contract(name) for name in modalities or self.manifest.contracts}
        self._map_index()
        if len(self.index) != self.manifest.samples:
            raise InputError(
                f"{self.place}: the index has {len(self.index)} samples, the manifest {self.manifest.samples}; "
                f"`swath index {self.place}` rebuilds it"
            )
        self._ahead: dict[str, Shard] = {}

    def stage(self, cache: CacheOptions, *, speaks: bool = True) -> None:
        """Read a local folder through copies in `cache` from now on, see StagedStore; a cache that cannot be had is gone without.
        Remote shards have one already."""
        if isinstance(self.store, RemoteStore):
            return
        try:
            self.store = StagedStore(Path(self.place), cache, speaks=speaks)
        except InputError as error:
            if speaks:
                log.warning("data.stage: %s; reading %s where it is", error, self.place)
            return
        self._map_index()

    def fill(self, shards: Sequence[int]) -> None:
        """Copy these, by their number, in that order, in the background, as far as there is room."""
        self.store.fill([self.manifest.shards[number] for number in shards])

    def _map_index(self) -> None:
        index, keys = (self.store.path(name, *self._stated(name)) for name in (INDEX, KEYS))
        self.index = open_index(index, keys, columns_of(list(self.manifest.contracts), self.manifest.maps), self.place)

    def _stated(self, name: str) -> tuple[int | None, str | None]:
        """(bytes, SHA-256) of a file as the manifest has them."""
        stated = self.manifest.files.get(name)
        return (stated.bytes, stated.sha256) if stated else (None, None)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def contract(self) -> InputContract:
        """Of the only modality; InputError where there are several."""
        if len(self.contracts) > 1:
            raise InputError(f"data set {self.manifest.dataset} has modalities {', '.join(self.contracts)}; name one of them")
        return next(iter(self.contracts.values()))

    @property
    def shard_sizes(self) -> list[int]:
        return [shard.samples for shard in self.manifest.shards]

    @property
    def labels(self) -> np.ndarray:
        """(N,) int32 class numbers into `manifest.classes`; -1 where a sample has none."""
        return self.index.samples["label"]

    def has(self, number: int, column: str) -> bool:
        """Whether a sample has the modality or other member `column`."""
        return self.index.members[number, self._column(column)]["format"] != FORMATS.index("absent")

    def pixels(self, number: int, modality: str | None = None) -> np.ndarray:
        """(C, H, W) of one sample as stored, of a series (dates · C, H, W); the sample must have the modality."""
        modality = modality or self.contract.modality
        return self._decode(number, modality, self._members(number, modality).item())

    def valid(self, number: int, modality: str | None = None) -> np.ndarray | None:
        """(1 or dates, H, W) uint8 validity codes, or None where every pixel is clear."""
        column = (modality or self.contract.modality) + VALID
        return self._decode(number, column, self._members(number, column).item()) if self.has(number, column) else None

    def label_map(self, number: int, name: str) -> np.ndarray | None:
        """(1, H, W) codes or (n, H, W) shares of one of `manifest.maps`, or None where the sample has none."""
        return self._decode(number, name, self._members(number, name).item()) if self.has(number, name) else None

    def meta(self, number: int) -> dict[str, Any]:
        """The sample's JSON; of a foreign sample without one `captions`, if it has a text, or nothing."""
        if not self.has(number, "json"):
            return {}
        member = self._members(number, "json")
        data = bytes(self._bytes(number, "json", member.item()))
        if FORMATS[member["format"]] == "txt":
            return {"captions": [data.decode("utf-8-sig", errors="replace").strip()]}
        value = json.loads(data)
        return value if isinstance(value, dict) else {}

    def prefetch(self, names: Sequence[str]) -> None:
        """Shards of a remote folder that will be needed, in that order; where there are many, those named first give way."""
        if all(name in self._ahead for name in names):
            return
        shards = {shard.name: shard for shard in self.manifest.shards}
        self._ahead |= {name: shards[name] for name in names}
        while sum(shard.bytes for shard in self._ahead.values()) > self.store.capacity // 2 and len(self._ahead) > len(names):
            self._ahead.pop(next(iter(self._ahead)))
        self.store.prefetch(self._ahead.values())

    def close(self) -> None:
        """End what goes on in the background."""
        self.store.close()

    def chips(self, numbers: Sequence[int] | np.ndarray, visits: np.ndarray | None = None) -> Chips:
        """The samples `numbers`, decoded into one batch."""
        numbers = np.asarray(numbers)
        while True:
            try:
                return self._chips(numbers, visits)
            except Damaged as error:
                if self.skips is None:
                    raise
                shard = self.manifest.shards[int(self.index.members[error.number, -1]["shard"])].name
                self.skips.add(f"{self.place}/{shard}", self.index.key(error.number), str(error))
                self._skipped.add(error.number)

    def _chips(self, numbers: np.ndarray, visits: np.ndarray | None) -> Chips:
        if len(wrong := self.index.damaged(numbers)):
            raise InputError(
                f"{self.place}: the index row of sample {self.index.key(int(wrong[0]))} is damaged; "
                f"`swath index {self.place}` rebuilds it from the shards"
            )
        samples = self.index.samples[numbers]
        stored = {name: self._stored(numbers, contract) for name, contract in self.contracts.items()}
        meta = {name: torch.from_numpy(samples[name].astype(np.float64)) for name in ("lat", "lon", "gsd_m")}
        meta["time"] = torch.from_numpy(self._times(numbers, samples["time"]))
        return Chips(
            stored,
            id=torch.from_numpy(samples["id"].astype(np.int64)),
            visit=torch.from_numpy(np.zeros(len(numbers), np.int64) if visits is None else visits),
            label=torch.from_numpy(samples["label"].astype(np.int64)),
            meta=meta,
        )

    def _times(self, numbers: np.ndarray, time: np.ndarray) -> np.ndarray:
        """(B,) of the index; of a series (B, dates) of the samples' JSON."""
        series = next((c for c in self.contracts.values() if c.dates > 1), None)
        if series is None:
            return _unknown_as_nan(time)
        made = np.full((len(numbers), series.dates), NO_TIME)
        for row, number in enumerate(numbers):
            told = self.meta(int(number)).get("times")
            dates = told.get(series.modality) if isinstance(told, dict) else None
            if isinstance(dates, list) and len(dates) == series.dates:
                made[row] = [seconds(date) for date in dates]
        return _unknown_as_nan(made)

    def _stored(self, numbers: np.ndarray, contract: InputContract) -> Stored:
        members = self._members(numbers, contract.modality)
        present = members["format"] != FORMATS.index("absent")
        if self._skipped:
            present &= ~np.isin(numbers, list(self._skipped))
        pixels, size = self._batch(numbers, contract, members, present)
        masks = self._members(numbers, contract.modality + VALID)
        masked = masks["format"] != FORMATS.index("absent")
        valid = None
        if masked.any() or not present.all() or (size != size[0]).any():
            valid = np.zeros((len(numbers), contract.dates, *pixels.shape[2:]), dtype=np.uint8)
            for row in np.flatnonzero(present):
                height, width = size[row]
                column = contract.modality + VALID
                codes = self._decode(int(numbers[row]), column, masks[row].item()) if masked[row] else VALID_CLEAR
                valid[row, :, :height, :width] = codes
        return Stored(
            pixels=torch.from_numpy(pixels),
            valid=None if valid is None else torch.from_numpy(valid),
            size=torch.from_numpy(size),
            scale=torch.from_numpy(np.where(present, members["scale"], 1.0)),
            add=torch.from_numpy(members["add"].astype(np.float64)),
        )

    def _batch(
        self, numbers: np.ndarray, contract: InputContract, members: np.ndarray, present: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(B, C, H, W) and sizes (B, 2). Chips of one known size are decoded straight into their place."""
        name, height, width = contract.modality, contract.height, contract.width
        rows = np.flatnonzero(present)
        where = list(zip(rows.tolist(), numbers[rows].tolist(), members[rows].tolist(), strict=True))
        if height is None or width is None:
            arrays = {row: self._decode(number, name, member) for row, number, member in where}
            size = np.ones((len(numbers), 2), dtype=np.int64) * max((a.shape[1:] for a in arrays.values()), default=(1, 1))
            for row, array in arrays.items():
                size[row] = array.shape[1:]
            out = np.zeros((len(numbers), contract.channels, *size.max(axis=0)), dtype=contract.dtype)
            for row, array in arrays.items():
                self._check(int(numbers[row]), name, array.shape, (contract.channels, *array.shape[1:]))
                out[row, :, : array.shape[1], : array.shape[2]] = array
            return out, size
        size = np.tile(np.array([[height, width]], dtype=np.int64), (len(numbers), 1))
        is_jpeg = members["format"] == FORMATS.index("jpg")
        if contract.channels == 3 and is_jpeg.all() and present.all():
            out_bhwc = np.empty((len(numbers), height, width, 3), dtype=np.uint8)
            for row, number, member in where:
                self._jpeg_into(number, name, member, out_bhwc[row])
            return np.moveaxis(out_bhwc, 3, 1), size
        out = (np.empty if present.all() else np.zeros)((len(numbers), contract.channels, height, width), dtype=contract.dtype)
        for row, number, member in where:
            array = self._decode(number, name, member)
            self._check(number, name, array.shape, out.shape[1:])
            out[row] = array
        return out, size

    def _check(self, number: int, column: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if shape != expected:
            raise self._damaged(number, column, f"shape {shape} instead of {expected}")

    def _jpeg_into(self, number: int, column: str, member: _Member, place_hwc: np.ndarray) -> None:
        try:
            made = simplejpeg.decode_jpeg(self._bytes(number, column, member), buffer=place_hwc)
        except ValueError as error:
            raise self._damaged(number, column, str(error)) from None
        self._check(number, column, made.shape, place_hwc.shape)

    def _decode(self, number: int, column: str, member: _Member) -> np.ndarray:
        if member[4] >= len(FORMATS):
            raise self._damaged(number, column, f"its format in the index, {member[4]}, is none")
        try:
            return decode(self._bytes(number, column, member), FORMATS[member[4]])
        except DecodeError as error:
            raise self._damaged(number, column, str(error)) from None

    def _column(self, name: str) -> int:
        return self.index.columns.index(name)

    def _members(self, numbers: Any, column: str) -> np.ndarray:
        """Of the index, (B,) of MEMBER; () of a single number. Read them by `tolist` or `item`: ten times as fast as by name."""
        return self.index.members[numbers, self._column(column)]

    def _bytes(self, number: int, column: str, member: _Member) -> memoryview:
        start, length, row, checksum = member[:4]
        if row >= len(self.manifest.shards):
            raise InputError(
                f"{self.place}: the index has sample {self.index.key(number)} in shard number {row}, the manifest has "
                f"{len(self.manifest.shards)} shards; `swath index {self.place}` rebuilds it"
            )
        shard = self.manifest.shards[row]
        for _ in range(2):
            data = self.store.shard(shard)[start : start + length]
            if len(data) == length and crc32(data) == checksum:
                return data
            if not self.store.forget(shard):  # a damaged copy in the cache is fetched anew
                break
        raise self._damaged(number, column, "its bytes do not match the checksum in the index")

    def _damaged(self, number: int, column: str, what: str) -> Damaged:
        shard = self.manifest.shards[int(self.index.members[number, self._column(column)]["shard"])].name
        return Damaged(
            number,
            f"sample {self.index.key(number)} in shard {self.place}/{shard} is damaged: {what}; "
            "copy the shard again or make it again",
        )


def _unknown_as_nan(time: np.ndarray) -> np.ndarray:
    return np.where(time == NO_TIME, np.nan, time.astype(np.float64))
