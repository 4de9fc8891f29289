"""The one source of all declarative layouts: joins what a walk found into samples, and decodes them when asked."""

import re
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from swath.shards.bands import InputContract, Normalisation
from swath.shards.codec import DecodeError, describe
from swath.shards.errors import InputError
from swath.shards.layouts.layout import ANYWHERE, GROUPS, Facts, Layer, Layout, iso_time
from swath.shards.layouts.pixels import Chip, fit, series, stack
from swath.shards.layouts.raster import Raster, degrees, extension, read_raster
from swath.shards.layouts.store import open_store
from swath.shards.layouts.tables import read_table
from swath.shards.layouts.walk import Found, Slot, walk
from swath.shards.recipes.registry import register
from swath.shards.sensors import SENSORS, band
from swath.shards.sources.source import Item, Options, Part, Sample

_SIDECAR_BYTES = 1 << 20
_NO_FACTS = Facts()
_NAMES = {1: ("grey",), 3: ("red", "green", "blue")}


class Place(NamedTuple):
    """Of an item: the slots of each modality in the order of their dates, and what tables say of the sample."""

    slots: dict[str, tuple[Slot, ...]]
    meta: dict[str, Any]


def declare(layout: Layout) -> Layout:
    """Registers a layout that needs no code of its own."""
    register(layout.name, layout.title, layout.licence)(partial(Tree, layout))
    return layout


