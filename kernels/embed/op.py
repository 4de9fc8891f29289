"""The embedding as a custom operator with its own backward pass; the bodies are Triton's."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@torch.library.custom_op("swath::visible_patch_embedding", mutates_args=())
def visible_patch_embedding(images_bchw: Tensor, weight_dcpq: Tensor, bias_d: Tensor | None, index_bk: Tensor | None) -> Tensor:
    """(B, K, D) in the weight's dtype; arguments as checked by the public function."""
    from swath.kernels.embed import triton

    return triton.forward(images_bchw, weight_dcpq, bias_d, index_bk)


@visible_patch_embedding.register_fake
def _fake(images_bchw: Tensor, weight_dcpq: Tensor, bias_d: Tensor | None, index_bk: Tensor | None) -> Tensor:
    batch, _, height, width = images_bchw.shape
    width_d, _, p, q = weight_dcpq.shape
    kept = (height // p) * (width // q) if index_bk is None else index_bk.shape[1]
    return weight_dcpq.new_empty(batch, kept, width_d)


@torch.library.custom_op("swath::visible_patch_embedding_backward", mutates_args=())
def visible_patch_embedding_backward(
    grad_bkd: Tensor, images_bchw: Tensor, weight_dcpq: Tensor, index_bk: Tensor | None, of_images: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of images (empty unless `of_images`: they are data, as a rule), weight and bias."""
    from swath.kernels.embed import triton

    grad_images = triton.backward_images(grad_bkd, images_bchw, weight_dcpq, index_bk) if of_images else images_bchw.new_empty(0)
    grad_bias_d = grad_bkd.sum(dim=(0, 1), dtype=torch.float32).to(weight_dcpq.dtype)
    return grad_images, triton.backward_weight(grad_bkd, images_bchw, weight_dcpq, index_bk), grad_bias_d


@visible_patch_embedding_backward.register_fake
def _fake_backward(
    grad_bkd: Tensor, images_bchw: Tensor, weight_dcpq: Tensor, index_bk: Tensor | None, of_images: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_images = images_bchw.new_empty(images_bchw.shape if of_images else 0)
    return grad_images, weight_dcpq.new_empty(weight_dcpq.shape), weight_dcpq.new_empty(weight_dcpq.shape[0])


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None], output: Tensor) -> None:
    images_bchw, weight_dcpq, bias_d, index_bk = inputs
    ctx.save_for_backward(images_bchw, weight_dcpq, index_bk)
    ctx.has_bias = bias_d is not None


def _backward(ctx: Any, grad_bkd: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
    images_bchw, weight_dcpq, index_bk = ctx.saved_tensors
    of_images = ctx.needs_input_grad[0]
    grad_images, grad_weight, grad_bias = visible_patch_embedding_backward(
        grad_bkd, images_bchw, weight_dcpq, index_bk, of_images
    )
    return grad_images if of_images else None, grad_weight, grad_bias if ctx.has_bias else None, None


visible_patch_embedding.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.swath.visible_patch_embedding)
def _flops(images: torch.Size, weight: torch.Size, *rest: Any, out_shape: torch.Size, **kwargs: Any) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


@register_flop_formula(torch.ops.swath.visible_patch_embedding_backward)
def _flops_backward(
    grad: torch.Size, images: torch.Size, weight: torch.Size, index: torch.Size | None, of_images: bool, **kwargs: Any
) -> int:
    return (2 + 2 * of_images) * math.prod(grad) * math.prod(weight[1:])
