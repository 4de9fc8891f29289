"""What is known of a scene besides its pixels, as one vector: place, day of the year, year and ground sampling distance.

Off in published recipes. Letters: b sample, f feature, d width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from swath.backbones.base import Context
from swath.kernels.linear import Linear

_OCTAVES = 6  # of a coordinate of the unit sphere: the finest has a period of 400 km on the ground
_YEAR, _YEARS = 2015.0, 20.0
_GSD_M, _GSD_OCTAVES = 10.0, 5.0
DROP = 0.5


def civil(seconds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(year, month 1…12, day of the year 0…365, hour), int64, UTC, of seconds since 1970 of any shape (Hinnant's algorithm)."""
    whole = seconds.double().floor().long()
    day = torch.div(whole, 86400, rounding_mode="floor")
    hour = torch.div(whole - day * 86400, 3600, rounding_mode="floor")
    since = day + 719468  # days since 1 March of the year 0; an era is 400 years
    era = torch.div(since, 146097, rounding_mode="floor")
    of_era = since - era * 146097
    year_of_era = (of_era - of_era // 1460 + of_era // 36524 - of_era // 146096) // 365
    of_march_year = of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    shifted = (5 * of_march_year + 2) // 153  # months since March
    month = torch.where(shifted < 10, shifted + 3, shifted - 9)
    year = year_of_era + era * 400 + (month <= 2)
    leap = ((year % 4 == 0) & (year % 100 != 0)) | (year % 400 == 0)
    of_year = torch.where(month <= 2, of_march_year - 306, of_march_year + 59 + leap)
    return year, month, of_year, hour


class ContextEncoding(nn.Module):
    """The sum of one projection per part: place, day, year, gsd. A part that is absent has a learned vector of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.place = Linear(6 * _OCTAVES, width)
        self.day = Linear(4, width)
        self.year = Linear(3, width)
        self.gsd = Linear(5, width)
        self.absent = nn.Parameter(torch.zeros(4, width))
        nn.init.normal_(self.absent, std=0.02)

    def forward(self, ctx: Context | None, batch: int) -> Tensor:
        """(batch, D). `ctx` holds lat and lon in degrees, time in seconds since 1970 and gsd_m in metres, each (B,); what is None
        or NaN is absent. In training, all of a sample is dropped where `ctx.drop` is below 0.5.

        Raises ValueError for a part that is not (B,).
        """
        dtype, device = self.absent.dtype, self.absent.device
        drop = ctx.drop if self.training and ctx is not None else None
        dropped_b = torch.zeros(batch, dtype=torch.bool, device=device) if drop is None else drop < DROP
        total_bd = torch.zeros(batch, self.absent.shape[1], dtype=dtype, device=device)
        for number, (project, features) in enumerate(zip(self._projections(), _features(ctx, batch), strict=True)):
            if features is None:
                total_bd = total_bd + self.absent[number]
                continue
            absent_b1 = (features.isnan().any(dim=1) | dropped_b)[:, None]
            known_bd = project(features.nan_to_num().to(dtype))
            total_bd = total_bd + torch.where(absent_b1, self.absent[number], known_bd)
        return total_bd

    def _projections(self) -> Sequence[nn.Module]:
        return self.place, self.day, self.year, self.gsd


def _features(ctx: Context | None, batch: int) -> list[Tensor | None]:
    """(B, F) numbers of about unit size of each part, NaN where a sample has none; None where no sample has it."""
    if ctx is None:
        return [None] * 4
    for name in ("lat", "lon", "time", "gsd_m"):
        value = getattr(ctx, name)
        if value is not None and tuple(value.shape) != (batch,):
            raise ValueError(f"ctx.{name} must be ({batch},), one number per sample, not {tuple(value.shape)}")
    place = None if ctx.lat is None or ctx.lon is None else _place(ctx.lat, ctx.lon)
    day, year = (None, None) if ctx.time is None else _date(ctx.time)
    gsd = None if ctx.gsd_m is None else _wave((ctx.gsd_m.double() / _GSD_M).log2() / _GSD_OCTAVES, 2)
    return [place, day, year, gsd]


def _place(lat: Tensor, lon: Tensor) -> Tensor:
    """Sines and cosines of the unit sphere's coordinates: no seam at the date line, no crowding at the poles."""
    north, east = lat.double().deg2rad(), lon.double().deg2rad()
    sphere_b3 = torch.stack([north.cos() * east.cos(), north.cos() * east.sin(), north.sin()], dim=1)
    octaves = math.pi * 2.0 ** torch.arange(_OCTAVES, dtype=torch.float64, device=lat.device)
    angle_bf = (sphere_b3[:, :, None] * octaves).flatten(1)
    return torch.cat([angle_bf.sin(), angle_bf.cos()], dim=1)


def _date(time: Tensor) -> tuple[Tensor, Tensor]:
    known = time.double()
    year, _, day, _ = civil(known.nan_to_num())
    nothing = known * 0  # NaN where there is no time
    angle = 2 * math.pi * day / 365.25 + nothing
    season = torch.stack([angle.sin(), angle.cos(), (2 * angle).sin(), (2 * angle).cos()], dim=1)
    return season, _wave((year - _YEAR) / _YEARS + nothing, 1)


def _wave(value_b: Tensor, octaves: int) -> Tensor:
    angles = [math.pi * 2**k * value_b for k in range(octaves)]
    return torch.stack([value_b, *(a.sin() for a in angles), *(a.cos() for a in angles)], dim=1)
