"""Selective scan and causal convolution on a GPU."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.case import Check, Timing
from swath.kernels.conv import causal_conv1d
from swath.kernels.conv import reference as conv_reference
from swath.kernels.dispatch import use
from swath.kernels.scan import reference, selective_scan
from swath.kernels.scan.op import OPERATOR

Given = dict[str, Any]  # tensors by argument
# Specified floors: 4 S + 2 s bytes forward, 7 S + 4 s backward at 4.3 TB/s; exponentials at 3.7e12/s, each pass over them.
SIZES = {"A": (128, 197, 1536), "B": (4, 16384, 384)}
FLOOR_US = {("A", False): 167, ("B", False): 109, ("A", True): 251 + 167, ("B", True): 163 + 109}
TARGET_US = {("A", False): 270, ("B", False): 175, ("A", True): 840, ("B", True): 545}


def inputs(
    size: tuple[int, int, int], states: int, dtype: torch.dtype, device: torch.device, directions: int | None = None,
    groups: int | None = None, grad: bool = True,
) -> Given:  # fmt: skip
    """Arguments as a Mamba block has them: parameters in fp32, activations in `dtype`, steps around 0.05."""
    generator = torch.Generator(device).manual_seed(0)
    batch, length, width = size
    lead = () if directions is None else (directions,)
    group = () if groups is None else (groups,)

    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(of)

    given = {
        "u": normal(batch, length, width),
        "delta": normal(*lead, batch, length, width) * 0.5,
        "A": -torch.arange(1, states + 1, device=device, dtype=torch.float32).expand(*lead, width, -1).contiguous(),
        "B": normal(*lead, batch, length, *group, states),
        "C": normal(*lead, batch, length, *group, states),
        "D": normal(*lead, width, of=torch.float32),
        "z": normal(batch, length, width),
        "delta_bias": normal(*lead, width, of=torch.float32) * 0.3 - 3,
    }
    return {name: tensor.detach().requires_grad_(grad) for name, tensor in given.items()}


def outcome(way: Callable[..., Any], given: Given, **options: Any) -> list[Tensor]:
    y = way(**given, **options)
    weight = torch.randn(y.shape, generator=torch.Generator(y.device).manual_seed(1), device=y.device).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, list(given.values()), weight)]


def worst(got: list[Tensor], expected: list[Tensor], share: float) -> float:
    """The largest difference, in units of `share` of each tensor's largest value; not finite counts as infinite."""
    errors = []
    for mine, theirs in zip(got, expected, strict=True):
        error = (mine.double() - theirs.double()).abs().max() / (share * theirs.double().abs().max().clamp_min(1e-3))
        errors.append(float(error) if bool(torch.isfinite(mine).all()) else float("inf"))
    return max(errors)


def checks(device: torch.device) -> Iterator[Check]:
    """Awkward shapes, orders, masks and packings; the expected values are the reference's in float64 of the same inputs."""
    cases: dict[str, tuple[Given, Given]] = {}
    for length in (1, 37, 196, 197, 1000):
        cases[f"length {length}"] = inputs((1 if length == 1000 else 3, length, 48), 16, torch.float32, device), {}
    for states in (1, 8, 64):
        cases[f"{states} states"] = inputs((2, 37, 24), states, torch.float32, device), {}
    for groups in (1, 2, 4):
        cases[f"{groups} groups"] = inputs((2, 37, 40), 16, torch.float32, device, groups=groups), {}
    generator = torch.Generator(device).manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    four = inputs((3, 196, 40), 16, torch.float32, device, directions=4)
    cases["four directions, orders, mask"] = four, {"order": random(4, 196).argsort(dim=1), "mask": random(3, 196) > 0.3}
    cases["orders per sample, apart"] = four, {"order": random(4, 3, 196).argsort(dim=2), "reverse": True, "reduce": "none"}
    many = inputs((512, 33, 512), 4, torch.float32, device, directions=2)
    cases["directions of one program"] = many, {"order": torch.stack([torch.arange(33), torch.arange(33).flip(0)]).to(device)}
    packing = torch.tensor([0, 5, 5, 700, 701, 2000], device=device)
    cases["packed, backwards"] = inputs((1, 2000, 40), 16, torch.float32, device), {"cu_seqlens": packing, "reverse": True}
    cases["segments"] = inputs((1, 4099, 64), 16, torch.float32, device, groups=2), {"mask": random(1, 4099) > 0.1}
    for name, (given, options) in cases.items():
        for dtype in (torch.float32, torch.bfloat16):
            yield Check(f"selective_scan {name} {str(dtype)[6:]}", lambda g=given, o=options, d=dtype: _scan_error(g, o, d))
    yield Check("selective_scan length 16384", lambda: _long_error(device))
    for dtype in (torch.float32, torch.bfloat16):
        yield Check(f"causal_conv1d {str(dtype)[6:]}", lambda d=dtype: _conv_error(device, d))


