"""Sources whose samples are put together: partners of another sensor (`Joined`), and several dates of one place (`Series`).

Scenes are read on the grid of the sample that they come to, so that pixel lies on pixel; what is not there is a mask.
"""

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from swath.shards.bands import InputContract
from swath.shards.codec import MAX_VALUES, DecodeError
from swath.shards.errors import InputError
from swath.shards.sources.cut import Scenes, _decoded
from swath.shards.sources.match import Dates, Names, Pairs, boxes, covers, days_apart, neighbours, read_table
from swath.shards.sources.scene import Grid, Scene, Stack, grid_of, open_raster, raster_errors
from swath.shards.sources.source import Item, Part, Sample, Source

_ALIKE = 0.5  # share of each other's ground from which on two scenes show one place
_Window = tuple[int, int, int, int]


def on_ground(source: Source) -> TypeGuard[Scenes]:
    """Whether all of `source` are scenes that know where they lie."""
    return isinstance(source, Scenes) and all(grid.crs is not None for grid in source._grids if grid is not None)


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
        if on_ground(primary) and on_ground(other):
            self.contracts = primary.contracts | {
                name: _onto(contract, next(iter(primary.contracts.values())), resampling)
                for name, contract in other.contracts.items()
            }
            _check_size(primary, self.contracts)
            numbers = _scene_partners(primary, other, pairs, table, found)
        else:
            self.contracts = primary.contracts | other.contracts
            numbers = _item_partners(primary, other, pairs, table, found)
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
            if on_ground(self.primary) and on_ground(self.other):
                partner = self._on_grid(self.primary, self.other, place, number)
            else:
                partner = self.other.read(self.other.items[number])
        except DecodeError as error:
            raise DecodeError(f"its partner: {error}") from None
        if not partner.parts and self.pairs.paired_only:
            return Sample({}, meta=sample.meta)  # as without a partner it is left out
        sample.parts |= partner.parts
        times = {name: [partner.meta.get("time")] for name in partner.parts} | partner.meta.get("times", {})
        sample.meta["times"] = sample.meta.get("times", {}) | times
        if partner.parts:
            sample.meta["partner"] = partner.meta.get("source", item.key)
        return sample

    def _on_grid(self, primary: Scenes, other: Scenes, place: Sequence[int], number: int) -> Sample:
        """The partner scene on a chip's grid; one that has nothing but nodata on most of the chip is none."""
        of, top, left, height, width = place
        grid, scene = primary._grids[of], other.scenes[number]
        assert grid is not None
        parts = {}
        for stack in scene.stacks:
            part = _part(stack, self.contracts[stack.modality], grid, (top, left, height, width), self.resampling)
            if part.valid is None or (part.valid != 0).mean() >= self.pairs.min_cover:
                parts[stack.modality] = part
        return Sample(parts, meta={"source": scene.stacks[0].shown[0], "time": scene.time})


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
            raise InputError(
                f"{timeless[0]} has no time, so it cannot be put in order with other dates; ISO 8601 in its name would do"
            )
        self.source, self.dates, self.resampling = source, dates, resampling
        self.dataset, self.kind, self.classes = source.dataset, f"{source.kind} in series", source.classes
        self.fingerprint = _mark(source.fingerprint, dates, resampling)
        lost: Counter[str] = Counter()
        places = _places(source, lost)
        foreign = any(not _aligned(source._grids[place[0]], source._grids[n]) for place in places for n in place)
        self.contracts = {
            name: contract.model_copy(
                update={
                    "dates": dates.count,
                    "resampling": _told(contract, f"{resampling} onto the first date" if foreign else None),
                }
            )
            for name, contract in source.contracts.items()
        }
        _check_size(source, self.contracts)
        self.items = _series(source, places, dates, lost)
        if not self.items:
            raise InputError(f"no place of {self.dataset} has {dates.at_least} dates; give a smaller --min-dates")
        taken = Counter(len(item.place[1]) for item in self.items)
        self.notes = (
            *source.notes,
            f"{len(self.items)} series out of {len(places)} places: "
            + ", ".join(f"{count} of {n} date{'s' * (n > 1)}" for n, count in sorted(taken.items())),
            *(f"{count} {words}" for words, count in lost.items() if count),
        )

    def read(self, item: Item) -> Sample:
        place, numbers = item.place
        number, *window = place
        grid = self.source._grids[number]
        scenes = [self.source.scenes[n] for n in numbers]
        if grid is None:
            raise DecodeError(scenes[0].broken or "has no grid")
        samples = [self._date(item, grid, n, window) for n in numbers]
        metas = [self.source._place(replace(item, time=scene.time), replace(scene, cloud=None), grid, window) for scene in scenes]
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
        if _aligned(grid, self.source._grids[number]):
            return self.source.read(replace(item, place=(number, *window)))
        top, left, height, width = window
        contracts = self.source.contracts
        return Sample({
            s.modality: _part(s, contracts[s.modality], grid, (top, left, height, width), self.resampling) for s in scene.stacks
        })  # fmt: skip


