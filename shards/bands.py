"""The input contract (DESIGN §2.1): which bands, in which order and unit, normalised how.

`swath shard` writes it into the manifest, every checkpoint and export carries it unchanged, and it is compared wherever
data meets weights.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from swath.shards.errors import InputError

Unit = Literal["reflectance", "digital number", "dB", "linear power", "radiance", "kelvin", "metres", "class", "several"]


class Strict(BaseModel):
    """Frozen, and unknown keys are errors: what is not understood must not be dropped."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Band(Strict):
    """One band. `wavelength_nm` and `width_nm` are centre and full width at half maximum; SAR has neither."""

    name: str
    common_name: str | None = None
    wavelength_nm: float | None = Field(default=None, gt=0)
    width_nm: float | None = Field(default=None, gt=0)
    gsd_m: float | None = Field(default=None, gt=0)


class Normalisation(Strict):
    """(x - mean) / std per band, in the contract's unit; `pixels` says from how many valid ones each was computed. What comes of
    it is cut to the range `clip`, where there is one."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixels: tuple[int, ...]
    minimum: tuple[float, ...] = ()
    maximum: tuple[float, ...] = ()
    clip: tuple[float, float] | None = None


class InputContract(Strict):
    """Ordered bands of one modality and what their numbers mean after `value * scale + offset` of the sample.

    A series holds `dates` of them: its channels are the bands of the first date, then those of the second, and so on.
    SAR's `level` says which backscatter it is (sigma0, gamma0); a band without a wavelength has none invented.
    """

    modality: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,17}$")  # with a key it must fit into a tar name
    sensor: str
    level: str
    unit: Unit
    bands: tuple[Band, ...] = Field(min_length=1)
    dates: int = Field(default=1, ge=1)
    normalisation: Normalisation
    dtype: str
    nodata: float | None = None
    height: int | None = None
    width: int | None = None
    gsd_m: float | None = None
    resampling: str | None = None

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        names = self.names
        if len(set(names)) != len(names):
            raise ValueError(f"band names repeat: {', '.join(names)}")
        for field in ("mean", "std", "pixels"):
            if len(getattr(self.normalisation, field)) != len(self.bands):
                raise ValueError(f"normalisation.{field} must have one value per band ({len(self.bands)})")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(band.name for band in self.bands)

    @property
    def channels(self) -> int:
        """Of a sample: the bands of all dates."""
        return self.dates * len(self.bands)

    @property
    def is_radar(self) -> bool:
        """SAR is told by its unit: backscatter, in dB or linear."""
        return self.unit in ("dB", "linear power")

    def require(self, other: "InputContract", *, ours: str, theirs: str, remedy: str) -> None:
        """Raise InputError, both sides band by band, unless `other` means the same bands in the same order and unit.

        Statistics may differ: the normalisation that counts is the one the weights were trained with.
        """
        heads = [
            (field, getattr(self, field), getattr(other, field))
            for field in ("modality", "sensor", "level", "unit", "dates")
            if getattr(self, field) != getattr(other, field)
        ]
        if not heads and [_identity(b) for b in self.bands] == [_identity(b) for b in other.bands]:
            return
        rows = [f"  {field}: {mine} | {yours}" for field, mine, yours in heads]
        for position, (mine, yours) in enumerate(zip_longest(self.bands, other.bands), start=1):
            same = mine is not None and yours is not None and _identity(mine) == _identity(yours)
            rows.append(f"  {'   ' if same else '!= '}band {position}: {_show(mine)} | {_show(yours)}")
        raise InputError(f"input contracts differ: {ours} | {theirs}\n" + "\n".join(rows) + f"\n  what would do: {remedy}")


def _identity(band: Band) -> tuple[str, float | None]:
    return band.name, band.wavelength_nm


def side_by_side(contracts: Sequence[InputContract]) -> InputContract:
    """Of one image of the bands of several modalities, one after the other: what they have in common, and of each its bands and
    their statistics. Bands of one name get their modality's in front."""
    names = [name for contract in contracts for name in contract.names]
    clips = {contract.normalisation.clip for contract in contracts}
    if len(clips) > 1 or any(contract.dates > 1 for contract in contracts):
        raise InputError("modalities of several dates, or with clips of their own, cannot be put side by side; name one modality")

    def common(field: str, otherwise: Any) -> Any:
        values = {getattr(contract, field) for contract in contracts}
        return values.pop() if len(values) == 1 else otherwise

    def bands(contract: InputContract) -> list[Band]:
        twice = [band.name for band in contract.bands if names.count(band.name) > 1]
        return [b.model_copy(update={"name": f"{contract.modality}_{b.name}"} if b.name in twice else {}) for b in contract.bands]

    def each(field: str) -> tuple[Any, ...]:
        return tuple(value for contract in contracts for value in getattr(contract.normalisation, field))

    return InputContract(
        modality="several", sensor=common("sensor", "several"), level=common("level", "several"), unit=common("unit", "several"),
        bands=tuple(band for contract in contracts for band in bands(contract)),
        normalisation=Normalisation(mean=each("mean"), std=each("std"), pixels=each("pixels"), clip=clips.pop()),
        dtype=common("dtype", "float32"), nodata=common("nodata", None), gsd_m=common("gsd_m", None),
        height=common("height", None), width=common("width", None),
    )  # fmt: skip


def _show(band: Band | None) -> str:
    if band is None:
        return "(none)"
    wavelength = f" {band.wavelength_nm:g} nm" if band.wavelength_nm else ""
    return f"{band.name}{wavelength}"
