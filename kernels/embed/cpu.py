"""Patch embedding on a CPU: the gather of the reference, and the product that trains faster there."""

from torch import Tensor

from swath.kernels.embed.reference import patches
from swath.kernels.linear import linear


def visible_patch_embedding(
    images_bchw: Tensor, weight_dcpq: Tensor, bias_d: Tensor | None = None, index_bk: Tensor | None = None
) -> Tensor:
    patches_bkcpq = patches(images_bchw, (weight_dcpq.shape[2], weight_dcpq.shape[3]), index_bk)
    return linear(patches_bkcpq.flatten(2), weight_dcpq.flatten(1), bias_d)
