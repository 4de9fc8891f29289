"""The projection of the Kronecker product without the product, in plain torch: matrix products over pieces.

    Y[b,i,j,o] = sum over r, h, c, s of Oc[b,r,h,i,c] Os[b,r,h,j,s] W[o,h,c,s]

Three ways, each a piece at a time so that what it holds stays small beside Y:
positions  Os is folded into W for each position, then multiplied with Oc; depth r·h·c in place of h·c·s;
channels   Oc is folded into W for each channel, then multiplied with Os; depth r·h·s;
product    the product of some channels is formed and projected.
Letters as in the reference; k the depth of what is left to multiply, m rows that share a weight.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_PIECE = {"cpu": 1 << 21, "gpu": 1 << 25}  # numbers that one piece may hold: about a cache
_SMALLEST = 1 << 16


def arithmetic(oc: torch.Size, os: torch.Size, width: int) -> dict[str, int]:
    """Multiply-adds of each way, from the shapes of Oc and Os."""
    batch, ranks, heads, channels, c = oc
    positions, s = os[3:]
    inner = heads * c * s * width
    tokens = batch * channels * positions
    return {
        "positions": ranks * (batch * positions * inner + tokens * heads * c * width),
        "channels": ranks * (batch * channels * inner + tokens * heads * s * width),
        "product": tokens * (inner + heads * c * s * ranks),
    }


def plan(oc: Tensor, os: Tensor, width: int, fused: bool) -> str:
    """The cheapest way, by multiply-adds and by what is written and read in between; `fused` forms the product in a tile."""
    batch, ranks, heads, channels, c = oc.shape
    positions, s = os.shape[3:]
    held = {
        "positions": batch * positions * ranks * heads * c * width,
        "channels": batch * channels * ranks * heads * (s * width + positions * s),
        "product": 0 if fused else 2 * batch * channels * positions * heads * c * s,
    }
    # Multiply-adds in the time of one number's way to memory and back: bf16 on an H200, 790 TFLOP/s by 4.3 TB/s; else fp32.
    dear = 180 if oc.is_cuda and oc.element_size() == 2 else 30
    count = arithmetic(oc.shape, os.shape, width)
    if fused:  # a tile that also forms its operand comes about two thirds as near the machine's peak as the library
        count["product"] += count["product"] // 2
    cost = {way: count[way] + dear * held[way] for way in count}
    return min(cost, key=lambda way: cost[way])


def forward(oc_brhic: Tensor, os_brhjs: Tensor, weight_od: Tensor, bias_o: Tensor | None, way: str) -> Tensor:
    """(B, C, N, Dout)."""
    oc, os = oc_brhic, os_brhjs
    y_bijo = oc.new_empty(oc.shape[0], oc.shape[3], os.shape[3], len(weight_od))
    if not y_bijo.numel():
        return y_bijo
    w_hcso = by_factor(oc, os, weight_od)
    for b, part in pieces(oc, os, len(weight_od), way):
        if way == "positions":
            y_bin = y_bijo[b, :, part].flatten(2)
            torch.bmm(_rows(oc[b]), _fold_positions(os[b, :, :, part], w_hcso).transpose(0, 1), out=y_bin)
        elif way == "channels":
            y_bin = y_bijo[b, part].flatten(0, 1)
            torch.bmm(_repeat(_columns(os[b]), part), _fold_channels(oc[b, :, :, part], w_hcso), out=y_bin)
        else:
            y_bin = y_bijo[b, part].flatten(0, 2)
            torch.mm(_product(oc[b, :, :, part], os[b]), weight_od.t(), out=y_bin)
        if bias_o is not None:
            y_bin.unflatten(-1, (-1, len(bias_o))).add_(bias_o)  # now, while the piece is in a cache
    return y_bijo


def backward(grad_bijo: Tensor, oc_brhic: Tensor, os_brhjs: Tensor, weight_od: Tensor, way: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of Oc, Os and the weight. Pieces are added up in their order, in fp32."""
    oc, os, grad = oc_brhic, os_brhjs, grad_bijo.contiguous()
    w_hcso = by_factor(oc, os, weight_od)
    wide = torch.float64 if oc.dtype == torch.float64 else torch.float32
    doc, dos, dw_hcso = (torch.zeros(x.shape, dtype=wide, device=oc.device) for x in (oc, os, w_hcso))
    of_piece = {"positions": _backward_positions, "channels": _backward_channels, "product": _backward_product}[way]
    for b, part in pieces(oc, os, len(weight_od), way) if grad.numel() else ():
        by_position = way == "positions"
        oc_part, os_part = (oc[b], os[b, :, :, part]) if by_position else (oc[b, :, :, part], os[b])
        grad_part = grad[b, :, part] if by_position else grad[b, part]
        of_oc, of_os, of_w = of_piece(grad_part, oc_part, os_part, w_hcso)
        (doc[b] if by_position else doc[b, :, :, part]).add_(of_oc)
        (dos[b, :, :, part] if by_position else dos[b]).add_(of_os)
        dw_hcso += of_w
    return doc.to(oc.dtype), dos.to(os.dtype), dw_hcso.permute(3, 0, 1, 2).reshape(weight_od.shape).to(weight_od.dtype)


