"""Several dates of one place in a sample, all read on the grid of the first."""

from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from swath.shards.bands import InputContract
from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.manifest import LabelMap
from swath.shards.sources.beside import TWO_DATES, read_codes
from swath.shards.sources.cut import CHANGE, Scenes, same_codes
from swath.shards.sources.match import (
    Dates,
    aligned,
    alike,
    boxes,
    covers,
    days_apart,
    neighbours,
)
from swath.shards.sources.on_grid import check_size, grid_of, mark, on_ground, part_on, told
from swath.shards.sources.scene import Grid
from swath.shards.sources.source import Item, Part, Sample, Source
from swath.shards.writer import seconds

_ALIKE = 0.5  # share of each other's ground from which on two scenes show one place


class Series:
    """Several dates of one place in a sample: all modalities of `source` become series of `dates.count`. Raises InputError.

    Label maps are those of the first date. What changed is known between the first date of a place and its last, so of samples
    that begin and end with these.
    Scenes that share most of their ground are of one place, and are read on the grid of its first; those that differ in scale
    or offset, which a series has one of, come into different samples.
    """

    def __init__(self, source: Source, dates: Dates, resampling: str = "nearest") -> None:
        if not on_ground(source):
            raise InputError(f"--dates-per-sample needs scenes with a georeference; {source.dataset} ({source.kind}) has none")
        timeless = [scene.name for scene in source.scenes if scene.broken is None and scene.time is None]
        if timeless:
            raise InputError(f"{timeless[0]} has no time, so it cannot be put in order; ISO 8601 in its name would do")
        self.source, self.dates, self.resampling = source, dates, resampling
        self.dataset, self.kind, self.classes = source.dataset, f"{source.kind} in series", source.classes
        self.fingerprint = mark(source.fingerprint, dates, resampling)
        lost: Counter[str] = Counter()
        places = _places(source, lost)
        foreign = any(not aligned(source.grids[place[0]], source.grids[n]) for place in places for n in place)
        onto = f"{resampling} onto the first date" if foreign else None
        self.contracts = {
            name: contract.model_copy(update={"dates": dates.count, "resampling": told(contract, onto)})
            for name, contract in source.contracts.items()
        }
        check_size(source, self.contracts)
        self._last = {place[0]: place[-1] for place in places}
        changes = [(scene.change, scene.stacks[0].grid.bounds) for scene in source.scenes if scene.change is not None]
        codes = same_codes([(path, tuple(read_codes(Path(path), bounds).items())) for path, bounds in changes])
        self.maps = source.maps | ({CHANGE: LabelMap(classes=codes)} if codes else {})
        self.items = _series(source, places, dates, lost)
        if not self.items:
            raise InputError(f"no place of {self.dataset} has {dates.at_least} dates; give a smaller --min-dates")
        taken = Counter(len(item.place[1]) for item in self.items if source.scenes[item.place[1][0]].broken is None)
        self.notes = (
            *(note for note in source.notes if not note.endswith(TWO_DATES)),
            "series: " + ", ".join(f"{count} of {n} date{'s' * (n > 1)}" for n, count in sorted(taken.items())),
            *(f"{count} {words}" for words, count in lost.items() if count),
        )

    def read(self, item: Item) -> Sample:
        place, numbers = item.place
        number, *window = place
        grid = self.source.grids[number]
        scenes = [self.source.scenes[n] for n in numbers]
        if grid is None:
            raise DecodeError(scenes[0].broken or "has no grid")
        samples = [self._date(item, grid, n, window) for n in numbers]
        metas = [
            self.source.place_of(replace(item, time=scene.time), replace(scene, cloud=None), grid, window) for scene in scenes
        ]
        meta: dict[str, Any] = {
            name: value for name, value in metas[0].items() if all(other.get(name) == value for other in metas[1:])
        }
        lacking = [None] * (self.dates.count - len(scenes))
        meta |= {"time": scenes[0].time, "scenes": [scene.name for scene in scenes]}
        parts = {
            name: _stacked([sample.parts.get(name) for sample in samples], contract)
            for name, contract in self.contracts.items()
            if any(name in sample.parts for sample in samples)
        }
        meta["times"] = {
            name: [scene.time if name in sample.parts else None for scene, sample in zip(scenes, samples, strict=True)] + lacking
            for name in parts
        }
        if item.cloud is not None:
            meta["scene_cloud"] = item.cloud
        maps = dict(samples[0].maps)
        if scenes[0].change is not None and len(scenes) > 1 and self._last.get(numbers[0]) == numbers[-1]:
            maps[CHANGE] = self.source.codes_in(scenes[0].change, grid, window)
        return Sample(parts, next((sample.label for sample in samples if sample.label is not None), None), meta, maps)

    def _date(self, item: Item, grid: Grid, number: int, window: list[int]) -> Sample:
        """One scene in a window of the place's grid."""
        scene = self.source.scenes[number]
        if aligned(grid, self.source.grids[number]):
            return self.source.read(replace(item, place=(number, *window)))
        return Sample({s.modality: part_on(self.source, s, grid, window, self.resampling) for s in scene.stacks})


