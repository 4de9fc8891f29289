"""The short causal convolution of Mamba, in one or several directions over tokens that stay where they are."""

import torch
from torch import Tensor

from swath.kernels.conv import reference
from swath.kernels.conv.op import OPERATOR, conv
from swath.kernels.dispatch import check_contents
from swath.kernels.scan.reference import canonical_order
from swath.kernels.scan.reference import check_contents as check_order

__all__ = ["causal_conv1d"]


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
    """y_t = SiLU(bias + sum over w of weight[:, w] x_{t - (W - 1 - w)}), per channel (Gu and Dao 2023, "Mamba").

    One direction: x (B, L, D), weight (D, W), bias (D,) → (B, L, D). K directions, told by weight (K, D, W): x (B, L, D) shared
    or (K, B, L, D), bias (D,) or (K, D) → (K, B, L, D). `activation` is "silu" or None.

    `order`, `reverse`, `mask` and `cu_seqlens` are those of `swath.kernels.scan.selective_scan`: the window is over the tokens
    visited last in the same sequence, results stand at their place. It skips tokens that `mask` drops; there y and all
    gradients are 0, and what stands there is not looked at.

    fp32, bf16 or fp16, each tensor in its own dtype, also under autocast, y in that of x; sums are in fp32 (float64 where x is,
    on a CPU or by the reference). Gradients for x, weight and bias, in a fixed order of summation.

    Raises ValueError for shapes, dtypes and devices that do not fit, naming the argument; for bad indices and packings on a
    CPU, and on a GPU under SWATH_CHECK=1, outside compiled code.
    """
    order_kbl = _check(x, weight, bias, activation, order, mask, cu_seqlens)
    length = x.shape[-2]
    if check_contents(x.device) and not torch.compiler.is_compiling():
        check_order(order_kbl, cu_seqlens, length)
    if OPERATOR.choose(x.device) == "reference":
        return reference.causal_conv1d(
            x, weight, bias, activation=activation, order=order, reverse=reverse, mask=mask, cu_seqlens=cu_seqlens
        )
    before = after = None
    if order is not None or mask is not None or cu_seqlens is not None:
        if order_kbl is None:
            order_kbl = torch.arange(length, device=x.device).expand(1, 1, -1)
        order_kbl = order_kbl.long().expand(-1, order_kbl.shape[1] if mask is None else len(mask), -1)
        tables = reference.neighbours(order_kbl, weight.shape[-1], mask, cu_seqlens)
        before, after = (table.int() for table in (reversed(tables) if reverse else tables))
    y_kbld = conv(
        x if x.ndim == 4 else x[None],
        weight if weight.ndim == 3 else weight[None],
        bias if bias is None or bias.ndim == 2 else bias[None],
        before, after, activation == "silu", reverse,
    )  # fmt: skip
    return y_kbld if weight.ndim == 3 else y_kbld[0]


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, order: Tensor | None, mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """The order as (K or 1, B or 1, L)."""
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, not {activation!r}")
    if weight.ndim not in (2, 3) or 0 in weight.shape:
        raise ValueError(f"weight must be (D, W), or (K, D, W) for K directions, not {tuple(weight.shape)}")
    lead, width = tuple(weight.shape[:-2]), weight.shape[-2]
    if (x.ndim != 3 and not (lead and x.ndim == 4 and len(x) == lead[0])) or x.shape[-1] != width:
        raise ValueError(f"x must be (B, L, {width}){' or (K, B, L, D)' if lead else ''} where weight is {tuple(weight.shape)}, "
                         f"not {tuple(x.shape)}")  # fmt: skip
    if bias is not None and tuple(bias.shape) not in [(width,), *([(*lead, width)] if lead else [])]:
        raise ValueError(f"bias must be ({width},){' or (K, D)' if lead else ''} where weight is {tuple(weight.shape)}, "
                         f"not {tuple(bias.shape)}")  # fmt: skip
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {tensor.dtype}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; all must be on one device")
    return canonical_order(order, mask, cu_seqlens, lead, (x.shape[-3], x.shape[-2]), x.device)
