"""Views of each chip from its own draws: crop, flips and quarter turns (DESIGN §2.4)."""

import math

import torch
from torch import Tensor

from swath.pretrain.config import Augment
from swath.pretrain.objective import Draws
from swath.shards.prepare import View

_TRIES = 10


def view(augment: Augment, draw: Draws, size_b2: Tensor) -> View:
    """What to take of each chip of `size_b2` rows and columns."""
    made = View(box=None if augment.crop is None else _crop(augment, draw, size_b2))
    if augment.flip != "none":
        flips_b2 = draw.uniform("flip", 2) < 0.5
        made.flip_columns = flips_b2[:, 0]
        made.flip_rows = flips_b2[:, 1] if augment.flip == "both" else None
    if augment.quarter_turns:
        # a quarter turn is a transposition and then a flip of the rows, a half turn is both flips
        turns_b = (draw.uniform("turn", 1)[:, 0] * 4).long()
        never = torch.zeros_like(turns_b, dtype=torch.bool)
        rows_b, columns_b = (never if f is None else f for f in (made.flip_rows, made.flip_columns))
        made.transpose = turns_b % 2 == 1
        made.flip_rows = torch.where(made.transpose, columns_b, rows_b) ^ ((turns_b == 1) | (turns_b == 2))
        made.flip_columns = torch.where(made.transpose, rows_b, columns_b) ^ (turns_b >= 2)
    return made


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
