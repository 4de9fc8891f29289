"""The causal convolution on a GPU: a program takes some places and some channels; neighbours by place, or from tables.

Backward is two programs: the gradient before the activation, with partial sums for weight and bias; then that of x, which looks
at the tokens that come after. Letters as in `reference.py`.
"""
# pyright: reportGeneralTypeIssues=false
# what Triton compiles is not quite Python

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_PLACES, _CHANNELS = 32, 64


@triton.jit
def _neighbour(place_l, inside_l, back: tl.constexpr, table_at, table_w, length, HAS_TABLE: tl.constexpr, LATER: tl.constexpr):
    """(place, whether there is one) `back` tokens before each place, after it if LATER; never out of range."""
    if HAS_TABLE:
        found_l = tl.load(table_at + back * table_w + place_l, mask=inside_l, other=-1)
    else:
        found_l = place_l + back if LATER else place_l - back
    return found_l, inside_l & (found_l >= 0) & (found_l < length)


@triton.jit
def _before_activation(
    x_at, weight_at, bias_at, table_at, place_l, inside_l, d, live_d, length, width, x_l, table_w,
    HAS_BIAS: tl.constexpr, HAS_TABLE: tl.constexpr, REVERSE: tl.constexpr, TAPS: tl.constexpr, BL: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    z_ld = tl.zeros((BL, BD), tl.float32)
    for back in tl.static_range(TAPS):
        found_l, there_l = _neighbour(place_l, inside_l, back, table_at, table_w, length, HAS_TABLE, REVERSE)
        at_ld = found_l.to(tl.int64)[:, None] * x_l + d[None, :]
        x_ld = tl.load(x_at + at_ld, mask=there_l[:, None] & live_d[None, :], other=0.0).to(tl.float32)
        tap_d = tl.load(weight_at + d * TAPS + (TAPS - 1 - back), mask=live_d, other=0.0).to(tl.float32)
        z_ld += x_ld * tap_d[None, :]
    if HAS_BIAS:
        z_ld += tl.load(bias_at + d, mask=live_d, other=0.0).to(tl.float32)[None, :]
    return z_ld


@triton.jit
def _forward(
    x, weight, bias, before, y, blocks, batch, length, width, x_k, x_b, x_l, bias_k, table_w, table_k, table_b,
    HAS_BIAS: tl.constexpr, HAS_TABLE: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr, TAPS: tl.constexpr,
    BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    k = (tl.program_id(0) // blocks // batch).to(tl.int64)
    b = (tl.program_id(0) // blocks % batch).to(tl.int64)
    place_l = tl.program_id(0) % blocks * BL + tl.arange(0, BL)
    inside_l = place_l < length
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    live_d = d < width
    table_at = before + k * table_k + b * table_b
    z_ld = _before_activation(
        x + k * x_k + b * x_b, weight + k * width * TAPS, bias + k * bias_k, table_at, place_l, inside_l, d, live_d, length,
        width, x_l, table_w, HAS_BIAS, HAS_TABLE, REVERSE, TAPS, BL, BD,
    )  # fmt: skip
    if SILU:
        z_ld = z_ld / (1.0 + tl.exp(-z_ld))
    _, present_l = _neighbour(place_l, inside_l, 0, table_at, table_w, length, HAS_TABLE, REVERSE)
    z_ld = tl.where(present_l[:, None], z_ld, 0.0)
    at_ld = ((k * batch + b) * length + place_l)[:, None] * width + d[None, :]
    tl.store(y + at_ld, z_ld.to(y.dtype.element_ty), mask=inside_l[:, None] & live_d[None, :])


@triton.jit
def _backward_weight(
    dy, x, weight, bias, before, dz, dweight, dbias, blocks, batch, length, width, x_k, x_b, x_l, bias_k,
    table_w, table_k, table_b,
    HAS_BIAS: tl.constexpr, HAS_TABLE: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr, TAPS: tl.constexpr,
    BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dz (K, B, L, D) before the activation; dweight (K, parts, W, D) and dbias (K, parts, D) of this program's places."""
    k = (tl.program_id(0) // blocks // batch).to(tl.int64)
    b = (tl.program_id(0) // blocks % batch).to(tl.int64)
    place_l = tl.program_id(0) % blocks * BL + tl.arange(0, BL)
    inside_l = place_l < length
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    live_d = d < width
    x_at = x + k * x_k + b * x_b
    table_at = before + k * table_k + b * table_b
    _, present_l = _neighbour(place_l, inside_l, 0, table_at, table_w, length, HAS_TABLE, REVERSE)
    at_ld = ((k * batch + b) * length + place_l)[:, None] * width + d[None, :]
    dz_ld = tl.load(dy + at_ld, mask=present_l[:, None] & live_d[None, :], other=0.0).to(tl.float32)
    if SILU:
        z_ld = _before_activation(
            x_at, weight + k * width * TAPS, bias + k * bias_k, table_at, place_l, inside_l, d, live_d, length, width, x_l,
            table_w, HAS_BIAS, HAS_TABLE, REVERSE, TAPS, BL, BD,
        )  # fmt: skip
        gate_ld = 1.0 / (1.0 + tl.exp(-z_ld))
        dz_ld *= gate_ld * (1.0 + z_ld * (1.0 - gate_ld))
    tl.store(dz + at_ld, dz_ld, mask=inside_l[:, None] & live_d[None, :])
    part = tl.program_id(0).to(tl.int64)
    for back in tl.static_range(TAPS):
        found_l, there_l = _neighbour(place_l, inside_l, back, table_at, table_w, length, HAS_TABLE, REVERSE)
        from_ld = found_l.to(tl.int64)[:, None] * x_l + d[None, :]
        x_ld = tl.load(x_at + from_ld, mask=there_l[:, None] & live_d[None, :], other=0.0).to(tl.float32)
        tl.store(dweight + (part * TAPS + TAPS - 1 - back) * width + d, tl.sum(x_ld * dz_ld, axis=0), mask=live_d)
    tl.store(dbias + part * width + d, tl.sum(dz_ld, axis=0), mask=live_d)


@triton.jit
def _backward_x(
    dz, weight, after, dx, blocks, batch, length, width, directions, table_w, table_k, table_b,
    SHARED: tl.constexpr, HAS_TABLE: tl.constexpr, REVERSE: tl.constexpr, TAPS: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dx (K, B, L, D), or (1, B, L, D), the sum over directions, if SHARED."""
    own = (tl.program_id(0) // blocks // batch).to(tl.int64)
    b = (tl.program_id(0) // blocks % batch).to(tl.int64)
    place_l = tl.program_id(0) % blocks * BL + tl.arange(0, BL)
    inside_l = place_l < length
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    live_d = d < width
    dx_ld = tl.zeros((BL, BD), tl.float32)
    for turn in range(directions if SHARED else 1):
        k = own + turn
        for back in tl.static_range(TAPS):
            table_at = after + k * table_k + b * table_b
            found_l, there_l = _neighbour(place_l, inside_l, back, table_at, table_w, length, HAS_TABLE, not REVERSE)
            from_ld = ((k * batch + b) * length + found_l)[:, None] * width + d[None, :]
            dz_ld = tl.load(dz + from_ld, mask=there_l[:, None] & live_d[None, :], other=0.0)
            tap_d = tl.load(weight + (k * width + d) * TAPS + (TAPS - 1 - back), mask=live_d, other=0.0).to(tl.float32)
            dx_ld += dz_ld * tap_d[None, :]
    at_ld = ((own * batch + b) * length + place_l)[:, None] * width + d[None, :]
    tl.store(dx + at_ld, dx_ld.to(dx.dtype.element_ty), mask=inside_l[:, None] & live_d[None, :])


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    y = x.new_empty(len(weight), *x.shape[1:])
    arguments = _arguments(x, weight, bias, before, reverse) | {"y": y, "SILU": silu}
    _launch(_forward, _grid(x, len(weight)), arguments)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    after: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    directions, width, taps = weight.shape
    grid = _grid(x, directions)
    parts = (directions, grid[0] // directions)

    def made(*shape: int) -> Tensor:
        return x.new_empty(*shape, dtype=torch.float32)

    dz, dweight, dbias = made(*dy.shape), made(*parts, taps, width), made(*parts, width)
    arguments = _arguments(x, weight, bias, before, reverse)
    _launch(_backward_weight, grid, arguments | {"dy": dy, "dz": dz, "dweight": dweight, "dbias": dbias, "SILU": silu})
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    arguments = _arguments(x, weight, bias, after, reverse) | {"after": after, "dz": dz, "dx": dx, "directions": directions}
    _launch(_backward_x, _grid(x, len(x)), arguments | {"SHARED": len(x) == 1})
    return dx, dweight.sum(dim=1).transpose(1, 2), dbias.sum(dim=1)


def _grid(x: Tensor, directions: int) -> tuple[int, int, int]:
    # samples and places first: only the first axis may pass 65535
    return directions * x.shape[1] * -(-x.shape[2] // _PLACES), -(-x.shape[3] // _CHANNELS), 1


def _arguments(x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor | None, reverse: bool) -> dict[str, Any]:
    x = x if x.stride(-1) == 1 else x.contiguous()
    strides = [0, 0, 0]
    if table is not None:
        table = table.contiguous()
        strides = [stride if size > 1 else 0 for size, stride in zip(table.shape[:3], table.stride()[:3], strict=True)]
    return {
        "x": x, "weight": weight.contiguous(), "bias": None if bias is None else bias.contiguous(), "before": table,
        "blocks": -(-x.shape[2] // _PLACES), "batch": x.shape[1], "length": x.shape[2], "width": x.shape[3],
        "x_k": x.stride(0) if len(x) > 1 else 0, "x_b": x.stride(1), "x_l": x.stride(2),
        "bias_k": bias.shape[1] if bias is not None and len(bias) > 1 else 0,
        "table_w": strides[0], "table_k": strides[1], "table_b": strides[2],
        "HAS_BIAS": bias is not None, "HAS_TABLE": table is not None, "REVERSE": reverse, "TAPS": weight.shape[2],
        "BL": _PLACES, "BD": _CHANNELS,
    }  # fmt: skip


def _launch(kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any]) -> None:
    if 0 in grid:
        return
    # a pointer that is not followed stands for what is not there
    given = {name: arguments["x"] if arguments[name] is None else arguments[name] for name in kernel.arg_names}
    with torch.cuda.device(arguments["x"].device) if arguments["x"].is_cuda else nullcontext():
        kernel[grid](**given, num_warps=4)
