"""The projection of the two branches' outcomes as a custom operator, with its own backward pass."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from swath.kernels.kronecker import fold


@torch.library.custom_op("swath::kronecker_projection", mutates_args=())
def kronecker_projection(oc: Tensor, os: Tensor, weight: Tensor, bias: Tensor | None, tiled: bool) -> Tensor:
    """oc (B, R, H, C, dc), os (B, R, H, N, ds), weight (Dout, H·dc·ds), bias (Dout,), of one dtype → (B, C, N, Dout).

    `tiled` forms the product in the tiles of a Triton kernel where forming it is cheapest.
    """
    way = _way(oc, os, weight, tiled)
    if way == "tiled":
        from swath.kernels.kronecker import triton

        return triton.forward(oc, os, weight, bias)
    return fold.forward(oc, os, weight, bias, way)


def _way(oc: Tensor, os: Tensor, weight: Tensor, tiled: bool) -> str:
    """One of `fold`'s ways, or "tiled", the product by Triton, whose tile holds all ranks and the whole channel factor."""
    tiled = tiled and oc.shape[1] <= 64 and oc.shape[4] <= 64
    way = fold.plan(oc, os, len(weight), tiled)
    return "tiled" if tiled and way == "product" else way


@kronecker_projection.register_fake
def _fake(oc: Tensor, os: Tensor, weight: Tensor, bias: Tensor | None, tiled: bool) -> Tensor:
    return oc.new_empty(oc.shape[0], oc.shape[3], os.shape[3], weight.shape[0])


@torch.library.custom_op("swath::kronecker_projection_backward", mutates_args=())
def kronecker_projection_backward(
    grad: Tensor, oc: Tensor, os: Tensor, weight: Tensor, tiled: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of oc, os, weight and bias."""
    dbias = grad.sum(dim=(0, 1, 2), dtype=torch.promote_types(grad.dtype, torch.float32)).to(weight.dtype)
    way = _way(oc, os, weight, tiled)
    if way == "tiled":
        from swath.kernels.kronecker import triton

        return *triton.backward(grad, oc, os, weight), dbias
    return *fold.backward(grad, oc, os, weight, way), dbias


@kronecker_projection_backward.register_fake
def _fake_backward(grad: Tensor, oc: Tensor, os: Tensor, weight: Tensor, tiled: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    empty = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (oc, os, weight))
    return *empty, weight.new_empty(weight.shape[0])  # pyright: ignore[reportReturnType]


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, bool], output: Tensor) -> None:
    oc, os, weight, bias, ctx.tiled = inputs
    ctx.save_for_backward(oc, os, weight)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:
    doc, dos, dweight, dbias = kronecker_projection_backward(grad, *ctx.saved_tensors, ctx.tiled)
    return doc, dos, dweight, dbias if ctx.has_bias else None, None


kronecker_projection.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.swath.kronecker_projection)
def _flops(oc: torch.Size, os: torch.Size, weight: torch.Size, *rest: Any, **kwargs: Any) -> int:
    return 2 * min(fold.arithmetic(oc, os, weight[0]).values())


@register_flop_formula(torch.ops.swath.kronecker_projection_backward)
def _flops_backward(grad: torch.Size, oc: torch.Size, os: torch.Size, weight: torch.Size, *rest: Any, **kwargs: Any) -> int:
    return 4 * min(fold.arithmetic(oc, os, weight[0]).values())
