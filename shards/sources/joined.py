"""Sources whose samples are put together: partners of another sensor (`Joined`), and several dates of one place (`Series`).

Scenes are read on the grid of the sample that they come to, so that pixel lies on pixel; what is not there is a mask.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from swath.shards.bands import InputContract
from swath.shards.codec import MAX_VALUES, DecodeError
from swath.shards.errors import InputError
from swath.shards.sources.cut import Scenes, decoded
from swath.shards.sources.match import (
    Dates,
    Names,
    Pairs,
    aligned,
    alike,
    boxes,
    covers,
    days_apart,
    neighbours,
    read_onto,
    read_table,
)
from swath.shards.sources.scene import Grid, Scene, Stack
from swath.shards.sources.source import Item, Part, Sample, Source
from swath.shards.writer import seconds

_ALIKE = 0.5  # share of each other's ground from which on two scenes show one place


def on_ground(source: Source) -> TypeGuard[Scenes]:
    """Whether all of `source` are scenes that know where they lie."""
    return isinstance(source, Scenes) and all(grid.crs is not None for grid in source.grids if grid is not None)


class Joined:
    """The items of `primary`, each with its partner out of `other`: on its own grid where both are scenes with a place, else as
    it is. Labels, splits and places are those of `primary`. Raises InputError."""

    def __init__(self, primary: Source, other: Source, pairs: Pairs, resampling: str = "nearest") -> None:
        if twice := sorted(set(primary.contracts) & set(other.contracts)):
            raise InputError(
                f"{primary.dataset} and {other.dataset} both hold {twice[0]}; a partner is of another sensor, and dates of one "
                "sensor are put together by --dates-per-sample"
            )
        self.primary, self.other, self.pairs, self.resampling = primary, other, pairs, resampling
        self.dataset, self.kind, self.classes = primary.dataset, f"{primary.kind} with {other.kind}", primary.classes
        table = None if pairs.table is None else read_table(Path(pairs.table))
        self.fingerprint = _mark(primary.fingerprint, other.fingerprint, pairs, table, resampling)
        found = _Found()
        self._ground = (primary, other) if on_ground(primary) and on_ground(other) else None
        if self._ground is not None:
            first = next(iter(primary.contracts.values()))
            self.contracts = primary.contracts | {name: _onto(c, first, resampling) for name, c in other.contracts.items()}
            _check_size(self._ground[0], self.contracts)
            numbers = _scene_partners(*self._ground, pairs, table, found)
        else:
            self.contracts = primary.contracts | other.contracts
            numbers = _item_partners(primary, other, pairs, table, found)
        whole = sum(s.broken is None for s in self._ground[1].scenes) if self._ground is not None else len(other.items)
        found.words["of the partners belong to no sample"] = whole - len(set(numbers) - {None})
        self.items = [
            replace(item, place=(item.place, number))
            for item, number in zip(primary.items, numbers, strict=True)
            if number is not None or not pairs.paired_only
        ]
        if not self.items:
            raise InputError(f"no sample of {primary.dataset} has a partner in {other.dataset} ({'; '.join(found.lines(pairs))})")
        self.notes = (*primary.notes, *(f"partners: {note}" for note in other.notes), *found.lines(pairs))

    def read(self, item: Item) -> Sample:
        """DecodeError also where the partner is bad: a sample without it would be another one."""
        place, number = item.place
        sample = self.primary.read(replace(item, place=place))
        if number is None:
            return sample
        try:
            if self._ground is not None:
                name, partner = self._on_grid(*self._ground, place, number)
            else:
                name, partner = self.other.items[number].key, self.other.read(self.other.items[number])
        except DecodeError as error:
            raise DecodeError(f"its partner: {error}") from None
        if not partner.parts:  # without any it is left out, as without a partner
            return Sample({}, meta=sample.meta) if self.pairs.paired_only else sample
        sample.parts |= partner.parts
        times = partner.meta.get("times", {})
        if (time := partner.meta.get("time")) is not None:
            times = {name: [time] for name in partner.parts} | times
        sample.meta |= {"partner": name, "times": sample.meta.get("times", {}) | times}
        return sample

    def _on_grid(self, primary: Scenes, other: Scenes, place: Sequence[int], number: int) -> tuple[str, Sample]:
        """The partner scene on a chip's grid; what is nodata on most of the chip is not there."""
        of, *window = place
        scene, grid = other.scenes[number], _grid(primary, of)
        parts = {
            stack.modality: part
            for stack in scene.stacks
            if (part := _part(other, stack, grid, window, self.resampling)).valid is None
            or (part.valid != 0).mean() >= self.pairs.min_cover
        }
        return scene.name, Sample(parts, meta={} if scene.time is None else {"time": scene.time})


