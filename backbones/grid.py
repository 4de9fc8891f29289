"""The grid of tokens over an image: which sizes fit, where tokens lie, positions that were learned on another grid."""

import torch
import torch.nn.functional as F
from torch import Tensor

from swath.backbones.base import Keep


def check_images(images_bchw: Tensor, bands: int) -> None:
    if images_bchw.ndim != 4 or images_bchw.shape[1] != bands:
        raise ValueError(f"images must be (B, {bands}, H, W), not {tuple(images_bchw.shape)}")


def check_image_size(image_size: int, patch: int) -> None:
    """Of a configuration, whose image is square."""
    if image_size % patch or not image_size:
        fits = max(1, round(image_size / patch)) * patch
        raise ValueError(f"image_size {image_size} is not divisible by patch {patch}; {fits} would be")


def patch_grid(height: int, width: int, patch: int, unit: str = "patch") -> tuple[int, int]:
    """(rows, columns); ValueError with the nearest size that fits where `patch` does not divide."""
    if height % patch or width % patch or not height or not width:
        fits = f"{max(1, round(height / patch)) * patch}×{max(1, round(width / patch)) * patch}"
        raise ValueError(f"image of {height}×{width} pixels is not divisible by {unit} {patch}; {fits} would be")
    return height // patch, width // patch


def pyramid_grid(height: int, width: int, stride: int) -> tuple[int, int, int, int]:
    """(1, 1, rows, columns) of a pyramid's last stage."""
    return 1, 1, *patch_grid(height, width, stride, "the total stride")


def boxes(grid: tuple[int, int, int, int], stride: int, device: torch.device, side: int | None = None) -> Tensor:
    """(N, 4) int64 top, left, height, width in pixels of every place: windows of `side`, by default `stride`, every `stride`."""
    rows, columns = (torch.arange(count, device=device) * stride for count in grid[2:])
    corner = torch.cartesian_prod(rows, columns)
    return torch.cat([corner, torch.full_like(corner, side or stride)], dim=1).repeat(grid[0] * grid[1], 1)


def resize_positions(table_1nd: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(rows · columns, D) of a learned table (1, N, D): bicubic, as it is where the grids are equal."""
    if old == new:
        return table_1nd[0]
    table_1dhw = table_1nd.unflatten(1, old).permute(0, 3, 1, 2)
    return F.interpolate(table_1dhw.float(), new, mode="bicubic", align_corners=False).flatten(2)[0].T


def refuse_keep(keep: Keep | None, instead: str = "mask pixels with `hide`, in units of mask_unit") -> None:
    """Of a backbone that is not sparse."""
    if keep is not None:
        raise ValueError(f"this backbone is not sparse and cannot encode a subset of tokens: {instead}")
