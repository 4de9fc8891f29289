"""xformers' memory-efficient attention behind the same function, for comparison and for those who have it."""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor


def missing(device_type: str) -> str | None:
    """Why it cannot run there; None where it can."""
    if device_type != "cuda":
        return "xformers' attention takes CUDA tensors only"
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed; an optional back end: pip install xformers"
    return None


def joint_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """As the reference; q, k, v are of one dtype, fp32, bf16 or fp16."""
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    q_bthe, k_bthe, v_bthe = (x.transpose(1, 2) for x in (q, k, v))
    if mask is None:
        return memory_efficient_attention(q_bthe, k_bthe, v_bthe, scale=scale).transpose(1, 2)
    # An additive bias whose rows are aligned to 8 numbers; finite, so that a row that sees nothing gives no NaN.
    (batch, heads, tokens, _), seen = q.shape, mask if mask.ndim == 3 else mask[None]
    bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, torch.finfo(q.dtype).min / 2)
    bias_bhtt = F.pad(bias, (0, -tokens % 8))[:, None, :, :tokens].expand(batch, heads, tokens, tokens)
    out_bthe = memory_efficient_attention(q_bthe, k_bthe, v_bthe, attn_bias=bias_bhtt, scale=scale)
    return out_bthe.transpose(1, 2).masked_fill(~seen.any(dim=-1)[:, None, :, None], 0)
