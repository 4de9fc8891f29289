"""Which tokens are seen and which are to be predicted: per sample, from its own draw."""

import torch
from torch import Tensor

from swath.pretrain.objective import Draws


def kept(tokens: int, mask_ratio: float) -> int:
    """How many of `tokens` are encoded. The published code truncates tokens·(1 - ratio) in Python floats, and so do we."""
    return int(tokens * (1 - mask_ratio))


def random_mask(draw: Draws, tokens: int, keep: int, valid_bn: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(keep (B, K), masked (B, N - K)) int64, each ascending: the K smallest of one uniform number per token (He et al. 2022).

    Invalid tokens come last, so they are kept only where a sample has fewer than K valid ones.
    """
    if valid_bn is None:
        order_bn = draw.order("mask", tokens)
    else:
        order_bn = (draw.uniform("mask", tokens) + (~valid_bn) * 2.0).argsort(dim=1, stable=True)
    return order_bn[:, :keep].sort(dim=1).values, order_bn[:, keep:].sort(dim=1).values


def fill(values_bmp: Tensor, index_bm: Tensor, into_bnp: Tensor) -> Tensor:
    """`into` with the rows `index` of each sample replaced by `values`."""
    rows = index_bm[..., None].expand(-1, -1, into_bnp.shape[2])
    return into_bnp.scatter(1, rows, values_bmp.to(into_bnp.dtype))


def places(draw: Draws, tokens: int) -> Tensor:
    """(B, N) where each token went in the shuffled order (`ids_restore` of the published code)."""
    return torch.argsort(draw.order("mask", tokens), dim=1)
