"""One pass over an index: what it says of all samples, without a tar being opened.

A few million rows at a time, vectorised, so that ten million samples take seconds and little memory.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from swath.shards.index import FORMATS, NO_TIME, VALID
from swath.shards.reader import ShardReader

CHUNK = 1 << 20  # samples
MOST = 64  # candidates for a contact sheet in one chunk
_PAIRS = 1000  # of scale and add that are told apart


@dataclass
class Extent:
    """Of the values that are known: least, greatest, and how many there are."""

    low: float = np.inf
    high: float = -np.inf
    count: int = 0

    def add(self, values: np.ndarray) -> None:
        if len(values):
            self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
            self.count += len(values)


@dataclass
class Stored:
    """Of one modality: samples that have it and that have a mask, {(scale, add): samples}, the first sample of each pair,
    and the numbers of samples that are spread evenly among those that have it."""

    samples: int = 0
    masked: int = 0
    pairs: Counter[tuple[float, float]] = field(default_factory=Counter)
    first: dict[tuple[float, float], int] = field(default_factory=dict)
    spread: list[int] = field(default_factory=list)

    def add(self, start: int, members: np.ndarray, masks: np.ndarray) -> None:
        """Take in the columns of a modality and of its mask, from sample `start` on."""
        rows = np.flatnonzero(members["format"] != FORMATS.index("absent"))
        self.samples += len(rows)
        self.masked += int(np.count_nonzero(masks["format"] != FORMATS.index("absent")))
        if not len(rows):
            return
        self.spread += (start + rows[np.unique(np.linspace(0, len(rows) - 1, MOST).round().astype(int))]).tolist()
        both = np.stack([members["scale"][rows], members["add"][rows]], axis=1).view(np.complex128)[:, 0]
        if (both == both[0]).all():
            found = both[:1], np.zeros(1, int), np.array([len(both)])
        else:
            found = np.unique(both, return_index=True, return_counts=True)
        for pair, index, count in zip(*(part.tolist() for part in found), strict=True):
            key = (pair.real, pair.imag)
            if key in self.first or len(self.first) < _PAIRS:
                self.first.setdefault(key, start + int(rows[index]))
                self.pairs[key] += count

    def chosen(self, most: int) -> list[int]:
        """At most `most` numbers of samples that have the modality, ascending."""
        places = np.unique(np.linspace(0, len(self.spread) - 1, most).round().astype(int)) if self.spread else []
        return [self.spread[place] for place in places]


@dataclass
class Survey:
    """What the index says. `labels` (classes + 2,): samples without a label, of each class, and of no class that there is.

    `time` in UTC seconds since 1970; `lon` within ±180 and `lon_east` within 0 to 360, degrees; `off_globe` counts positions
    that are none.
    """

    labels: np.ndarray
    stored: dict[str, Stored]
    time: Extent = field(default_factory=Extent)
    gsd_m: Extent = field(default_factory=Extent)
    lat: Extent = field(default_factory=Extent)
    lon: Extent = field(default_factory=Extent)
    lon_east: Extent = field(default_factory=Extent)
    off_globe: int = 0

    @property
    def longitudes(self) -> tuple[float, float]:
        """West and east; east is above 180 where the samples lie across the date line, and not almost all around the globe."""
        around, across = (extent.high - extent.low for extent in (self.lon, self.lon_east))
        view = self.lon_east if across < around - 20 else self.lon
        return view.low, view.high


def survey(reader: ShardReader) -> Survey:
    """Count what there is in the index of `reader`."""
    classes, columns = len(reader.manifest.classes), reader.index.columns
    made = Survey(np.zeros(classes + 2, np.int64), {name: Stored() for name in reader.contracts})
    for start in range(0, len(reader), CHUNK):
        samples, members = (table[start : start + CHUNK] for table in (reader.index.samples, reader.index.members))
        labels = samples["label"].astype(np.int64)
        labels[(labels < -1) | (labels >= classes)] = classes
        made.labels += np.bincount(labels + 1, minlength=classes + 2)
        made.time.add(samples["time"][samples["time"] != NO_TIME])
        made.gsd_m.add(samples["gsd_m"][np.isfinite(samples["gsd_m"])])
        lat, lon, off = positions(samples)
        made.lat.add(lat)
        made.lon.add(lon)
        made.lon_east.add(lon % 360)
        made.off_globe += off
        for name, stored in made.stored.items():
            stored.add(start, members[:, columns.index(name)], members[:, columns.index(name + VALID)])
    return made


def positions(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Latitudes and longitudes (N,) float64 in degrees within ±90 and [-180, 180) of those that have any, and how many lie
    off the globe."""
    lat, lon = samples["lat"].astype(np.float64), samples["lon"].astype(np.float64)
    on = (np.abs(lat) <= 90) & (np.abs(lon) <= 360)
    off = int(np.count_nonzero(~on & ~(np.isnan(lat) | np.isnan(lon))))
    return lat[on], (lon[on] + 180) % 360 - 180, off
