"""Attention of all tokens with all, across channels and positions: torch's, or xformers' where it is asked for."""

import torch
from torch import Tensor

from swath.kernels.dispatch import Implementation, Operator, autocast_dtype, everywhere
from swath.kernels.joint import reference, xformers

OPERATOR = Operator(
    "joint_attention",
    Implementation("xformers", xformers.missing, automatic=False),
    Implementation("sdpa", everywhere),
)


def joint_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(q k^T scale) v over all tokens (Vaswani et al. 2017, eq. 1), by `F.scaled_dot_product_attention`.

    q, k, v (B, H, T, E) of one floating dtype; mask (T, T) or (B, T, T), bool, True where token row may attend to token column;
    a row with none gives 0. scale is E^-0.5 by default. → (B, H, T, E) in the dtype of q; under autocast all are cast to its
    dtype. Gradients for q, k and v.

    Raises ValueError for shapes, dtypes and devices that do not fit, naming the argument.
    """
    _check(q, k, v, mask)
    device = q.device.type
    if (dtype := autocast_dtype(device)) is not None:
        q, k, v = (x.to(dtype) for x in (q, k, v))
    chosen = xformers if OPERATOR.choose(q.device) == "xformers" else reference
    return chosen.joint_attention(q, k, v, mask=mask, scale=scale)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    if q.ndim != 4 or not q.is_floating_point():
        raise ValueError(f"q must be (B, H, T, E), floating point, not {tuple(q.shape)} {q.dtype}")
    autocast = autocast_dtype(q.device.type) is not None
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name} must be as q, {tuple(q.shape)}, not {tuple(x.shape)}")
        if x.dtype != q.dtype and not (autocast and x.is_floating_point()):
            raise ValueError(f"{name} is {x.dtype}, q is {q.dtype}; outside autocast they must agree")
    batch, _, tokens, _ = q.shape
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) not in ((tokens, tokens), (batch, tokens, tokens))):
        shape = f"([{batch},] {tokens}, {tokens})"
        raise ValueError(f"mask must be bool, {shape} for q {tuple(q.shape)}, not {mask.dtype} {tuple(mask.shape)}")
    for name, x in (("k", k), ("v", v), ("mask", mask)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q is on {q.device}")
