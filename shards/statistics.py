"""Statistics per band in one pass, mergeable in any grouping: exact counts, moments, and a sketch for percentiles.

Moments are merged as in Chan, Golub and LeVeque (1979). The sketch counts values rounded to bfloat16, a histogram whose
buckets grow with the value, as those of DDSketch (Masson, Rim and Lee, 2019) do: it needs no range beforehand, merging is
addition of whole numbers, and so percentiles do not depend on how the work was divided.
"""

import base64
import zlib
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

CLEAR, NODATA = 1, 0  # codes of `valid`
_BUCKETS = 1 << 16  # of bfloat16: sign, 8 bits of exponent, 7 of fraction
_CHUNK = 1 << 18  # values that are worked on at a time: they stay in the cache, and a large scene costs no memory
_PENDING = 1 << 22  # values that wait to be counted together
_MOMENTS = ("mean", "m2", "minimum", "maximum")
_COUNTS = ("pixels", "invalid", "count")


class Statistics:
    """Per band, (C,) each: of all `pixels` seen, `invalid` had no value, and `count` were clear and had one (int64); of these
    `mean`, `m2` (sum of squared deviations), `minimum` and `maximum` (float64, physical). The rest was cloud or shadow."""

    def __init__(self, bands: int) -> None:
        self.bands = bands
        self.pixels, self.invalid, self._count = (np.zeros(bands, dtype=np.int64) for _ in _COUNTS)
        self._mean, self._m2 = np.zeros(bands), np.zeros(bands)
        self._minimum, self._maximum = np.full(bands, np.inf), np.full(bands, -np.inf)
        none = np.zeros(0, np.uint16), np.zeros(0, np.int64)
        self._sketch = [none] * bands  # per band the buckets that are not empty, ascending, and their counts
        # what waits to be counted together, as (first band, block (bands, n)): short integers by scale, add and type, which
        # then give the moments too; of other types the buckets
        self._pending: dict[tuple[float, float, np.dtype[Any]] | None, list[tuple[int, np.ndarray]]] = {}
        self._waiting = 0

    def add(
        self,
        values_chw: np.ndarray,
        valid_hw: np.ndarray | None = None,
        *,
        scale: float = 1.0,
        add: float = 0.0,
        nodata: float | None = None,
    ) -> None:
        """Take in one array as stored, whose physical values are `values · scale + add`.

        `valid_hw` holds the codes of `Part.valid` (a bool mask is the same): 1 counts, 0 is invalid, others are left out. A
        value that is `nodata` or not finite is invalid in its own band. A series has values (T · C, H, W), date after date,
        and a mask (T, H, W), or (H, W) for all dates; the statistics of a band are over all of them.
        """
        dates, rest = divmod(len(values_chw), self.bands)
        if rest or not dates:
            raise ValueError(f"{len(values_chw)} channels are no whole number of dates of {self.bands} bands")
        flat_tcn = values_chw.reshape(dates, self.bands, -1)
        codes_tn = [None] * dates
        if valid_hw is not None:
            codes_tn = np.broadcast_to(valid_hw.reshape(-1, flat_tcn.shape[2]), (dates, flat_tcn.shape[2]))
        step = max(1, _CHUNK // self.bands)
        for flat_cn, codes_n in zip(flat_tcn, codes_tn, strict=True):
            for start in range(0, flat_cn.shape[1], step):
                part = slice(start, start + step)
                self._add(flat_cn[:, part], None if codes_n is None else codes_n[part], scale, add, nodata)

    def _add(self, flat_cn: np.ndarray, codes_n: np.ndarray | None, scale: float, add: float, nodata: float | None) -> None:
        self.pixels += flat_cn.shape[1]
        if codes_n is not None and not (clear_n := codes_n == CLEAR).all():
            self.invalid += np.count_nonzero(codes_n == NODATA)
            flat_cn = flat_cn.compress(clear_n, axis=1)
        missing_cn = _missing(flat_cn, nodata)
        if missing_cn is None:
            self._take(0, flat_cn, scale, add)
            return
        self.invalid += missing_cn.sum(axis=1)
        for band, (row_n, missing_n) in enumerate(zip(flat_cn, missing_cn, strict=True)):
            self._take(band, row_n[None, ~missing_n], scale, add)

    def _take(self, first: int, stored_cn: np.ndarray, scale: float, add: float) -> None:
        """Count values, all of them good, of the bands from `first` on."""
        bands, count = stored_cn.shape
        if not count:
            return
        if stored_cn.dtype.kind in "iu" and stored_cn.dtype.itemsize <= 2:
            block_cn = stored_cn.astype(stored_cn.dtype.newbyteorder("="))  # a copy in any case
            key = scale, add, block_cn.dtype
        else:
            flat_cn = stored_cn.astype(np.float64)
            mean = flat_cn.mean(axis=1)
            deviation = flat_cn - mean[:, None]
            m2 = np.einsum("cn,cn->c", deviation, deviation)
            ends = np.stack([flat_cn.min(axis=1), flat_cn.max(axis=1)])
            self._merge(slice(first, first + bands), count, mean, m2, ends, scale, add)
            key, block_cn = None, _buckets(flat_cn * scale + add)
        self._pending.setdefault(key, []).append((first, block_cn))
        self._waiting += block_cn.size
        if self._waiting >= _PENDING:
            self._settle()

    def _settle(self) -> None:
        """Count what waits: each of at most 65,536 values once, however many pixels have it."""
        for key, blocks in self._pending.items():
            for band in range(self.bands):
                mine = [block_cn[band - first] for first, block_cn in blocks if first <= band < first + len(block_cn)]
                if not mine:
                    continue
                row_n = np.concatenate(mine)
                unsigned = np.dtype(f"u{row_n.dtype.itemsize}")
                dense = np.bincount(row_n.view(unsigned))
                found = np.flatnonzero(dense)
                keys, times = found.astype(unsigned), dense[found]
                if key is not None:
                    scale, add, dtype = key
                    values = keys.view(dtype).astype(np.float64)
                    mean = np.average(values, weights=times)
                    m2 = np.dot((values - mean) ** 2, times)
                    ends = np.array([[values.min()], [values.max()]])
                    self._merge(slice(band, band + 1), len(row_n), mean, m2, ends, scale, add)
                    keys = _buckets(values * scale + add)
                self._sketch[band] = _joined(self._sketch[band], keys, times)
        self._pending, self._waiting = {}, 0

    def merge(self, other: "Statistics") -> None:
        """Add what `other` has seen. The result depends on the order of merges, in the last bits of the moments only."""
        self._settle()
        other._settle()  # so that it does not matter whether somebody has looked at it before
        self.pixels = self.pixels + other.pixels
        self.invalid = self.invalid + other.invalid
        if other._count.any():
            self._merge(slice(None), other._count, other._mean, other._m2, np.stack([other._minimum, other._maximum]))
        for band, (keys, times) in enumerate(other._sketch):
            if len(keys):
                self._sketch[band] = _joined(self._sketch[band], keys, times)

    def __getstate__(self) -> dict[str, Any]:
        self._settle()  # counts travel between processes, not pixels
        return self.__dict__

    def _merge(self, rows: slice, count: Any, mean: Any, m2: Any, ends: np.ndarray, scale: float = 1.0, add: float = 0.0) -> None:
        """Take in moments and extremes (2, bands) of stored values."""
        had = self._count[rows]
        total = had + count
        share = np.divide(count, total, out=np.zeros(len(total)), where=total > 0)
        delta = mean * scale + add - self._mean[rows]
        self._mean[rows] += delta * share
        self._m2[rows] += m2 * scale**2 + delta * (had * share) * delta
        ends = ends * scale + add
        self._minimum[rows] = np.minimum(self._minimum[rows], ends.min(axis=0))
        self._maximum[rows] = np.maximum(self._maximum[rows], ends.max(axis=0))
        self._count[rows] = total

    @property
    def count(self) -> np.ndarray:
        self._settle()
        return self._count

    @property
    def mean(self) -> np.ndarray:
        self._settle()
        return self._mean

    @property
    def m2(self) -> np.ndarray:
        self._settle()
        return self._m2

    @property
    def minimum(self) -> np.ndarray:
        self._settle()
        return self._minimum

    @property
    def maximum(self) -> np.ndarray:
        self._settle()
        return self._maximum

    @property
    def std(self) -> np.ndarray:
        """Population standard deviation per band."""
        return np.sqrt(np.divide(self.m2, self.count, out=np.zeros(self.bands), where=self.count > 0))

    @property
    def nodata_share(self) -> np.ndarray:
        """Invalid pixels of all pixels, per band."""
        return np.divide(self.invalid, self.pixels, out=np.zeros(self.bands), where=self.pixels > 0)

    def percentiles(self, qs: Sequence[float]) -> np.ndarray:
        """(len(qs), C) float64: the smallest value that `q` % of the values do not exceed, NaN for a band without values.

        Off by at most 2⁻⁸ (0.4 %) of the value, by nothing for 0 and for whole numbers up to 256; never beyond the extremes.
        """
        if not all(0 <= q <= 100 for q in qs):
            raise ValueError(f"percentiles lie between 0 and 100, not {list(qs)}")
        self._settle()
        found = np.full((len(qs), self.bands), np.nan)
        for band, (keys, counts) in enumerate(self._sketch):
            if not len(keys):
                continue
            values = (keys.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
            order = np.argsort(values, kind="stable")
            reached = np.cumsum(counts[order])
            ranks = np.clip(np.ceil(np.asarray(qs, np.float64) / 100 * reached[-1]), 1, reached[-1])
            chosen = values[order][np.searchsorted(reached, ranks)]
            found[:, band] = np.clip(chosen, self.minimum[band], self.maximum[band])
        return found

    def state(self) -> dict[str, Any]:
        """JSON without loss: floats as hexadecimal text, the sketch packed (about 3 kB per band)."""
        self._settle()
        return {
            **{name: getattr(self, name).tolist() for name in _COUNTS},
            **{name: [float(x).hex() for x in getattr(self, name)] for name in _MOMENTS},
            "sketch": [_pack(keys, counts) for keys, counts in self._sketch],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """What `state` described; KeyError, TypeError or ValueError where it is not one."""
        made = cls(len(state["count"]))
        made.pixels, made.invalid, made._count = (np.array(state[name], dtype=np.int64) for name in _COUNTS)
        moments = (np.array([float.fromhex(x) for x in state[name]]) for name in _MOMENTS)
        made._mean, made._m2, made._minimum, made._maximum = moments
        made._sketch = [_unpack(text) for text in state["sketch"]]
        if any(len(state[name]) != made.bands for name in (*_COUNTS, *_MOMENTS, "sketch")):
            raise ValueError("a state of statistics must have one entry per band everywhere")
        if made._count.tolist() != [int(times.sum()) for _, times in made._sketch]:
            raise ValueError("a state of statistics must count the same in its sketch")
        return made


def _missing(flat_cn: np.ndarray, nodata: float | None) -> np.ndarray | None:
    """(C, n) bool where a value is nodata or not finite, None where all are good."""
    missing_cn = None
    if flat_cn.dtype.kind == "f":
        missing_cn = ~np.isfinite(flat_cn)
        if nodata is not None:
            missing_cn |= flat_cn == flat_cn.dtype.type(nodata)
    elif nodata is not None and float(nodata).is_integer() and np.can_cast(np.min_scalar_type(int(nodata)), flat_cn.dtype):
        missing_cn = flat_cn == flat_cn.dtype.type(nodata)  # compared as integers: no copy in floats
    return missing_cn if missing_cn is not None and missing_cn.any() else None


def _buckets(values: np.ndarray) -> np.ndarray:
    """The upper half of each float32's bits, rounded half away from zero."""
    with np.errstate(over="ignore"):  # beyond float32: the outermost bucket, which `percentiles` brings back to the extremes
        bits = values.astype(np.float32).view(np.uint32)
    bits += 0x8000
    bits >>= 16
    return bits.astype(np.uint16)


def _joined(sketch: tuple[np.ndarray, np.ndarray], keys: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sketch with `keys` (uint16, at least one, may repeat) counted in, each as often as `times` says."""
    both = np.concatenate([sketch[0], keys]).astype(np.int64)
    least = int(both.min())
    dense = np.zeros(int(both.max()) + 1 - least, np.int64)
    np.add.at(dense, both - least, np.concatenate([sketch[1], times]))
    found = np.flatnonzero(dense)
    return (found + least).astype(np.uint16), dense[found]


def _pack(keys: np.ndarray, counts: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(keys.astype("<u2").tobytes() + counts.astype("<i8").tobytes())).decode()


def _unpack(text: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        raw = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), 10 * _BUCKETS + 1)
    except zlib.error as error:
        raise ValueError(f"the sketch of a band is damaged: {error}") from None
    count, rest = divmod(len(raw), 10)
    if rest or count > _BUCKETS:
        raise ValueError("the sketch of a band is damaged")
    return np.frombuffer(raw, "<u2", count).astype(np.uint16), np.frombuffer(raw, "<i8", count, 2 * count).astype(np.int64)
