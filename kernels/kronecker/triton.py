"""The projection of the Kronecker product with the product formed inside the projection's tiles.

A tile is some channels by some positions. For one head (and some of the factors' width s) the product of the two factors is a
small matrix product over the ranks, ((i, c), r) by (r, (j, s)); turned to ((i, j), (c, s)) it is the left operand of the
projection. What is read per tile is the factors alone. Backward does the same for the weight's gradient, and for the factors'
turns the gradient of a tile back. Sums over tiles are of partial sums in their order; there are no atomics.

Letters as in the reference; a rows (i, j) of a tile, d its depth (c, s), n its pairs (i, c), m its pairs (j, s).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from swath.kernels.kronecker import fold

_PROGRAMS = 264  # two for each multiprocessor of an H100
# Rows of a tile, and its width forward: what forming the product costs is spread over it. fp32 takes more registers.
_ROWS, _WIDEST = 128, 256
_ROWS_FP32, _WIDEST_FP32 = 64, 64


@triton.jit
def _channel_factor(oc, b, h, i0, H, C, c_width, R: tl.constexpr, TI: tl.constexpr, CW: tl.constexpr, RANKS: tl.constexpr):
    """(n, r) of one head, in fp32, and where it lies."""
    n, r = tl.arange(0, TI * CW), tl.arange(0, RANKS)
    i, c = i0 + n // CW, n % CW
    place = (((b * R + r[None, :]) * H + h) * C + i[:, None]) * c_width + c[:, None]
    inside = ((i < C) & (c < c_width))[:, None] & (r < R)[None, :]
    return tl.load(oc + place, mask=inside, other=0).to(tl.float32), place, inside


@triton.jit
def _position_factor(
    os, b, h, j0, s0, H, N, s_width, R: tl.constexpr, TJ: tl.constexpr, SW: tl.constexpr, RANKS: tl.constexpr
):  # fmt: skip
    """(m, r) of one head, in fp32, and where it lies."""
    m, r = tl.arange(0, TJ * SW), tl.arange(0, RANKS)
    j, s = j0 + m // SW, s0 + m % SW
    place = (((b * R + r[None, :]) * H + h) * N + j[:, None]) * s_width + s[:, None]
    inside = ((j < N) & (s < s_width))[:, None] & (r < R)[None, :]
    return tl.load(os + place, mask=inside, other=0).to(tl.float32), place, inside


@triton.jit
def _product(
    oc, os, b, h, i0, j0, s0, H, C, N, c_width, s_width,
    R: tl.constexpr, RANKS: tl.constexpr, TI: tl.constexpr, TJ: tl.constexpr, CW: tl.constexpr, SW: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(a, d): the product itself, of one head."""
    factor_c = _channel_factor(oc, b, h, i0, H, C, c_width, R, TI, CW, RANKS)
    factor_s = _position_factor(os, b, h, j0, s0, H, N, s_width, R, TJ, SW, RANKS)
    product_nm = tl.dot(factor_c[0].to(DOT), tl.trans(factor_s[0].to(DOT)), input_precision=PRECISION).to(DOT)
    return tl.reshape(tl.permute(tl.reshape(product_nm, (TI, CW, TJ, SW)), (0, 2, 1, 3)), (TI * TJ, CW * SW))


@triton.jit
def _rows(b, i0, j0, C, N, TI: tl.constexpr, TJ: tl.constexpr):
    """Which rows of Y a tile's are, and whether there are such."""
    a = tl.arange(0, TI * TJ)
    i, j = i0 + a // TJ, j0 + a % TJ
    return (b * C + i) * N + j, (i < C) & (j < N)


@triton.jit
def _depth(h, s0, c_width, s_width, CW: tl.constexpr, SW: tl.constexpr):
    """Which rows of the weight (h, c, s) a tile's depth is, and whether there are such."""
    d = tl.arange(0, CW * SW)
    c, s = d // SW, s0 + d % SW
    return ((h * c_width + c) * s_width + s).to(tl.int64), (c < c_width) & (s < s_width)