class Tree:
    """Samples of `layout` below `path`. Raises InputError where there are none, or the tables are not as published."""

    kind = "layout"

    def __init__(self, layout: Layout, path: Path, options: Options) -> None:
        self.layout, self.dataset = layout, layout.name
        self._layers, self._by_hand = _with_options(layout, options), options.add is not None
        self._store = open_store(path)
        found = walk(self._store, layout, self._layers)
        self.fingerprint = found.fingerprint
        notes = self._drop_absent(found, path)
        self._patterns = {name: re.compile(layer.files) for name, layer in self._layers.items()}
        self.items = self._items(found, notes)
        if not self.items:
            raise InputError(f"{path}: no sample of {layout.name} is left ({'; '.join(notes)})")
        for name in self._layers:
            self._layers[name] = self._resolved(name)
        self._chosen = {name: _chosen(layer, options) for name, layer in self._layers.items()}
        self.contracts = {name: _contract(name, layer, self._chosen[name]) for name, layer in self._layers.items()}
        self.classes = tuple(sorted({item.label for item in self.items if item.label is not None}))
        links = [f"{self._store.links} symbolic links are left out"] if self._store.links else []
        self.notes = (*notes, *found.notes, *links)

    def read(self, item: Item) -> Sample:
        """All modalities of one sample; its own metadata win over those of tables."""
        place: Place = item.place
        sample = Sample({}, item.label, dict(place.meta))
        for name in ("lat", "lon", "time"):
            if getattr(item, name) is not None:
                sample.meta[name] = getattr(item, name)
        for modality, slots in place.slots.items():
            self._add(sample, modality, slots)
        return sample

    def _add(self, sample: Sample, modality: str, slots: tuple[Slot, ...]) -> None:
        layer, first = self._layers[modality], self._file(modality, slots[0])
        said = [self._sidecar(modality, slot) for slot in slots]
        if self._by_hand:
            said = [replace(facts, add=None) for facts in said]
        if len({facts.add for facts in said}) > 1:
            raise DecodeError(f"{first}: dates have different radiometric offsets, which one sample cannot carry")
        data, chips = None, []
        for slot in slots:
            name = self._file(modality, slot)
            data, raster = self._raster(modality, slot)
            chip = fit(raster, layer.size, name)
            data = data if chip.raster is raster else None
            chips.append(chip)
        pixels, valid = series(chips, layer, first)
        add = layer.add if said[0].add is None else said[0].add
        source = layer.scale_source if said[0].add is None else f"{layer.scale_source}; {said[0].add_source}"
        kept = data is not None and layer.dates == 1 and extension(first) in ("jpg", "png")
        form = (data, extension(first)) if kept else (None, "npy")
        sample.parts[modality] = Part(pixels, *form, valid, layer.scale, add, source)
        self._describe(sample, modality, said, chips[0], slots)

    def _raster(self, modality: str, slot: Slot) -> tuple[bytes | None, Raster]:
        """The chosen bands of one date; the file's own bytes where it is one, wholly taken."""
        layer, chosen = self._layers[modality], self._chosen[modality]
        bands = layer.bands or ()
        if slot.single:
            data = self._bytes(slot.path)
            raster = read_raster(data, slot.path)
            if len(raster.pixels) != len(bands):
                raise DecodeError(f"{slot.path} has {describe(raster.pixels)}, the layout has {len(bands)} of {layer.dtype}")
            if chosen != list(range(len(bands))):
                data, raster = None, replace(raster, pixels=raster.pixels[chosen])
            return data, stack([raster], [slot.path], layer)
        if (lacking := slot.lacks(chosen)) is not None:
            raise DecodeError(f"{slot.file(bands[lacking])} is not there")
        names = [slot.file(bands[position]) for position in chosen]
        rasters = [read_raster(self._bytes(name), name) for name in names]
        for raster, name in zip(rasters, names, strict=True):
            if len(raster.pixels) != 1:
                raise DecodeError(f"{name} has {describe(raster.pixels)}, the layout has one band in each file")
        return None, stack(rasters, names, layer)

    def _describe(self, sample: Sample, modality: str, said: list[Facts], chip: Chip, slots: tuple[Slot, ...]) -> None:
        """Metadata: the first modality says where the sample is, each says when it was."""
        layer, meta, raster = self._layers[modality], sample.meta, chip.raster
        meta.setdefault("source", self._file(modality, slots[0]))
        if raster.crs is not None and raster.bounds is not None and "crs" not in meta:
            lat, lon = degrees(raster.crs, raster.bounds)
            meta |= {"crs": raster.crs, "bounds": list(raster.bounds), "lat": lat, "lon": lon}
        gsd_m = round(raster.resolution, 3) if raster.metric and raster.resolution else layer.gsd_m
        if gsd_m is not None:
            meta.setdefault("gsd_m", gsd_m)
        groups = [self._groups(modality, slot) for slot in slots]
        meta |= {name: text for name, text in groups[0].items() if name not in GROUPS and name not in meta}
        if layer.dates > 1:
            times = [facts.time or iso_time(group.get("date", "")) for facts, group in zip(said, groups, strict=True)]
            times = list(said[0].times) or times
            meta.setdefault("times", {})[modality] = times + [None] * (layer.dates - len(times))
            for name in said[0].meta:
                meta.setdefault(name, {})[modality] = [facts.meta.get(name) for facts in said]
            return
        meta |= {name: value for name, value in said[0].meta.items() if name not in meta}
        sample.label = said[0].label or sample.label
        time = said[0].time or iso_time(groups[0].get("time", ""))
        if time is not None and modality == next(iter(sample.parts)):
            meta["time"] = time
        elif time is not None:
            meta.setdefault("times", {})[modality] = [time]

    def _bytes(self, name: str) -> bytes:
        data = self._store.read(name)
        if data is None:
            raise DecodeError(f"{name} is not there any more")
        return data

    def _sidecar(self, modality: str, slot: Slot) -> Facts:
        sidecar = self._layers[modality].sidecar
        if sidecar is None:
            return _NO_FACTS
        folder = slot.path.rpartition("/")[0]
        name = sidecar.path.format(folder=folder, **self._groups(modality, slot)).lstrip("/")
        data = self._store.read(name, _SIDECAR_BYTES)
        try:
            return _NO_FACTS if data is None else sidecar.facts(data)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DecodeError(f"{name} is not as published ({type(error).__name__}: {error})") from None

    def _file(self, modality: str, slot: Slot) -> str:
        return slot.file((self._layers[modality].bands or ("",))[0])

    def _groups(self, modality: str, slot: Slot) -> dict[str, str]:
        match = self._patterns[modality].fullmatch(self._file(modality, slot))
        return {group: text for group, text in (match.groupdict() if match else {}).items() if text is not None}

    def _drop_absent(self, found: Found, path: Path) -> list[str]:
        """Modalities that were not downloaded are in no contract; InputError where a required one is not there."""
        absent = [name for name in self._layers if not found.slots[name]]
        lacking = [name for name in absent if self._layers[name].required]
        if lacking or len(absent) == len(self._layers):
            packed = f"; {found.packed[0]} looks packed: join its parts and unpack it" if found.packed else ""
            which = f" ({lacking[0]})" if lacking and len(self._layers) > 1 else ""
            raise InputError(f"{path} holds no files of {self.layout.name}{which}, such as {self.layout.looks}{packed}")
        for name in absent:
            del self._layers[name]
        return [f"{name}: no files, left out of the contracts" for name in absent]

    def _facts(self, found: Found) -> tuple[dict[str, Facts], bool]:
        """By key of the sample, and whether samples without a row are left out."""
        facts: dict[str, Facts] = {}
        for table, files in zip(self.layout.tables, found.tables, strict=True):
            if table.selects and not files:
                shown = re.sub(r"\?P<\w+>|\\", "", table.file.removeprefix(ANYWHERE))
                raise InputError(f"{self.layout.name}: no file {shown} beside the imagery; download it there")
            for name, groups in files:
                for key, row in read_table(self._store, name, table, groups):
                    if facts.setdefault(key, row) != row:
                        raise InputError(f"{name}: {key} stands twice in the tables, in different ways")
        return facts, any(table.selects for table in self.layout.tables)

    def _items(self, found: Found, notes: list[str]) -> list[Item]:
        facts, selecting = self._facts(found)
        joins = {name: self._partners(name, found, facts, notes) for name, layer in self._layers.items() if layer.joined}
        keys = set().union(*(found.slots[name] for name in self._layers.keys() - joins.keys()))
        lost: Counter[str] = Counter()
        items = []
        for key in sorted(keys):
            if selecting and key not in facts:
                lost["samples have no row in the tables and are left out"] += 1
                continue
            slots = {}
            for name, layer in self._layers.items():
                dates = found.slots[name].get(joins[name].get(key, "") if layer.joined else key, {})
                if dates:
                    slots[name] = tuple(dates[date] for date in sorted(dates))[: layer.dates]
                    lost[f"dates of {name} beyond {layer.dates} are left out"] += max(0, len(dates) - layer.dates)
            lacking = [name for name in self._layers if name not in slots]
            if needed := [name for name in lacking if self._layers[name].required]:
                lost[f"samples lack {needed[0]} and are left out"] += 1
                continue
            lost.update(f"samples lack {name}: it is masked" for name in lacking)
            items.append(self._item(key, slots, facts.get(key, _NO_FACTS)))
        for name, joined in joins.items():
            met = {joined[item.key] for item in items if name in item.place.slots}
            lost[f"of {name} are no sample's partner and are left out"] += len(found.slots[name].keys() - met)
        notes.extend(f"{count} {words}" for words, count in lost.items() if count)
        for name in self._layers.keys() - {name for item in items for name in item.place.slots}:
            del self._layers[name]  # a contract of which no sample has anything has no statistics either
        if missing := sorted(facts.keys() - keys):
            notes.append(f"{len(missing)} rows of the tables have no files, such as {missing[0]}")
        return items

    def _item(self, key: str, slots: dict[str, tuple[Slot, ...]], facts: Facts) -> Item:
        name, first = next((name, dates[0]) for name, dates in slots.items())
        groups = self._groups(name, first)
        return Item(
            key, first.stem, facts.label or groups.get("label"), Place(slots, dict(facts.meta)),
            facts.split or groups.get("split"), facts.lat, facts.lon, facts.time or iso_time(groups.get("time", "")), facts.cloud,
        )  # fmt: skip

    def _partners(self, name: str, found: Found, facts: dict[str, Facts], notes: list[str]) -> dict[str, str]:
        """Key of a sample → key of its partner in modality `name`: by the tables, else by the modality's own sidecars."""
        joined = {key: row.joins[name] for key, row in facts.items() if name in row.joins}
        if joined:
            return joined
        late = 0
        for key, dates in sorted(found.slots[name].items()):
            try:
                partner = self._sidecar(name, next(iter(dates.values()))).partner
            except DecodeError as error:
                raise InputError(f"{error}; it says which sample it belongs to") from None
            if partner is not None:
                late += joined.setdefault(partner, key) != key
        if late:
            notes.append(f"{late} of {name} belong to a sample that has one already, and are left out")
        return joined

    def _resolved(self, name: str) -> Layer:
        """A layer that leaves bands or dtype open takes them from the first file that can be read."""
        layer = self._layers[name]
        if layer.bands is not None and layer.dtype is not None:
            return layer
        reason = ""
        for slot in (slot for item in self.items for slot in item.place.slots.get(name, ())):
            try:
                path = self._file(name, slot)
                pixels = read_raster(self._bytes(path), path).pixels
            except DecodeError as error:
                reason = reason or str(error)
                continue
            bands = layer.bands or _NAMES.get(len(pixels)) or tuple(f"b{n}" for n in range(1, len(pixels) + 1))
            return replace(layer, bands=bands, dtype=layer.dtype or str(pixels.dtype))
        raise InputError(f"none of the files of {self.layout.name} ({name}) can be decoded ({reason})")


