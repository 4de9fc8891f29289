"""Which items of a source are read at all: by place, date, cloud as their metadata have it, and as a sample."""

import json
import re
from calendar import monthrange
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np

from swath.shards.errors import InputError
from swath.shards.identity import hash_text
from swath.shards.ingestion.blocks import cells, thin
from swath.shards.ingestion.quality import LeftOut
from swath.shards.ingestion.work import Job
from swath.shards.writer import NO_TIME, seconds

Stratum = Literal["class", "place", "time"]
_CELL_KM = 100  # of the strata by place
_FILE_BYTES = 64 << 20
_NUMBER = r"\s*[-+]?\d+(?:\.\d*)?\s*"


@dataclass(frozen=True)
class Selection:
    """What is taken of a source.

    `aoi`: a GeoJSON file of polygons, or "west,south,east,north" in degrees; the centre of an item must lie inside. `dates`:
    "2019-01-01..2019-12-31", both ends within, either may be left out or be a month or a year. `max_cloud`: share of cloud
    and shadow, by the item's metadata before decoding and by decoded codes after. `thin_km`: one item per cell of this size.
    `sample`: so many items, chosen by the hash of their key, the same number of each class, place (cells of 100 km) or time
    (month) where `stratify` says so and there are enough. `drop_duplicates`: the first of samples with the same pixels.
    """

    aoi: str | None = None
    dates: str | None = None
    max_cloud: float = 1.0
    thin_km: float | None = None
    sample: int | None = None
    stratify: Stratum | None = None
    drop_duplicates: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.max_cloud <= 1:
            raise InputError(f"--max-cloud is a share between 0 and 1, not {self.max_cloud}")
        if self.sample is not None and self.sample < 1:
            raise InputError(f"--sample must be at least 1, not {self.sample}")
        if self.stratify is not None and self.sample is None:
            raise InputError(f"--stratify {self.stratify} says how to draw a sample; give its size with --sample")


def select(jobs: list[Job], dataset: str, selection: Selection, left_out: LeftOut) -> list[Job]:
    """All of `selection` but the sample, before anything is decoded. What goes is counted in `left_out`. Raises InputError."""
    if selection.aoi is not None:
        inside = region(selection.aoi)
        lat, lon, known = _places(jobs, f"--aoi {selection.aoi}")
        pairs = zip(known, inside(lat, lon).tolist(), strict=True)
        jobs = _kept(jobs, ["no location" if not ok else None if near else "outside --aoi" for ok, near in pairs], left_out)
    if selection.dates is not None:
        first, end = period(selection.dates)
        times = [seconds(job.item.time) for job in jobs]
        if jobs and all(time == NO_TIME for time in times):
            raise InputError(f"--dates {selection.dates} needs the time of each item, and none has one before it is decoded")
        why = ["no date" if time == NO_TIME else None if first <= time < end else "outside --dates" for time in times]
        jobs = _kept(jobs, why, left_out)
    cloudy = f"more than {selection.max_cloud:.0%} cloud by their metadata"
    jobs = _kept(jobs, [cloudy if (job.item.cloud or 0.0) > selection.max_cloud else None for job in jobs], left_out)
    if selection.thin_km is not None and jobs:
        kept, gone = thin([job.item for job in jobs], dataset, selection.thin_km)
        left_out.merge(gone)
        chosen = {id(item) for item in kept}
        jobs = [job for job in jobs if id(job.item) in chosen]
    return jobs


def _kept(jobs: list[Job], why: Sequence[str | None], left_out: LeftOut) -> list[Job]:
    """Those without a reason to go."""
    kept = []
    for job, reason in zip(jobs, why, strict=True):
        if reason is None:
            kept.append(job)
        else:
            left_out.add(reason, job.item.key)
    return kept


