"""What an ingest reads from: a list of cheap items, each of which is decoded into one sample when its turn comes."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from swath.shards.bands import InputContract


@dataclass(frozen=True)
class Item:
    """`key` names the sample in the source, `lookup` is the path a split file knows it by, `place` is the source's own."""

    key: str
    lookup: str
    label: str | None
    place: Any = None


@dataclass
class Sample:
    """A decoded item. `pixels` (C, H, W) as stored; `data` its bytes with `extension`; `valid` (H, W) uint8 or None.

    Physical value = pixel · `scale` + `add`; `scale_source` says in words who claims that.
    """

    pixels: np.ndarray
    data: bytes
    extension: str
    valid: np.ndarray | None = None
    scale: float = 1.0
    add: float = 0.0
    scale_source: str = "none: values as stored"
    label: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """`fingerprint` changes when the files do; `contract` has no statistics yet; `classes` fixes the label numbers.

    `notes` are lines that a person must hear: what was guessed, and what was left out.
    """

    dataset: str
    kind: str
    classes: tuple[str, ...]
    contract: InputContract
    items: list[Item]
    fingerprint: str
    notes: tuple[str, ...]

    def read(self, item: Item) -> Sample:
        """Decode one item wholly. DecodeError: the file is bad; InputError: it is of another kind than the rest."""
        ...
