"""The low-rank spectral-spatial attention of LESS: channels and positions apart, joined by a Kronecker product."""

import torch
import torch.nn.functional as F
from torch import Tensor

from swath.kernels.axial.op import attention_along, fits
from swath.kernels.dispatch import Implementation, Operator, autocast_dtype, everywhere, with_triton
from swath.kernels.kronecker import reference
from swath.kernels.kronecker.op import kronecker_projection

OPERATOR = Operator(
    "kronecker_attention",
    Implementation("triton", with_triton),
    Implementation("fold", everywhere),
    Implementation("reference", everywhere, slow=True),
)


def kronecker_attention(
    qc: Tensor,
    kc: Tensor,
    vc: Tensor,
    qs: Tensor,
    ks: Tensor,
    vs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    mask_c: Tensor | None = None,
    scale_c: float | None = None,
    scale_s: float | None = None,
) -> Tensor:
    """Y[i, j] = W concat over heads of (sum over ranks of Oc^r[i] ⊗ Os^r[j]) + bias, with Oc^r = softmax(qc kc^T scale_c +
    mask_c) vc over the channels and Os^r = softmax(qs ks^T scale_s + mask) vs over the positions: the low-rank attention of LESS
    ViT (uiuctml/GeospatialFM), (Ac^r ⊗ As^r)(vc ⊗ vs) at a cost of C² + N² + R C N in place of (C N)².

    qc, kc (B, R, H, C, dc); vc (B, H, C, dc), shared by the R ranks; qs, ks (B, R, H, N, ds); vs (B, H, N, ds); weight
    (Dout, H·dc·ds), its columns by head, then dc, then ds; bias (Dout,). mask (N, N) or (B, N, N), bool, True where position
    row may attend to position column; mask_c (C, C) or (B, C, C), the same of channels; a row with none gives Os or Oc = 0.
    Scales are dc^-0.5 and ds^-0.5 by default. → (B, C, N, Dout). All of one floating dtype; under autocast all are cast to its
    dtype, as `F.linear` does. Sums are in fp32.

    Gradients for every floating tensor. Neither pass holds the (C·N, H·dc·ds) product, only pieces of it or of W with one factor
    folded in, at most a quarter of Y each (one position's or channel's at least).

    Raises ValueError for shapes, dtypes and devices that do not fit, naming the argument.
    """
    _check(qc, kc, vc, qs, ks, vs, weight, bias, mask, mask_c)
    if (dtype := autocast_dtype(qc.device.type)) is not None:
        qc, kc, vc, qs, ks, vs, weight = (x.to(dtype) for x in (qc, kc, vc, qs, ks, vs, weight))
        bias = None if bias is None else bias.to(dtype)
    implementation = OPERATOR.choose(qc.device)
    if implementation == "reference":
        return reference.kronecker_attention(
            qc, kc, vc, qs, ks, vs, weight, bias, mask=mask, mask_c=mask_c, scale_c=scale_c, scale_s=scale_s
        )  # fmt: skip
    tiled = implementation == "triton" and fits(qc) and fits(qs)
    oc_brhic, os_brhjs = _branch(qc, kc, vc, mask_c, scale_c, tiled), _branch(qs, ks, vs, mask, scale_s, tiled)
    return kronecker_projection(oc_brhic, os_brhjs, weight, bias, tiled)


def _branch(q_brhle: Tensor, k_brhle: Tensor, v_bhle: Tensor, mask: Tensor | None, scale: float | None, tiled: bool) -> Tensor:
    """One branch's attention, (B, R, H, L, E)."""
    v_brhle = v_bhle[:, None].expand_as(q_brhle)
    if tiled:  # reads the shared values where they are, and skips blocks that the mask empties
        return attention_along(q_brhle, k_brhle, v_brhle, mask, scale, 3)[0]
    seen = mask if mask is None or mask.ndim == 2 else mask[:, None]
    # Ranks as heads; the four-dimensional form is the one that has fast kernels.
    q, k, v = (x.flatten(1, 2) for x in (q_brhle, k_brhle, v_brhle))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).view(q_brhle.shape)


def _check(
    qc: Tensor, kc: Tensor, vc: Tensor, qs: Tensor, ks: Tensor, vs: Tensor, weight: Tensor, bias: Tensor | None,
    mask: Tensor | None, mask_c: Tensor | None,
) -> None:  # fmt: skip
    for name, q, k, v in (("c", qc, kc, vc), ("s", qs, ks, vs)):
        if q.ndim != 5:
            raise ValueError(f"q{name} must be (B, R, H, length, width), not {tuple(q.shape)}")
        if k.shape != q.shape:
            raise ValueError(f"k{name} must be as q{name}, {tuple(q.shape)}, not {tuple(k.shape)}")
        if tuple(v.shape) != (q.shape[0], *q.shape[2:]):
            raise ValueError(f"v{name} must be {(q.shape[0], *q.shape[2:])} for q{name} {tuple(q.shape)}, not {tuple(v.shape)}")
    if qc.shape[:3] != qs.shape[:3]:
        raise ValueError(f"qc and qs must agree in batch, ranks and heads, not {tuple(qc.shape)} and {tuple(qs.shape)}")
    depth = qc.shape[2] * qc.shape[4] * qs.shape[4]
    if weight.ndim != 2 or weight.shape[1] != depth:
        raise ValueError(
            f"weight must be (Dout, {depth}) for qc {tuple(qc.shape)} and qs {tuple(qs.shape)}, not {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},) for weight {tuple(weight.shape)}, not {tuple(bias.shape)}")
    for name, seen, q in (("mask", mask, qs), ("mask_c", mask_c, qc)):
        batch, length = q.shape[0], q.shape[3]
        if seen is not None and (
            seen.dtype != torch.bool or tuple(seen.shape) not in ((length, length), (batch, length, length))
        ):
            raise ValueError(f"{name} must be bool, ([{batch},] {length}, {length}), not {seen.dtype} {tuple(seen.shape)}")
    named = {"kc": kc, "vc": vc, "qs": qs, "ks": ks, "vs": vs, "weight": weight, "bias": bias}
    autocast = autocast_dtype(qc.device.type) is not None
    for name, x in {"qc": qc, **named, "mask": mask, "mask_c": mask_c}.items():
        if x is None:
            continue
        if x.device != qc.device:
            raise ValueError(f"{name} is on {x.device}, qc is on {qc.device}")
        if not name.startswith("mask") and (not x.is_floating_point() or (x.dtype != qc.dtype and not autocast)):
            raise ValueError(f"{name} is {x.dtype}, qc is {qc.dtype}; outside autocast all must be of one floating dtype")