def _with_options(layout: Layout, options: Options) -> dict[str, Layer]:
    """The layers that are asked for. A recipe knows what it reads: only bands, and what numbers mean, can be overruled.

    Scale, offset and nodata are meant for reflectance where there is any: a radar partner keeps its own.
    """
    for name in ("chip", "stride", "sensor", "level", "unit", "gsd_m"):
        if getattr(options, name) is not None:
            raise InputError(f"recipe {layout.name} fixes --{name.replace('_', '-').removesuffix('-m')}; leave it out")
    layers = dict(layout.layers)
    if options.bands is not None:
        known = {name: _names(layer) for name, layer in layers.items()}
        layers = {name: layer for name, layer in layers.items() if any(_position(layer, b) is not None for b in options.bands)}
        for asked in options.bands:
            if all(_position(layer, asked) is None for layer in layers.values()):
                there = "; ".join(f"{name}: {', '.join(names)}" for name, names in known.items())
                raise InputError(f"recipe {layout.name} has no band {asked}; there are {there}")
    given: dict[str, Any] = {n: getattr(options, n) for n in ("scale", "add", "nodata") if getattr(options, n) is not None}
    if not given:
        return layers
    meant = [name for name, layer in layers.items() if layer.unit == "reflectance"] or list(layers)
    if len({(layers[name].sensor, layers[name].unit) for name in meant}) > 1:
        raise InputError(f"recipe {layout.name} has {', '.join(meant)}: choose one by --bands to give its {', '.join(given)}")
    if given.keys() & {"scale", "add"}:
        given["scale_source"] = "given by hand"
    return layers | {name: replace(layers[name], **given) for name in meant}


def _names(layer: Layer) -> list[str]:
    return [band(name, SENSORS.get(layer.sensor)).name for name in layer.bands or ()]


def _position(layer: Layer, asked: str) -> int | None:
    names = _names(layer)
    name = band(asked, SENSORS.get(layer.sensor)).name
    return names.index(name) if name in names else None


def _chosen(layer: Layer, options: Options) -> list[int]:
    """Positions in the file of the bands that are asked for, in the order of the asking."""
    if options.bands is None:
        return list(range(len(layer.bands or ())))
    return [position for asked in options.bands if (position := _position(layer, asked)) is not None]


def _contract(name: str, layer: Layer, chosen: list[int]) -> InputContract:
    known = SENSORS.get(layer.sensor)
    bands = tuple(band((layer.bands or ())[position], known) for position in chosen)
    none = tuple(0.0 for _ in bands)
    return InputContract(
        modality=name, sensor=layer.sensor, level=layer.level, unit=layer.unit, bands=bands, dates=layer.dates,
        normalisation=Normalisation(mean=none, std=none, pixels=tuple(0 for _ in bands)), dtype=layer.dtype or "",
        nodata=layer.nodata, gsd_m=layer.gsd_m, resampling=layer.resampling,
    )  # fmt: skip