def _scan_error(given: Given, options: Given, dtype: torch.dtype) -> float:
    mine = {n: (t.detach() if n in ("A", "D", "delta_bias") else t.detach().to(dtype)).requires_grad_() for n, t in given.items()}
    exact = {n: t.detach().double().requires_grad_() for n, t in mine.items()}
    with use(selective_scan="triton"):
        got = outcome(selective_scan, mine, delta_softplus=True, **options)
    y = reference.selective_scan(**exact, delta_softplus=True, **options)
    assert isinstance(y, Tensor)
    weight = torch.randn(y.shape, generator=torch.Generator(y.device).manual_seed(1), device=y.device).to(dtype).double()
    expected = [y.detach(), *torch.autograd.grad(y, list(exact.values()), weight)]
    # fp32 state over up to thousands of steps; bf16 results rounded once, to half a unit in the last place
    return worst(got, expected, 1e-4 if dtype == torch.float32 else 2**-7)


def _long_error(device: torch.device) -> float:
    """Segments against one pass in fp64 on the CPU, for one sequence of 16384 steps."""
    given = inputs((1, 16384, 32), 16, torch.float32, device)
    with use(selective_scan="triton"):
        got = outcome(selective_scan, given, delta_softplus=True)
    exact = {n: t.detach().cpu().double().requires_grad_() for n, t in given.items()}
    y = selective_scan(**exact, delta_softplus=True)
    assert isinstance(y, Tensor)
    weight = torch.randn(y.shape, generator=torch.Generator(device).manual_seed(1), device=device).cpu().double()
    return worst([t.cpu() for t in got], [y.detach(), *torch.autograd.grad(y, list(exact.values()), weight)], 1e-4)


def _conv_error(device: torch.device, dtype: torch.dtype) -> float:
    generator = torch.Generator(device).manual_seed(0)
    given = {
        "x": torch.randn(3, 197, 100, generator=generator, device=device).to(dtype).requires_grad_(),
        "weight": torch.randn(2, 100, 4, generator=generator, device=device).requires_grad_(),
        "bias": torch.randn(2, 100, generator=generator, device=device).requires_grad_(),
    }
    options = {
        "order": torch.rand(2, 197, generator=generator, device=device).argsort(dim=1),
        "mask": torch.rand(3, 197, generator=generator, device=device) > 0.3,
    }
    with use(causal_conv1d="triton"):
        got = outcome(causal_conv1d, given, **options)
    return worst(got, outcome(conv_reference.causal_conv1d, given, **options), 1e-5 if dtype == torch.float32 else 2**-7)


