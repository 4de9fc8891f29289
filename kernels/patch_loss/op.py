"""The loss as a custom operator with its own backward pass; the bodies are Triton's."""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("swath::masked_patch_loss", mutates_args=())
def masked_patch_loss(
    prediction_bmv: Tensor, images_bchw: Tensor, index_bm: Tensor, p: int, q: int, normalise: bool, eps: float,
    valid_b1hw: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(error, mean, spread), each (B, M) fp32; arguments as checked by the public function."""
    from swath.kernels.patch_loss import triton

    return triton.forward(prediction_bmv, images_bchw, index_bm, (p, q), normalise, eps, valid_b1hw)


@masked_patch_loss.register_fake
def _fake(
    prediction_bmv: Tensor, images_bchw: Tensor, index_bm: Tensor, p: int, q: int, normalise: bool, eps: float,
    valid_b1hw: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    error, mean, spread = (prediction_bmv.new_empty(prediction_bmv.shape[:2], dtype=torch.float32) for _ in range(3))
    return error, mean, spread


@torch.library.custom_op("swath::masked_patch_loss_backward", mutates_args=())
def masked_patch_loss_backward(
    grad_bm: Tensor, prediction_bmv: Tensor, images_bchw: Tensor, index_bm: Tensor, mean_bm: Tensor, spread_bm: Tensor,
    p: int, q: int, valid_b1hw: Tensor | None,
) -> Tensor:  # fmt: skip
    """The prediction's gradient, in its dtype."""
    from swath.kernels.patch_loss import triton

    return triton.backward(grad_bm, prediction_bmv, images_bchw, index_bm, mean_bm, spread_bm, (p, q), valid_b1hw)


@masked_patch_loss_backward.register_fake
def _fake_backward(
    grad_bm: Tensor, prediction_bmv: Tensor, images_bchw: Tensor, index_bm: Tensor, mean_bm: Tensor, spread_bm: Tensor,
    p: int, q: int, valid_b1hw: Tensor | None,
) -> Tensor:  # fmt: skip
    return prediction_bmv.new_empty(prediction_bmv.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    prediction_bmv, images_bchw, index_bm, ctx.p, ctx.q, _, _, valid_b1hw = inputs
    ctx.save_for_backward(prediction_bmv, images_bchw, index_bm, *output[1:], valid_b1hw)


def _backward(ctx: Any, grad_bm: Tensor, *statistics: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, valid_b1hw = ctx.saved_tensors
    return masked_patch_loss_backward(grad_bm, *tensors, ctx.p, ctx.q, valid_b1hw), *(None,) * 7


masked_patch_loss.register_autograd(_backward, setup_context=_setup)
