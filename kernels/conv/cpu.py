"""The causal convolution on a CPU, one tap after the other over whole rows of channels; letters as in `reference.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    y_kbld = _linear(x, weight, bias, before, reverse)
    if silu:
        y_kbld = F.silu(y_kbld, inplace=True)
    return _present(y_kbld, before).to(x.dtype)


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
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dz_kbld = _present(dy.to(dtype), before)
    if silu:
        z_kbld = _present(_linear(x, weight, bias, before, reverse), before)
        gate_kbld = torch.sigmoid(z_kbld)
        dz_kbld = dz_kbld * gate_kbld * (1 + z_kbld * (1 - gate_kbld))
    taps = weight.shape[2]
    dx, dweight_kdw = torch.zeros(x.shape, dtype=dtype), torch.empty(weight.shape, dtype=dtype)
    for k, dz_bld in enumerate(dz_kbld):
        own = min(k, len(x) - 1)
        for back in range(taps):
            tap = taps - 1 - back
            dweight_kdw[k, :, tap] = (_found(x[own].to(dtype), back, before, k, reverse) * dz_bld).sum(dim=(0, 1))
            dx[own] += _found(dz_bld, back, after, k, not reverse) * weight[k, :, tap].to(dtype)
    return dx, dweight_kdw, dz_kbld.sum(dim=(1, 2))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, reverse: bool) -> Tensor:
    """(K, B, L, D) before the activation."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    taps = weight.shape[2]
    y_kbld = torch.zeros(len(weight), *x.shape[1:], dtype=dtype)
    for k, y_bld in enumerate(y_kbld):
        x_bld = x[min(k, len(x) - 1)].to(dtype)
        for back in range(taps):
            y_bld.addcmul_(_found(x_bld, back, before, k, reverse), weight[k, :, taps - 1 - back].to(dtype))
        if bias is not None:
            y_bld += bias[min(k, len(bias) - 1)].to(dtype)
    return y_kbld


def _found(tensor_bld: Tensor, back: int, table: Tensor | None, k: int, later: bool) -> Tensor:
    """(B, L, D) what stands `back` tokens before each place, after it if `later`; 0 where nothing does."""
    if table is None:
        if back == 0:
            return tensor_bld
        away = F.pad(tensor_bld, (0, 0, 0, back) if later else (0, 0, back, 0))
        return away[:, back:] if later else away[:, : tensor_bld.shape[1]]
    place_bl = table[back, min(k, table.shape[1] - 1)].long().expand(len(tensor_bld), -1)
    found_bld = tensor_bld[torch.arange(len(tensor_bld))[:, None], place_bl.clamp_min(0)]
    return found_bld.masked_fill_((place_bl < 0)[..., None], 0.0)


def _present(tensor_kbld: Tensor, before: Tensor | None) -> Tensor:
    return tensor_kbld if before is None else torch.where((before[0] >= 0)[..., None], tensor_kbld, 0.0)