def _places(jobs: list[Job], asked: str) -> tuple[np.ndarray, np.ndarray, list[bool]]:
    """(latitudes, longitudes, whether they are known) of all; InputError where none is."""
    places = [(job.item.lat, job.item.lon) for job in jobs]
    known = [lat is not None and lon is not None for lat, lon in places]
    if jobs and not any(known):
        raise InputError(f"{asked} needs the place of each item, and none has one before it is decoded")
    lat, lon = (np.array([place[axis] if ok else 0.0 for place, ok in zip(places, known, strict=True)], float) for axis in (0, 1))
    return lat, lon, known


def drawn(jobs: list[Job], dataset: str, selection: Selection, left_out: LeftOut) -> list[Job]:
    """The sample that `selection` asks for, in the order given: one of each stratum, then a second, until there are enough."""
    if selection.sample is None or selection.sample >= len(jobs):
        return jobs
    strata = _strata(jobs, selection.stratify)
    order = sorted(range(len(jobs)), key=lambda n: (hash_text("sample", dataset, jobs[n].item.key), jobs[n].key))
    met: Counter[Any] = Counter()
    ranks = np.zeros(len(jobs), np.int64)
    for number in order:
        ranks[number] = met[strata[number]]
        met[strata[number]] += 1
    chosen = set(sorted(order, key=lambda number: ranks[number])[: selection.sample])  # stable: by hash within a rank
    return _kept(jobs, [None if n in chosen else "not drawn for --sample" for n in range(len(jobs))], left_out)


def _strata(jobs: list[Job], by: Stratum | None) -> list[Any]:
    """What each job counts as; what is not known of it is a stratum too, unless it is known of none."""
    if by is None:
        return [None] * len(jobs)
    if by == "class":
        made: list[Any] = [job.label for job in jobs]
    elif by == "time":
        times = [seconds(job.item.time) for job in jobs]
        made = [None if time == NO_TIME else str(np.datetime64(time, "s"))[:7] for time in times]
    else:
        lat, lon, known = _places(jobs, "--stratify place")
        made = [cell if ok else None for cell, ok in zip(cells(lat, lon, _CELL_KM).tolist(), known, strict=True)]
    if all(stratum is None for stratum in made):
        raise InputError(f"--stratify {by} needs the {by} of each item, and none has one before it is decoded")
    return made


def period(text: str) -> tuple[float, float]:
    """UTC seconds since 1970 [from, to) of a range of dates. Raises InputError."""
    first, dots, last = text.partition("..")
    if not first and not last:
        raise InputError(f"--dates {text!r} names no date; 2019-01-01..2019-12-31 is a range, either end may be left out")
    start = _days(first, text)[0] if first else -np.inf
    end = (_days(last, text) if last else (0.0, np.inf))[1] if dots else _days(first, text)[1]
    if start >= end:
        raise InputError(f"--dates {text!r} ends before it begins")
    return start, end


def _days(text: str, given: str) -> tuple[float, float]:
    """Of a day, a month or a year: its first second and the one after its last."""
    found = re.fullmatch(r"(\d{4})(?:-(\d\d))?(?:-(\d\d))?", text.strip(), re.ASCII)
    try:
        if found is None:
            raise ValueError("not of that form")
        year, month, day = (int(part) if part else None for part in found.groups())
        assert year is not None
        first = date(year, month or 1, day or 1)
        last = date(year, month or 12, day or monthrange(year, month or 12)[1])
        after = last + timedelta(days=1)
    except (ValueError, OverflowError) as error:
        raise InputError(f"--dates {given!r}: {text!r} is no date ({error}); 2019, 2019-07 and 2019-07-31 are") from None
    return tuple(datetime(d.year, d.month, d.day, tzinfo=UTC).timestamp() for d in (first, after))  # pyright: ignore[reportReturnType]


