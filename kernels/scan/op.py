"""The selective scan as one operator, so that it compiles and exports; which implementation runs is chosen when it runs."""

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from swath.kernels.dispatch import Implementation, Operator, everywhere, on_cpu, with_triton
from swath.kernels.scan import mamba_ssm
from swath.kernels.scan.reference import Scan

# Steps between the states that forward keeps for backward: few enough to stay in a GPU's registers, and little memory on a CPU.
KEEP = {"cpu": 16, "cuda": 8}
OPERATOR = Operator(
    "selective_scan",
    Implementation("mamba_ssm", mamba_ssm.missing, automatic=False),
    Implementation("triton", with_triton),
    Implementation("cpu", on_cpu),
    Implementation("reference", everywhere, slow=True),
)


def _module(device: torch.device) -> ModuleType:
    name = OPERATOR.choose(device)
    if name == "triton":
        from swath.kernels.scan import triton  # needs Triton

        return triton
    if name == "cpu":
        from swath.kernels.scan import cpu

        return cpu
    raise ValueError(f"this program was compiled with a fast selective scan, and on {device.type} there is only {name}")


def _dtype(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


@torch.library.custom_op("swath::selective_scan", mutates_args=())
def scan(
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
    softplus: bool,
    reverse: bool,
    summed: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the canonical form: (y (B, L, D) or (K, B, L, D), last state (K, S, D, N), kept states (K, kept, D, N))."""
    x = Scan(u, delta, A, B, C, D, z, delta_bias, order, mask, cu_seqlens, initial_state)
    return _module(u.device).forward(x, softplus, reverse, summed, save)


@scan.register_fake
def _fake(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None,
    order: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None, initial_state: Tensor | None,
    softplus: bool, reverse: bool, summed: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    directions, batch, length, width = delta.shape
    sequences, states = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1, A.shape[2]
    y = u.new_empty(batch, length, width) if summed else u.new_empty(directions, batch, length, width)
    last = u.new_empty(directions, sequences, width, states, dtype=_dtype(u))
    rows = batch * length // KEEP.get(u.device.type, 8) + sequences if save else 0
    return y, last, u.new_empty(directions, rows, width, states, dtype=_dtype(u))


@torch.library.custom_op("swath::selective_scan_backward", mutates_args=())
def scan_backward(
    dy: Tensor,
    dlast: Tensor | None,
    kept: Tensor,
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
    softplus: bool,
    reverse: bool,
    summed: bool,
) -> list[Tensor]:
    """The gradients of those floating-point arguments that are there, in the order of `Scan`."""
    x = Scan(u, delta, A, B, C, D, z, delta_bias, order, mask, cu_seqlens, initial_state)
    made = _module(u.device).backward(x, softplus, reverse, summed, kept, dy.contiguous(), dlast)
    return [made[name] for name in _differentiable(x)]


@scan_backward.register_fake
def _fake_backward(
    dy: Tensor, dlast: Tensor | None, kept: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, order: Tensor | None, mask: Tensor | None,
    cu_seqlens: Tensor | None, initial_state: Tensor | None, softplus: bool, reverse: bool, summed: bool,
) -> list[Tensor]:  # fmt: skip
    x = Scan(u, delta, A, B, C, D, z, delta_bias, order, mask, cu_seqlens, initial_state)
    return [value.new_empty(value.shape) for value in _differentiable(x).values()]


def _differentiable(x: Scan) -> dict[str, Tensor]:
    fields: dict[str, Tensor | None] = x._asdict()
    return {name: value for name, value in fields.items() if value is not None and value.is_floating_point()}


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    tensors, ctx.flags = inputs[:12], inputs[12:15]
    ctx.save_for_backward(output[2], *tensors)
    ctx.shape, ctx.dtype = output[0].shape, output[0].dtype


def _backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None, dkept: Tensor | None) -> tuple[Any, ...]:
    kept, *tensors = ctx.saved_tensors
    x = Scan(*tensors)
    if dy is None:
        dy = x.u.new_zeros(ctx.shape)
    made = dict(zip(_differentiable(x), scan_backward(dy, dlast, kept, *x, *ctx.flags), strict=True))
    return *(made.get(name) for name in Scan._fields), *(None,) * 4


scan.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.swath.selective_scan)
def _flops(u: torch.Size, delta: torch.Size, A: torch.Size, *rest: Any, **kwargs: Any) -> int:
    return 6 * math.prod(delta) * A[2]


@register_flop_formula(torch.ops.swath.selective_scan_backward)
def _flops_backward(
    dy: torch.Size, dlast: Any, kept: torch.Size, u: torch.Size, delta: torch.Size, A: torch.Size, *rest: Any, **kwargs: Any
) -> int:
    return 14 * math.prod(delta) * A[2]
