"""Choices by place, made before anything is decoded: at most one sample per cell, and splits by spatial block.

Cells are those of a grid of rows of equal height whose rows are cut into as many equal pieces as fit, so that all are about
as wide as high, at the poles too (as Major TOM's grid is made, Francis and Czerkawski, 2024). Lengths are great-circle km on a
sphere.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from swath.shards.errors import InputError
from swath.shards.identity import hash_text
from swath.shards.ingestion.quality import LeftOut
from swath.shards.sources.source import Item
from swath.shards.sources.split import Row

RADIUS_KM = 6371.0088
_NOWHERE = "no location"


def cells(lat: np.ndarray, lon: np.ndarray, km: float) -> np.ndarray:
    """(N,) int64: the cell of about `km` × `km` in which each point (degrees) lies."""
    rows = max(1, round(np.pi * RADIUS_KM / km))
    row = np.clip(np.floor((lat + 90) / 180 * rows), 0, rows - 1).astype(np.int64)
    middle = np.radians((row + 0.5) / rows * 180 - 90)
    columns = np.maximum(1, np.rint(2 * np.pi * RADIUS_KM * np.cos(middle) / km)).astype(np.int64)
    column = np.minimum(np.floor(np.mod(lon + 180, 360) / 360 * columns).astype(np.int64), columns - 1)
    return (row << 32) | column


def thin(items: Sequence[Item], dataset: str, km: float) -> tuple[list[Item], LeftOut]:
    """At most one item per cell of `km`, the one whose hash of (data set, key) is smallest, in the order given; what is left out.

    Items whose place is not known before decoding are left out too. Raises InputError where that is all of them.
    """
    if not 0.01 <= km <= 20_000:
        raise InputError(f"cells of {km} km: 0.01 to 20000 are possible")
    lat, lon, known = _places(items, "thinning by place")
    best: dict[int, tuple[int, str]] = {}
    rank = [(hash_text(dataset, item.key), item.key) for item in items]
    cell = np.where(known, cells(lat, lon, km), -1).tolist()
    for place, one in zip(cell, rank, strict=True):
        best[place] = min(one, best.get(place, one))
    kept, left_out = [], LeftOut()
    for item, place, one in zip(items, cell, rank, strict=True):
        if place < 0:
            left_out.add(_NOWHERE, item.key)
        elif best[place] != one:
            left_out.add(f"another sample in the same cell of {km:g} km", item.key)
        else:
            kept.append(item)
    return kept, left_out


@dataclass
class Spatial:
    """`rows`: the split and block of each item, None where it is left out; `blocks`: how many each split has samples in."""

    rows: list[Row | None]
    blocks: dict[str, int]
    left_out: LeftOut


def assign_blocks(
    items: Sequence[Item], fractions: dict[str, float], *, block_km: float, buffer_km: float = 0.0, seed: int = 0
) -> Spatial:
    """Split `items` by blocks of `block_km`: a block falls to a split by its hash, with the probability that `fractions` says.

    With `buffer_km` no two samples of different splits are that near or nearer, from centre to centre (so add the diagonal of a
    chip where footprints must not touch): the split with the larger fraction gives up samples, of equal ones the one named
    first. Raises InputError for fractions that are none, for items without a place, and when a split stays empty.
    """
    _check(fractions, block_km, buffer_km)
    lat, lon, known = _places(items, "a split by blocks")
    block = np.where(known, cells(lat, lon, block_km), -1)
    names, ends = list(fractions), np.cumsum(list(fractions.values()))
    drawn = {b: (hash_text(str(seed), str(b)) & ((1 << 53) - 1)) / (1 << 53) for b in set(block.tolist())}
    place = np.array([drawn[b] for b in block.tolist()]) * ends[-1]
    split = np.where(known, np.minimum(np.searchsorted(ends, place, side="right"), len(names) - 1), -1)
    left_out = LeftOut()
    for number in np.flatnonzero(~known).tolist():
        left_out.add(_NOWHERE, items[number].key)
    if buffer_km > 0:
        order = sorted(range(len(names)), key=lambda i: (fractions[names[i]], -i))
        for number, reason in _too_near(names, split, order, _on_sphere(lat, lon), buffer_km):
            left_out.add(reason, items[number].key)
    rows = [
        None if mine < 0 else Row(names[mine], item.label, where)
        for item, mine, where in zip(items, split.tolist(), block.tolist(), strict=True)
    ]
    used = Counter(name for name, _ in {(row.split, row.block) for row in rows if row is not None})
    if empty := [name for name, fraction in fractions.items() if fraction > 0 and not used[name]]:
        raise InputError(
            f"the split by blocks leaves nothing for {', '.join(empty)}: the samples lie in {len(drawn)} blocks of "
            f"{block_km:g} km, the buffer is {buffer_km:g} km; smaller ones would do"
        )
    return Spatial(rows, {name: used[name] for name in names}, left_out)


def _too_near(names: list[str], split: np.ndarray, order: list[int], points: np.ndarray, km: float) -> Iterator[tuple[int, str]]:
    """Set to -1 in `split` what lies within `km` of a sample of a split that stands earlier in `order`; say which and why."""
    from scipy.spatial import KDTree  # a third of a second, for this only

    # a straight line through the sphere; what is near but for rounding is near
    chord = 2 * np.sin(min(km / RADIUS_KM, np.pi) / 2) * (1 + 1e-9) + 1e-12
    for position, giving in enumerate(order):
        for keeping in order[:position]:
            mine, theirs = np.flatnonzero(split == giving), np.flatnonzero(split == keeping)
            if not len(mine) or not len(theirs):
                continue
            distance, _ = KDTree(points[theirs]).query(points[mine], distance_upper_bound=chord)
            near = mine[np.isfinite(distance)]
            split[near] = -1
            for number in near.tolist():
                yield number, f"{names[giving]} within {km:g} km of {names[keeping]}"


def _on_sphere(lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
    """(N, 3) on the unit sphere."""
    phi, lam = np.radians(lat), np.radians(lon)
    return np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], axis=1)


def _places(items: Sequence[Item], asked: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latitude, longitude (0 where not known) and whether they are known; (N,) each."""
    known = np.array([item.lat is not None and item.lon is not None for item in items], bool)
    lat = np.array([item.lat if ok else 0.0 for item, ok in zip(items, known, strict=True)], np.float64)
    lon = np.array([item.lon if ok else 0.0 for item, ok in zip(items, known, strict=True)], np.float64)
    if not known.any():
        raise InputError(f"{asked} needs the place of each sample, and none has one before it is decoded")
    good = np.isfinite(lat) & np.isfinite(lon) & (np.abs(lat) <= 90) & (np.abs(lon) <= 360)
    if not good.all():
        item = items[int(np.argmin(good))]
        raise InputError(f"{item.key}: latitude {item.lat}, longitude {item.lon} are no degrees; is the order right?")
    return lat, lon, known


def _check(fractions: dict[str, float], block_km: float, buffer_km: float) -> None:
    for name, fraction in fractions.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) or name == "journal":
            raise InputError(f"{name!r} cannot be the name of a split: letters, digits, _ and - make one")
        if not 0 <= fraction <= 1:
            raise InputError(f"the fraction of {name} must lie between 0 and 1, not {fraction}")
    if abs(sum(fractions.values()) - 1) > 1e-6:
        raise InputError(f"the fractions of the splits must sum to 1, not {sum(fractions.values()):g}")
    if not 0.01 <= block_km <= 20_000 or not 0 <= buffer_km <= 20_000:
        raise InputError(f"blocks of {block_km} km with a buffer of {buffer_km} km: 0.01 to 20000 and 0 to 20000 are possible")
