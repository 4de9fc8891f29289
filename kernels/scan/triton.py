"""The selective scan on a GPU: sizes, strides, grids and buffers of the programs in `programs.py`."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from swath.kernels.dispatch import check_contents
from swath.kernels.scan import programs, reference
from swath.kernels.scan.op import KEEP
from swath.kernels.scan.reference import Scan

_CHANNELS = 32  # of a program: one warp
# States of a tile, which a thread holds of one channel: 16 bytes at once; in backward fewer, or registers spill.
_STATES, _STATES_BACK = 4, 2
_ENOUGH = 4096  # programs that fill a large GPU
_SHORTEST = 256  # steps of a segment


def forward(x: Scan, softplus: bool, reverse: bool, summed: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(y in the dtype of u, last state (K, S, D, N), states before every KEEP-th step (K, kept, D, N), none unless `save`)."""
    if check_contents(x.u.device):
        reference.check_contents(x.order, x.cu_seqlens, x.delta.shape[2])
    call = _Call(x, softplus, reverse, summed)
    directions, batch, length, width = x.delta.shape
    dtype = x.u.dtype if directions == 1 or not summed else torch.float32
    y = x.u.new_empty(directions // call.together, batch, length, width, dtype=dtype)
    last = x.u.new_empty(directions, call.sequences, width, call.states, dtype=torch.float32)
    kept = x.u.new_empty(directions, call.kept_rows if save else 0, width, call.states, dtype=torch.float32)
    start = x.u.new_zeros(directions, call.sequences, call.segments, width, call.states, dtype=torch.float32)
    if x.initial_state is not None:
        start[:, :, 0] = x.initial_state
    if call.segments > 1:
        call.incoming(start, x.u, x.B, back=False)
    call.launch(
        programs.forward, call.grid, start=start,
        y=y, last=last, kept=kept, y_k=y[0].numel(), HAS_SKIP=x.D is not None, HAS_Z=x.z is not None,
        HAS_START=x.initial_state is not None or call.segments > 1, SAVE=save, N=call.padded, NB=call.tile, BD=_CHANNELS,
        KEEP=call.keep, TOGETHER=call.together,
    )  # fmt: skip
    if summed:
        y = (y.sum(dim=0) if len(y) > 1 else y[0]).to(x.u.dtype)
    return y, last, kept


def backward(
    x: Scan, softplus: bool, reverse: bool, summed: bool, kept: Tensor, dy: Tensor, dlast: Tensor | None
) -> dict[str, Tensor]:
    """{argument: gradient, in the form of `Scan` and in its argument's dtype}."""
    call = _Call(x, softplus, reverse, summed)
    directions, batch, length, width = x.delta.shape
    turns, shared = directions // call.together, len(x.u) == 1
    dy = dy.reshape(1 if summed else directions, batch, length, width)

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return x.u.new_empty(*shape, dtype=dtype)

    def added_up(like: Tensor) -> Tensor:
        return made(turns, batch, length, width, dtype=like.dtype if directions == 1 else torch.float32)

    du = added_up(x.u) if shared else made(*x.delta.shape, dtype=x.u.dtype)
    dz = added_up(x.z) if x.z is not None else None
    ddelta = made(*x.delta.shape, dtype=x.delta.dtype)
    db, dc = (made(call.blocks, *part.shape) for part in (x.B, x.C))
    pieces = (directions, call.sequences, call.segments)
    # a segment behind the end of its sequence writes nothing
    da = x.u.new_zeros(*pieces, width, call.states, dtype=torch.float32)
    dskip, dbias = (x.u.new_zeros(*pieces, width, dtype=torch.float32) for _ in range(2))
    carry = x.u.new_zeros(*pieces, width, call.states, dtype=torch.float32)
    if dlast is not None:
        carry[:, torch.arange(call.sequences, device=carry.device), call.last_segment()] = dlast.float()
    if call.segments > 1:
        call.incoming(carry, dy, x.C, back=True)
    call.launch(
        programs.backward, call.grid, dy=dy, kept=kept,
        carry=carry, du=du, ddelta=ddelta, da=da, db=db, dc=dc, dskip=dskip, dz=dz, dbias=dbias,
        dy_k=0 if summed else dy[0].numel(), HAS_SKIP=x.D is not None, HAS_Z=x.z is not None, N=call.padded,
        NB=min(call.tile, _STATES_BACK), BD=_CHANNELS, KEEP=call.keep, TOGETHER=call.together, SHARED=shared,
    )  # fmt: skip
    found: dict[str, Tensor | None] = {
        "u": du.sum(dim=0, keepdim=True) if shared else du,
        "delta": ddelta,
        "A": da.sum(dim=(1, 2)),
        "B": db.sum(dim=0),
        "C": dc.sum(dim=0),
        "D": dskip.sum(dim=(1, 2)),
        "z": None if dz is None else dz.sum(dim=0),
        "delta_bias": dbias.sum(dim=(1, 2)),
        "initial_state": carry[:, :, 0],
    }
    grads: dict[str, Tensor] = {}
    for name, grad in found.items():
        argument = getattr(x, name)
        if argument is not None and grad is not None:
            if len(argument) < len(grad):  # one for all directions
                grad = grad.sum(dim=0, keepdim=True)
            grads[name] = grad.to(argument.dtype).contiguous()
    return grads


class _Call:
    """Sizes, strides and the grid of one call."""

    def __init__(self, x: Scan, softplus: bool, reverse: bool, summed: bool) -> None:
        self.x, self.keep = x, KEEP[x.u.device.type]
        directions, batch, length, width = x.delta.shape
        self.groups, self.states = x.B.shape[3:]
        self.sequences = batch if x.cu_seqlens is None else len(x.cu_seqlens) - 1
        self.padded = 1 << max(0, self.states - 1).bit_length()
        self.tile = min(self.padded, _STATES)
        self.blocks = _ceil(width // self.groups, _CHANNELS)
        programs = self.groups * self.blocks * self.sequences * directions
        self.segments = 1
        if programs and programs < _ENOUGH // 4 and length >= 2 * _SHORTEST:
            self.segments = min(_ceil(_ENOUGH, programs), length // _SHORTEST)
        self.segment = _ceil(_ceil(length, self.segments), self.keep) * self.keep
        self.segments = max(1, _ceil(length, max(1, self.segment)))
        enough = programs * self.segments // directions >= _ENOUGH // 4
        self.together = directions if summed and enough else 1
        self.kept_rows = batch * length // self.keep + self.sequences
        # sequences first: only the first axis may pass 65535
        self.grid = (self.sequences * self.segments, self.groups * self.blocks, directions // self.together)
        self.order = None if x.order is None else x.order.to(torch.int32).contiguous()
        self.fixed: dict[str, Any] = {
            "u": x.u, "delta": x.delta, "a": x.A.contiguous(), "b": x.B, "c": x.C, "skip": x.D, "z": x.z, "bias": x.delta_bias,
            "order": self.order, "mask": None if x.mask is None else x.mask.contiguous().view(torch.uint8), "cu": x.cu_seqlens,
            "length": length, "width": width, "states": self.states, "per_group": width // self.groups, "blocks": self.blocks,
            "segment": self.segment, "segments": self.segments, "sequences": self.sequences, "directions": directions,
            "kept_rows": self.kept_rows, "groups": self.groups, "batch": batch,
            "HAS_BIAS": x.delta_bias is not None, "HAS_ORDER": x.order is not None, "HAS_MASK": x.mask is not None,
            "PACKED": x.cu_seqlens is not None, "SOFTPLUS": softplus, "REVERSE": reverse,
            "order_k": 0, "order_b": 0, "WIDE": length * max(width, *(t.stride(-2) for t in (x.u, x.delta, x.B, x.C))) >= 2**31,
        }  # fmt: skip
        if self.order is not None:
            self.fixed["order_k"] = self.order.stride(0) if len(self.order) > 1 else 0
            self.fixed["order_b"] = self.order.stride(1) if self.order.shape[1] > 1 else 0

    def launch(self, kernel: Any, grid: tuple[int, ...], **given: Any) -> None:
        """Run `kernel` with those of the fixed and given arguments that it takes, and the strides of its tensors."""
        if 0 in grid:
            return
        arguments = self.fixed | given
        for name in ("u", "delta", "b", "c", "v", "x", "z", "skip", "bias"):
            tensor = arguments.get(name)
            if tensor is None:
                arguments |= {f"{name}_{part}": 0 for part in "kblg"}
                continue
            if tensor.stride(-1) != 1:
                arguments[name] = tensor = tensor.contiguous()
            axes = {"skip": "k", "bias": "k", "z": "bl"}.get(name, "kblg")
            for part, size, stride in zip(axes, tensor.shape[:-1], tensor.stride()[:-1], strict=False):
                arguments[f"{name}_{part}"] = stride if size > 1 else 0
        given = {name: arguments[name] for name in kernel.arg_names}
        for name, value in given.items():  # a pointer that is not followed
            if value is None:
                given[name] = self.x.u
        with torch.cuda.device(self.x.u.device) if self.x.u.is_cuda else nullcontext():
            kernel[grid](**given, num_warps=1)

    def incoming(self, start: Tensor, x: Tensor, v: Tensor, back: bool) -> None:
        """Fill `start` (K, S, J, D, N), which holds what comes in from outside, with what comes into every segment."""
        added, passed = torch.empty_like(start), start.new_empty(start.shape[:4])
        directions = len(start)
        self.launch(
            programs.carry, (*self.grid[:2], directions), v=v, x=x,
            added=added, passed=passed, HAS_Z=back and self.x.z is not None, BACK=back, N=self.padded, NB=self.tile,
            BD=_CHANNELS,
        )  # fmt: skip
        grid = (self.sequences, _ceil(start.shape[3], _CHANNELS), directions)
        self.launch(programs.chain, grid, added=added, passed=passed, start=start, BACK=back, N=self.padded, BD=_CHANNELS)

    def last_segment(self) -> Tensor | int:
        """The last segment of each sequence that has steps; the first one of an empty sequence."""
        if self.x.cu_seqlens is None:
            return self.segments - 1
        return ((self.x.cu_seqlens.diff().long() + self.segment - 1) // max(1, self.segment)).clamp(1, self.segments) - 1


def _ceil(number: int, by: int) -> int:
    return -(-number // by)
