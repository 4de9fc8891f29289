"""Attention along one axis of a (groups × positions) grid, as its formula; what an export carries.

Letters: b batch, g groups (bands), n positions, h heads, e width of a head; l and m places along the axis.
"""

import torch
from torch import Tensor


def axial_attention(
    q: Tensor, k: Tensor, v: Tensor, axis: str, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(q k^T scale) v along "spectral" (over G) or "spatial" (over N), in fp32 (or float64); → as q (B, G, N, H, E)."""
    order = (0, 2, 3, 1, 4) if axis == "spectral" else (0, 1, 3, 2, 4)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_le, k_me, v_me = (x.to(wide).permute(order) for x in (q, k, v))
    score_lm = q_le @ k_me.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is None:
        share_lm = score_lm.softmax(dim=-1)
    else:
        seen = mask if mask.ndim == 2 else mask[:, None, None]
        # a row that may attend to nothing gives 0
        share_lm = score_lm.masked_fill(~seen, torch.finfo(wide).min).softmax(dim=-1).masked_fill(~seen, 0)
    back = (0, 3, 1, 2, 4) if axis == "spectral" else (0, 1, 3, 2, 4)
    return (share_lm @ v_me).permute(back).to(q.dtype)
