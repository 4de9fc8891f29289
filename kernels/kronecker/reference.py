"""The low-rank attention of LESS as its formula; what an export carries.

Letters: b batch, r rank, h head, i and m channels, j and n positions, c and s widths of the two factors, o output width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def kronecker_attention(
    qc: Tensor,
    kc: Tensor,
    vc: Tensor,
    qs: Tensor,
    ks: Tensor,
    vs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    mask_c: Tensor | None = None,
    scale_c: float | None = None,
    scale_s: float | None = None,
) -> Tensor:
    """Y[i, j] = weight · concat over heads of (sum over ranks of Oc^r[i] ⊗ Os^r[j]) + bias, in fp32 (or float64) throughout."""
    oc_brhic = _attend(qc, kc, vc, mask_c, scale_c)
    os_brhjs = _attend(qs, ks, vs, mask, scale_s)
    product_bijd = torch.einsum("brhic,brhjs->bijhcs", oc_brhic, os_brhjs).flatten(3)
    return F.linear(product_bijd, _wide(weight), None if bias is None else _wide(bias)).to(weight.dtype)


def _attend(q_brhie: Tensor, k_brhme: Tensor, v_bhme: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """softmax(q k^T scale) v, values shared over the ranks; a row that may attend to nothing gives 0."""
    factor = q_brhie.shape[-1] ** -0.5 if scale is None else scale
    score_brhim = _wide(q_brhie) @ _wide(k_brhme).transpose(-1, -2) * factor
    if mask is None:
        return score_brhim.softmax(dim=-1) @ _wide(v_bhme)[:, None]
    seen = mask if mask.ndim == 2 else mask[:, None, None]
    share_brhim = score_brhim.masked_fill(~seen, torch.finfo(score_brhim.dtype).min).softmax(dim=-1).masked_fill(~seen, 0)
    return share_brhim @ _wide(v_bhme)[:, None]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
