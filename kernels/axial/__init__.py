"""Attention along the spectral or the spatial axis of a (groups × positions) grid, read where it stands."""

import torch
import torch.nn.functional as F
from torch import Tensor

from swath.kernels.axial import reference
from swath.kernels.axial.op import attention_along, fits
from swath.kernels.dispatch import Implementation, Operator, autocast_dtype, everywhere, with_triton

OPERATOR = Operator(
    "axial_attention",
    Implementation("triton", with_triton),
    Implementation("sdpa", everywhere),
    Implementation("reference", everywhere, slow=True),
)
_LONG = 128  # from here on a spatial axis without a mask is a plain batch of sequences, which library attention does best


def axial_attention(
    q: Tensor, k: Tensor, v: Tensor, axis: str, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(q k^T scale) v along one axis of a (G groups × N positions) grid, as in Ho et al. 2019, "Axial attention".

    q, k, v (B, G, N, H, E), of any strides, such as views of one projection (B, G, N, 3, H, E): nothing is permuted in memory.
    axis: "spectral", each position attends over its G groups; "spatial", each group attends over its N positions. mask, bool,
    True where place row may attend to place column of the axis: (G, G) or (N, N), or with a batch in front; a row with none
    gives 0. scale is E^-0.5 by default. → (B, G, N, H, E), contiguous, in the dtype of q; under autocast all are cast to its
    dtype, as `F.scaled_dot_product_attention` does. Sums and softmax are in fp32. Gradients for q, k and v.

    Raises ValueError for shapes, dtypes and devices that do not fit, naming the argument.
    """
    _check(q, k, v, axis, mask)
    device = q.device.type
    if (dtype := autocast_dtype(device)) is not None:
        q, k, v = (x.to(dtype) for x in (q, k, v))
    implementation = OPERATOR.choose(q.device)
    if implementation == "reference":
        return reference.axial_attention(q, k, v, axis, mask=mask, scale=scale)
    long = axis == "spatial" and mask is None and q.shape[2] >= _LONG
    if implementation == "triton" and fits(q) and not long:
        return attention_along(q, k, v, mask, scale, 1 if axis == "spectral" else 2)[0]
    # One batch of (sequences, heads, length, width); along the spatial axis a view, along the spectral one a copy.
    order, back = ((0, 2, 3, 1, 4), (0, 3, 1, 2, 4)) if axis == "spectral" else ((0, 1, 3, 2, 4), (0, 1, 3, 2, 4))
    q_xhle, k_xhle, v_xhle = (x.permute(order).flatten(0, 1) for x in (q, k, v))
    others = q.shape[2 if axis == "spectral" else 1]
    if mask is not None and mask.ndim == 3:
        mask = mask.repeat_interleave(others, dim=0)[:, None]
    out_xhle = F.scaled_dot_product_attention(q_xhle, k_xhle, v_xhle, attn_mask=mask, scale=scale)
    return out_xhle.unflatten(0, (q.shape[0], others)).permute(back).contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor, axis: str, mask: Tensor | None) -> None:
    if axis not in ("spectral", "spatial"):
        raise ValueError(f'axis must be "spectral" or "spatial", not {axis!r}')
    if q.ndim != 5 or not q.is_floating_point():
        raise ValueError(f"q must be (B, G, N, H, E), floating point, not {tuple(q.shape)} {q.dtype}")
    autocast = autocast_dtype(q.device.type) is not None
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name} must be as q, {tuple(q.shape)}, not {tuple(x.shape)}")
        if x.dtype != q.dtype and not (autocast and x.is_floating_point()):
            raise ValueError(f"{name} is {x.dtype}, q is {q.dtype}; outside autocast they must agree")
    length = q.shape[1 if axis == "spectral" else 2]
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) not in ((length, length), (len(q), length, length))):
        shape = f"([{len(q)},] {length}, {length})"
        raise ValueError(
            f"mask must be bool, {shape} along the {axis} axis of q {tuple(q.shape)}, not {mask.dtype} {tuple(mask.shape)}"
        )
    for name, x in (("k", k), ("v", v), ("mask", mask)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q is on {q.device}")
