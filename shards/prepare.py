"""From stored chips to what a backbone sees: decode, normalise, crop, flip and resize, batched and on the chips' device.

Resizing is two matrix products with weights made per sample, so crops of different boxes and sizes are one call, and filters
are anti-aliased when shrinking. Letters: b sample, c band, h w in, y x out.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from swath.shards.bands import InputContract
from swath.shards.errors import InputError
from swath.shards.reader import VALID_CLEAR, Chips


@dataclass
class Batch:
    """images {modality: (B, C, H, W)} normalised, 0 where invalid; valid {modality: (B, 1, H, W)} bool, without an entry
    where every pixel is; id, visit (B,) int64; weight (B,) float32, 0 for samples that must not count."""

    images: dict[str, Tensor]
    valid: dict[str, Tensor]
    id: Tensor
    visit: Tensor
    weight: Tensor
    meta: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class View:
    """What to take of each chip: the `box` (B, 4) float64 top, left, height, width in pixels, resized to the result, then
    transposed, then flipped where `transpose`, `flip_rows`, `flip_columns` (B,) bool say so. None: the whole, no sample."""

    box: Tensor | None = None
    transpose: Tensor | None = None
    flip_rows: Tensor | None = None
    flip_columns: Tensor | None = None


def prepare(chips: Chips, contract: InputContract, size: tuple[int, int], view: View | None = None) -> Batch:
    """A batch of `size` (height, width) from `chips`, normalised by `contract`.

    Values are physical (DN · scale + add) before (x - mean) / std. Pixels that are not clear, are nodata, or are not finite
    become 0 and are marked invalid. Raises InputError when the chips have another number of bands.
    """
    if chips.pixels.shape[1] != len(contract.bands):
        raise InputError(f"chips have {chips.pixels.shape[1]} bands, the contract {len(contract.bands)}")
    device = chips.pixels.device
    stored_bchw = chips.pixels.to(torch.float32, memory_format=torch.contiguous_format)
    valid_b1hw = _valid(chips, stored_bchw, contract)
    mean, std = (torch.tensor(v, device=device) for v in (contract.normalisation.mean, contract.normalisation.std))
    std = torch.where(std > 0, std, torch.ones_like(std))  # a constant band becomes 0, not infinity
    # one multiplication and one addition per pixel: (dn·scale + add - mean) / std
    factor_bc = (chips.scale.float()[:, None] / std)[..., None, None]
    shift_bc = ((chips.add.float()[:, None] - mean) / std)[..., None, None]
    x_bchw = stored_bchw * factor_bc + shift_bc
    if valid_b1hw is not None:
        x_bchw = torch.where(valid_b1hw, x_bchw, 0.0)
    view = view or View()
    if view.box is not None or tuple(x_bchw.shape[2:]) != size or chips.valid is not None:
        whole = torch.cat([torch.zeros_like(chips.size), chips.size], dim=1).double()
        x_bchw, valid_b1hw = _resample(x_bchw, valid_b1hw, chips.size, whole if view.box is None else view.box, size)
    x_bchw = _turn(x_bchw, view)
    if valid_b1hw is not None:
        valid_b1hw = _turn(valid_b1hw, view)
    return Batch(
        images={contract.modality: x_bchw},
        valid={} if valid_b1hw is None else {contract.modality: valid_b1hw},
        id=chips.id,
        visit=chips.visit,
        weight=torch.ones(len(chips.id), device=device),
    )


def _valid(chips: Chips, stored_bchw: Tensor, contract: InputContract) -> Tensor | None:
    """(B, 1, H, W) bool, or None where nothing can be invalid."""
    masks = []
    if chips.valid is not None:
        masks.append(chips.valid == VALID_CLEAR)
    if contract.nodata is not None:
        masks.append((stored_bchw != contract.nodata).all(dim=1, keepdim=True))
    if chips.pixels.is_floating_point():
        masks.append(torch.isfinite(stored_bchw).all(dim=1, keepdim=True))
    return torch.stack(masks).all(dim=0) if masks else None


def _resample(
    x_bchw: Tensor, valid_b1hw: Tensor | None, size_b2: Tensor, box_b4: Tensor, out: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """Bilinear with anti-aliasing on valid pixels only; validity by nearest neighbour."""
    top, left, height, width = box_b4.unbind(1)
    rows_byh = _weights(top, height, size_b2[:, 0], x_bchw.shape[2], out[0])
    columns_bxw = _weights(left, width, size_b2[:, 1], x_bchw.shape[3], out[1])

    def apply(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return rows[:, None] @ values @ columns[:, None].transpose(2, 3)

    made_bcyx = apply(x_bchw, rows_byh, columns_bxw)
    if valid_b1hw is None:
        return made_bcyx, None
    near_rows = F.one_hot(rows_byh.argmax(2), rows_byh.shape[2]).float()
    near_columns = F.one_hot(columns_bxw.argmax(2), columns_bxw.shape[2]).float()
    share = apply(valid_b1hw.float(), rows_byh, columns_bxw)
    made_valid = (apply(valid_b1hw.float(), near_rows, near_columns) > 0.5) & (share > 0)
    return torch.where(made_valid, made_bcyx / share.clamp_min(1e-6), 0.0), made_valid


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
