"""Axial, Kronecker and joint attention on a GPU, against their references and against SDPA and einsum."""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.case import Check, Timing
from swath.kernels.axial import axial_attention
from swath.kernels.axial import reference as axial_reference
from swath.kernels.axial.op import attention_along
from swath.kernels.dispatch import OPERATORS, use
from swath.kernels.joint import joint_attention
from swath.kernels.kronecker import fold, kronecker_attention
from swath.kernels.kronecker import reference as kronecker_reference
from swath.kernels.kronecker.op import kronecker_projection

_BYTES, _FLOPS = 4.3e6, 790e6  # of an H200 in a microsecond: memory, and bf16 products
# Of the largest value: fp32 sums in another order; in bf16, 8 bits, some roundings on the way to a result or gradient.
_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2}
_DTYPES = (torch.float32, torch.bfloat16)

# B, G, N, H, E, axis: packed tiles, whole tiles, one more than a tile, long ones, odd widths
AXIAL = [
    (2, 1, 37, 12, 64, "spectral"), (2, 3, 196, 12, 64, "spectral"), (2, 13, 256, 12, 64, "spectral"),
    (1, 37, 197, 3, 48, "spectral"), (2, 64, 16, 12, 64, "spectral"), (1, 65, 7, 3, 40, "spectral"),
    (1, 200, 64, 12, 64, "spectral"), (1, 1000, 3, 2, 128, "spectral"), (1, 13, 64, 12, 64, "spatial"),
    (1, 3, 197, 5, 24, "spatial"), (1, 1, 16384, 1, 64, "spatial"),
]  # fmt: skip
# B, R, H, C, N, dc, ds, Dout
KRONECKER = [
    (2, 1, 12, 13, 256, 4, 16, 768), (1, 1, 12, 200, 64, 4, 16, 768), (2, 8, 12, 13, 256, 4, 16, 768),
    (1, 8, 12, 200, 64, 4, 16, 768), (1, 3, 3, 7, 197, 3, 5, 100), (1, 8, 12, 13, 196, 2, 32, 768), (1, 17, 1, 1, 37, 8, 20, 33),
]  # fmt: skip


def checks(device: torch.device) -> Iterator[Check]:
    for shape in AXIAL:
        length = shape[1] if shape[5] == "spectral" else shape[2]
        for dtype in _DTYPES:
            for masked in (False, True) if length <= 1000 else (False,):
                name = f"axial {shape} {str(dtype)[6:]}{' mask' if masked else ''}"
                yield Check(name, functools.partial(_axial_error, device, shape, dtype, masked))
    for shape in KRONECKER:
        for dtype in _DTYPES:
            yield Check(f"kronecker {shape} {str(dtype)[6:]}", functools.partial(_kronecker_error, device, shape, dtype))
            name = f"kronecker's tiles {shape} {str(dtype)[6:]}"
            yield Check(name, functools.partial(_tiles_error, device, shape, dtype))
    if OPERATORS["joint_attention"].implementations["xformers"].missing(device.type) is None:
        for dtype in _DTYPES:
            yield Check(f"joint, xformers {str(dtype)[6:]}", functools.partial(_joint_error, device, dtype))


def timings(device: torch.device) -> Iterator[Timing]:
    for batch, groups, positions in ((32, 13, 256), (8, 200, 64)):
        shape = (batch, groups, positions, 12, 64)
        size = 2 * batch * groups * positions * 768
        for axis, length in (("spectral", groups), ("spatial", positions)):
            ways = {
                "ours": functools.partial(_axial_call, device, shape, functools.partial(axial_attention, axis=axis)),
                "sdpa": functools.partial(_axial_call, device, shape, functools.partial(_axial_sdpa, axis=axis)),
                "einsum": functools.partial(_axial_call, device, shape, functools.partial(_axial_einsum, axis=axis)),
                "triton": functools.partial(_axial_call, device, shape, functools.partial(_axial_triton, axis=axis)),
            }
            # forward reads three and writes one, backward reads four and writes three; 14 operations per pair and width
            floor = max(11 * size / _BYTES, 14 * size / 2 * length / _FLOPS)
            asked: tuple[str, ...] = ("sdpa", "einsum") if axis == "spectral" else ()
            ratios: dict[str, float] = dict.fromkeys(asked, 2.0)
            memory: dict[str, float] = dict.fromkeys(asked, 0.5)
            name = f"axial {axis} C {groups} N {positions} D 768, forward and backward"
            yield Timing(name, ways, floor, ratios=ratios, memory=memory)
        for ranks in (1, 8):
            shape = (batch, ranks, 12, groups, positions, 4, 16, 768)
            ways = {
                "ours": functools.partial(_kronecker_call, device, shape, kronecker_attention),
                "sdpa and einsum": functools.partial(_kronecker_call, device, shape, _kronecker_sdpa),
                "fold": functools.partial(_kronecker_call, device, shape, _kronecker_fold),
            }
            oc, os = torch.Size((batch, ranks, 12, groups, 4)), torch.Size((batch, ranks, 12, positions, 16))
            floor = max(2 * size / _BYTES, 6 * min(fold.arithmetic(oc, os, 768).values()) / _FLOPS)
            name = f"kronecker rank {ranks} C {groups} N {positions} D 768, forward and backward"
            ratio = {"sdpa and einsum": 2.0 if ranks == 1 else 1.3}
            yield Timing(name, ways, floor, ratios=ratio, memory={"sdpa and einsum": 0.5} if ranks == 1 else {})
    if OPERATORS["joint_attention"].implementations["xformers"].missing(device.type) is None:
        ways = {name: functools.partial(_joint_call, device, name) for name in ("sdpa", "xformers")}
        yield Timing("joint B 8 H 12 T 3328 E 64, forward and backward", ways)


