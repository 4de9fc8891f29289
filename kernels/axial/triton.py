"""Attention along one dimension of five-dimensional tensors, read and written with strides.

Sequences of up to 64 places are packed, as many as fit, into one tile with a block-diagonal mask: a tile product of 64 × 64 costs
less than the reading of its rows, where one sequence alone would leave most of the tile empty, and a broadcast
multiply-and-sum would leave the tensor cores idle. A packed tile needs no running maximum, and backward recomputes all from q, k
and v in one program. Longer sequences go block by block as in flash attention; a mask comes with lists of the blocks that it
does not empty. No atomics: keys' and queries' gradients are summed by programs of their own.

Letters: s sequences, t rows of a packed tile, n and m places of queries and keys, e width of a head; x and y the two dimensions
beside the batch that are not the sequence.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = 1.4426950408889634  # scores are kept in base 2, which the hardware exponentiates


@triton.jit
def _start(s, X, Y, stride_b, stride_x, stride_y):
    """Offset of the first place of sequence s."""
    wide = s.to(tl.int64)
    return wide // (X * Y) * stride_b + wide // Y % X * stride_x + wide % Y * stride_y


@triton.jit
def _load(pointer, start, place, stride, inside, e, DOT: tl.constexpr):
    """Rows of a tile; 0 where there is none."""
    offset = start + place.to(tl.int64) * stride
    return tl.load(pointer + offset[:, None] + e[None, :], mask=inside, other=0).to(tl.float32).to(DOT)


@triton.jit
def _store(pointer, start, place, stride, inside, e, value):
    offset = start + place.to(tl.int64) * stride
    tl.store(pointer + offset[:, None] + e[None, :], value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _shares(q, k, seen, scale, PRECISION: tl.constexpr):
    """softmax over the keys that are seen; rows that see none are 0."""
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    score = tl.where(seen, score, float("-inf"))
    top = tl.max(score, axis=1)
    share = tl.exp2(score - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(share, axis=1)
    return share / tl.where(total == 0, 1.0, total)[:, None]


@triton.jit
def _packed(s, place, here, mask, mask_b, X, Y, L, MASKED: tl.constexpr):
    """Which rows of a packed tile see which."""
    seen = (s[:, None] == s[None, :]) & here[:, None] & here[None, :]
    if MASKED:
        row = s.to(tl.int64) // (X * Y) * mask_b + place.to(tl.int64) * L
        seen = (tl.load(mask + row[:, None] + place[None, :], mask=seen, other=0) != 0) & seen
    return seen


@triton.jit
def _short_forward(
    q, k, v, mask, out, q_b, q_x, q_y, q_l, k_b, k_x, k_y, k_l, v_b, v_x, v_y, v_l, o_b, o_x, o_y, o_l,
    mask_b, sequences, pack, X, Y, L, E, scale,
    MASKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    t, e = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    s, place = tl.program_id(0) * pack + t // L, t % L
    here = (t < pack * L) & (s < sequences)
    inside = here[:, None] & (e < E)[None, :]
    q_te = _load(q, _start(s, X, Y, q_b, q_x, q_y), place, q_l, inside, e, DOT)
    k_te = _load(k, _start(s, X, Y, k_b, k_x, k_y), place, k_l, inside, e, DOT)
    v_te = _load(v, _start(s, X, Y, v_b, v_x, v_y), place, v_l, inside, e, DOT)
    share = _shares(q_te, k_te, _packed(s, place, here, mask, mask_b, X, Y, L, MASKED), scale, PRECISION)
    o_te = tl.dot(share.to(DOT), v_te, input_precision=PRECISION)
    _store(out, _start(s, X, Y, o_b, o_x, o_y), place, o_l, inside, e, o_te)


@triton.jit
def _short_backward(
    grad, q, k, v, mask, dq, dk, dv,
    g_b, g_x, g_y, g_l, q_b, q_x, q_y, q_l, k_b, k_x, k_y, k_l, v_b, v_x, v_y, v_l, o_b, o_x, o_y, o_l,
    mask_b, sequences, pack, X, Y, L, E, scale, dscale,
    MASKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    t, e = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    s, place = tl.program_id(0) * pack + t // L, t % L
    here = (t < pack * L) & (s < sequences)
    inside = here[:, None] & (e < E)[None, :]
    q_te = _load(q, _start(s, X, Y, q_b, q_x, q_y), place, q_l, inside, e, DOT)
    k_te = _load(k, _start(s, X, Y, k_b, k_x, k_y), place, k_l, inside, e, DOT)
    v_te = _load(v, _start(s, X, Y, v_b, v_x, v_y), place, v_l, inside, e, DOT)
    g_te = _load(grad, _start(s, X, Y, g_b, g_x, g_y), place, g_l, inside, e, DOT)
    share = _shares(q_te, k_te, _packed(s, place, here, mask, mask_b, X, Y, L, MASKED), scale, PRECISION)
    dshare = tl.dot(g_te, tl.trans(v_te), input_precision=PRECISION)
    dscore = (share * (dshare - tl.sum(share * dshare, axis=1)[:, None]) * dscale).to(DOT)
    start = _start(s, X, Y, o_b, o_x, o_y)
    _store(dv, start, place, o_l, inside, e, tl.dot(tl.trans(share.to(DOT)), g_te, input_precision=PRECISION))
    _store(dq, start, place, o_l, inside, e, tl.dot(dscore, k_te, input_precision=PRECISION))
    _store(dk, start, place, o_l, inside, e, tl.dot(tl.trans(dscore), q_te, input_precision=PRECISION))


@triton.jit
def _seen(mask, start, queries, keys, L, MASKED: tl.constexpr, ROWS: tl.constexpr):
    """Which queries of a block see which keys of another. The mask's offsets within these stay 32-bit: it saves registers."""
    t = tl.arange(0, ROWS)
    seen = (queries * ROWS + t < L)[:, None] & (keys * ROWS + t < L)[None, :]
    if MASKED:
        corner = mask + start + queries.to(tl.int64) * ROWS * L + keys * ROWS
        seen = (tl.load(corner + (t[:, None] * L + t[None, :]), mask=seen, other=0) != 0) & seen
    return seen


