"""The plain masked patch loss. Letters: b sample, m masked patch, c band, p q rows and columns of a patch, v its values."""

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_patch_loss(
    prediction_bmv: Tensor,
    images_bchw: Tensor,
    index_bm: Tensor,
    *,
    patch: tuple[int, int],
    normalise: bool = True,
    eps: float = 1e-6,
    valid_b1hw: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(error, mean, spread), each (B, M), of masked patches. Only their pixels are copied, and that copy is then overwritten."""
    dtype = torch.float64 if prediction_bmv.dtype == torch.float64 else torch.float32
    target_bmv = _masked(images_bchw.detach(), index_bm, patch).to(dtype)
    mean, spread = target_bmv.new_zeros(*index_bm.shape, 1), target_bmv.new_ones(*index_bm.shape, 1)
    if valid_b1hw is None:
        if normalise:
            # a single value has no unbiased variance, and deviates from nothing
            correction = min(1, target_bmv.shape[2] - 1)
            spread = (target_bmv.var(dim=2, keepdim=True, correction=correction) + eps) ** 0.5
            mean = target_bmv.mean(dim=2, keepdim=True)
            target_bmv.sub_(mean).div_(spread)
        error_bm = F.mse_loss(prediction_bmv.to(dtype), target_bmv, reduction="none").mean(dim=2)
        return error_bm, mean[..., 0], spread[..., 0]
    bands = images_bchw.shape[1]
    valid_bmv = _masked(valid_b1hw, index_bm, patch)[..., None].expand(-1, -1, -1, bands).flatten(2)
    count = valid_bmv.sum(dim=2, keepdim=True)
    target_bmv.masked_fill_(~valid_bmv, 0)
    if normalise:
        mean = target_bmv.sum(dim=2, keepdim=True) / count.clamp_min(1)
        target_bmv.sub_(mean).masked_fill_(~valid_bmv, 0)
        spread = ((target_bmv**2).sum(dim=2, keepdim=True) / (count - 1).clamp_min(1) + eps) ** 0.5
        target_bmv.div_(spread)
    square_bmv = F.mse_loss(prediction_bmv.to(dtype), target_bmv, reduction="none")
    error_bm = (square_bmv * valid_bmv).sum(dim=2) / count[..., 0].clamp_min(1)
    return error_bm, mean[..., 0], spread[..., 0]


def _masked(images_bchw: Tensor, index_bm: Tensor, patch: tuple[int, int]) -> Tensor:
    """(B, M, V): a new tensor of the pixels at places `index_bm` of the raster."""
    (batch, bands, height, width), (p, q) = images_bchw.shape, patch
    grid_bhwcpq = images_bchw.view(batch, bands, height // p, p, width // q, q).permute(0, 2, 4, 1, 3, 5)
    sample_b1 = torch.arange(batch, device=index_bm.device)[:, None]
    columns = width // q
    patches_bmcpq = grid_bhwcpq[sample_b1, index_bm // columns, index_bm % columns]
    return patches_bmcpq.permute(0, 1, 3, 4, 2).flatten(2)
