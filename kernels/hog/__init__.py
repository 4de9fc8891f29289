"""Per-patch energy of oriented gradients, the score by which SelectiveMAE means to choose patches. Plain torch everywhere."""

import torch
from torch import Tensor

from swath.kernels.hog import reference


def hog_energy(
    images_bchw: Tensor, patch: tuple[int, int], *, cell: int = 8, bins: int = 9, valid_b1hw: Tensor | None = None
) -> Tensor:
    """How strongly oriented each patch is: histograms of oriented gradients (Dalal & Triggs 2005), before any normalisation.

    Sobel's gradient of every band is summed by unsigned orientation, `bins` of them, over cells of `cell` pixels. The energy is
    the length of a cell's histogram, which the usual descriptor divides away, summed over a patch's cells, divided by its pixels
    and averaged over bands: 0 for a flat patch, proportional to contrast, larger for edges than for noise of the same gradient.
    images (B, C, H, W) of any floating dtype; `patch` (p, q) divides (H, W), `cell` divides both. valid (B, 1, H, W) bool: only
    gradients whose nine pixels are all valid count; a patch without any has energy 0.
    → (B, N) in raster order, fp32 (float64 for float64), under autocast too. A score: it has no gradient.

    Raises ValueError for shapes, dtypes and devices that do not fit.
    """
    _check(images_bchw, patch, cell, bins, None)
    if valid_b1hw is not None:
        shape = (len(images_bchw), 1, *images_bchw.shape[2:])
        if tuple(valid_b1hw.shape) != shape or valid_b1hw.dtype != torch.bool or valid_b1hw.device != images_bchw.device:
            got = f"{tuple(valid_b1hw.shape)} {valid_b1hw.dtype} on {valid_b1hw.device}"
            raise ValueError(
                f"valid must be {shape} bool on {images_bchw.device} for images {tuple(images_bchw.shape)}, not {got}"
            )
    return reference.hog_energy(images_bchw, patch, cell=cell, bins=bins, valid_b1hw=valid_b1hw)


def hog_descriptor(
    images_bchw: Tensor, patch: tuple[int, int], *, cell: int = 8, bins: int = 9, window: int | None = None
) -> Tensor:
    """The normalised histograms of `hog_energy`: (B, N, C·bins·(p/cell)·(q/cell)), ordered band, orientation, row, column.

    Each cell's histogram has length 1, or 0 where it is flat. With `window`, gradients are first weighted by a Gaussian of that
    many pixels and half as wide, tiled over the image: window=16 at patch 16 is SelectiveMAE's published code. No gradient.

    Raises ValueError for shapes and dtypes that do not fit.
    """
    _check(images_bchw, patch, cell, bins, window)
    return reference.hog_descriptor(images_bchw, patch, cell=cell, bins=bins, window=window)


def _check(images_bchw: Tensor, patch: tuple[int, int], cell: int, bins: int, window: int | None) -> None:
    shape = tuple(images_bchw.shape)
    if len(shape) != 4 or not images_bchw.is_floating_point() or min(shape[1:]) < 1 or min(shape[2:]) < 2:
        raise ValueError(f"images must be floating point (B, C, H, W) of at least 2×2 pixels, not {shape} {images_bchw.dtype}")
    if min(patch) < 1 or shape[2] % patch[0] or shape[3] % patch[1]:
        raise ValueError(f"images of {shape} are not divisible into patches of {tuple(patch)}")
    if cell < 1 or patch[0] % cell or patch[1] % cell:
        raise ValueError(f"cell {cell} does not divide patch {tuple(patch)}")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    if window is not None and (window < 1 or shape[2] % window or shape[3] % window):
        raise ValueError(f"window {window} does not divide images of {shape}")
