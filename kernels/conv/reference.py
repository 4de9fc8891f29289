"""The causal depth-wise convolution in plain torch; what an export carries.

Letters: k direction, b sample, l place, t step, d channel, w tap; the last tap is of the token itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    order: Tensor | None = None,
    reverse: bool = False,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Over the tokens visited last; see `swath.kernels.conv.causal_conv1d`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    lead = weight.shape[:-2]
    directions, taps = (lead[0] if lead else 1), weight.shape[-1]
    x_kbld = (x if x.ndim == 4 else x[None]).to(dtype).expand(directions, -1, -1, -1)
    batch, length = x_kbld.shape[1:3]
    if order is not None and order.ndim == 2 and lead and len(order) == directions:
        order = order[:, None]
    order_kbl = (torch.arange(length, device=x.device) if order is None else order.long()).expand(directions, batch, length)
    earlier_wkbl = neighbours(order_kbl, taps, mask, cu_seqlens)[int(reverse)]
    k, b = torch.arange(directions, device=x.device)[:, None, None], torch.arange(batch, device=x.device)[:, None]
    y_kbld = x_kbld.new_zeros(x_kbld.shape)
    for back, place_kbl in enumerate(earlier_wkbl):
        token_kbld = torch.where((place_kbl >= 0)[..., None], x_kbld[k, b, place_kbl.clamp_min(0)], 0.0)
        y_kbld = y_kbld + token_kbld * weight.to(dtype).expand(directions, -1, -1)[:, None, None, :, taps - 1 - back]
    if bias is not None:
        y_kbld = y_kbld + bias.to(dtype).expand(directions, -1)[:, None, None]
    if activation == "silu":
        y_kbld = F.silu(y_kbld)
    y_kbld = torch.where((earlier_wkbl[0] >= 0)[..., None], y_kbld, 0.0)
    return (y_kbld if lead else y_kbld[0]).to(x.dtype)


def neighbours(order_kbl: Tensor, taps: int, mask_bl: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two tables (W, K, B, L) int64: the place of the token visited w tokens before the one at a place, and w after it.

    Dropped tokens are not counted; -1 where there is none in the sequence, and for dropped tokens themselves.
    """
    directions, _, length = order_kbl.shape
    if mask_bl is None:
        visited_kbl, present_kbl = order_kbl, torch.ones_like(order_kbl, dtype=torch.bool)
    else:  # present ones first, in the order of visits
        present_kbl = mask_bl.expand(directions, -1, -1).gather(2, order_kbl)
        first = present_kbl.logical_not().to(torch.uint8).argsort(dim=2, stable=True)
        visited_kbl, present_kbl = order_kbl.gather(2, first), present_kbl.gather(2, first)
    sequence_l = torch.zeros(length, dtype=torch.int64, device=order_kbl.device)
    if cu_seqlens is not None:
        sequence_l = torch.bucketize(torch.arange(length, device=order_kbl.device), cu_seqlens[1:].long(), right=True)
    sequence_kbl = torch.where(present_kbl, sequence_l[visited_kbl], -1)
    t = torch.arange(length, device=order_kbl.device)
    tables = []
    for sign in (-1, 1):
        rows = []
        for away in range(taps):
            other_l = t + sign * away
            inside_l = (other_l >= 0) & (other_l < length)
            other_l = other_l.clamp(0, max(length - 1, 0))
            same_kbl = inside_l & present_kbl & (sequence_kbl[..., other_l] == sequence_kbl)
            found_kbl = torch.where(same_kbl, visited_kbl[..., other_l], -1)
            rows.append(torch.full_like(visited_kbl, -1).scatter(2, visited_kbl, found_kbl))
        tables.append(torch.stack(rows))
    return tables[0], tables[1]
