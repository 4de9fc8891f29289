"""Attention of all tokens with all, as torch has it; what an export carries."""

import torch.nn.functional as F
from torch import Tensor


def joint_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(q k^T scale) v; q, k, v (B, H, T, E), mask ([B,] T, T), bool, True where row may attend to column."""
    seen = mask if mask is None or mask.ndim == 2 else mask[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