@dataclass
class _Choice:
    """Partners that a sample could have: the nearest in time, whether there is any at all, whether there are several."""

    number: int | None = None
    some: bool = False
    several: bool = False


class _Found:
    """Counts of a join: all samples are matched, late or unmatched."""

    def __init__(self) -> None:
        self.samples: Counter[str] = Counter()
        self.words: Counter[str] = Counter()

    def add(self, choice: _Choice) -> int | None:
        self.samples["matched" if choice.number is not None else "late" if choice.some else "unmatched"] += 1
        self.samples["several"] += choice.several
        return choice.number

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
        own = [n for n, grid in enumerate(primary._grids) if grid is not None]
        met = neighbours(boxes([_present(primary, n) for n in own]), boxes([other.scenes[n].stacks[0].grid for n in whole]))
        candidates = {n: [whole[k] for k in some] for n, some in zip(own, met, strict=True)}
    else:
        ours, theirs = ([(scene.name, scene.lookup) for scene in source.scenes] for source in (primary, other))
        candidates = _named(primary.dataset, ours, other.dataset, theirs, table, found)
        readable = set(whole)
        candidates = {n: [k for k in some if k in readable] for n, some in candidates.items()}
    numbers: list[int | None] = []
    for of, group in groupby(primary.items, key=lambda item: item.place[0]):
        windows = [item.place[1:] for item in group]
        numbers += [found.add(choice) for choice in _nearest(primary, other, pairs, of, windows, candidates.get(of, []))]
    return numbers


def _nearest(
    primary: Scenes, other: Scenes, pairs: Pairs, of: int, windows: list[Sequence[int]], candidates: list[int]
) -> list[_Choice]:  # fmt: skip
    """What each chip of scene `of` may be joined with."""
    scene, grid = primary.scenes[of], primary._grids[of]
    if grid is None or not candidates:
        return [_Choice() for _ in windows]
    shares = covers(grid, np.array(windows), [other.scenes[k].stacks[0].grid for k in candidates]) >= pairs.min_cover
    partners = [other.scenes[k] for k in candidates]
    met = shares.any(axis=1)
    if pairs.within_days is not None and met.any():
        _check_times([scene, *(p for p, some in zip(partners, met, strict=True) if some)])
    ranks = [(days_apart(scene.time, p.time), p.name) for p in partners]
    order = sorted(range(len(partners)), key=lambda row: ranks[row])
    soon = [row for row in order if pairs.within_days is None or ranks[row][0] <= pairs.within_days]
    some, several = shares.any(axis=0), shares.sum(axis=0) > 1
    made = [_Choice(None, bool(a), bool(b)) for a, b in zip(some, several, strict=True)]
    for row in reversed(soon):  # the nearest is the last to write
        for column in np.flatnonzero(shares[row]):
            made[column].number = candidates[row]
    return made


def _item_partners(
    primary: Source, other: Source, pairs: Pairs, table: list[tuple[str, str]] | None, found: _Found
) -> list[int | None]:  # fmt: skip
    """For each item of `primary` the number of an item of `other`."""
    if pairs.by == "footprint":
        vague = other if on_ground(primary) else primary
        raise InputError(f"joining by footprint needs scenes with a georeference; {vague.dataset} ({vague.kind}) has none")
    ours, theirs = ([(item.key, item.lookup) for item in source.items] for source in (primary, other))
    candidates = _named(primary.dataset, ours, other.dataset, theirs, table, found)
    numbers = []
    for number, item in enumerate(primary.items):
        some = candidates.get(number, [])
        if some and pairs.within_days is not None:
            _check_times([item, *(other.items[k] for k in some)])
        ranks = sorted((days_apart(item.time, other.items[k].time), other.items[k].key, k) for k in some)
        soon = [k for days, _, k in ranks if pairs.within_days is None or days <= pairs.within_days]
        numbers.append(found.add(_Choice(soon[0] if soon else None, bool(some), len(some) > 1)))
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
    order = sorted((n for n, g in enumerate(source._grids) if g is not None), key=lambda n: (scenes[n].time, scenes[n].name))
    near = neighbours(found := boxes([_present(source, n) for n in order]), found)
    places: dict[int, list[int]] = {}
    times: dict[int, set[str | None]] = {}
    for row, number in enumerate(order):
        firsts = [order[k] for k in near[row] if order[k] in places]
        shares = [_shared(_present(source, first), _present(source, number)) for first in firsts]
        home = firsts[int(np.argmax(shares))] if shares and max(shares) >= _ALIKE else number
        twice = scenes[number].time in times.setdefault(home, set())
        lost["scenes are of the same place and time as one before them, and are left out"] += twice
        if not twice:
            times[home].add(scenes[number].time)
            places.setdefault(home, []).append(number)
    return list(places.values()) + [[n] for n, grid in enumerate(source._grids) if grid is None]