def launches() -> Iterator[Callable[[], object]]:
    """Calls on CPU tensors whose kernels are compiled ahead of time."""
    cpu = torch.device("cpu")
    lengths = (((13, 8, 12, 64), False), ((64, 8, 12, 64), True), ((200, 2, 12, 64), False), ((200, 2, 4, 16), True))
    for dtype in _DTYPES:
        for shape, masked in lengths:
            call = functools.partial(_axial_error, cpu, (1, *shape, "spectral"), dtype, masked)
            yield functools.partial(_forced, call)
        yield functools.partial(_tiles_error, cpu, (1, 8, 12, 13, 16, 4, 16, 768), dtype)


def _forced(call: Callable[[], object]) -> None:
    with use(axial_attention="triton"):
        call()


def _compare(got: Tensor, wanted: Tensor, inputs: Sequence[Tensor], exact: Sequence[Tensor], grad: Tensor) -> float:
    """The largest difference of result and gradients, in tolerances, each relative to its largest value."""
    mine = (got, *torch.autograd.grad(got, inputs, grad.to(got.dtype)))
    theirs = (wanted, *torch.autograd.grad(wanted, exact, grad))
    worst = 0.0
    for one, other in zip(mine, theirs, strict=True):
        if not bool(one.isfinite().all()):
            return float("inf")
        worst = max(worst, ((one.float() - other).abs().max() / other.abs().max().clamp(min=1e-3)).item())
    return worst / _TOLERANCE[got.dtype]


def _exact(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().float().requires_grad_() for x in inputs]


