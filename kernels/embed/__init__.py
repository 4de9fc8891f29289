"""Patch embedding of visible patches only: what is masked is neither projected nor copied."""

import torch
from torch import Tensor

from swath.kernels.dispatch import Implementation, Operator, autocast_dtype, check_contents, everywhere, on_cpu, with_triton
from swath.kernels.embed import cpu, op, reference

OPERATOR = Operator(
    "visible_patch_embedding",
    Implementation("triton", with_triton),
    Implementation("cpu", on_cpu),
    Implementation("reference", everywhere),
)


def visible_patch_embedding(
    images_bchw: Tensor, weight_dcpq: Tensor, bias_d: Tensor | None = None, index_bk: Tensor | None = None
) -> Tensor:
    """x_k W^T + b over the patches x_k at `index_bk`, the tokens of Dosovitskiy et al. 2021 as He et al. 2022 mask them.

    images (B, C, H, W), of any strides; weight (D, C, p, q), bias (D,), of a convolution whose stride is its kernel; p divides H,
    q divides W. index (B, K) int64: numbers of patches in raster order, in any order, repeated or not; None for all of them.
    → (B, K, D) in the weight's dtype, under autocast in autocast's, as `torch.nn.functional.linear`. Gradients for images,
    weight and bias. Sums are in fp32 (float64, for which the reference is always taken, in float64).

    Raises ValueError for shapes, dtypes and devices that do not fit, and for numbers outside the raster where contents are
    checked (`swath.kernels.dispatch.check_contents`); elsewhere those give the bias alone or an error of torch.
    """
    _check(images_bchw, weight_dcpq, bias_d, index_bk)
    choice = OPERATOR.choose(images_bchw.device)
    if choice == "triton" and torch.float64 not in (images_bchw.dtype, weight_dcpq.dtype):
        # The image stays as it is: only what is kept of it is cast, inside the kernel.
        dtype = autocast_dtype(images_bchw.device.type) or weight_dcpq.dtype
        bias_d = None if bias_d is None else bias_d.to(dtype)
        return op.visible_patch_embedding(images_bchw, weight_dcpq.to(dtype), bias_d, index_bk)
    if choice == "cpu":
        return cpu.visible_patch_embedding(images_bchw, weight_dcpq, bias_d, index_bk)
    return reference.visible_patch_embedding(images_bchw, weight_dcpq, bias_d, index_bk)


def _check(images_bchw: Tensor, weight_dcpq: Tensor, bias_d: Tensor | None, index_bk: Tensor | None) -> None:
    images, weight = tuple(images_bchw.shape), tuple(weight_dcpq.shape)
    if images_bchw.ndim != 4 or weight_dcpq.ndim != 4 or images[1] != weight[1]:
        raise ValueError(f"images must be (B, C, H, W) and weight (D, C, p, q), not {images} and {weight}")
    if 0 in weight or images[2] % weight[2] or images[3] % weight[3]:
        raise ValueError(f"images of {images} are not divisible into the patches of weight {weight}")
    if not images_bchw.is_floating_point() or not weight_dcpq.is_floating_point():
        raise ValueError(f"images and weight must be floating point, not {images_bchw.dtype} and {weight_dcpq.dtype}")
    if images_bchw.dtype != weight_dcpq.dtype and autocast_dtype(images_bchw.device.type) is None:
        raise ValueError(f"images are {images_bchw.dtype}, weight is {weight_dcpq.dtype}; outside autocast they must agree")
    if bias_d is not None and (tuple(bias_d.shape) != weight[:1] or bias_d.dtype != weight_dcpq.dtype):
        raise ValueError(
            f"bias must be ({weight[0]},) {weight_dcpq.dtype} for weight {weight}, not {tuple(bias_d.shape)} {bias_d.dtype}"
        )
    if index_bk is not None:
        if index_bk.ndim != 2 or len(index_bk) != images[0] or index_bk.dtype != torch.int64:
            raise ValueError(
                f"index must be ({images[0]}, K) int64 for images {images}, not {tuple(index_bk.shape)} {index_bk.dtype}"
            )
        check_places(index_bk, (images[2] // weight[2]) * (images[3] // weight[3]))
    for name, tensor in (("weight", weight_dcpq), ("bias", bias_d), ("index", index_bk)):
        if tensor is not None and tensor.device != images_bchw.device:
            raise ValueError(f"{name} is on {tensor.device}, images are on {images_bchw.device}")


def check_places(index: Tensor, places: int) -> None:
    """ValueError for numbers outside 0 … places - 1, where contents are checked; compiled code does not look."""
    if torch.compiler.is_compiling() or not index.numel() or not check_contents(index.device):
        return
    low, high = (int(bound) for bound in index.aminmax())
    if low < 0 or high >= places:
        raise ValueError(f"index holds {low} … {high}; the raster has places 0 … {places - 1}")