def timings(device: torch.device) -> Iterator[Timing]:
    mamba = OPERATOR.implementations["mamba_ssm"].missing(device.type) is None
    for name, size in SIZES.items():
        for both in (False, True):
            ways: dict[str, Callable[[], Callable[[], object]]] = {
                "swath": lambda s=size, b=both: _call("triton", inputs(s, 16, torch.bfloat16, device, grad=b))
            }
            if mamba:
                ways["mamba_ssm"] = lambda s=size, b=both: _call("mamba_ssm", inputs(s, 16, torch.bfloat16, device, grad=b))
            yield Timing(
                f"selective_scan {name} {size} {'forward + backward' if both else 'forward'}", ways, FLOOR_US[name, both],
                TARGET_US[name, both], {"mamba_ssm": 1.3} if both and mamba else {},
            )  # fmt: skip
    for states in (1, 16):
        size = (128, 196, 384)
        yield Timing(
            f"four directions, N {states}, {size} forward + backward",
            {
                "swath": lambda n=states: _call("triton", inputs((128, 196, 384), n, torch.bfloat16, device, 4), cross(device)),
                "materialised cross-scan": lambda n=states: _materialised(inputs((128, 196, 384), n, torch.bfloat16, device, 4)),
            },
            ratios={"materialised cross-scan": 2.5},
        )
    yield Timing(
        "causal_conv1d (128, 197, 1536) forward + backward",
        {"swath": lambda: _conv(device, False), "torch conv1d, transposed": lambda: _conv(device, True)},
    )


def cross(device: torch.device) -> Tensor:
    """Rows, columns and both backwards of a 14 × 14 map."""
    rows = torch.arange(196, device=device)
    columns = rows.view(14, 14).T.flatten()
    return torch.stack([rows, columns, rows.flip(0), columns.flip(0)]).int()


def _call(implementation: str, given: Given, order: Tensor | None = None) -> Callable[[], object]:
    grad = given["u"].requires_grad

    def run() -> object:
        with use(selective_scan=implementation):
            y: Any = selective_scan(**given, delta_softplus=True, order=order)
            return torch.autograd.grad(y, list(given.values()), torch.ones_like(y)) if grad else y

    return run


def _materialised(given: Given) -> Callable[[], object]:
    """Copies in scan order, one scan per direction with the same kernel, copies back and a sum."""
    order_kl = cross(given["u"].device).long()

    def run() -> object:
        total = 0
        for k, order in enumerate(order_kl):
            one = {n: (t if n in ("u", "z") else t[k]) for n, t in given.items()}
            one = {n: (t[:, order] if n in ("u", "delta", "B", "C", "z") else t) for n, t in one.items()}
            with use(selective_scan="triton"):
                y: Any = selective_scan(**one, delta_softplus=True)
            total = total + y[:, order.argsort()]
        assert isinstance(total, Tensor)
        return torch.autograd.grad(total, list(given.values()), torch.ones_like(total))

    return run


def _conv(device: torch.device, plain: bool) -> Callable[[], object]:
    x = torch.randn(128, 197, 1536, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1536, 4, device=device, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(1536, device=device, dtype=torch.bfloat16, requires_grad=True)

    def run() -> object:
        if plain:
            y = F.silu(F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), weight[:, None], bias, groups=1536)).transpose(1, 2)
        else:
            with use(causal_conv1d="triton"):
                y = causal_conv1d(x, weight, bias)
        return torch.autograd.grad(y, [x, weight, bias], torch.ones_like(y))

    return run


def launches() -> Iterator[Callable[[], object]]:
    """Calls whose kernels are compiled ahead of time (`benchmarks/aot.py`), at widths of use."""
    cpu = torch.device("cpu")
    for dtype in (torch.bfloat16, torch.float32):
        yield _call("triton", inputs((2, 197, 768), 16, dtype, cpu))
    yield _call("triton", inputs((2, 196, 384), 16, torch.bfloat16, cpu, 4), cross(cpu))
    yield _call("triton", inputs((2, 196, 384), 1, torch.bfloat16, cpu, 4), cross(cpu))
    yield _call("triton", inputs((1, 4096, 64), 16, torch.bfloat16, cpu))

    def conv() -> object:
        x, weight = torch.zeros(2, 197, 768, dtype=torch.bfloat16, requires_grad=True), torch.zeros(768, 4, requires_grad=True)
        with use(causal_conv1d="triton"):
            return causal_conv1d(x, weight, mask=torch.ones(2, 197, dtype=torch.bool)).sum().backward()

    yield conv
