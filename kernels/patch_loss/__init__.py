"""The loss of masked autoencoders at masked patches, whose targets are standardised per patch and never all made."""

import torch
from torch import Tensor

from swath.kernels.dispatch import Implementation, Operator, everywhere, with_triton
from swath.kernels.embed import check_places
from swath.kernels.patch_loss import op, reference

OPERATOR = Operator("masked_patch_loss", Implementation("triton", with_triton), Implementation("reference", everywhere))


def masked_patch_loss(
    prediction_bmv: Tensor,
    images_bchw: Tensor,
    index_bm: Tensor,
    *,
    patch: tuple[int, int],
    normalise: bool = True,
    eps: float = 1e-6,
    valid_b1hw: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of (prediction - target)² over each masked patch, and its target's mean and spread (He et al. 2022).

    prediction (B, M, V), V = p·q·C values ordered row, column, band; images (B, C, H, W), of any strides; index (B, M) int64:
    numbers of the patches in raster order; patch (p, q) divides (H, W); all tensors of any floating dtype. The target is
    (x - mean) / spread, spread² = unbiased variance over the patch + eps; without `normalise` it is x, mean 0 and spread 1.
    valid (B, 1, H, W) bool: other pixels, whatever they hold, count neither in the error nor in the statistics, and a patch
    without any has error 0.
    → error, mean, spread, each (B, M) fp32 (float64, and then by the reference, for a float64 prediction), under autocast too.
    The error has a gradient for the prediction alone: targets are data.

    Raises ValueError for shapes, dtypes and devices that do not fit, and for numbers outside the raster where contents are
    checked (`swath.kernels.dispatch.check_contents`); elsewhere those give 0 or an error of torch.
    """
    _check(prediction_bmv, images_bchw, index_bm, patch, valid_b1hw)
    if OPERATOR.choose(images_bchw.device) == "triton" and torch.float64 not in (prediction_bmv.dtype, images_bchw.dtype):
        height, width = patch
        error, mean, spread = op.masked_patch_loss(
            prediction_bmv, images_bchw.detach(), index_bm, height, width, normalise, eps, valid_b1hw
        )
        return error, mean.detach(), spread.detach()
    return reference.masked_patch_loss(
        prediction_bmv, images_bchw, index_bm, patch=patch, normalise=normalise, eps=eps, valid_b1hw=valid_b1hw
    )


def _check(
    prediction_bmv: Tensor, images_bchw: Tensor, index_bm: Tensor, patch: tuple[int, int], valid_b1hw: Tensor | None
) -> None:
    prediction, images = tuple(prediction_bmv.shape), tuple(images_bchw.shape)
    if len(images) != 4 or min(patch) < 1 or images[2] % patch[0] or images[3] % patch[1]:
        raise ValueError(f"images must be (B, C, H, W) divisible into patches of {tuple(patch)}, not {images}")
    values = images[1] * patch[0] * patch[1]
    if len(prediction) != 3 or prediction[0] != images[0] or prediction[2] != values or not values:
        raise ValueError(f"prediction must be ({images[0]}, M, {values}) for images {images} and patch {patch}, not {prediction}")
    if not prediction_bmv.is_floating_point() or not images_bchw.is_floating_point():
        raise ValueError(f"prediction and images must be floating point, not {prediction_bmv.dtype} and {images_bchw.dtype}")
    if tuple(index_bm.shape) != prediction[:2] or index_bm.dtype != torch.int64:
        raise ValueError(
            f"index must be {prediction[:2]} int64 for prediction {prediction}, not {tuple(index_bm.shape)} {index_bm.dtype}"
        )
    if valid_b1hw is not None and (tuple(valid_b1hw.shape) != (images[0], 1, *images[2:]) or valid_b1hw.dtype != torch.bool):
        shape = (images[0], 1, *images[2:])
        raise ValueError(f"valid must be {shape} bool for images {images}, not {tuple(valid_b1hw.shape)} {valid_b1hw.dtype}")
    for name, tensor in (("prediction", prediction_bmv), ("index", index_bm), ("valid", valid_b1hw)):
        if tensor is not None and tensor.device != images_bchw.device:
            raise ValueError(f"{name} is on {tensor.device}, images are on {images_bchw.device}")
    check_places(index_bm, (images[2] // patch[0]) * (images[3] // patch[1]))