@triton.jit
def _long_forward(
    q, k, v, mask, lists, counts, out, lse,
    q_b, q_x, q_y, q_l, k_b, k_x, k_y, k_l, v_b, v_x, v_y, v_l, o_b, o_x, o_y, o_l,
    mask_b, list_b, X, Y, L, E, scale,
    MASKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One block of queries; neighbours in the grid share keys and values."""
    blocks = tl.cdiv(L, ROWS)
    s, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b = s.to(tl.int64) // (X * Y)
    e, n = tl.arange(0, WIDTH), block * ROWS + tl.arange(0, ROWS)
    inside = (n < L)[:, None] & (e < E)[None, :]
    q_ne = _load(q, _start(s, X, Y, q_b, q_x, q_y), n, q_l, inside, e, DOT)
    k_start, v_start = _start(s, X, Y, k_b, k_x, k_y), _start(s, X, Y, v_b, v_x, v_y)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    o_ne = tl.zeros((ROWS, WIDTH), tl.float32)
    line = b * list_b + block
    count = tl.load(counts + line) if MASKED else blocks
    for step in range(count):
        other = tl.load(lists + line * blocks + step) if MASKED else step
        m = other * ROWS + tl.arange(0, ROWS)
        here = (m < L)[:, None] & (e < E)[None, :]
        k_me = _load(k, k_start, m, k_l, here, e, DOT)
        v_me = _load(v, v_start, m, v_l, here, e, DOT)
        score = tl.dot(q_ne, tl.trans(k_me), input_precision=PRECISION) * scale
        score = tl.where(_seen(mask, b * mask_b, block, other, L, MASKED, ROWS), score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.exp2(score - level[:, None])
        shrink = tl.exp2(top - level)
        total = total * shrink + tl.sum(share, axis=1)
        o_ne = tl.dot(share.to(DOT), v_me, o_ne * shrink[:, None], input_precision=PRECISION)
        top = higher
    empty = total == 0
    _store(out, _start(s, X, Y, o_b, o_x, o_y), n, o_l, inside, e, o_ne / tl.where(empty, 1.0, total)[:, None])
    level = top + tl.log2(tl.where(empty, 1.0, total))  # of a row that sees nothing minus infinity, and never used
    tl.store(lse + s.to(tl.int64) * L + n, level, mask=n < L)


@triton.jit
def _long_backward_queries(
    grad, q, k, v, out, mask, lists, counts, lse, delta, dq,
    g_b, g_x, g_y, g_l, q_b, q_x, q_y, q_l, k_b, k_x, k_y, k_l, v_b, v_x, v_y, v_l, o_b, o_x, o_y, o_l,
    mask_b, list_b, X, Y, L, E, scale, dscale,
    MASKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries; leaves delta, the sum over e of grad · out, for the keys' pass."""
    blocks = tl.cdiv(L, ROWS)
    s, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b = s.to(tl.int64) // (X * Y)
    e, n = tl.arange(0, WIDTH), block * ROWS + tl.arange(0, ROWS)
    inside = (n < L)[:, None] & (e < E)[None, :]
    q_ne = _load(q, _start(s, X, Y, q_b, q_x, q_y), n, q_l, inside, e, DOT)
    g_ne = _load(grad, _start(s, X, Y, g_b, g_x, g_y), n, g_l, inside, e, DOT)
    o_start = _start(s, X, Y, o_b, o_x, o_y)
    delta_n = tl.sum(g_ne.to(tl.float32) * _load(out, o_start, n, o_l, inside, e, tl.float32), axis=1)
    row = s.to(tl.int64) * L + n
    tl.store(delta + row, delta_n, mask=n < L)
    lse_n = tl.load(lse + row, mask=n < L, other=float("inf"))
    k_start, v_start = _start(s, X, Y, k_b, k_x, k_y), _start(s, X, Y, v_b, v_x, v_y)
    dq_ne = tl.zeros((ROWS, WIDTH), tl.float32)
    line = b * list_b + block
    count = tl.load(counts + line) if MASKED else blocks
    for step in range(count):
        other = tl.load(lists + line * blocks + step) if MASKED else step
        m = other * ROWS + tl.arange(0, ROWS)
        here = (m < L)[:, None] & (e < E)[None, :]
        k_me = _load(k, k_start, m, k_l, here, e, DOT)
        v_me = _load(v, v_start, m, v_l, here, e, DOT)
        score = tl.dot(q_ne, tl.trans(k_me), input_precision=PRECISION) * scale
        share = tl.where(_seen(mask, b * mask_b, block, other, L, MASKED, ROWS), tl.exp2(score - lse_n[:, None]), 0.0)
        dshare = tl.dot(g_ne, tl.trans(v_me), input_precision=PRECISION)
        dq_ne = tl.dot((share * (dshare - delta_n[:, None])).to(DOT), k_me, dq_ne, input_precision=PRECISION)
    _store(dq, o_start, n, o_l, inside, e, dq_ne * dscale)


@triton.jit
def _long_backward_keys(
    grad, q, k, v, mask, lists, counts, lse, delta, dk, dv,
    g_b, g_x, g_y, g_l, q_b, q_x, q_y, q_l, k_b, k_x, k_y, k_l, v_b, v_x, v_y, v_l, o_b, o_x, o_y, o_l,
    mask_b, list_b, X, Y, L, E, scale, dscale,
    MASKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys; the lists are of the blocks of queries that see it."""
    blocks = tl.cdiv(L, ROWS)
    s, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b = s.to(tl.int64) // (X * Y)
    e, m = tl.arange(0, WIDTH), block * ROWS + tl.arange(0, ROWS)
    inside = (m < L)[:, None] & (e < E)[None, :]
    k_me = _load(k, _start(s, X, Y, k_b, k_x, k_y), m, k_l, inside, e, DOT)
    v_me = _load(v, _start(s, X, Y, v_b, v_x, v_y), m, v_l, inside, e, DOT)
    q_start, g_start = _start(s, X, Y, q_b, q_x, q_y), _start(s, X, Y, g_b, g_x, g_y)
    dk_me = tl.zeros((ROWS, WIDTH), tl.float32)
    dv_me = tl.zeros((ROWS, WIDTH), tl.float32)
    line = b * list_b + block
    count = tl.load(counts + line) if MASKED else blocks
    for step in range(count):
        other = tl.load(lists + line * blocks + step) if MASKED else step
        n = other * ROWS + tl.arange(0, ROWS)
        here = (n < L)[:, None] & (e < E)[None, :]
        row = s.to(tl.int64) * L + n
        q_ne = _load(q, q_start, n, q_l, here, e, DOT)
        g_ne = _load(grad, g_start, n, g_l, here, e, DOT)
        lse_n = tl.load(lse + row, mask=n < L, other=float("inf"))
        delta_n = tl.load(delta + row, mask=n < L, other=0)
        score = tl.dot(q_ne, tl.trans(k_me), input_precision=PRECISION) * scale
        share = tl.where(_seen(mask, b * mask_b, other, block, L, MASKED, ROWS), tl.exp2(score - lse_n[:, None]), 0.0)
        dv_me = tl.dot(tl.trans(share.to(DOT)), g_ne, dv_me, input_precision=PRECISION)
        dshare = tl.dot(g_ne, tl.trans(v_me), input_precision=PRECISION)
        dscore = (share * (dshare - delta_n[:, None])).to(DOT)
        dk_me = tl.dot(tl.trans(dscore), q_ne, dk_me, input_precision=PRECISION)
    start = _start(s, X, Y, o_b, o_x, o_y)
    _store(dv, start, m, o_l, inside, e, dv_me)
    _store(dk, start, m, o_l, inside, e, dk_me * dscale)


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dim: int, short: bool) -> tuple[Tensor, Tensor]:
    """(out as q, contiguous; log-sum-exp base 2, flat, empty if `short`)."""
    q, k, v = (_rows(x) for x in (q, k, v))
    out = q.new_empty(q.shape)
    lse = q.new_empty(0 if short else q[..., 0].numel(), dtype=torch.float32)
    if not out.numel():
        return out, lse
    mask, common, mask_b, sizes = _common(q, mask, dim, short)
    strides, sizes = _strides(dim, q, k, v, out), (*sizes, scale * _LOG2E)
    if short:
        grid, pack = _packing(q, dim, common["ROWS"])
        numbers: list[Any] = [*strides, mask_b, *pack, *sizes]
        _short_forward[grid](q, k, v, mask, out, *numbers, **common)
    else:
        lists, counts, list_b = _lists(mask, common, q.shape[dim], transposed=False)
        numbers = [*strides, mask_b, list_b, *sizes]
        _long_forward[_grid(q, dim, common)](q, k, v, mask, lists, counts, out, lse, *numbers, **common)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, mask: Tensor | None, scale: float, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous; `out` None where sequences are short."""
    grad, q, k, v = (_rows(x) for x in (grad, q, k, v))
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    if not dq.numel():
        return dq, dk, dv
    mask, common, mask_b, sizes = _common(q, mask, dim, out is None)
    strides, sizes = _strides(dim, grad, q, k, v, dq), (*sizes, scale * _LOG2E, scale)
    if out is None:
        grid, pack = _packing(q, dim, common["ROWS"])
        numbers: list[Any] = [*strides, mask_b, *pack, *sizes]
        _short_backward[grid](grad, q, k, v, mask, dq, dk, dv, *numbers, **common)
        return dq, dk, dv
    delta, length, grid = torch.empty_like(lse), q.shape[dim], _grid(q, dim, common)
    lists, counts, list_b = _lists(mask, common, length, transposed=False)
    numbers = [*strides, mask_b, list_b, *sizes]
    _long_backward_queries[grid](grad, q, k, v, out, mask, lists, counts, lse, delta, dq, *numbers, **common)
    lists, counts, _ = _lists(mask, common, length, transposed=True)
    _long_backward_keys[grid](grad, q, k, v, mask, lists, counts, lse, delta, dk, dv, *numbers, **common)
    return dq, dk, dv


def _rows(x: Tensor) -> Tensor:
    """The heads' values must be neighbours, as they are in views of a projection."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(dim: int, *tensors: Tensor) -> list[int]:
    """Of each tensor those of batch, x, y and the sequence."""
    x, y = (d for d in (1, 2, 3) if d != dim)
    return [tensor.stride(d) for tensor in tensors for d in (0, x, y, dim)]


def _common(q: Tensor, mask: Tensor | None, dim: int, short: bool) -> tuple[Tensor, dict[str, Any], int, Sequence[int]]:
    """The mask (or any tensor in its place), the kernels' constants, the mask's batch stride, and (X, Y, L, E)."""
    x, y = (q.shape[d] for d in (1, 2, 3) if d != dim)
    length, width = q.shape[dim], q.shape[-1]
    exact = q.dtype == torch.float32
    # Exact fp32 has no tensor cores: its tile is no larger than it must be, and fits the registers.
    rows = (max(16, triton.next_power_of_2(length)) if short else 32) if exact else 64
    dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(q.dtype, tl.float32)
    constants = {
        "MASKED": mask is not None,
        # the interpreter multiplies the bits of bf16, not its numbers
        "DOT": dot if isinstance(_short_forward, triton.JITFunction) else tl.float32,
        "PRECISION": "ieee" if exact else "tf32",
        "ROWS": rows,
        "WIDTH": max(16, triton.next_power_of_2(width)),
        "num_warps": 4 if not exact or rows == 32 else 2 if rows == 16 else 8,
        "num_stages": 2,
    }
    batch_stride = length * length if mask is not None and mask.ndim == 3 else 0
    return q if mask is None else mask.contiguous(), constants, batch_stride, (x, y, length, width)


def _packing(q: Tensor, dim: int, rows: int) -> tuple[tuple[Any], tuple[Any, Any]]:
    """(grid, (sequences, how many share a tile))."""
    length = q.shape[dim]
    sequences, pack = q[..., 0].numel() // length, rows // length
    return (triton.cdiv(sequences, pack),), (sequences, pack)


def _grid(q: Tensor, dim: int, common: dict[str, Any]) -> tuple[Any]:
    return (q[..., 0].numel() // q.shape[dim] * triton.cdiv(q.shape[dim], common["ROWS"]),)


def _lists(mask: Tensor, common: dict[str, Any], length: int, transposed: bool) -> tuple[Tensor, Tensor, int]:
    """Numbers of the blocks of keys that a block of queries sees, seen ones first (transposed: the other way round), how many
    they are, and by how many lines the next sample's lie further."""
    if not common["MASKED"]:
        return mask, mask, 0
    rows, blocks = common["ROWS"], -(-length // common["ROWS"])
    pad = blocks * rows - length
    padded = torch.nn.functional.pad(mask.view(-1, length, length), (0, pad, 0, pad))
    any_xnm = padded.view(-1, blocks, rows, blocks, rows).any(dim=4).any(dim=2)
    any_xnm = any_xnm.transpose(1, 2) if transposed else any_xnm
    lists = any_xnm.to(torch.int8).argsort(dim=2, descending=True, stable=True).to(torch.int32).contiguous()
    return lists, any_xnm.sum(dim=2, dtype=torch.int32), blocks if mask.ndim == 3 else 0
