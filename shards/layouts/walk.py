"""One pass over the files of a layout: which belong to which sample, and what is not used."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from swath.shards.layouts.layout import Layer, Layout
from swath.shards.layouts.raster import PICTURES, TIFFS
from swath.shards.layouts.store import Store

IMAGERY = (*PICTURES, *TIFFS, ".jp2")
_PACKED = re.compile(r".*\.(zip|tar|tgz|z\d\d|(tar\.)?(gz|zst)|(part|gz)a[a-z])", re.IGNORECASE)
_HOLE = "\0"  # stands where the band's name stood: no path has it


class Slot(NamedTuple):
    """The files of one modality and date: one path, or one with a hole for the band; a bit for each band that is there.

    BigEarthNet has eight million files; so it is half a million paths.
    """

    path: str
    bits: int

    @property
    def single(self) -> bool:
        """One file holds all bands."""
        return _HOLE not in self.path

    @property
    def stem(self) -> str:
        """What a split file knows it by: the path, of a file per band without the band."""
        return self.path.split(_HOLE)[0].rstrip("/_-.")

    def file(self, band: str) -> str:
        return self.path.replace(_HOLE, band)

    def lacks(self, positions: list[int]) -> int | None:
        """The first of the bands (by position) that has no file."""
        return None if self.single else next((p for p in positions if not self.bits >> p & 1), None)


@dataclass
class Found:
    """`slots` by modality, key and date; the files of each table with their groups; files that are not used, by the reason."""

    slots: dict[str, dict[str, dict[str, Slot]]]
    tables: list[list[tuple[str, dict[str, str]]]]
    fingerprint: str = ""
    unused: Counter[str] = field(default_factory=Counter)
    duplicates: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    packed: list[str] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        made = [f"{count} files left out: {words}" for words, count in sorted(self.unused.items())]
        for names, words in ((self.duplicates, "stand twice, the first is taken"), (self.strangers, "fit no pattern, left out")):
            if names:
                made.append(f"{len(names)} files {words}, such as {names[0]}")
        return made


def walk(store: Store, layout: Layout, layers: Mapping[str, Layer]) -> Found:
    """Every file is looked at once, by name; what it holds is not."""
    found = Found({name: defaultdict(dict) for name in layers}, [[] for _ in layout.tables])
    patterns = {name: re.compile(layer.files) for name, layer in layers.items()}
    tables = [re.compile(table.file) for table in layout.tables]
    unused = [(re.compile(pattern), words) for pattern, words in layout.left_out.items()]
    digest = hashlib.sha256()
    for name, stamp in store.walk():
        digest.update(repr((name, stamp)).encode())
        if any(_take(name, modality, pattern, layers[modality], found) for modality, pattern in patterns.items()):
            continue
        matches = [(number, match) for number, pattern in enumerate(tables) if (match := pattern.fullmatch(name))]
        if matches:
            found.tables[matches[0][0]].append((name, matches[0][1].groupdict()))
        elif name.lower().endswith(IMAGERY):
            words = next((words for pattern, words in unused if pattern.fullmatch(name)), None)
            if words:
                found.unused[words] += 1
            else:
                found.strangers.append(name)
        elif _PACKED.fullmatch(name):
            found.packed.append(name)
    found.fingerprint = digest.hexdigest()
    return found


def _take(name: str, modality: str, pattern: re.Pattern[str], layer: Layer, found: Found) -> bool:
    """Whether the file is one of this modality."""
    if (match := pattern.fullmatch(name)) is None:
        return False
    groups = match.groupdict()
    path, bit = name, 1
    if "band" in groups:
        if layer.bands is None or groups["band"] not in layer.bands:
            return False
        path = name[: match.start("band")] + _HOLE + name[match.end("band") :]
        bit = 1 << layer.bands.index(groups["band"])
    key = "/".join(part for part in (groups.get("head"), groups["key"]) if part)
    dates = found.slots[modality][key]
    slot = dates.setdefault(groups.get("date") or "", Slot(path, 0))
    if slot.path == path:
        dates[groups.get("date") or ""] = Slot(path, slot.bits | bit)
    else:
        found.duplicates.append(name)
    return True
