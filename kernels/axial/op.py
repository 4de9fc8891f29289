"""Attention along one dimension of five-dimensional tensors as a custom operator; the bodies are Triton's."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_SHORT = 64  # up to here whole sequences fit one tile, and backward needs nothing but its inputs


def fits(q: Tensor) -> bool:
    """Whether the kernels take it: they have no float64, and a tile holds whole heads."""
    return q.dtype in (torch.float32, torch.bfloat16, torch.float16) and q.shape[-1] <= 128


@torch.library.custom_op("swath::attention_along", mutates_args=())
def attention_along(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, dim: int) -> tuple[Tensor, Tensor]:
    """q, k, v (B, ·, ·, ·, E) of any strides, `dim` 1, 2 or 3 the sequence, the two others apart; mask ([B,] L, L), bool.

    (out as q, contiguous; log-sum-exp base 2 of each row, (sequences, L) fp32, empty where sequences are short).
    """
    from swath.kernels.axial import triton

    return triton.forward(q, k, v, mask, _scale(q, scale), dim, q.shape[dim] <= _SHORT)


@attention_along.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, dim: int) -> tuple[Tensor, Tensor]:
    rows = 0 if q.shape[dim] <= _SHORT else math.prod(q.shape[:-1])
    return q.new_empty(q.shape), q.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("swath::attention_along_backward", mutates_args=())
def attention_along_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, mask: Tensor | None, scale: float | None,
    dim: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, contiguous."""
    from swath.kernels.axial import triton

    return triton.backward(grad, q, k, v, out, lse, mask, _scale(q, scale), dim)


@attention_along_backward.register_fake
def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, mask: Tensor | None, scale: float | None,
    dim: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.scale, ctx.dim = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, output[0] if q.shape[ctx.dim] > _SHORT else None, output[1], mask)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, mask = ctx.saved_tensors
    return *attention_along_backward(grad, q, k, v, out, lse, mask, ctx.scale, ctx.dim), None, None, None


attention_along.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.swath.attention_along)
def _flops(q: torch.Size, k: torch.Size, v: torch.Size, mask: Any, scale: float | None, dim: int, **kwargs: Any) -> int:
    return 4 * math.prod(q) * q[dim]


@register_flop_formula(torch.ops.swath.attention_along_backward)
def _flops_backward(grad: torch.Size, *rest: Any, **kwargs: Any) -> int:
    return 10 * math.prod(grad) * grad[rest[7]]
