"""The selective scan in plain torch, one step after the other; what an export carries.

Letters: k direction, b sample, l place, m = b·l place of the whole batch, s sequence, t step, d channel, g group, n state.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Scan(NamedTuple):
    """One call in the form that every implementation takes: always K directions, and groups of B and C."""

    u: Tensor  # (K or 1, B, L, D)
    delta: Tensor  # (K, B, L, D)
    A: Tensor  # (K, D, N)
    B: Tensor  # (K, B, L, G, N)
    C: Tensor  # (K, B, L, G, N)
    D: Tensor | None  # (K or 1, D)
    z: Tensor | None  # (B, L, D)
    delta_bias: Tensor | None  # (K or 1, D)
    order: Tensor | None  # (K or 1, B or 1, L)
    mask: Tensor | None  # (B, L)
    cu_seqlens: Tensor | None  # (S + 1,)
    initial_state: Tensor | None  # (K, S, D, N)


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
    """h = exp(dt A) h + dt B u, y = C·h + D u, gated by SiLU(z); see `swath.kernels.scan.selective_scan`."""
    x = canonical(u, delta, A, B, C, D, z, delta_bias, order, mask, cu_seqlens, initial_state, reduce)
    y_kbld, last_ksdn = _scan(x, delta_softplus, reverse)
    if A.ndim == 2:
        y, last = y_kbld[0], last_ksdn[0]
    else:
        y, last = y_kbld.sum(dim=0) if reduce == "sum" else y_kbld, last_ksdn
    return (y.to(u.dtype), last) if return_last_state else y.to(u.dtype)


def _scan(x: Scan, delta_softplus: bool, reverse: bool) -> tuple[Tensor, Tensor]:
    """(y (K, B, L, D), last state (K, S, D, N)) in fp32, or float64 where u is."""
    dtype = torch.float64 if x.u.dtype == torch.float64 else torch.float32
    directions, batch, length, width = x.delta.shape
    place_kst = visits(x, reverse).expand(directions, -1, -1)
    present_kst = place_kst >= 0
    place_kst = place_kst.clamp_min(0)
    if x.mask is not None:
        present_kst = present_kst & x.mask.flatten()[place_kst]
    present_tks1 = present_kst.permute(2, 0, 1)[..., None]
    direction_k11 = torch.arange(directions, device=x.u.device)[:, None, None]

    def visited(tensor_kbl: Tensor) -> Tensor:
        """(T, K, S, …) what each step finds, 0 where nothing is present."""
        flat = tensor_kbl.to(dtype).flatten(1, 2).expand(directions, *(-1,) * (tensor_kbl.ndim - 2))
        found = flat[direction_k11, place_kst].movedim(2, 0)
        return torch.where(present_tks1.unflatten(-1, (1,) * (found.ndim - 3)), found, 0.0)

    u_tksd, step_tksd = visited(x.u), visited(x.delta)
    if x.delta_bias is not None:
        step_tksd = step_tksd + x.delta_bias.to(dtype)[:, None]
    if delta_softplus:
        step_tksd = F.softplus(step_tksd, threshold=20.0)
    step_tksd = torch.where(present_tks1, step_tksd, 0.0)
    per_group = width // x.B.shape[3]
    b_tksdn, c_tksdn = (visited(part).repeat_interleave(per_group, dim=3) for part in (x.B, x.C))
    a_k1dn = x.A.to(dtype)[:, None]

    state_ksdn = u_tksd.new_zeros(directions, place_kst.shape[1], width, x.A.shape[2])
    if x.initial_state is not None:
        state_ksdn = state_ksdn + x.initial_state.to(dtype)
    rows = []
    steps = zip(u_tksd.unbind(0), step_tksd.unbind(0), b_tksdn.unbind(0), c_tksdn.unbind(0), strict=True)
    for u_ksd, step_ksd, b_ksdn, c_ksdn in steps:
        state_ksdn = torch.exp(step_ksd[..., None] * a_k1dn) * state_ksdn + (step_ksd * u_ksd)[..., None] * b_ksdn
        rows.append((state_ksdn * c_ksdn).sum(dim=-1))
    y_tksd = torch.stack(rows) if rows else u_tksd.expand(0, directions, *u_tksd.shape[2:])
    if x.D is not None:
        y_tksd = y_tksd + x.D.to(dtype)[:, None] * u_tksd
    y_kstd = torch.where(present_tks1, y_tksd, 0.0).movedim(0, 2)
    out_kmd = y_kstd.new_zeros(directions, batch * length, width)
    out_kmd = out_kmd.index_put((direction_k11.expand_as(place_kst), place_kst), y_kstd, accumulate=True)
    y_kbld = out_kmd.unflatten(1, (batch, length))
    if x.z is not None:
        gate_bld = F.silu(x.z.to(dtype))
        if x.mask is not None:
            gate_bld = torch.where(x.mask[..., None], gate_bld, 0.0)
        y_kbld = y_kbld * gate_bld
    return y_kbld, state_ksdn


def visits(x: Scan, reverse: bool) -> Tensor:
    """(K or 1, S, T) int64: the place m that step t of sequence s comes to; -1 behind the end of a shorter sequence."""
    _, batch, length, _ = x.delta.shape
    device = x.delta.device
    if x.order is None:
        order_kbl = torch.arange(length, device=device).expand(1, batch, length)
    else:
        order_kbl = x.order.long().expand(-1, batch, -1)
    place_kbl = order_kbl + torch.arange(batch, device=device)[:, None] * length
    if x.cu_seqlens is None:
        return place_kbl.flip(2) if reverse else place_kbl
    first_s, end_s = x.cu_seqlens[:-1].long(), x.cu_seqlens[1:].long()
    longest = int((end_s - first_s).max()) if len(first_s) else 0
    t = torch.arange(longest, device=device)
    step_st = end_s[:, None] - 1 - t if reverse else first_s[:, None] + t
    inside_st = (step_st >= first_s[:, None]) & (step_st < end_s[:, None])
    place_kst = place_kbl[:, 0][:, step_st.clamp(0, max(length - 1, 0))]
    return torch.where(inside_st, place_kst, -1)


def canonical(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    order: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    reduce: str,
) -> Scan:
    """The arguments in one form. Raises ValueError, naming the argument and both shapes, where they do not fit together."""
    if reduce not in ("sum", "none"):
        raise ValueError(f"reduce must be 'sum' or 'none', not {reduce!r}")
    if A.ndim not in (2, 3):
        raise ValueError(f"A must be (D, N), or (K, D, N) for K directions, not {tuple(A.shape)}")
    if delta.ndim != A.ndim + 1:
        raise ValueError(f"delta must be {'(B, L, D)' if A.ndim == 2 else '(K, B, L, D)'} where A is {tuple(A.shape)}, "
                         f"not {tuple(delta.shape)}")  # fmt: skip
    lead = tuple(A.shape[:-2])
    *_, batch, length, width = delta.shape
    directions, states = A.shape[0] if lead else 1, A.shape[-1]

    def fit(name: str, tensor: Tensor | None, *shapes: tuple[int, ...]) -> None:
        if tensor is not None and tuple(tensor.shape) not in shapes:
            raise ValueError(f"{name} must be {' or '.join(map(str, shapes))} where delta is {tuple(delta.shape)}, "
                             f"not {tuple(tensor.shape)}")  # fmt: skip
        if tensor is not None and tensor.device != u.device:
            raise ValueError(f"{name} is on {tensor.device}, u on {u.device}; all must be on one device")

    one_bld = (batch, length, width)
    fit("delta", delta, (*lead, *one_bld))
    fit("A", A, (*lead, width, states))
    fit("u", u, one_bld, *([(directions, *one_bld)] if lead else []))
    for name, tensor in (("B", B), ("C", C)):
        groups = tensor.shape[-2] if tensor.ndim == len(lead) + 4 else 1
        if tensor.ndim == len(lead) + 4 and (groups == 0 or width % groups):
            raise ValueError(f"{name} {tuple(tensor.shape)} has {groups} groups, which do not divide the {width} channels of "
                             f"delta {tuple(delta.shape)}")  # fmt: skip
        fit(name, tensor, (*lead, batch, length, states), (*lead, batch, length, groups, states))
    if B.shape != C.shape:
        raise ValueError(f"B {tuple(B.shape)} and C {tuple(C.shape)} must have one shape")
    for name, tensor in (("D", D), ("delta_bias", delta_bias)):
        fit(name, tensor, (width,), *([(directions, width)] if lead else []))
    fit("z", z, one_bld)
    order = canonical_order(order, mask, cu_seqlens, lead, (batch, length), u.device)
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    fit("initial_state", initial_state, (*lead, sequences, width, states))
    for name, tensor in (("u", u), ("delta", delta), ("A", A), ("B", B), ("C", C), ("D", D), ("z", z),
                         ("delta_bias", delta_bias), ("initial_state", initial_state)):  # fmt: skip
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {tensor.dtype}")

    def lifted(tensor: Tensor, ndim: int) -> Tensor:
        return tensor[None] if tensor.ndim < ndim else tensor

    if B.ndim == len(lead) + 3:
        B, C = B.unsqueeze(-2), C.unsqueeze(-2)
    return Scan(
        lifted(u, 4), lifted(delta, 4), lifted(A, 3), lifted(B, 5), lifted(C, 5), None if D is None else lifted(D, 2), z,
        None if delta_bias is None else lifted(delta_bias, 2), order, mask, cu_seqlens,
        None if initial_state is None else lifted(initial_state, 4),
    )  # fmt: skip


def canonical_order(
    order: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    lead: tuple[int, ...],
    size: tuple[int, int],
    device: torch.device,
) -> Tensor | None:
    """`order` as (K or 1, B or 1, L), where `lead` is (K,) or () and `size` (B, L). ValueError for what does not fit them."""
    batch, length = size
    for name, tensor in (("order", order), ("mask", mask), ("cu_seqlens", cu_seqlens)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the tokens on {device}; all must be on one device")
        if tensor is not None and name != "mask" and tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be int32 or int64, not {tensor.dtype}")
    if mask is not None and (mask.shape != (batch, length) or mask.dtype != torch.bool):
        raise ValueError(
            f"mask must be bool {(batch, length)}, True where a token is present, not {mask.dtype} {tuple(mask.shape)}"
        )
    if cu_seqlens is not None and batch != 1:
        raise ValueError(f"cu_seqlens packs sequences into a batch of 1, but there are {batch} samples")
    if cu_seqlens is not None and (cu_seqlens.ndim != 1 or len(cu_seqlens) < 2):
        raise ValueError(f"cu_seqlens must be (sequences + 1,), not {tuple(cu_seqlens.shape)}")
    if order is None:
        return None
    shapes = [(length,), (batch, length)] + ([(*lead, length), (*lead, batch, length)] if lead else [])
    if tuple(order.shape) not in shapes:
        raise ValueError(f"order must be {' or '.join(map(str, shapes))}, not {tuple(order.shape)}")
    if order.ndim == 3:
        return order
    if order.ndim == 1:
        return order[None, None]
    # (K, L) before (B, L), where both fit
    return order[:, None] if lead and len(order) == lead[0] else order[None]


def check_contents(order: Tensor | None, cu_seqlens: Tensor | None, length: int) -> None:
    """Raises ValueError for indices out of range, an order that misses or repeats a place, and packings with gaps.

    `order` is as `canonical_order` gives it. It looks at values, so it costs a synchronisation on a GPU.
    """
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != length or sorted(ends) != ends:
            raise ValueError(
                f"cu_seqlens must rise from 0 to the length {length}, not {ends if len(ends) < 9 else [*ends[:8], '…']}"
            )
    if order is None or length == 0:
        return
    if order.min() < 0 or order.max() >= length:
        raise ValueError(f"order must be in 0 … {length - 1}, but has {int(order.min())} … {int(order.max())}")
    if (order.long().sort(dim=-1).values != torch.arange(length, device=order.device)).any():
        raise ValueError(f"order must visit each of the {length} places once; some are repeated and some missed")
    if cu_seqlens is not None:
        sequence_l = torch.bucketize(torch.arange(length, device=order.device), cu_seqlens[1:].long(), right=True)
        if (sequence_l[order.long()] != sequence_l).any():
            raise ValueError("order must stay within each sequence of cu_seqlens, but leads from one into another")
