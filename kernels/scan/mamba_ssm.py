"""mamba-ssm's CUDA kernel behind the same function, for comparison and for those who have it.

It knows neither orders nor masks: orders are applied by copies, masks, packings and initial states are refused.
"""

import importlib.util

import torch
from torch import Tensor

from swath.kernels.scan.reference import Scan, visits


def missing(device_type: str) -> str | None:
    """Why it cannot run there; None where it can."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return "mamba-ssm is not installed; an optional back end, built with CUDA: pip install mamba-ssm"
    if device_type != "cuda":
        return "mamba-ssm takes CUDA tensors only"
    if importlib.util.find_spec("selective_scan_cuda") is None:
        return "mamba-ssm was built without its Mamba-1 kernel; build it with MAMBA_KEEP_CUDA_BUILD=TRUE"
    return None


def selective_scan(x: Scan, softplus: bool, reverse: bool, summed: bool) -> tuple[Tensor, Tensor]:
    """(y, last state (K, S, D, N)) of the canonical form. Raises ValueError for what mamba-ssm has not."""
    for name in ("mask", "cu_seqlens", "initial_state"):
        if getattr(x, name) is not None:
            raise ValueError(f"mamba_ssm has no {name}; take the triton implementation")
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # pyright: ignore[reportMissingImports]

    directions, batch, length, _ = x.delta.shape
    place_kst = visits(x, reverse).expand(directions, -1, -1)
    made, lasts = [], []
    for k in range(directions):
        place_m = place_kst[k].flatten()

        def visited(tensor_bl: Tensor, place_m: Tensor = place_m) -> Tensor:
            """(B, …, L) in visiting order."""
            return tensor_bl.flatten(0, 1)[place_m].unflatten(0, (batch, length)).movedim(1, -1).contiguous()

        y_bdl, last = selective_scan_fn(
            visited(x.u[min(k, len(x.u) - 1)]),
            visited(x.delta[k]),
            x.A[k].float(),
            visited(x.B[k]),
            visited(x.C[k]),
            None if x.D is None else x.D[min(k, len(x.D) - 1)].float(),
            None if x.z is None else visited(x.z),
            None if x.delta_bias is None else x.delta_bias[min(k, len(x.delta_bias) - 1)].float(),
            softplus,
            True,
        )
        y_md = y_bdl.movedim(1, 2).flatten(0, 1)
        made.append(torch.zeros_like(y_md).index_copy(0, place_m, y_md).unflatten(0, (batch, length)))
        lasts.append(last)
    y_kbld = torch.stack(made)
    return y_kbld.sum(dim=0) if summed else y_kbld, torch.stack(lasts)
