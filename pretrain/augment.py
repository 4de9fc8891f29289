"""Views of each chip from its own draws: crop, flips and quarter turns (DESIGN §2.4)."""

import math

import torch
from torch import Tensor

from swath.pretrain.config import Augment
from swath.pretrain.objective import Draws
from swath.shards.prepare import View

_TRIES = 10


def view(augment: Augment, draw: Draws, size_b2: Tensor) -> View | None:
    """What to take of each chip of `size_b2` rows and columns; None when nothing is asked for."""
    if augment == Augment(flip="none"):
        return None
    whole = View.whole(size_b2)
    flips_b2 = draw.uniform("flip", 2) < 0.5
    never = torch.zeros_like(flips_b2[:, 0])
    return View(
        box=whole.box if augment.crop is None else _crop(augment, draw, size_b2),
        flip_rows=flips_b2[:, 1] if augment.flip == "both" else never,
        flip_columns=never if augment.flip == "none" else flips_b2[:, 0],
        turns=(draw.uniform("turn", 1)[:, 0] * 4).long() if augment.quarter_turns else None,
    )


def _crop(augment: Augment, draw: Draws, size_b2: Tensor) -> Tensor:
    """(B, 4) boxes: area share uniform, ratio log-uniform; the first of ten tries that fits, else the largest central box."""
    assert augment.crop is not None
    height_b1, width_b1 = size_b2.double().split(1, dim=1)
    area_bt = draw.uniform("crop/area", _TRIES).double()
    ratio_bt = draw.uniform("crop/ratio", _TRIES).double()
    low, high = augment.crop
    area_bt = height_b1 * width_b1 * (low + (high - low) * area_bt)
    first, last = (math.log(r) for r in augment.ratio)
    ratio_bt = torch.exp(first + (last - first) * ratio_bt)
    rows_bt, columns_bt = (area_bt / ratio_bt).sqrt(), (area_bt * ratio_bt).sqrt()
    fits_bt = (rows_bt <= height_b1) & (columns_bt <= width_b1)
    pick_b1 = fits_bt.int().argmax(dim=1, keepdim=True)
    rows_b1, columns_b1 = rows_bt.gather(1, pick_b1), columns_bt.gather(1, pick_b1)
    fitted_b1 = fits_bt.any(dim=1, keepdim=True)
    ratio_b1 = (width_b1 / height_b1).clamp(*augment.ratio)
    rows_b1 = torch.where(fitted_b1, rows_b1, torch.minimum(height_b1, width_b1 / ratio_b1))
    columns_b1 = torch.where(fitted_b1, columns_b1, torch.minimum(width_b1, height_b1 * ratio_b1))
    free_b2 = torch.cat([height_b1 - rows_b1, width_b1 - columns_b1], dim=1)
    corner_b2 = free_b2 * torch.where(fitted_b1, draw.uniform("crop/corner", 2).double(), 0.5)
    return torch.cat([corner_b2, rows_b1, columns_b1], dim=1)