class Series:
    """Several dates of one place in a sample: all modalities of `source` become series of `dates.count`. Raises InputError.

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
        self.fingerprint = _mark(source.fingerprint, dates, resampling)
        lost: Counter[str] = Counter()
        places = _places(source, lost)
        foreign = any(not aligned(source.grids[place[0]], source.grids[n]) for place in places for n in place)
        onto = f"{resampling} onto the first date" if foreign else None
        self.contracts = {
            name: contract.model_copy(update={"dates": dates.count, "resampling": _told(contract, onto)})
            for name, contract in source.contracts.items()
        }
        _check_size(source, self.contracts)
        self.items = _series(source, places, dates, lost)
        if not self.items:
            raise InputError(f"no place of {self.dataset} has {dates.at_least} dates; give a smaller --min-dates")
        taken = Counter(len(item.place[1]) for item in self.items if source.scenes[item.place[1][0]].broken is None)
        self.notes = (
            *source.notes,
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
        return Sample(parts, next((sample.label for sample in samples if sample.label is not None), None), meta)

    def _date(self, item: Item, grid: Grid, number: int, window: list[int]) -> Sample:
        """One scene in a window of the place's grid."""
        scene = self.source.scenes[number]
        if aligned(grid, self.source.grids[number]):
            return self.source.read(replace(item, place=(number, *window)))
        return Sample({s.modality: _part(self.source, s, grid, window, self.resampling) for s in scene.stacks})


class _Found:
    """Counts of a join: every sample is matched, late or unmatched."""

    def __init__(self) -> None:
        self.samples: Counter[str] = Counter()
        self.words: Counter[str] = Counter()

    def add(self, number: int | None, *, some: bool, several: bool) -> int | None:
        """Count one sample, whose partner is `number`; `some`: there is one, if too late, `several`: the rule names more."""
        self.samples["matched" if number is not None else "late" if some else "unmatched"] += 1
        self.samples["several"] += several
        return number

    def lines(self, pairs: Pairs) -> tuple[str, ...]:
        matched, unmatched, late, several = (self.samples[name] for name in ("matched", "unmatched", "late", "several"))
        how = "table" if pairs.by == "table" else pairs.by
        fate = "left out" if pairs.paired_only else "masked"
        said = f"joined by {how}: {matched} of {matched + unmatched + late} samples matched, {unmatched} unmatched"
        said += "" if pairs.within_days is None else f", {late} late (beyond {pairs.within_days:g} days)"
        said += f"; those without a partner are {fate}" if unmatched + late else ""
        duplicates = (f"{several} samples have several partners by {how}: the nearest in time is taken, or the first by name",)
        extra = tuple(f"{count} {words}" for words, count in self.words.items() if count)
        return (said, *(duplicates if several and pairs.by != "footprint" else ()), *extra)