def _places(source: Scenes, lost: Counter[str]) -> list[list[int]]:
    """Scenes by place: the first in time, whose grid counts, and those that share most of its ground. Broken ones are alone."""
    scenes = source.scenes
    order = sorted((n for n, s in enumerate(scenes) if s.broken is None), key=lambda n: (seconds(scenes[n].time), scenes[n].name))
    found = boxes([grid_of(source, n) for n in order])
    places: dict[int, list[int]] = {}
    times: dict[int, set[int]] = {}
    for number, near in zip(order, neighbours(found, found), strict=True):
        firsts, grid = [order[k] for k in near if order[k] in places], grid_of(source, number)
        home = next((first for first in firsts if aligned(grid_of(source, first), grid)), None)
        if home is None and firsts:
            share, best = max((alike(grid_of(source, first), grid), -first) for first in firsts)
            home = -best if share >= _ALIKE else None
        home = number if home is None else home
        time = seconds(scenes[number].time)
        if time in times.setdefault(home, set()):
            lost["scenes are of the same place and time as one before them, and are left out"] += 1
            continue
        times[home].add(time)
        places.setdefault(home, []).append(number)
    return list(places.values()) + [[n] for n, scene in enumerate(scenes) if scene.broken is not None]


def _series(source: Scenes, places: list[list[int]], dates: Dates, lost: Counter[str]) -> list[Item]:
    of_scene = {number: list(group) for number, group in groupby(source.items, key=lambda item: item.place[0])}
    made = []
    for place in places:
        first, grid = place[0], source.grids[place[0]]
        items = of_scene[first]
        if grid is None:
            made += [replace(item, place=(item.place, (first,))) for item in items]
            continue
        windows = np.array([item.place[1:] for item in items])
        grids = [grid_of(source, n) for n in place]
        seen = covers(grid, windows, grids) >= dates.min_cover
        cut: dict[bytes, list[tuple[int, ...]]] = {}
        for column, item in enumerate(items):
            pattern = seen[:, column].tobytes()
            if pattern not in cut:
                cut[pattern] = _cut(source, [n for n, some in zip(place, seen[:, column], strict=True) if some], dates)
            for numbers in cut[pattern]:
                if len(numbers) < dates.at_least:
                    lost[f"series have fewer than {dates.at_least} dates, and are left out"] += 1
                    continue
                scenes = [source.scenes[n] for n in numbers]
                clouds = [scene.cloud for scene in scenes if scene.cloud is not None]
                key = scenes[0].name + item.key.removeprefix(source.scenes[first].name)
                cloud = round(sum(clouds) / len(clouds), 6) if clouds else None
                made.append(
                    replace(item, key=key, lookup=scenes[0].lookup, place=(item.place, numbers), time=scenes[0].time, cloud=cloud)
                )
    return made


def _cut(source: Scenes, numbers: list[int], dates: Dates) -> list[tuple[int, ...]]:
    """Scenes in the order of time → series of them, each of one scale and offset by modality."""
    alike: list[tuple[dict[str, tuple[float | None, float]], list[int]]] = []
    for number in numbers:
        own = {stack.modality: (stack.scale, stack.add) for stack in source.scenes[number].stacks}
        home = next((group for group in alike if all(group[0].get(name, value) == value for name, value in own.items())), None)
        if home is None:
            alike.append((own, [number]))
        else:
            home[0].update(own)
            home[1].append(number)
    made: list[tuple[int, ...]] = []
    for _, group in alike:
        begun: list[int] = []
        for number in group:
            span = days_apart(source.scenes[begun[0]].time, source.scenes[number].time) if begun else 0.0
            if len(begun) == dates.count or (dates.within_days is not None and span > dates.within_days):
                made.append(tuple(begun))
                begun = []
            begun.append(number)
        made.append(tuple(begun))
    return made


def _stacked(parts: list[Part | None], contract: InputContract) -> Part:
    """A series out of its dates; those that are not there are nodata."""
    some = [part for part in parts if part is not None]
    first = some[0]
    empty = np.full_like(first.pixels, 0 if contract.nodata is None else contract.nodata)
    dates = [*parts, *[None] * (contract.dates - len(parts))]
    pixels = np.concatenate([empty if part is None else part.pixels for part in dates])
    shape = first.pixels.shape[1:]
    codes = [
        np.zeros(shape, np.uint8) if part is None else np.ones(shape, np.uint8) if part.valid is None else part.valid
        for part in dates
    ]
    valid = np.stack(codes)
    said = "; ".join(dict.fromkeys(part.scale_source for part in some))
    return Part(pixels, valid=None if (valid == 1).all() else valid, scale=first.scale, add=first.add, scale_source=said)