def region(text: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """(latitudes, longitudes), (N,) each in degrees → (N,) bool: inside. Raises InputError.

    Edges are straight in degrees, as RFC 7946 has it. Boxes with west > east and longitudes up to ±360 cross the date line.
    """
    if re.fullmatch(",".join([_NUMBER] * 4), text):
        west, south, east, north = (float(part) for part in text.split(","))
        east += 360 * (east < west)
        if not (-90 <= south < north <= 90 and -360 <= west < east <= 540 and east - west <= 360):
            raise InputError(f"--aoi {text} is no box; give west,south,east,north in degrees")
        polygons = [[np.array([(west, south), (east, south), (east, north), (west, north), (west, south)])]]
    else:
        polygons = _polygons(Path(text))
    return lambda lat, lon: _inside(polygons, lat, lon)


def _inside(polygons: list[list[np.ndarray]], lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
    """Even-odd rule over the rings of each polygon, at each turn around the globe; points are sorted so that an edge sees few."""
    order = np.argsort(lat, kind="stable")
    y, x = lat[order], np.mod(lon[order] + 180, 360) - 180
    found = np.zeros(len(y), bool)
    for rings in polygons:
        ends = [ring[:, 0] for ring in rings]
        low, high = min(float(e.min()) for e in ends), max(float(e.max()) for e in ends)
        for turn in range(int(np.floor((low - 180) / 360)), int(np.ceil((high + 180) / 360)) + 1):
            odd = np.zeros(len(y), bool)
            for ring in rings:
                for (x0, y0), (x1, y1) in zip(ring[:-1].tolist(), ring[1:].tolist(), strict=True):
                    a, b = np.searchsorted(y, sorted((y0, y1)))
                    if y0 != y1 and a < b:
                        odd[a:b] ^= x[a:b] + 360 * turn < x0 + (y[a:b] - y0) * ((x1 - x0) / (y1 - y0))
            found |= odd
    inside = np.zeros(len(y), bool)
    inside[order] = found
    return inside


def _polygons(path: Path) -> list[list[np.ndarray]]:
    """Per polygon its rings, (n, 2) of longitude and latitude each."""
    try:
        if path.stat().st_size > _FILE_BYTES:
            raise InputError(f"--aoi {path} has more than {_FILE_BYTES >> 20} MiB; simplify its polygons")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        what = getattr(error, "strerror", None) or error
        raise InputError(f"--aoi {path} is neither a GeoJSON file ({what}) nor west,south,east,north in degrees") from None
    made: list[list[np.ndarray]] = []
    waiting = [value]
    try:
        while waiting:
            one = waiting.pop()
            kind = one["type"]
            if kind == "Feature":
                waiting.append(one["geometry"])
            elif kind in ("FeatureCollection", "GeometryCollection"):
                waiting.extend(one["features" if kind == "FeatureCollection" else "geometries"])
            elif kind in ("Polygon", "MultiPolygon"):
                parts = [one["coordinates"]] if kind == "Polygon" else one["coordinates"]
                made.extend([_ring(path, ring) for ring in part] for part in parts)
            else:
                raise InputError(f"--aoi {path} holds a {str(kind)[:40]}; an area is of polygons")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"--aoi {path} is no GeoJSON of polygons ({type(error).__name__}: {str(error)[:80]})") from None
    if not any(made):
        raise InputError(f"--aoi {path} holds no polygon")
    return [rings for rings in made if rings]


def _ring(path: Path, ring: Any) -> np.ndarray:
    points = np.array([point[:2] for point in ring], np.float64).reshape(-1, 2)
    if len(points) < 3 or not (np.abs(points) <= (360, 90)).all():  # NaN is none
        raise InputError(f"--aoi {path}: a ring has fewer than 3 points, or they are not longitude and latitude in degrees")
    closed = np.concatenate([points, points[:1]])
    step = np.abs(np.diff(closed[:, 0]))
    if (bad := np.flatnonzero((step > 180) & (step < 360))).size:
        a, b = closed[bad[0], 0], closed[bad[0] + 1, 0]
        raise InputError(
            f"--aoi {path}: an edge from longitude {a:g} to {b:g} could go either way round; cut the polygon at the date line, "
            "write longitudes beyond 180, or add a point between"
        )
    return closed