@triton.jit
def _forward(
    oc, os, weight, bias, y, H, C, N, c_width, s_width, width, chunks,
    R: tl.constexpr, RANKS: tl.constexpr, TI: tl.constexpr, TJ: tl.constexpr, CW: tl.constexpr, SW: tl.constexpr,
    BIAS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One tile of channels × positions × width; neighbours in the grid share the factors."""
    tiles_o, tiles_j = tl.cdiv(width, WIDTH), tl.cdiv(N, TJ)
    tile = tl.program_id(0) // tiles_o
    o = tl.program_id(0) % tiles_o * WIDTH + tl.arange(0, WIDTH)
    j0, i0 = tile % tiles_j * TJ, tile // tiles_j % tl.cdiv(C, TI) * TI
    b = (tile // tiles_j // tl.cdiv(C, TI)).to(tl.int64)
    y_ao = tl.zeros((TI * TJ, WIDTH), tl.float32)
    for step in range(H * chunks):
        h, s0 = step // chunks, step % chunks * SW
        product_ad = _product(
            oc, os, b, h, i0, j0, s0, H, C, N, c_width, s_width, R, RANKS, TI, TJ, CW, SW, DOT, PRECISION
        )  # fmt: skip
        d, present = _depth(h, s0, c_width, s_width, CW, SW)
        inside = present[:, None] & (o < width)[None, :]
        w_do = tl.load(weight + d[:, None] * width + o[None, :], mask=inside, other=0).to(tl.float32).to(DOT)
        y_ao = tl.dot(product_ad, w_do, y_ao, input_precision=PRECISION)
    if BIAS:
        y_ao += tl.load(bias + o, mask=o < width, other=0).to(tl.float32)[None, :]
    a, present = _rows(b, i0, j0, C, N, TI, TJ)
    inside = present[:, None] & (o < width)[None, :]
    tl.store(y + a[:, None] * width + o[None, :], y_ao.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_weight(
    grad, oc, os, out, B, H, C, N, c_width, s_width, width, chunks, split,
    R: tl.constexpr, RANKS: tl.constexpr, TI: tl.constexpr, TJ: tl.constexpr, CW: tl.constexpr, SW: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One head's rows of the weight, over `split` tiles; the caller adds the splits."""
    tiles_o, tiles_j, tiles_i = tl.cdiv(width, WIDTH), tl.cdiv(N, TJ), tl.cdiv(C, TI)
    step = tl.program_id(0) // tiles_o
    o = tl.program_id(0) % tiles_o * WIDTH + tl.arange(0, WIDTH)
    h, s0 = step // chunks, step % chunks * SW
    first = tl.program_id(1) * split
    dw_do = tl.zeros((CW * SW, WIDTH), tl.float32)
    for tile in range(first, min(first + split, B * tiles_i * tiles_j)):
        j0, i0 = tile % tiles_j * TJ, tile // tiles_j % tiles_i * TI
        b = (tile // tiles_j // tiles_i).to(tl.int64)
        product_ad = _product(
            oc, os, b, h, i0, j0, s0, H, C, N, c_width, s_width, R, RANKS, TI, TJ, CW, SW, DOT, PRECISION
        )  # fmt: skip
        a, present = _rows(b, i0, j0, C, N, TI, TJ)
        inside = present[:, None] & (o < width)[None, :]
        g_ao = tl.load(grad + a[:, None] * width + o[None, :], mask=inside, other=0).to(tl.float32).to(DOT)
        dw_do = tl.dot(tl.trans(product_ad), g_ao, dw_do, input_precision=PRECISION)
    d, present = _depth(h, s0, c_width, s_width, CW, SW)
    place = (tl.program_id(1).to(tl.int64) * H * c_width * s_width + d[:, None]) * width + o[None, :]
    tl.store(out + place, dw_do, mask=present[:, None] & (o < width)[None, :])


@triton.jit
def _backward_factors(
    grad, oc, os, weight, doc, dos, H, C, N, c_width, s_width, width, chunks, split, oc_size, os_size,
    R: tl.constexpr, RANKS: tl.constexpr, TI: tl.constexpr, TJ: tl.constexpr, CW: tl.constexpr, SW: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One head and some positions, over `split` tiles of channels: dos summed over these, doc of each of them. The caller adds
    doc over positions (and parts of s), dos over the splits."""
    tiles_j = tl.cdiv(N, TJ)
    step, over = tl.program_id(0) % (H * chunks), tl.program_id(0) // (H * chunks)
    h, s0 = step // chunks, step % chunks * SW
    j0, b = over % tiles_j * TJ, (over // tiles_j).to(tl.int64)
    os_mr, os_place, os_inside = _position_factor(os, b, h, j0, s0, H, N, s_width, R, TJ, SW, RANKS)
    d, d_present = _depth(h, s0, c_width, s_width, CW, SW)
    dos_mr = tl.zeros((TJ * SW, RANKS), tl.float32)
    first = tl.program_id(1) * split
    part = (over % tiles_j * chunks + step % chunks).to(tl.int64) * oc_size
    for tile in range(first, min(first + split, tl.cdiv(C, TI))):
        i0 = tile * TI
        a, a_present = _rows(b, i0, j0, C, N, TI, TJ)
        dproduct_ad = tl.zeros((TI * TJ, CW * SW), tl.float32)
        for start in range(0, width, WIDTH):
            o = start + tl.arange(0, WIDTH)
            inside = a_present[:, None] & (o < width)[None, :]
            g_ao = tl.load(grad + a[:, None] * width + o[None, :], mask=inside, other=0).to(tl.float32).to(DOT)
            inside = d_present[:, None] & (o < width)[None, :]
            w_do = tl.load(weight + d[:, None] * width + o[None, :], mask=inside, other=0).to(tl.float32).to(DOT)
            dproduct_ad = tl.dot(g_ao, tl.trans(w_do), dproduct_ad, input_precision=PRECISION)
        turned = tl.permute(tl.reshape(dproduct_ad.to(DOT), (TI, TJ, CW, SW)), (0, 2, 1, 3))
        dproduct_nm = tl.reshape(turned, (TI * CW, TJ * SW))
        oc_nr, oc_place, oc_inside = _channel_factor(oc, b, h, i0, H, C, c_width, R, TI, CW, RANKS)
        dos_mr = tl.dot(tl.trans(dproduct_nm), oc_nr.to(DOT), dos_mr, input_precision=PRECISION)
        tl.store(doc + part + oc_place, tl.dot(dproduct_nm, os_mr.to(DOT), input_precision=PRECISION), mask=oc_inside)
    tl.store(dos + tl.program_id(1).to(tl.int64) * os_size + os_place, dos_mr, mask=os_inside)


def forward(oc_brhic: Tensor, os_brhjs: Tensor, weight_od: Tensor, bias_o: Tensor | None) -> Tensor:
    """(B, C, N, Dout)."""
    oc, os, width = oc_brhic.contiguous(), os_brhjs.contiguous(), len(weight_od)
    y_bijo = oc.new_empty(oc.shape[0], oc.shape[3], os.shape[3], width)
    if not y_bijo.numel():
        return y_bijo
    w_hcso = fold.by_factor(oc, os, weight_od)
    sizes, common = _common(oc, os, width)
    tile = min(_WIDEST_FP32 if oc.dtype == torch.float32 else _WIDEST, max(16, triton.next_power_of_2(width)))
    grid = (len(oc) * triton.cdiv(oc.shape[3], common["TI"]) * triton.cdiv(os.shape[3], common["TJ"]) * triton.cdiv(width, tile),)
    bias = w_hcso if bias_o is None else bias_o.contiguous()
    _forward[grid](oc, os, w_hcso, bias, y_bijo, *sizes, WIDTH=tile, **common | {"BIAS": bias_o is not None})
    return y_bijo


def backward(grad_bijo: Tensor, oc_brhic: Tensor, os_brhjs: Tensor, weight_od: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of Oc, Os and the weight."""
    grad, oc, os, width = grad_bijo.contiguous(), oc_brhic.contiguous(), os_brhjs.contiguous(), len(weight_od)
    if not grad.numel():
        return torch.zeros_like(oc), torch.zeros_like(os), torch.zeros_like(weight_od)
    w_hcso = fold.by_factor(oc, os, weight_od)
    sizes, common = _common(oc, os, width)
    steps = sizes[0] * sizes[-1]
    tiles_i, tiles_j = triton.cdiv(oc.shape[3], common["TI"]), triton.cdiv(os.shape[3], common["TJ"])

    tile = min(64 if oc.dtype == torch.float32 else 128, max(16, triton.next_power_of_2(width)))
    programs = steps * triton.cdiv(width, tile)
    split, splits = _splits(len(oc) * tiles_i * tiles_j, programs)
    dw = torch.empty(splits, *w_hcso.shape, dtype=torch.float32, device=oc.device)
    numbers: list[Any] = [len(oc), *sizes, split]
    _backward_weight[(programs, splits)](grad, oc, os, dw, *numbers, WIDTH=tile, **common)
    dweight_od = dw.sum(dim=0).permute(3, 0, 1, 2).reshape(weight_od.shape).to(weight_od.dtype)
    del dw

    programs = len(oc) * tiles_j * steps
    split, splits = _splits(tiles_i, programs)
    doc = torch.empty(tiles_j * sizes[-1], *oc.shape, dtype=torch.float32, device=oc.device)
    dos = torch.empty(splits, *os.shape, dtype=torch.float32, device=oc.device)
    tile = min(64, max(16, triton.next_power_of_2(width)))
    numbers = [*sizes, split, oc.numel(), os.numel()]
    _backward_factors[(programs, splits)](grad, oc, os, w_hcso, doc, dos, *numbers, WIDTH=tile, **common)
    return doc.sum(dim=0).to(oc.dtype), dos.sum(dim=0).to(os.dtype), dweight_od


def _common(oc: Tensor, os: Tensor, width: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(heads, channels, positions, widths of c, s and Y, parts of s), and the kernels' constants."""
    _, ranks, heads, channels, c = oc.shape
    positions, s = os.shape[3:]
    c_tile = triton.next_power_of_2(c)
    s_tile = max(min(triton.next_power_of_2(s), 64 // c_tile), 16 // c_tile, 1)
    # Sides whose tiles waste the least; each product within a tile needs 16 rows and columns.
    exact = oc.dtype == torch.float32
    rows = _ROWS_FP32 if exact else _ROWS
    sides = [i for i in (4, 8, 16, 32) if i * c_tile >= 16 and rows // i * s_tile >= 16]
    i_tile = min(sides, key=lambda i: triton.cdiv(channels, i) * i * triton.cdiv(positions, rows // i) * (rows // i))
    dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(oc.dtype, tl.float32)
    constants = {
        "R": ranks, "RANKS": max(16, triton.next_power_of_2(ranks)),
        "TI": i_tile, "TJ": rows // i_tile, "CW": c_tile, "SW": s_tile,
        # the interpreter multiplies the bits of bf16, not its numbers
        "DOT": dot if isinstance(_forward, triton.JITFunction) else tl.float32,
        "PRECISION": "ieee" if exact else "tf32",
        "num_warps": 8, "num_stages": 2,
    }  # fmt: skip
    return (heads, channels, positions, c, s, width, triton.cdiv(s, s_tile)), constants


def _splits(tiles: Any, programs: Any) -> tuple[Any, Any]:
    """(tiles of each split, splits), enough to occupy the GPU."""
    split = triton.cdiv(tiles, max(1, min(tiles, 2 * _PROGRAMS // programs)))
    return split, triton.cdiv(tiles, split)
