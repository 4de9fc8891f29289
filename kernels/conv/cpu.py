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
    weight_kwd = _by_tap(weight, dtype)
    dx, dweight_kwd = torch.zeros(x.shape, dtype=dtype), torch.empty_like(weight_kwd)
    for k, dz_bld in enumerate(dz_kbld):
        own = min(k, len(x) - 1)
        x_bld, earlier, later = x[own].to(dtype), _Side(before, k, reverse), _Side(after, k, not reverse)
        for back, tap in enumerate(reversed(range(weight.shape[2]))):
            here, found_bld = earlier.found(x_bld, back)
            dweight_kwd[k, tap] = (found_bld * dz_bld[:, here]).sum(dim=(0, 1))
            here, found_bld = later.found(dz_bld, back)
            dx[own, :, here].addcmul_(found_bld, weight_kwd[k, tap])
    return dx, dweight_kwd.transpose(1, 2), dz_kbld.sum(dim=(1, 2))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, reverse: bool) -> Tensor:
    """(K, B, L, D) before the activation."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight_kwd = _by_tap(weight, dtype)
    y_kbld = torch.empty(len(weight), *x.shape[1:], dtype=dtype)
    for k, y_bld in enumerate(y_kbld):
        x_bld, earlier = x[min(k, len(x) - 1)].to(dtype), _Side(before, k, reverse)
        y_bld.copy_(bias[min(k, len(bias) - 1)]) if bias is not None else y_bld.zero_()
        for back, tap in enumerate(reversed(range(weight.shape[2]))):
            here, found_bld = earlier.found(x_bld, back)
            y_bld[:, here].addcmul_(found_bld, weight_kwd[k, tap])
    return y_kbld


def _by_tap(weight_kdw: Tensor, dtype: torch.dtype) -> Tensor:
    """(K, W, D), contiguous: with strides between channels, products take many times as long."""
    return weight_kdw.to(dtype).transpose(1, 2).contiguous()


class _Side:
    """The tokens visited before those at each place, or after them: by a table (W, K or 1, B or 1, L), or by place alone."""

    def __init__(self, table: Tensor | None, k: int, later: bool) -> None:
        """later: without a table, whether they stand behind."""
        self.table_wbl = None if table is None else table[:, min(k, table.shape[1] - 1)]
        self.later = later
        if self.table_wbl is not None and len(self.table_wbl) > 1:
            # where all tokens come in plain order, as the second row tells, nothing has to be gathered
            (own_bl, next_bl), place_l = self.table_wbl[:2], torch.arange(self.table_wbl.shape[2])
            falls, rises = (next_bl[:, 1:] == place_l[:-1]).all(), (next_bl[:, :-1] == place_l[1:]).all()
            if (falls or rises) and (own_bl >= 0).all():
                self.table_wbl, self.later = None, bool(rises)

    def found(self, tensor_bld: Tensor, back: int) -> tuple[slice, Tensor]:
        """Places, and what stands `back` tokens from each of them; for other places there is nothing."""
        batch, length = tensor_bld.shape[:2]
        if self.table_wbl is None:
            count = max(length - back, 0)
            first, last = slice(0, count), slice(length - count, length)
            return (first, tensor_bld[:, last]) if self.later else (last, tensor_bld[:, first])
        place_bl = self.table_wbl[back].long().expand(batch, -1)
        row_m = (place_bl.clamp_min(0) + torch.arange(batch)[:, None] * length).flatten()
        found_md = tensor_bld.flatten(0, 1).index_select(0, row_m)
        found_md.index_fill_(0, (place_bl < 0).flatten().nonzero()[:, 0], 0.0)
        return slice(None), found_md.view(tensor_bld.shape)


def _present(tensor_kbld: Tensor, before: Tensor | None) -> Tensor:
    """0 for dropped tokens."""
    if before is None or (before[0] >= 0).all():
        return tensor_kbld
    return torch.where((before[0] >= 0)[..., None], tensor_kbld, 0.0)
