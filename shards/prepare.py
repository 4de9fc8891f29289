"""From stored chips to what a backbone sees: decode, normalise, crop, flip and resize, batched and on the chips' device.

Resizing is two matrix products with weights made per sample, so crops of different boxes and sizes are one call, and filters
are anti-aliased when shrinking. Letters: b sample, c band, h w in, y x out.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from swath.shards.bands import InputContract
from swath.shards.errors import InputError
from swath.shards.reader import VALID_CLEAR, Chips, Stored


@dataclass
class Batch:
    """images {modality: (B, C, H, W)} normalised, 0 where invalid, of a series (B, dates · C, H, W) date after date;
    valid {modality: (B, 1, H, W)}, of a series (B, dates, H, W), bool, without an entry where every pixel is;
    id, visit (B,) int64; weight (B,) float32, 0 for samples that must not count. meta {gsd_m, lat, lon, time} (B,) float64, NaN
    where unknown: metres per pixel after cropping and resizing, degrees of the crop's centre, UTC seconds since 1970 (B, dates).
    wavelength_nm {modality: (bands,)} float64, NaN for a band that has none."""

    images: dict[str, Tensor]
    valid: dict[str, Tensor]
    id: Tensor
    visit: Tensor
    weight: Tensor
    meta: dict[str, Tensor] = field(default_factory=dict)
    wavelength_nm: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class View:
    """What to take of each chip: the `box` (B, 4) float64 top, left, height, width in pixels of the first modality, resized to
    the result, then transposed, then flipped where `transpose`, `flip_rows`, `flip_columns` (B,) bool say so. None: the whole."""

    box: Tensor | None = None
    transpose: Tensor | None = None
    flip_rows: Tensor | None = None
    flip_columns: Tensor | None = None


def prepare(
    chips: Chips,
    contracts: Mapping[str, InputContract],
    size: tuple[int, int],
    view: View | None = None,
    clear: Collection[int] = (VALID_CLEAR,),
) -> Batch:
    """A batch of `size` (height, width) from `chips`: the modalities of `contracts`, each normalised by its own.

    Values are physical (DN · scale + add) before (x - mean) / std. Pixels whose code is not among `clear`, that are nodata, or
    are not finite become 0 and are marked invalid; a sample without a valid pixel has weight 0. Raises InputError when the chips
    have another number of bands.
    """
    view = view or View()
    first = next(iter(chips.stored.values()))
    images, valid = {}, {}
    seen_b = torch.zeros(len(chips.id), dtype=torch.bool, device=chips.id.device)
    for name, contract in contracts.items():
        stored = chips.stored[name]
        own = view
        if view.box is not None and stored is not first:  # the same ground in this modality's pixels
            own = replace(view, box=view.box * (stored.size / first.size).repeat(1, 2))
        images[name], valid_bthw = _one(stored, contract, size, own, clear)
        if valid_bthw is None:
            seen_b |= True
        else:
            valid[name] = valid_bthw
            seen_b |= valid_bthw.flatten(1).any(dim=1)
    nanometres = {
        name: torch.tensor(
            [math.nan if band.wavelength_nm is None else band.wavelength_nm for band in contract.bands], dtype=torch.float64
        )
        for name, contract in contracts.items()
    }
    return Batch(
        images, valid, chips.id, chips.visit, seen_b.float(), _meta(chips.meta, first.size, view.box, size),
        {name: value.to(chips.id.device) for name, value in nanometres.items()},
    )  # fmt: skip


def _one(
    stored: Stored, contract: InputContract, size: tuple[int, int], view: View, clear: Collection[int]
) -> tuple[Tensor, Tensor | None]:
    """Pixels (B, C, H, W) and validity (B, dates, H, W) or None."""
    if stored.pixels.shape[1] != contract.channels:
        dates = f" of {contract.dates} dates" if contract.dates > 1 else ""
        raise InputError(f"chips have {stored.pixels.shape[1]} bands, the contract {contract.channels}{dates}")
    device = stored.pixels.device
    stored_bchw = stored.pixels.to(torch.float32, memory_format=torch.contiguous_format)
    valid_bthw = _valid(stored, stored_bchw, contract, clear)
    mean, std = (
        torch.tensor(v * contract.dates, device=device) for v in (contract.normalisation.mean, contract.normalisation.std)
    )
    std = torch.where(std > 0, std, torch.ones_like(std))  # a constant band becomes 0, not infinity
    # one multiplication and one addition per pixel: (dn·scale + add - mean) / std
    factor_bc = (stored.scale.float()[:, None] / std)[..., None, None]
    shift_bc = ((stored.add.float()[:, None] - mean) / std)[..., None, None]
    x_bchw = stored_bchw * factor_bc + shift_bc
    if contract.normalisation.clip is not None:
        x_bchw = x_bchw.clamp(*contract.normalisation.clip)
    if valid_bthw is not None:
        x_bchw = torch.where(_of_bands(valid_bthw, contract), x_bchw, 0.0)
    if view.box is not None or tuple(x_bchw.shape[2:]) != size or stored.valid is not None:
        whole = torch.cat([torch.zeros_like(stored.size), stored.size], dim=1).double()
        x_bchw, valid_bthw = _resample(x_bchw, valid_bthw, stored.size, whole if view.box is None else view.box, size)
    x_bchw = _turn(x_bchw, view)
    return x_bchw, None if valid_bthw is None else _turn(valid_bthw, view)


def _of_bands(valid_bthw: Tensor, contract: InputContract) -> Tensor:
    """One mask for all bands where there is one date, else that of its date for each band."""
    return valid_bthw if contract.dates == 1 else valid_bthw.repeat_interleave(len(contract.bands), dim=1)


def _valid(stored: Stored, stored_bchw: Tensor, contract: InputContract, clear: Collection[int]) -> Tensor | None:
    """(B, dates, H, W) bool, or None where nothing can be invalid."""
    masks = []
    dates_btchw = stored_bchw.unflatten(1, (contract.dates, len(contract.bands)))
    if stored.valid is not None:
        masks.append(torch.isin(stored.valid, torch.tensor(list(clear), dtype=torch.uint8, device=stored.valid.device)))
    if contract.nodata is not None:
        masks.append((dates_btchw != contract.nodata).all(dim=2))
    if stored.pixels.is_floating_point():
        masks.append(torch.isfinite(dates_btchw).all(dim=2))
    return torch.stack(masks).all(dim=0) if masks else None


def _meta(meta: dict[str, Tensor], size_b2: Tensor, box_b4: Tensor | None, out: tuple[int, int]) -> dict[str, Tensor]:
    """`meta` of whole chips as it is of the crops, taking rows to run south and columns east."""
    if not meta:
        return {}
    size_b2 = size_b2.double()
    box_b4 = torch.cat([torch.zeros_like(size_b2), size_b2], dim=1) if box_b4 is None else box_b4
    away_b2 = box_b4[:, :2] + box_b4[:, 2:] / 2 - size_b2 / 2
    # the centre stays where it is, even if nobody knows how large a pixel is
    south_b, east_b = torch.where(away_b2 == 0, 0.0, away_b2 * meta["gsd_m"][:, None]).unbind(1)
    per_degree = 111_320.0  # metres
    lat = meta["lat"] - south_b / per_degree
    lon = meta["lon"] + east_b / (per_degree * torch.cos(torch.deg2rad(meta["lat"])).clamp_min(1e-3))
    zoom_b = (box_b4[:, 2] / out[0] * box_b4[:, 3] / out[1]).sqrt()
    return {**meta, "lat": lat, "lon": lon, "gsd_m": meta["gsd_m"] * zoom_b}


def _resample(
    x_bchw: Tensor, valid_bthw: Tensor | None, size_b2: Tensor, box_b4: Tensor, out: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """Bilinear with anti-aliasing on valid pixels only; validity by nearest neighbour."""
    top, left, height, width = box_b4.unbind(1)
    rows_byh = _weights(top, height, size_b2[:, 0], x_bchw.shape[2], out[0])
    columns_bxw = _weights(left, width, size_b2[:, 1], x_bchw.shape[3], out[1])

    def apply(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return rows[:, None] @ values @ columns[:, None].transpose(2, 3)

    made_bcyx = apply(x_bchw, rows_byh, columns_bxw)
    if valid_bthw is None:
        return made_bcyx, None
    near_rows = F.one_hot(rows_byh.argmax(2), rows_byh.shape[2]).float()
    near_columns = F.one_hot(columns_bxw.argmax(2), columns_bxw.shape[2]).float()
    share = apply(valid_bthw.float(), rows_byh, columns_bxw)
    made_valid = (apply(valid_bthw.float(), near_rows, near_columns) > 0.5) & (share > 0)
    bands = x_bchw.shape[1] // share.shape[1]
    wide_share, wide_valid = (m if m.shape[1] == 1 else m.repeat_interleave(bands, dim=1) for m in (share, made_valid))
    return torch.where(wide_valid, made_bcyx / wide_share.clamp_min(1e-6), 0.0), made_valid


def _turn(x_bchw: Tensor, view: View) -> Tensor:
    """Transpose and flip each sample that asks for it."""
    if view.transpose is not None:
        if x_bchw.shape[2] != x_bchw.shape[3]:
            raise InputError(f"quarter turns need square images, not {x_bchw.shape[2]}×{x_bchw.shape[3]}")
        x_bchw = torch.where(view.transpose[:, None, None, None], x_bchw.transpose(2, 3), x_bchw)
    for flip_b, axis in ((view.flip_rows, 2), (view.flip_columns, 3)):
        if flip_b is not None:
            x_bchw = torch.where(flip_b[:, None, None, None], x_bchw.flip(axis), x_bchw)
    return x_bchw


def _weights(start_b: Tensor, length_b: Tensor, limit_b: Tensor, size: int, out: int) -> Tensor:
    """(B, out, size) float32 rows that sum to 1: a triangle filter, as wide as an output pixel when shrinking."""
    step = length_b / out
    reach = step.clamp_min(1.0)[:, None, None]
    place = torch.arange(out, device=start_b.device, dtype=torch.float64)
    centre = start_b[:, None] + (place + 0.5) * step[:, None] - 0.5
    source = torch.arange(size, device=start_b.device, dtype=torch.float64)
    # beyond the chip's own edge lies its padding, which must not be seen
    limit = (limit_b[:, None] - 1).double()
    centre = torch.minimum(centre.clamp_min(0), limit)
    weights = (1 - (source - centre[..., None]).abs() / reach).clamp_min(0)
    weights = weights * (source <= limit)[:, None]
    return (weights / weights.sum(dim=2, keepdim=True)).float()
