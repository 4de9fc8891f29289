"""The plain patch embedding; what an export carries. Letters: b sample, c band, h w pixels, k kept patches, d width."""

import torch
import torch.nn.functional as F
from torch import Tensor


def visible_patch_embedding(
    images_bchw: Tensor, weight_dcpq: Tensor, bias_d: Tensor | None = None, index_bk: Tensor | None = None
) -> Tensor:
    """(B, K, D): a convolution whose stride is its kernel (p, q), at the patches `index_bk` of the raster, all N when None."""
    patches_bkcpq = patches(images_bchw, (weight_dcpq.shape[2], weight_dcpq.shape[3]), index_bk)
    return F.linear(patches_bkcpq.flatten(2), weight_dcpq.flatten(1), bias_d)


def patches(images_bchw: Tensor, size: tuple[int, int], index_bk: Tensor | None = None) -> Tensor:
    """(B, K, C, p, q): the patches of `size` (p, q) at places `index_bk` of the raster, all N when None, and no others."""
    (batch, bands, height, width), (p, q) = images_bchw.shape, size
    grid_bhwcpq = images_bchw.view(batch, bands, height // p, p, width // q, q).permute(0, 2, 4, 1, 3, 5)
    if index_bk is None:
        return grid_bhwcpq.flatten(1, 2)
    sample_b1 = torch.arange(batch, device=index_bk.device)[:, None]
    columns = width // q
    return grid_bhwcpq[sample_b1, index_bk // columns, index_bk % columns]
