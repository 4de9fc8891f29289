"""The causal convolution as one operator, so that it compiles and exports; which implementation runs is chosen when it runs."""

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from swath.kernels.dispatch import Implementation, Operator, everywhere, on_cpu, with_triton

OPERATOR = Operator(
    "causal_conv1d",
    Implementation("triton", with_triton),
    Implementation("cpu", on_cpu),
    Implementation("reference", everywhere, slow=True),
)


def _module(device: torch.device) -> ModuleType:
    name = OPERATOR.choose(device)
    if name == "triton":
        from swath.kernels.conv import triton  # needs Triton

        return triton
    if name == "cpu":
        from swath.kernels.conv import cpu

        return cpu
    raise ValueError(f"this program was compiled with a fast causal convolution, and on {device.type} there is only {name}")


@torch.library.custom_op("swath::causal_conv1d", mutates_args=())
def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, after: Tensor | None, silu: bool, reverse: bool
) -> Tensor:
    """x (K or 1, B, L, D), weight (K, D, W), bias (K or 1, D) → (K, B, L, D).

    before, after: the tables of `reference.neighbours`, (W, K or 1, B or 1, L) int32; without them neighbours are by place,
    and `reverse` says from which side.
    """
    return _module(x.device).forward(x, weight, bias, before, silu, reverse)


@conv.register_fake
def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, after: Tensor | None, silu: bool, reverse: bool
) -> Tensor:
    return x.new_empty(weight.shape[0], *x.shape[1:])


@torch.library.custom_op("swath::causal_conv1d_backward", mutates_args=())
def conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    after: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight, and of a bias (K, D), each in its argument's dtype."""
    dx, dweight, dbias = _module(x.device).backward(dy.contiguous(), x, weight, bias, before, after, silu, reverse)
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias


@conv_backward.register_fake
def _fake_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    after: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2], dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, bias, before, after = ctx.saved_tensors
    dx, dweight, dbias = conv_backward(dy, x, weight, bias, before, after, ctx.silu, ctx.reverse)
    if bias is not None:
        dbias = (dbias if len(bias) == len(dbias) else dbias.sum(dim=0, keepdim=True)).to(bias.dtype)
    return dx, dweight, dbias if bias is not None else None, None, None, None, None


conv.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.swath.causal_conv1d)
def _flops(x: torch.Size, weight: torch.Size, *rest: Any, **kwargs: Any) -> int:
    return 2 * weight[0] * weight[2] * math.prod(x[1:])


@register_flop_formula(torch.ops.swath.causal_conv1d_backward)
def _flops_backward(dy: torch.Size, x: torch.Size, weight: torch.Size, *rest: Any, **kwargs: Any) -> int:
    return 6 * weight[0] * weight[2] * math.prod(x[1:])