def pieces(oc: Tensor, os: Tensor, width: int, way: str) -> Iterator[tuple[slice, slice]]:
    """(samples, positions or channels) of each piece: some whole samples, or where one is too large, a part of one."""
    batch, ranks, heads, channels, c = oc.shape
    positions, s = os.shape[3:]
    each = {
        "positions": ranks * heads * c * width,
        "channels": ranks * heads * s * max(width, positions),
        "product": positions * heads * c * s,
    }[way]
    length = positions if way == "positions" else channels
    most = min(_PIECE["gpu" if oc.is_cuda else "cpu"], batch * channels * positions * width // 4)
    most = max(most, _SMALLEST) // max(each, 1)
    samples, step = max(1, most // length), min(length, max(1, most))
    for first in range(0, batch, samples):
        for start in range(0, length, step):
            yield slice(first, min(first + samples, batch)), slice(start, min(start + step, length))


def by_factor(oc: Tensor, os: Tensor, weight_od: Tensor) -> Tensor:
    """(H, dc, ds, Dout)."""
    return weight_od.reshape(-1, oc.shape[2], oc.shape[4], os.shape[4]).permute(1, 2, 3, 0).contiguous()


def _rows(oc_brhic: Tensor) -> Tensor:
    """(b, i, k), k = (h, c, r): the order in which `_fold_positions` leaves its depth."""
    return oc_brhic.permute(0, 3, 2, 4, 1).flatten(2)


def _columns(os_brhjs: Tensor) -> Tensor:
    """(b, j, k), k = (r, h, s): the order in which `_fold_channels` leaves its depth."""
    return os_brhjs.permute(0, 3, 1, 2, 4).flatten(2)


def _repeat(x_bjk: Tensor, part: slice) -> Tensor:
    """Each sample for all of its channels (no copy of a single sample): (b·i, j, k)."""
    return x_bjk[:, None].expand(-1, part.stop - part.start, -1, -1).reshape(-1, *x_bjk.shape[1:])


def _fold_positions(os_brhjs: Tensor, w_hcso: Tensor) -> Tensor:
    """(k, b, j·o), with one stride for all of k, so that no product needs a copy."""
    os_hms = os_brhjs.permute(2, 1, 0, 3, 4).flatten(1, 3)
    batch, ranks = os_brhjs.shape[:2]
    return torch.matmul(os_hms[:, None], w_hcso).view(math.prod(w_hcso.shape[:2]) * ranks, batch, -1)


def _fold_channels(oc_brhic: Tensor, w_hcso: Tensor) -> Tensor:
    """(b·i, k, o)."""
    oc_hmc = oc_brhic.permute(2, 0, 3, 1, 4).flatten(1, 3)
    batch, ranks, heads, channels, _ = oc_brhic.shape
    folded_mhn = w_hcso.new_empty(batch * channels * ranks, heads, math.prod(w_hcso.shape[2:]))
    torch.bmm(oc_hmc, w_hcso.flatten(2), out=folded_mhn.transpose(0, 1))
    return folded_mhn.view(batch * channels, -1, w_hcso.shape[3])


def _product(oc_brhic: Tensor, os_brhjs: Tensor) -> Tensor:
    """(b·i·j, h·c·s): the product itself, of a piece."""
    (batch, _, heads, channels, c), (positions, s) = oc_brhic.shape, os_brhjs.shape[3:]
    oc_bhnr = oc_brhic.permute(0, 2, 3, 4, 1).flatten(2, 3)
    os_bhrm = os_brhjs.permute(0, 2, 1, 3, 4).flatten(3)
    product = torch.matmul(oc_bhnr, os_bhrm).view(batch, heads, channels, c, positions, s)
    return product.permute(0, 2, 4, 1, 3, 5).reshape(batch * channels * positions, heads * c * s)


def _backward_positions(grad_bijo: Tensor, oc: Tensor, os: Tensor, w_hcso: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (batch, ranks, heads, _, c), (positions, s), width = oc.shape, os.shape[3:], w_hcso.shape[3]
    grad_bin, oc_bik = grad_bijo.flatten(2), _rows(oc)
    doc_bik = torch.bmm(grad_bin, _fold_positions(os, w_hcso).permute(1, 2, 0))
    dfolded_kbn = w_hcso.new_empty(heads * c * ranks, batch, positions * width)
    torch.bmm(oc_bik.transpose(1, 2), grad_bin, out=dfolded_kbn.transpose(0, 1))
    dfolded_hcmo = dfolded_kbn.view(heads, c, -1, width)
    os_hsm = os.permute(2, 4, 1, 0, 3).flatten(2)
    dos_hms = torch.matmul(dfolded_hcmo, w_hcso.transpose(2, 3)).sum(dim=1)
    return (
        doc_bik.unflatten(2, (heads, c, ranks)).permute(0, 4, 2, 1, 3),
        dos_hms.view(heads, ranks, batch, positions, s).permute(2, 1, 0, 3, 4),
        torch.matmul(os_hsm[:, None], dfolded_hcmo),
    )


def _backward_channels(grad_bijo: Tensor, oc: Tensor, os: Tensor, w_hcso: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (batch, ranks, heads, channels, c), s = oc.shape, os.shape[4]
    grad_mjo, os_bjk, every = grad_bijo.flatten(0, 1), _columns(os), slice(0, channels)
    dos_mjk = torch.bmm(grad_mjo, _fold_channels(oc, w_hcso).transpose(1, 2))
    dos_bjk = dos_mjk.unflatten(0, (batch, channels)).sum(dim=1, dtype=torch.promote_types(os.dtype, torch.float32))
    del dos_mjk
    dfolded_mko = torch.bmm(_repeat(os_bjk, every).transpose(1, 2), grad_mjo)
    dfolded_hmn = dfolded_mko.view(batch * channels * ranks, heads, -1).transpose(0, 1)
    oc_hcm = oc.permute(2, 4, 0, 3, 1).flatten(2)
    doc_hmc = torch.bmm(dfolded_hmn, w_hcso.flatten(2).transpose(1, 2))
    return (
        doc_hmc.view(heads, batch, channels, ranks, c).permute(1, 3, 0, 2, 4),
        dos_bjk.unflatten(2, (ranks, heads, s)).permute(0, 2, 3, 1, 4),
        torch.bmm(oc_hcm, dfolded_hmn).view(w_hcso.shape),
    )


def _backward_product(grad_bijo: Tensor, oc: Tensor, os: Tensor, w_hcso: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (batch, _, heads, channels, c), (positions, s), width = oc.shape, os.shape[3:], w_hcso.shape[3]
    grad_mo = grad_bijo.flatten(0, 2)
    dw_do = torch.mm(_product(oc, os).t(), grad_mo)
    dproduct = torch.mm(grad_mo, w_hcso.view(-1, width).t()).view(batch, channels, positions, heads, c, s)
    dproduct_bhnm = dproduct.permute(0, 3, 1, 4, 2, 5).reshape(batch, heads, channels * c, positions * s)
    del dproduct
    os_bhmr, oc_bhrn = os.permute(0, 2, 3, 4, 1).flatten(2, 3), oc.permute(0, 2, 1, 3, 4).flatten(3)
    doc_bhnr, dos_bhrm = torch.matmul(dproduct_bhnm, os_bhmr), torch.matmul(oc_bhrn, dproduct_bhnm)
    return (
        doc_bhnr.unflatten(2, (channels, c)).permute(0, 4, 1, 2, 3),
        dos_bhrm.unflatten(3, (positions, s)).transpose(1, 2),
        dw_do.view(w_hcso.shape),
    )
