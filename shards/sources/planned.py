"""What the sources of array formats share: a plan that is complete before anything is decoded, contracts without statistics."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from swath.shards.bands import Band, InputContract, Normalisation, Unit
from swath.shards.manifest import LabelMap
from swath.shards.sources.source import Item


@dataclass(kw_only=True)
class Planned:
    """The fields of a `Source`; what derives from it adds `read`."""

    dataset: str
    kind: str
    contracts: dict[str, InputContract]
    items: list[Item]
    fingerprint: str
    classes: tuple[str, ...] = ()
    maps: dict[str, LabelMap] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=())


def fingerprint(root: Path, files: Iterable[Path], *options: object) -> str:
    """Changes with any file's path, size or time, and with what was asked of them."""
    stated = [(path.relative_to(root).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    return hashlib.sha256(repr((stated, options)).encode()).hexdigest()


def contract(
    modality: str, bands: Iterable[Band], dtype: str, *, sensor: str, level: str, unit: Unit, nodata: float | None = None,
    gsd_m: float | None = None, dates: int = 1, resampling: str | None = None,
) -> InputContract:  # fmt: skip
    """An input contract whose statistics are still to be taken."""
    bands = tuple(bands)
    none = tuple(0.0 for _ in bands)
    return InputContract(
        modality=modality, sensor=sensor, level=level, unit=unit, bands=bands, dtype=dtype, nodata=nodata, gsd_m=gsd_m,
        dates=dates, resampling=resampling, normalisation=Normalisation(mean=none, std=none, pixels=tuple(0 for _ in bands)),
    )  # fmt: skip
