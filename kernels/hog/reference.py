"""Histograms of oriented gradients per patch. Letters: b sample, c band, o orientation, h w cells or pixels, n patches."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def hog_energy(
    images_bchw: Tensor, patch: tuple[int, int], *, cell: int = 8, bins: int = 9, valid_b1hw: Tensor | None = None
) -> Tensor:
    """(B, N): the length of each cell's histogram, summed over a patch, per counted pixel, averaged over bands."""
    gradient_bchw, angle_bchw = _gradient(images_bchw)
    counted_b1hw = torch.ones_like(gradient_bchw[:, :1], dtype=torch.bool)
    if valid_b1hw is not None:
        # a gradient is that of the scene where all nine pixels under its kernel are
        missing_b1hw = F.pad((~valid_b1hw).to(gradient_bchw.dtype), (1, 1, 1, 1), mode="reflect")
        counted_b1hw = F.max_pool2d(missing_b1hw, 3, stride=1) == 0
    gradient_bchw = torch.where(counted_b1hw, gradient_bchw, 0.0)
    length_bhw = _histogram(gradient_bchw, angle_bchw, cell, bins).norm(dim=2).mean(dim=1)
    pixels_bhw = _pool(counted_b1hw.to(length_bhw.dtype), patch)[:, 0]
    cells = (patch[0] // cell, patch[1] // cell)
    return (_pool(length_bhw[:, None], cells)[:, 0] / pixels_bhw.clamp_min(1)).flatten(1)


@torch.no_grad()
def hog_descriptor(
    images_bchw: Tensor, patch: tuple[int, int], *, cell: int = 8, bins: int = 9, window: int | None = None
) -> Tensor:
    """(B, N, C·bins·cells of a patch): each cell's histogram divided by its length."""
    gradient_bchw, angle_bchw = _gradient(images_bchw)
    if window is not None:
        height, width = images_bchw.shape[2:]
        place = torch.arange(window, dtype=gradient_bchw.dtype, device=gradient_bchw.device) - (window - 1) / 2
        bell = torch.exp(-((place / (window / 2)) ** 2) / 2)
        bell = bell / bell.sum()
        gradient_bchw = gradient_bchw * (bell[:, None] * bell).tile(height // window, width // window)
    histogram_bcohw = F.normalize(_histogram(gradient_bchw, angle_bchw, cell, bins), dim=2)
    rows, columns = patch[0] // cell, patch[1] // cell
    split = histogram_bcohw.unflatten(4, (-1, columns)).unflatten(3, (-1, rows))
    return split.permute(0, 3, 5, 1, 2, 4, 6).flatten(3).flatten(1, 2)


def _gradient(images_bchw: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitude, and direction in (-π, π], of Sobel's differences; written without a convolution, which a GPU may round."""
    x = images_bchw if images_bchw.dtype == torch.float64 else images_bchw.float()
    x = F.pad(x, (1, 1, 1, 1), mode="reflect")
    across, down = x[..., :-2] - x[..., 2:], x[..., :-2, :] - x[..., 2:, :]
    across = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    down = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    return torch.hypot(across, down), torch.atan2(across, down)


def _histogram(gradient_bchw: Tensor, angle_bchw: Tensor, cell: int, bins: int) -> Tensor:
    """(B, C, O, cells): sums of the magnitude by unsigned orientation. One orientation at a time: nothing is O images large."""
    bin_bchw = (angle_bchw * (bins / torch.pi)).floor().remainder(bins)
    return torch.stack([_pool(torch.where(bin_bchw == o, gradient_bchw, 0.0), (cell, cell)) for o in range(bins)], dim=2)


def _pool(x_bchw: Tensor, size: tuple[int, int]) -> Tensor:
    """Sums over windows of `size`."""
    return F.avg_pool2d(x_bchw, size, divisor_override=1)
