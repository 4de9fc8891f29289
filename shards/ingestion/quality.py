"""Which decoded samples are left out: mostly nodata, mostly cloud, or the same pixels as one before.

Every filter says why, and `LeftOut` gathers it for the manifest.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from swath.shards.sources.source import Part, Sample

DIGEST = 16  # bytes; among 10^9 samples two equal by chance once in 10^21
_EXAMPLES = 5


@dataclass
class LeftOut:
    """How many samples were left out for each reason, and the first few of them by name. Merging may go in any order."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, sample: str) -> None:
        self.counts[reason] += 1
        self._show(reason, [sample])

    def merge(self, other: "LeftOut") -> None:
        self.counts.update(other.counts)
        for reason, samples in other.examples.items():
            self._show(reason, samples)

    def _show(self, reason: str, samples: list[str]) -> None:
        self.examples[reason] = sorted([*self.examples.get(reason, []), *samples])[:_EXAMPLES]

    def state(self) -> dict[str, Any]:
        """JSON, as it stands in the manifest: {reason: {samples, examples}}."""
        return {reason: {"samples": count, "examples": self.examples[reason]} for reason, count in sorted(self.counts.items())}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        counts = Counter({reason: int(entry["samples"]) for reason, entry in state.items()})
        return cls(counts, {reason: [str(name) for name in entry["examples"]] for reason, entry in state.items()})


def nodata_share(part: Part) -> float:
    """Of all pixels (of all dates), those without a value."""
    return 0.0 if part.valid is None else float((part.valid == 0).mean())


def cloud_share(part: Part) -> float:
    """Of the pixels that have a value, those that are cloud or shadow."""
    if part.valid is None or not (seen := np.count_nonzero(part.valid)):
        return 0.0
    return np.count_nonzero(part.valid > 1) / seen


def unfit(sample: Sample, max_nodata: float, max_cloud: float) -> str | None:
    """Why `sample` is to be left out, or None.

    Of several modalities the one with least nodata counts, since it shows what the others lack, and the one with most cloud.
    """
    parts = sample.parts.values()
    if not parts:
        return "no modality is there"
    if min(nodata_share(part) for part in parts) > max_nodata:
        return f"more than {max_nodata:.0%} nodata"
    if max(cloud_share(part) for part in parts) > max_cloud:
        return f"more than {max_cloud:.0%} cloud or shadow"
    return None


def digest(sample: Sample) -> bytes:
    """DIGEST bytes that tell the decoded pixels of all parts: equal for equal modalities, types, shapes and values as stored."""
    hashed = hashlib.sha256()
    for name, part in sorted(sample.parts.items()):
        # little-endian, so that it does not depend on how a file or a machine orders bytes
        pixels = np.ascontiguousarray(part.pixels, part.pixels.dtype.newbyteorder("<"))
        hashed.update(repr((name, pixels.dtype.str, pixels.shape)).encode())
        hashed.update(pixels.data)
    return hashed.digest()[:DIGEST]


class Duplicates:
    """Keeps the first of samples with equal pixels, in the order in which they are shown.

    Jobs are shown in their order, which is that of a hash of (data set, key), and the splits in theirs; so what stays does not
    depend on workers, and a run that continues shows what it has first. About 150 bytes of memory per sample.
    """

    def __init__(self) -> None:
        self._first: dict[bytes, str] = {}

    def earlier(self, key: str, made: bytes) -> str | None:
        """The key of the sample shown before that has the same digest, or None: then this is the first."""
        first = self._first.setdefault(made, key)
        return None if first == key else first

    def restore(self, keys: Iterable[str], digests: bytes) -> None:
        """Show again what was kept: the digests of `keys` one after the other."""
        for number, key in enumerate(keys):
            self._first[digests[number * DIGEST : (number + 1) * DIGEST]] = key
