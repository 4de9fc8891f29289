"""The selective scan of Mamba, in one or several directions over tokens that stay where they are."""

import torch
from torch import Tensor

from swath.kernels.dispatch import check_contents
from swath.kernels.scan import mamba_ssm, reference
from swath.kernels.scan.op import OPERATOR, scan

__all__ = ["selective_scan"]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    order: Tensor | None = None,
    reverse: bool = False,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    reduce: str = "sum",
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t;  y_t = C_t · h_t + D u_t;  y SiLU(z) (Gu and Dao 2023, "Mamba", eq. 2; B is
    Euler-discretised as in their code). dt = delta + delta_bias, through softplus (linear above 20) if `delta_softplus`.

    One direction: u, delta, z (B, L, D); A (D, N), negative; B, C (B, L, N), or (B, L, G, N) where group g serves channels
    g·D/G … (g+1)·D/G - 1; D, delta_bias (D,). → y (B, L, D) in the dtype of u.

    K directions, told by A (K, D, N): u (B, L, D) shared or (K, B, L, D); delta (K, B, L, D); B, C (K, B, L, [G,] N);
    D, delta_bias (D,) or (K, D); z (B, L, D). → the sum (B, L, D), or (K, B, L, D) with `reduce="none"`.

    Every tensor is indexed by place, and results stand at their place. `order[..., t]`, int32 or int64, is the place visited at
    step t, each place once: (L,), (K, L), (B, L) or (K, B, L); (K, L) where both would fit. `reverse` visits backwards.
    `mask` (B, L), bool: where it is False there is no token; the state passes unchanged, y and all gradients are 0 there, and
    what stands there is not looked at. `cu_seqlens` (sequences + 1,) packs sequences into a batch of 1; the state starts anew
    in each (and `order` stays within each). `initial_state`: (B, D, N), or (sequences, D, N), with K in front; 0 by default.
    `return_last_state` gives (y, the state after the last step), of the same shape, in fp32.

    Inputs are fp32, bf16 or fp16, each in its own dtype, also under autocast; the state is fp32 (all float64 where u is, on a
    CPU or by the reference). There are gradients for every floating-point input, through y and the last state, in a fixed
    order of summation.

    Raises ValueError for shapes, dtypes and devices that do not fit, naming the argument; for bad indices and packings on a
    CPU, and on a GPU under SWATH_CHECK=1.
    """
    x = reference.canonical(u, delta, A, B, C, D, z, delta_bias, order, mask, cu_seqlens, initial_state, reduce)
    summed = reduce == "sum" or A.ndim == 2
    implementation = OPERATOR.choose(u.device)
    if implementation in ("reference", "mamba_ssm") and check_contents(u.device) and not torch.compiler.is_compiling():
        reference.check_contents(x.order, x.cu_seqlens, x.delta.shape[2])
    if implementation == "reference":
        return reference.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, order=order, reverse=reverse, mask=mask,
            cu_seqlens=cu_seqlens, initial_state=initial_state, return_last_state=return_last_state, reduce=reduce,
        )  # fmt: skip
    if implementation == "mamba_ssm":
        y, last = mamba_ssm.selective_scan(x, delta_softplus, reverse, summed)
    else:
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in x)
        y, last, _ = scan(*x, delta_softplus, reverse, summed, save)
    return (y, last if A.ndim == 3 else last[0]) if return_last_state else y