def _scene_partners(
    primary: Scenes, other: Scenes, pairs: Pairs, table: list[tuple[str, str]] | None, found: _Found
) -> list[int | None]:  # fmt: skip
    """For each item of `primary` the number of a scene of `other`."""
    whole = [n for n, scene in enumerate(other.scenes) if scene.broken is None]
    found.words["scenes of the partners cannot be read"] = len(other.scenes) - len(whole)
    if pairs.by == "footprint":
        own = [n for n, grid in enumerate(primary.grids) if grid is not None]
        met = neighbours(boxes([_grid(primary, n) for n in own]), boxes([other.scenes[n].stacks[0].grid for n in whole]))
        candidates = {n: [whole[k] for k in some] for n, some in zip(own, met, strict=True)}
    else:
        ours, theirs = ([(scene.name, scene.lookup) for scene in source.scenes] for source in (primary, other))
        candidates = _named(primary.dataset, ours, other.dataset, theirs, table, found)
        readable = set(whole)
        candidates = {n: [k for k in some if k in readable] for n, some in candidates.items()}
    numbers: list[int | None] = []
    for of, group in groupby(primary.items, key=lambda item: item.place[0]):
        windows, mine = np.array([item.place[1:] for item in group]), candidates.get(of, [])
        several = pairs.by != "footprint" and len(mine) > 1
        for number, some in _nearest(primary, other, pairs, of, windows, mine):
            numbers.append(found.add(number, some=some, several=several))
    return numbers


def _nearest(
    primary: Scenes, other: Scenes, pairs: Pairs, of: int, windows_n4: np.ndarray, candidates: list[int]
) -> list[tuple[int | None, bool]]:  # fmt: skip
    """(partner, whether there is any at all) of each chip of scene `of`."""
    scene = primary.scenes[of]
    if scene.broken is not None or not candidates:
        return [(None, False)] * len(windows_n4)
    partners = [other.scenes[k] for k in candidates]
    if pairs.within_days is not None:
        _check_times([scene, *partners])
    ranks = sorted((days_apart(scene.time, p.time), p.name, k) for p, k in zip(partners, candidates, strict=True))
    limit = np.inf if pairs.within_days is None else pairs.within_days
    chosen: list[int | None] = [None] * len(windows_n4)
    some = np.zeros(len(windows_n4), bool)
    for late in (False, True):  # the late ones only for those that have no other, to say what they lack
        rest = np.flatnonzero(~some)
        numbers = [k for days, _, k in ranks if (days > limit) == late]
        if len(rest) and numbers:
            grids = [other.scenes[k].stacks[0].grid for k in numbers]
            enough = covers(_grid(primary, of), windows_n4[rest], grids) >= pairs.min_cover
            some[rest] = enough.any(axis=0)
            for column in () if late else np.flatnonzero(enough.any(axis=0)):
                chosen[rest[column]] = numbers[int(enough[:, column].argmax())]
    return list(zip(chosen, some.tolist(), strict=True))


def _item_partners(
    primary: Source, other: Source, pairs: Pairs, table: list[tuple[str, str]] | None, found: _Found
) -> list[int | None]:  # fmt: skip
    """For each item of `primary` the number of an item of `other`."""
    if pairs.by == "footprint":
        vague = other if on_ground(primary) else primary
        raise InputError(f"joining by footprint needs scenes with a georeference; {vague.dataset} ({vague.kind}) has none")
    ours, theirs = ([(item.key, item.lookup) for item in source.items] for source in (primary, other))
    candidates = _named(primary.dataset, ours, other.dataset, theirs, table, found)
    numbers: list[int | None] = []
    for number, item in enumerate(primary.items):
        some = candidates.get(number, [])
        if some and pairs.within_days is not None:
            _check_times([item, *(other.items[k] for k in some)])
        ranks = sorted((days_apart(item.time, other.items[k].time), other.items[k].key, k) for k in some)
        soon = [k for days, _, k in ranks if pairs.within_days is None or days <= pairs.within_days]
        numbers.append(found.add(soon[0] if soon else None, some=bool(some), several=len(some) > 1))
    return numbers


