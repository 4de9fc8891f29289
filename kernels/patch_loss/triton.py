"""One program per masked patch reads its pixels from the image and its prediction; nothing of a target's size is written.

Letters: v values of a patch, ordered row, column, band.
"""

# A launch is not a call of the function below it, which the type checker takes it for.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _corner(index, kept, places, columns, stride_b, stride_h, stride_w, P: tl.constexpr, Q: tl.constexpr):
    """Offset of the first pixel of this program's patch, and whether there is such a patch."""
    place = tl.load(index + tl.program_id(0))
    sample = (tl.program_id(0) // kept).to(tl.int64)
    offset = sample * stride_b + (place // columns) * P * stride_h + (place % columns) * Q * stride_w
    return offset, (place >= 0) & (place < places)


@triton.jit
def _valid(v, valid, corner, there, values, valid_h, valid_w, C: tl.constexpr, Q: tl.constexpr, VALID: tl.constexpr):
    """Which of these values count."""
    inside = (v < values) & there
    if VALID:
        inside = (
            tl.load(valid + corner + (v // (C * Q)).to(tl.int64) * valid_h + (v // C % Q) * valid_w, mask=inside, other=0) != 0
        )
    return inside


@triton.jit
def _pixels(v, images, corner, inside, image_c, image_h, image_w, C: tl.constexpr, Q: tl.constexpr):
    offset = (v % C).to(tl.int64) * image_c + (v // (C * Q)).to(tl.int64) * image_h + (v // C % Q) * image_w
    return tl.load(images + corner + offset, mask=inside, other=0).to(tl.float32)


@triton.jit
def _forward(
    prediction, images, index, valid, error, mean, spread, values, kept, places, columns, image_b, image_c, image_h, image_w,
    valid_b, valid_h, valid_w, eps,
    C: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, NORMALISE: tl.constexpr, VALID: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Three passes, of which the pixels of the last two come from the cache: the mean, deviations from it, the error."""
    row = tl.program_id(0).to(tl.int64)
    corner, there = _corner(index, kept, places, columns, image_b, image_h, image_w, P, Q)
    valid_corner, _ = _corner(index, kept, places, columns, valid_b, valid_h, valid_w, P, Q)
    total, number = tl.zeros((VALUES,), tl.float32), tl.zeros((VALUES,), tl.float32)
    for start in range(0, values, VALUES):
        v = start + tl.arange(0, VALUES)
        inside = _valid(v, valid, valid_corner, there, values, valid_h, valid_w, C, Q, VALID)
        number += inside.to(tl.float32)
        if NORMALISE:
            total += _pixels(v, images, corner, inside, image_c, image_h, image_w, C, Q)
    count = tl.sum(number)
    centre, width = 0.0, 1.0
    if NORMALISE:
        centre = tl.sum(total) / tl.maximum(count, 1.0)
        total = tl.zeros((VALUES,), tl.float32)
        for start in range(0, values, VALUES):
            v = start + tl.arange(0, VALUES)
            inside = _valid(v, valid, valid_corner, there, values, valid_h, valid_w, C, Q, VALID)
            x = _pixels(v, images, corner, inside, image_c, image_h, image_w, C, Q)
            total += tl.where(inside, (x - centre) * (x - centre), 0.0)
        width = tl.sqrt(tl.sum(total) / tl.maximum(count - 1.0, 1.0) + eps)
    total = tl.zeros((VALUES,), tl.float32)
    for start in range(0, values, VALUES):
        v = start + tl.arange(0, VALUES)
        inside = _valid(v, valid, valid_corner, there, values, valid_h, valid_w, C, Q, VALID)
        x = _pixels(v, images, corner, inside, image_c, image_h, image_w, C, Q)
        y = tl.load(prediction + row * values + v, mask=inside, other=0).to(tl.float32)
        difference = tl.where(inside, y - (x - centre) / width, 0.0)
        total += difference * difference
    tl.store(error + row, tl.sum(total) / tl.maximum(count, 1.0))
    tl.store(mean + row, centre)
    tl.store(spread + row, width)


@triton.jit
def _backward(
    grad, prediction, images, index, valid, mean, spread, out, values, kept, places, columns,
    image_b, image_c, image_h, image_w, valid_b, valid_h, valid_w,
    C: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, VALID: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """2 (prediction - target) / count, times the error's gradient."""
    row = tl.program_id(0).to(tl.int64)
    corner, there = _corner(index, kept, places, columns, image_b, image_h, image_w, P, Q)
    valid_corner, _ = _corner(index, kept, places, columns, valid_b, valid_h, valid_w, P, Q)
    count = values * 1.0
    if VALID:
        number = tl.zeros((VALUES,), tl.float32)
        for start in range(0, values, VALUES):
            v = start + tl.arange(0, VALUES)
            number += _valid(v, valid, valid_corner, there, values, valid_h, valid_w, C, Q, VALID).to(tl.float32)
        count = tl.maximum(tl.sum(number), 1.0)
    factor = 2.0 * tl.load(grad + row).to(tl.float32) / count
    centre, width = tl.load(mean + row), tl.load(spread + row)
    for start in range(0, values, VALUES):
        v = start + tl.arange(0, VALUES)
        inside = _valid(v, valid, valid_corner, there, values, valid_h, valid_w, C, Q, VALID)
        x = _pixels(v, images, corner, inside, image_c, image_h, image_w, C, Q)
        y = tl.load(prediction + row * values + v, mask=inside, other=0).to(tl.float32)
        g = tl.where(inside, (y - (x - centre) / width) * factor, 0.0)
        tl.store(out + row * values + v, g.to(out.dtype.element_ty), mask=v < values)


def forward(
    prediction_bmv: Tensor, images_bchw: Tensor, index_bm: Tensor, patch: tuple[int, int], normalise: bool, eps: float,
    valid_b1hw: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(error, mean, spread), each (B, M) fp32."""
    error, mean, spread = (prediction_bmv.new_empty(index_bm.shape, dtype=torch.float32) for _ in range(3))
    if index_bm.numel():
        tensors, numbers, constants = _arguments(images_bchw, index_bm, patch, valid_b1hw)
        _forward[(index_bm.numel(),)](
            prediction_bmv.contiguous(), *tensors, error, mean, spread, *numbers, eps, NORMALISE=normalise, **constants
        )
    return error, mean, spread


def backward(
    grad_bm: Tensor, prediction_bmv: Tensor, images_bchw: Tensor, index_bm: Tensor, mean_bm: Tensor, spread_bm: Tensor,
    patch: tuple[int, int], valid_b1hw: Tensor | None,
) -> Tensor:  # fmt: skip
    """The prediction's gradient, in its dtype."""
    prediction_bmv = prediction_bmv.contiguous()
    out_bmv = torch.empty_like(prediction_bmv)
    if index_bm.numel():
        tensors, numbers, constants = _arguments(images_bchw, index_bm, patch, valid_b1hw)
        _backward[(index_bm.numel(),)](
            grad_bm.contiguous(), prediction_bmv, *tensors, mean_bm, spread_bm, out_bmv, *numbers, **constants
        )
    return out_bmv


def _arguments(
    images_bchw: Tensor, index_bm: Tensor, patch: tuple[int, int], valid_b1hw: Tensor | None
) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, int]]:
    """What both kernels take: tensors, sizes and strides, constants."""
    (_, bands, height, width), (p, q) = images_bchw.shape, patch
    values, columns = bands * p * q, width // q
    mask = images_bchw if valid_b1hw is None else valid_b1hw.view(torch.uint8)
    mask_b, _, mask_h, mask_w = mask.stride()
    sizes = (values, index_bm.shape[1], height // p * columns, columns)
    block = min(1024, triton.next_power_of_2(values))
    constants = {"C": bands, "P": p, "Q": q, "VALID": valid_b1hw is not None, "VALUES": block}
    return (images_bchw, index_bm.contiguous(), mask), (*sizes, *images_bchw.stride(), mask_b, mask_h, mask_w), constants