def _qkv(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Views of one projection's result (B, G, N, 3, H, E)."""
    torch.manual_seed(0)
    fused = torch.randn(*shape[:3], 3, *shape[3:], device=device, dtype=dtype)
    return [x.detach().requires_grad_() for x in fused.unbind(3)]


def _near(length: int, device: torch.device) -> Tensor:
    """A perception field: near places, the first always; the second row sees nothing."""
    place = torch.arange(length, device=device)
    mask = ((place[:, None] - place).abs() < max(2, length // 8)) | (place == 0)
    mask[1:2] = False
    return mask


def _axial_error(device: torch.device, shape: tuple, dtype: torch.dtype, masked: bool) -> float:
    inputs = _qkv(device, shape[:5], dtype)
    exact, grad = _exact(inputs), torch.randn(shape[:5], device=device)
    mask = _near(shape[1] if shape[5] == "spectral" else shape[2], device) if masked else None
    got = axial_attention(*inputs, axis=shape[5], mask=mask)
    wanted = axial_reference.axial_attention(*exact, axis=shape[5], mask=mask)
    return _compare(got, wanted, inputs, exact, grad)


def _branches(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """qc, kc, vc, qs, ks, vs, weight, bias."""
    torch.manual_seed(0)
    b, r, h, c, n, dc, ds, width = shape
    sizes = [s for length, d in ((c, dc), (n, ds)) for s in ((b, r, h, length, d), (b, r, h, length, d), (b, h, length, d))]
    made = [torch.randn(s, device=device, dtype=dtype) for s in (*sizes, (width, h * dc * ds), (width,))]
    made[6] *= (h * dc * ds) ** -0.5
    return [x.requires_grad_() for x in made]


def _kronecker_error(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> float:
    inputs, mask = _branches(device, shape, dtype), _near(shape[4], device)
    exact, grad = _exact(inputs), torch.randn(shape[0], shape[3], shape[4], shape[7], device=device)
    got = kronecker_attention(*inputs, mask=mask)
    return _compare(got, kronecker_reference.kronecker_attention(*exact, mask=mask), inputs, exact, grad)


def _tiles_error(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """The kernels that form the product in their tiles, also where folding is cheaper."""
    from swath.kernels.kronecker import triton

    qc, _, _, qs, _, _, weight, bias = (x.detach() for x in _branches(device, shape, dtype))
    grad = torch.randn(shape[0], shape[3], shape[4], shape[7], device=device).to(dtype)
    exact = _exact((qc, qs, weight, bias))
    y = F.linear(torch.einsum("brhic,brhjs->bijhcs", exact[0], exact[1]).flatten(3), exact[2], exact[3])
    mine = (triton.forward(qc, qs, weight, bias), *triton.backward(grad, qc, qs, weight))
    theirs = (y, *torch.autograd.grad(y, exact[:3], grad.float()))
    pairs = zip(mine, theirs, strict=True)
    return max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in pairs) / _TOLERANCE[dtype]


def _joint_error(device: torch.device, dtype: torch.dtype) -> float:
    inputs, mask = [x[0] for x in _qkv(device, (1, 2, 3, 197, 64), dtype)], _near(197, device)
    inputs = [x.detach().requires_grad_() for x in inputs]
    exact, grad = _exact(inputs), torch.randn(inputs[0].shape, device=device)
    with use(joint_attention="xformers"):
        got = joint_attention(*inputs, mask=mask)
    return _compare(got, joint_attention(*exact, mask=mask), inputs, exact, grad)


def _axial_call(device: torch.device, shape: tuple[int, ...], attend: Callable[..., Tensor]) -> Callable[[], object]:
    inputs, grad = _qkv(device, shape, torch.bfloat16), torch.randn(shape, device=device, dtype=torch.bfloat16)
    return lambda: torch.autograd.grad(attend(*inputs), inputs, grad)


def _axial_sdpa(q: Tensor, k: Tensor, v: Tensor, axis: str) -> Tensor:
    with use(axial_attention="sdpa"):
        return axial_attention(q, k, v, axis)


def _axial_einsum(q: Tensor, k: Tensor, v: Tensor, axis: str) -> Tensor:
    pairs, back = (
        ("bgnhe,bmnhe->bnhgm", "bnhgm,bmnhe->bgnhe") if axis == "spectral" else ("bgnhe,bgmhe->bghnm", "bghnm,bgmhe->bgnhe")
    )
    return torch.einsum(back, (torch.einsum(pairs, q, k) * q.shape[-1] ** -0.5).softmax(dim=-1), v)


def _axial_triton(q: Tensor, k: Tensor, v: Tensor, axis: str) -> Tensor:
    """The kernels also where the dispatch leaves a long axis to the library."""
    return attention_along(q, k, v, None, None, 1 if axis == "spectral" else 2)[0]


def _kronecker_call(device: torch.device, shape: tuple[int, ...], attend: Callable[..., Tensor]) -> Callable[[], object]:
    inputs = _branches(device, shape, torch.bfloat16)
    grad = torch.randn(shape[0], shape[3], shape[4], shape[7], device=device, dtype=torch.bfloat16)
    return lambda: torch.autograd.grad(attend(*inputs), inputs, grad)


def _kronecker_sdpa(
    qc: Tensor, kc: Tensor, vc: Tensor, qs: Tensor, ks: Tensor, vs: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """As it is written by hand: SDPA for the branches, einsum for the product, a linear layer."""
    oc = F.scaled_dot_product_attention(qc, kc, vc[:, None].expand_as(qc))
    os = F.scaled_dot_product_attention(qs, ks, vs[:, None].expand_as(qs))
    return F.linear(torch.einsum("brhic,brhjs->bijhcs", oc, os).flatten(3), weight, bias)


def _kronecker_fold(
    qc: Tensor, kc: Tensor, vc: Tensor, qs: Tensor, ks: Tensor, vs: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """The branches as ours, the projection without Triton: what the choice between them is worth."""
    oc = attention_along(qc, kc, vc[:, None].expand_as(qc), None, None, 3)[0]
    os = attention_along(qs, ks, vs[:, None].expand_as(qs), None, None, 3)[0]
    return kronecker_projection(oc, os, weight, bias, False)


def _joint_call(device: torch.device, name: str) -> Callable[[], object]:
    inputs = [x[0] for x in _qkv(device, (1, 8, 12, 3328, 64), torch.bfloat16)]
    inputs = [x.detach().requires_grad_() for x in inputs]
    grad = torch.randn(inputs[0].shape, device=device, dtype=torch.bfloat16)

    def call() -> object:
        with use(joint_attention=name):
            return torch.autograd.grad(joint_attention(*inputs), inputs, grad)

    return call
