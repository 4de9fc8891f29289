"""Patch embedding as one matrix product whose left operand's tiles are read straight from the image.

Letters: r rows of the product (a sample's kept patch each), d width, v values of a patch (band, row, column), s splits.
"""

# A launch is not a call of the function below it, which the type checker takes it for.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 264  # two for each multiprocessor of an H100; with fewer tiles the rows are split


@triton.jit
def _corners(
    row, index, rows, kept, places, columns, image_b, image_h, image_w, P: tl.constexpr, Q: tl.constexpr, EVERY: tl.constexpr
):  # fmt: skip
    """Offsets of the first pixel of each row's patch, and whether there is such a patch."""
    present = row < rows
    place = (row % kept).to(tl.int64)
    if not EVERY:
        place = tl.load(index + row, mask=present, other=-1)
    present = present & (place >= 0) & (place < places)
    offset = (row // kept).to(tl.int64) * image_b + (place // columns) * P * image_h + (place % columns) * Q * image_w
    return offset, present


@triton.jit
def _values(value, image_c, image_h, image_w, P: tl.constexpr, Q: tl.constexpr):
    """Offsets of a patch's values from its first pixel."""
    return (value // (P * Q)).to(tl.int64) * image_c + (value // Q % P).to(tl.int64) * image_h + (value % Q) * image_w


@triton.jit
def _embed(
    images, weight, bias, index, out, rows, width, values, kept, places, columns, image_b, image_c, image_h, image_w,
    P: tl.constexpr, Q: tl.constexpr, EVERY: tl.constexpr, BIAS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """One tile of rows × width; neighbours in the grid share rows, so that the image is read from memory once."""
    tiles = tl.cdiv(width, WIDTH)
    r = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(0) % tiles * WIDTH + tl.arange(0, WIDTH)
    corner, present = _corners(r, index, rows, kept, places, columns, image_b, image_h, image_w, P, Q, EVERY)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, values, VALUES):
        v = start + tl.arange(0, VALUES)
        pixel = images + corner[:, None] + _values(v, image_c, image_h, image_w, P, Q)[None, :]
        x = tl.load(pixel, mask=present[:, None] & (v < values)[None, :], other=0).to(tl.float32)
        w = tl.load(
            weight + d[None, :].to(tl.int64) * values + v[:, None], mask=(d < width)[None, :] & (v < values)[:, None], other=0
        )
        total = tl.dot(x.to(DOT), w.to(tl.float32).to(DOT), total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + d, mask=d < width, other=0).to(tl.float32)[None, :]
    inside = (r < rows)[:, None] & (d < width)[None, :]
    tl.store(out + r[:, None].to(tl.int64) * width + d[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weight_gradient(
    grad, images, index, out, rows, width, values, kept, places, columns, image_b, image_c, image_h, image_w, split,
    P: tl.constexpr, Q: tl.constexpr, EVERY: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """One tile of width × values, summed over `split` rows; the caller adds the splits in their order."""
    tiles = tl.cdiv(values, VALUES)
    d = tl.program_id(0) // tiles * WIDTH + tl.arange(0, WIDTH)
    v = tl.program_id(0) % tiles * VALUES + tl.arange(0, VALUES)
    first = tl.program_id(1) * split
    value = _values(v, image_c, image_h, image_w, P, Q)
    total = tl.zeros((WIDTH, VALUES), tl.float32)
    for start in range(first, min(first + split, rows), ROWS):
        r = start + tl.arange(0, ROWS)
        corner, present = _corners(r, index, rows, kept, places, columns, image_b, image_h, image_w, P, Q, EVERY)
        x = tl.load(images + corner[:, None] + value[None, :], mask=present[:, None] & (v < values)[None, :], other=0)
        inside = (r < rows)[None, :] & (d < width)[:, None]
        g = tl.load(grad + r[None, :].to(tl.int64) * width + d[:, None], mask=inside, other=0)
        total = tl.dot(g.to(tl.float32).to(DOT), x.to(tl.float32).to(DOT), total, input_precision=PRECISION)
    place = (tl.program_id(1).to(tl.int64) * width + d[:, None]) * values + v[None, :]
    tl.store(out + place, total, mask=(d < width)[:, None] & (v < values)[None, :])


def forward(images_bchw: Tensor, weight_dcpq: Tensor, bias_d: Tensor | None, index_bk: Tensor | None) -> Tensor:
    """(B, K, D) in the weight's dtype."""
    weight_dv = weight_dcpq.flatten(1).contiguous()
    geometry, kept = _geometry(images_bchw, weight_dcpq, index_bk)
    rows, (width, values) = len(images_bchw) * kept, weight_dv.shape
    out_bkd = weight_dcpq.new_empty(len(images_bchw), kept, width)
    if not out_bkd.numel():
        return out_bkd
    index = images_bchw if index_bk is None else index_bk.contiguous()
    bias = weight_dv if bias_d is None else bias_d.contiguous()
    tile = _tile(rows, width, values, weight_dcpq.dtype)
    grid = (triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(width, tile["WIDTH"]),)
    _embed[grid](
        images_bchw, weight_dv, bias, index, out_bkd, rows, width, values, kept, *geometry,
        P=weight_dcpq.shape[2], Q=weight_dcpq.shape[3], EVERY=index_bk is None, BIAS=bias_d is not None,
        **_arithmetic(weight_dcpq.dtype), **tile,
    )  # fmt: skip
    return out_bkd


def backward_weight(grad_bkd: Tensor, images_bchw: Tensor, weight_dcpq: Tensor, index_bk: Tensor | None) -> Tensor:
    """The weight's gradient, in its shape and dtype."""
    geometry, kept = _geometry(images_bchw, weight_dcpq, index_bk)
    rows, width, values = len(images_bchw) * kept, len(weight_dcpq), weight_dcpq[0].numel()
    if not rows:
        return torch.zeros_like(weight_dcpq)
    tile = _tile(width, values, rows, weight_dcpq.dtype)
    tile |= {"WIDTH": tile["ROWS"], "VALUES": tile["WIDTH"], "ROWS": tile["VALUES"]}
    tiles = triton.cdiv(width, tile["WIDTH"]) * triton.cdiv(values, tile["VALUES"])
    # at least eight steps each, so that the partial sums stay few beside the rows
    splits = max(1, min(_PROGRAMS // tiles, rows // (8 * tile["ROWS"])))
    split = triton.cdiv(triton.cdiv(rows, splits), tile["ROWS"]) * tile["ROWS"]
    splits = triton.cdiv(rows, split)
    partial_sdv = torch.empty(splits, width, values, dtype=torch.float32, device=grad_bkd.device)
    index = images_bchw if index_bk is None else index_bk.contiguous()
    _weight_gradient[(tiles, splits)](
        grad_bkd.contiguous(), images_bchw, index, partial_sdv, rows, width, values, kept, *geometry, split,
        P=weight_dcpq.shape[2], Q=weight_dcpq.shape[3], EVERY=index_bk is None, **_arithmetic(weight_dcpq.dtype), **tile,
    )  # fmt: skip
    return partial_sdv.sum(dim=0).view(weight_dcpq.shape).to(weight_dcpq.dtype)


def backward_images(grad_bkd: Tensor, images_bchw: Tensor, weight_dcpq: Tensor, index_bk: Tensor | None) -> Tensor:
    """The images' gradient, zero where no patch is kept. Seldom wanted, so it is left to torch, whose sum is ordered too."""
    batch, _, height, width = images_bchw.shape
    _, bands, p, q = weight_dcpq.shape
    rows, columns = height // p, width // q
    patch_bkcpq = (grad_bkd @ weight_dcpq.flatten(1)).view(batch, grad_bkd.shape[1], bands, p, q).to(images_bchw.dtype)
    if index_bk is None:
        grid_bhwcpq = patch_bkcpq.view(batch, rows, columns, bands, p, q)
    else:
        sample_b1 = torch.arange(batch, device=index_bk.device)[:, None]
        grid_bhwcpq = patch_bkcpq.new_zeros(batch, rows, columns, bands, p, q)
        grid_bhwcpq.index_put_((sample_b1, index_bk // columns, index_bk % columns), patch_bkcpq, accumulate=True)
    return grid_bhwcpq.permute(0, 3, 1, 4, 2, 5).reshape(images_bchw.shape)


def _geometry(images_bchw: Tensor, weight_dcpq: Tensor, index_bk: Tensor | None) -> tuple[tuple[int, ...], int]:
    """(places, columns and the image's strides), and how many patches are kept of each sample."""
    rows, columns = images_bchw.shape[2] // weight_dcpq.shape[2], images_bchw.shape[3] // weight_dcpq.shape[3]
    return (rows * columns, columns, *images_bchw.stride()), rows * columns if index_bk is None else index_bk.shape[1]


def _tile(rows: int, columns: int, depth: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of a product of rows × columns over `depth`, and its warps: at most 128 × 128 × 32, half the rows for tf32x3."""
    most = {"ROWS": 64 if _arithmetic(dtype)["PRECISION"] == "tf32x3" else 128, "WIDTH": 128, "VALUES": 32}
    sizes = zip(most, (rows, columns, depth), strict=True)
    tile = {name: min(most[name], max(16, triton.next_power_of_2(size))) for name, size in sizes}
    return {**tile, "num_warps": 8 if tile["ROWS"] * tile["WIDTH"] > 64 * 64 else 4}


def _arithmetic(dtype: torch.dtype) -> dict[str, object]:
    """What the product multiplies in. In fp32 as torch is set: TF32, or three TF32 products, which are as exact as fp32."""
    interpreted = not isinstance(_embed, triton.JITFunction)
    if dtype == torch.float32 or interpreted:  # the interpreter multiplies the bits of bf16, not its numbers
        return {"DOT": tl.float32, "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"}
    return {"DOT": {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype], "PRECISION": "tf32"}
