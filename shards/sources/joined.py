"""Samples with a partner of another sensor, found by footprint and time, by a table or by key."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np

from swath.shards.bands import InputContract
from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.sources.cut import Scenes
from swath.shards.sources.match import (
    Names,
    Pairs,
    boxes,
    covers,
    days_apart,
    neighbours,
    read_table,
)
from swath.shards.sources.on_grid import check_size, grid_of, mark, on_ground, part_on, told
from swath.shards.sources.scene import Scene
from swath.shards.sources.source import Item, Sample, Source, maps_of


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
        self.maps = maps_of(primary)
        table = None if pairs.table is None else read_table(Path(pairs.table))
        self.fingerprint = mark(primary.fingerprint, other.fingerprint, pairs, table, resampling)
        found = _Found()
        self._ground = (primary, other) if on_ground(primary) and on_ground(other) else None
        if self._ground is not None:
            first = next(iter(primary.contracts.values()))
            self.contracts = primary.contracts | {name: _onto(c, first, resampling) for name, c in other.contracts.items()}
            check_size(self._ground[0], self.contracts)
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
        scene, grid = other.scenes[number], grid_of(primary, of)
        parts = {
            stack.modality: part
            for stack in scene.stacks
            if (part := part_on(other, stack, grid, window, self.resampling)).valid is None
            or (part.valid != 0).mean() >= self.pairs.min_cover
        }
        return scene.name, Sample(parts, meta={} if scene.time is None else {"time": scene.time})


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
        met = neighbours(boxes([grid_of(primary, n) for n in own]), boxes([other.scenes[n].stacks[0].grid for n in whole]))
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
            enough = covers(grid_of(primary, of), windows_n4[rest], grids) >= pairs.min_cover
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


def _onto(contract: InputContract, first: InputContract, resampling: str) -> InputContract:
    """A partner's contract as it is on the grid of `first`."""
    said = told(contract, f"{resampling} onto the grid of {first.modality}")
    return contract.model_copy(update={"gsd_m": first.gsd_m, "resampling": said})
