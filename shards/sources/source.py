"""What an ingest reads from: a list of cheap items, each of which is decoded into one sample when its turn comes."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from swath.shards.bands import InputContract, Unit
from swath.shards.manifest import LabelMap
from swath.shards.sources.match import Dates, Pairs


@dataclass(frozen=True)
class Options:
    """What a person says about an archive that its files do not; every source takes what concerns it.

    `chip` and `stride` in pixels cut scenes; `gsd_m` asks for another pixel size, by `resampling` (of rasterio's names).
    `join` puts samples together: with a partner out of another source, or from several dates.
    `scale`, `add`, `nodata` and `unit` are of the stored values, and win over what files say.
    """

    chip: int | None = None
    stride: int | None = None
    bands: tuple[str, ...] | None = None
    sensor: str | None = None
    level: str | None = None
    unit: Unit | None = None
    scale: float | None = None
    add: float | None = None
    nodata: float | None = None
    gsd_m: float | None = None
    resampling: str = "nearest"
    join: Pairs | Dates | None = None


@dataclass(frozen=True)
class Item:
    """`key` names the sample in the source, `lookup` is the path a split file knows it by, `place` is the source's own.

    The rest is told where it is known before decoding: the published `split`, degrees of the centre, time (ISO 8601), and the
    share of the item (0 to 1) that its metadata call cloudy. Items with the same `near` are cheap to read one after another.
    """

    key: str
    lookup: str
    label: str | None = None
    place: Any = None
    split: str | None = None
    lat: float | None = None
    lon: float | None = None
    time: str | None = None
    cloud: float | None = None
    near: str | None = None


@dataclass
class Part:
    """One modality of a sample. `pixels` (C, H, W) as stored, of a series date after date (dates · C, H, W).

    `valid` (H, W), of a series (dates, H, W), holds uint8 codes (0 nodata, 1 clear, 2 cloud, 3 shadow), None where all is clear.
    Physical value = pixel · `scale` + `add`; `scale_source` says in words who claims that. `data` with `extension` are the
    file's own bytes where they are kept as they came (jpg, png); without them `pixels` are encoded.
    """

    pixels: np.ndarray
    data: bytes | None = None
    extension: str = "npy"
    valid: np.ndarray | None = None
    scale: float = 1.0
    add: float = 0.0
    scale_source: str = "none: values as stored"


@dataclass
class Sample:
    """A decoded item: `parts` by modality; one that this sample lacks has no entry, and is a mask for whoever reads it.

    `maps` are the label maps that this sample has, of those of the source: codes (H, W), or shares (n, H, W). `meta` goes into
    the sample's JSON. These keys have a meaning: `lat`, `lon` (degrees, of the centre), `gsd_m`, `time` (ISO
    8601), `times` ({modality: [ISO 8601, one for each date]}), `crs`, `bounds`, `labels`, `captions`.
    """

    parts: dict[str, Part]
    label: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    maps: dict[str, np.ndarray] = field(default_factory=dict)


class Source(Protocol):
    """`fingerprint` changes when the files do; `contracts`, by modality, lack statistics; `classes` fixes label numbers.

    `notes` are lines that a person must hear: what was guessed, and what was left out.
    """

    dataset: str
    kind: str
    classes: tuple[str, ...]
    contracts: dict[str, InputContract]
    fingerprint: str
    notes: tuple[str, ...]

    @property
    def items(self) -> list[Item]: ...

    def read(self, item: Item) -> Sample:
        """Decode one item wholly. DecodeError: the file is bad; InputError: it is of another kind than the rest."""
        ...


def maps_of(source: Source) -> dict[str, LabelMap]:
    """The label maps that samples of `source` may have; few kinds of source know of any, and those have `maps`."""
    return getattr(source, "maps", {})
