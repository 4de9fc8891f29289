"""What a published tree of files is, said once: which files, which bands in which order, what their numbers mean.

Paths are matched wholly by regular expressions with named groups. These have a meaning, others go into the sample's metadata:
`key` (joins the files of a sample, and modalities), `head` (put before the key where other folders stand between), `band` (one
file per band), `label`, `split`, `date` (orders a series), `time` (of the sample), `root` (a folder that `Sidecar.path` names).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from swath.shards.bands import Unit

GROUPS = ("key", "head", "band", "label", "split", "date", "time", "root")
RGB = ("red", "green", "blue")
NEAREST = "nearest to the finest grid"
BY_PUBLISHER = "by the publisher, to one grid"
ANYWHERE = r"(?:.*/)?"  # whatever folders stand above: people unpack archives at different depths


@dataclass(frozen=True, slots=True)
class Facts:
    """What a table or a sidecar says of one sample; None and empty where it says nothing.

    `times` are those of a series, in order. `joins` ({modality: key}) names partners under other keys; `partner` is the sample
    that a joined modality belongs to. `add` is the offset of this sample, in the contract's unit, as `add_source` claims.
    """

    label: str | None = None
    split: str | None = None
    time: str | None = None
    times: tuple[str, ...] = ()
    lat: float | None = None
    lon: float | None = None
    cloud: float | None = None
    add: float | None = None
    add_source: str = ""
    partner: str | None = None
    joins: Mapping[str, str] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A CSV, Parquet or TXT file with a row for each sample: `row(columns, groups of `file`)` is its key and facts.

    A TXT is a list, by lines or commas, and its column is `name`.

    `columns` are the names where a CSV has no header. With `selects` the table must exist, and samples without a row are left
    out and counted; else it only adds what it says.
    """

    file: str
    row: Callable[[dict[str, Any], dict[str, str]], tuple[str, Facts]]
    columns: tuple[str, ...] | None = None
    selects: bool = False


@dataclass(frozen=True)
class Sidecar:
    """A small file beside a sample's pixels, read with them. `path` may hold {folder} and the groups of the layer's pattern."""

    path: str
    facts: Callable[[bytes], Facts]


@dataclass(frozen=True)
class Size:
    """What becomes of pixels that are not `side` × `side`.

    keep: they stay. crop: the centre is cut out, smaller ones are bad. pad: larger ones are cropped, smaller ones are filled up
    at the right and the bottom, masked. reject: they are bad.
    """

    policy: Literal["keep", "crop", "pad", "reject"] = "keep"
    side: int = 0


@dataclass(frozen=True)
class Layer:
    """One modality. `bands` are spelt as in the files and stand in FILE ORDER; `sensor` turns them into the contract's names.

    `bands` and `dtype` None: as the first readable file has them. `nodata` in any band marks a pixel, `void` only where all
    bands have it: L1C has no nodata value, and a cirrus band that is truly 0. Physical value = DN · `scale` + `add`, as
    `scale_source` claims. A sample without a `required` modality is left out and counted. `joined`: the keys are its own, and
    a table or its sidecars say whose partners they are.
    """

    files: str
    bands: tuple[str, ...] | None
    dtype: str | None
    sensor: str = "unknown"
    level: str = "unknown"
    unit: Unit = "digital number"
    nodata: float | None = None
    void: float | None = None
    scale: float = 1.0
    add: float = 0.0
    scale_source: str = "none: values as stored"
    gsd_m: float | None = None
    resampling: str | None = None
    dates: int = 1
    size: Size = Size()
    required: bool = True
    joined: bool = False
    sidecar: Sidecar | None = None


@dataclass(frozen=True)
class Layout:
    """A published data set. `looks` shows people a path of it; `left_out` says in words what files of a pattern are not used."""

    name: str
    title: str
    licence: str
    looks: str
    layers: Mapping[str, Layer]
    tables: tuple[Table, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)


def iso_time(text: str) -> str | None:
    """ISO 8601 of a published time, None where it is none. BigEarthNet v1 drops leading zeros: 20180510T94033 is 09:40:33."""
    if found := re.fullmatch(r"(\d{4})(\d\d)(\d\d)(?:T(\d{5,6}))?", text.strip()):
        clock = found[4].zfill(6) if found[4] else None
        text = f"{found[1]}-{found[2]}-{found[3]}" + (f"T{clock[:2]}:{clock[2:4]}:{clock[4:]}" if clock else "")
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    return text.strip() if re.fullmatch(r"\d{4}-\d\d-\d\d", text.strip()) else moment.isoformat()