def _shared(one: Grid, two: Grid) -> float:
    """The smaller of the shares of two grids that lie on the other."""
    if _aligned(one, two):
        return 1.0
    whole = (np.array([[0, 0, grid.height, grid.width]]) for grid in (one, two))
    return min(covers(grid, window, [other]).item() for grid, other, window in zip((one, two), (two, one), whole, strict=True))


def _aligned(one: Grid | None, two: Grid | None) -> bool:
    """Whether both have the same pixels, to half of one."""
    if one is None or two is None:
        return one is two
    if (one.height, one.width, one.crs) != (two.height, two.width, two.crs):
        return False
    back = ~one.transform
    corners = [(0, 0), (one.width, 0), (0, one.height), (one.width, one.height)]
    return all(np.abs(np.subtract(back * two.at(x, y), (x, y))).max() <= 0.5 for x, y in corners)


def _series(source: Scenes, places: list[list[int]], dates: Dates, lost: Counter[str]) -> list[Item]:
    of_scene = {number: list(group) for number, group in groupby(source.items, key=lambda item: item.place[0])}
    made = []
    for place in places:
        first, grid = place[0], source._grids[place[0]]
        items = of_scene[first]
        if grid is None:
            made += [replace(item, place=(item.place, (first,))) for item in items]
            continue
        windows = np.array([item.place[1:] for item in items])
        grids = [_present(source, n) for n in place]
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
    return Part(
        pixels, valid=None if (valid == 1).all() else valid, scale=first.scale, add=first.add, scale_source=said
    )  # fmt: skip


def _present(source: Scenes, number: int) -> Grid:
    grid = source._grids[number]
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


def _part(stack: Stack, contract: InputContract, grid: Grid, window: _Window, resampling: str) -> Part:
    """A stack of another grid in a window of `grid`; what lies beyond it is nodata."""
    read = [_window(path, grid, window, resampling, contract.nodata) for path in stack.paths]
    pixels = np.concatenate([values for values, _ in read]).astype(contract.dtype, copy=False)
    seen = np.logical_and.reduce([inside for _, inside in read])
    if pixels.dtype.kind == "f":
        seen &= np.isfinite(pixels).all(axis=0)
    if contract.nodata is not None:
        seen &= (pixels != contract.nodata).all(axis=0)
    codes = seen.astype(np.uint8)
    if stack.mask is not None:
        mask, inside = _window(stack.mask.path, grid, window, "nearest", None)
        codes *= _decoded(mask[0], stack.mask) * inside
    scale = 1.0 if stack.scale is None else stack.scale
    return Part(pixels, valid=None if (codes == 1).all() else codes, scale=scale, add=stack.add, scale_source=stack.said)


def _window(path: str, grid: Grid, window: _Window, resampling: str, nodata: float | None) -> tuple[np.ndarray, np.ndarray]:
    """(C, height, width) of a window of `grid`, and which of its pixels (height, width) the file reaches."""
    top, left, height, width = window
    try:
        file, bands = _warped(path, (os.getpid(), threading.get_ident()), grid, resampling, nodata)
        read = file.read(window=((top, top + height), (left, left + width)))
    except raster_errors() as error:
        raise DecodeError(f"{path.rpartition('/')[2]}: {error.__cause__ or error}") from None
    return read[:bands], np.ones((height, width), bool) if len(read) == bands else read[bands] != 0


@lru_cache(maxsize=512)
def _warped(path: str, here: tuple[int, int], grid: Grid, resampling: str, nodata: float | None) -> tuple[Any, int]:
    """The file on `grid`, and its number of bands: one more tells what it reaches, where no value does.

    `here` keeps processes and threads apart, since GDAL's datasets survive neither a fork nor a thread.
    """
    from rasterio.enums import ColorInterp, Resampling
    from rasterio.vrt import WarpedVRT

    file = open_raster(path)
    if grid_of(file) == grid:
        return file, file.count
    if nodata is None and np.dtype(file.dtypes[0]).kind == "f":
        nodata = float("nan")
    made = WarpedVRT(
        file, crs=grid.crs, transform=grid.transform, height=grid.height, width=grid.width, resampling=Resampling[resampling],
        src_nodata=nodata, nodata=nodata, add_alpha=nodata is None and ColorInterp.alpha not in file.colorinterp,
    )  # fmt: skip
    return made, file.count