def _named(
    shown: str, ours: list[tuple[str, str]], other: str, theirs: list[tuple[str, str]], table: list[tuple[str, str]] | None,
    found: _Found,
) -> dict[int, list[int]]:  # fmt: skip
    """Number of one of ours → numbers of its partners, by (name, path) of each: as `table` says, or of the same name."""
    if table is None:
        by_name: dict[str, list[int]] = {}
        for number, (name, _) in enumerate(theirs):
            by_name.setdefault(name, []).append(number)
        return {number: by_name[name] for number, (name, _) in enumerate(ours) if name in by_name}
    keys, partners = Names(shown, ours), Names(other, theirs)
    made: dict[int, set[int]] = {}
    for key, name in table:
        some, with_these = keys.find(key), partners.find(name)
        found.words[f"rows of the table name nothing in {shown}"] += not some
        found.words[f"rows of the table name no partner in {other}"] += not with_these
        for number in some:
            made.setdefault(number, set()).update(with_these)
    return {number: sorted(some) for number, some in made.items()}


def _check_times(members: Sequence[Scene | Item]) -> None:
    for one in members:
        if days_apart(one.time, one.time):
            name = one.name if isinstance(one, Scene) else one.key
            raise InputError(f"{name} has no time, so it cannot be joined within days; leave --within-days out")


def _places(source: Scenes, lost: Counter[str]) -> list[list[int]]:
    """Scenes by place: the first in time, whose grid counts, and those that share most of its ground. Broken ones are alone."""
    scenes = source.scenes
    order = sorted((n for n, s in enumerate(scenes) if s.broken is None), key=lambda n: (seconds(scenes[n].time), scenes[n].name))
    found = boxes([_grid(source, n) for n in order])
    places: dict[int, list[int]] = {}
    times: dict[int, set[int]] = {}
    for number, near in zip(order, neighbours(found, found), strict=True):
        firsts, grid = [order[k] for k in near if order[k] in places], _grid(source, number)
        home = next((first for first in firsts if aligned(_grid(source, first), grid)), None)
        if home is None and firsts:
            share, best = max((alike(_grid(source, first), grid), -first) for first in firsts)
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
        grids = [_grid(source, n) for n in place]
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


def _grid(source: Scenes, number: int) -> Grid:
    grid = source.grids[number]
    assert grid is not None
    return grid


def _onto(contract: InputContract, first: InputContract, resampling: str) -> InputContract:
    """A partner's contract as it is on the grid of `first`."""
    said = _told(contract, f"{resampling} onto the grid of {first.modality}")
    return contract.model_copy(update={"gsd_m": first.gsd_m, "resampling": said})


def _told(contract: InputContract, more: str | None) -> str | None:
    return ", ".join(text for text in (contract.resampling, more) if text) or None


def _check_size(source: Scenes, contracts: dict[str, InputContract]) -> None:
    chip = max((item.place[3] * item.place[4] for item in source.items), default=0)
    channels = max(contract.channels for contract in contracts.values())
    if chip * channels > MAX_VALUES:
        raise InputError(f"chips of {chip} pixels in {channels} channels are beyond {MAX_VALUES} values; give a smaller --chip")


def _mark(*said: object) -> str:
    return hashlib.sha256(repr(said).encode()).hexdigest()


def _part(source: Scenes, stack: Stack, grid: Grid, window: Sequence[int], resampling: str) -> Part:
    """A stack of `source` in a window of another grid; what lies beyond it is nodata."""
    nodata = source.contracts[stack.modality].nodata
    read = [read_onto(path, source.fingerprint, grid, window, resampling, nodata) for path in stack.paths]
    pixels = np.concatenate([values for values, _ in read])
    seen = np.logical_and.reduce([inside for _, inside in read])
    if pixels.dtype.kind == "f":
        seen &= np.isfinite(pixels).all(axis=0)
    if nodata is not None:
        seen &= (pixels != nodata).all(axis=0)
    codes = seen.astype(np.uint8)
    if stack.mask is not None:
        mask, inside = read_onto(stack.mask.path, source.fingerprint, grid, window, "nearest", None)
        codes *= decoded(mask[0], stack.mask) * inside
    scale = 1.0 if stack.scale is None else stack.scale
    return Part(pixels, valid=None if (codes == 1).all() else codes, scale=scale, add=stack.add, scale_source=stack.said)
