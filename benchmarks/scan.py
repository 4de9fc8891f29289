"""The selective scan on a CPU beside a hand-written compiled loop and beside autograd through an indexed loop, alternating.

    python benchmarks/scan.py [--rounds 9] [--indexed] [--out benchmarks/results/scan_cpu.json]

B 8, L 196, D 384, N 16, fp32, forward and backward; ratios of the medians of one process. `--indexed` times the pattern of the
published reference as well (a[:, t] under autograd: quadratic in L), a few times only.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from swath.kernels.scan import selective_scan

BATCH, LENGTH, WIDTH, STATES = 8, 196, 384, 16
KEEP = 14


@numba.njit(parallel=True, fastmath=True, cache=True)
def _loop_forward(u, delta, a, b, c):
    """y (B, L, D) and the state before every KEEP-th step; one row of channels per thread, states innermost."""
    batch, length, width = u.shape
    states = a.shape[1]
    y = np.empty_like(u)
    kept = np.empty((batch, (length + KEEP - 1) // KEEP, width, states), np.float32)
    for row in numba.prange(batch * width):
        i, d = row // width, row % width
        h = np.zeros(states, np.float32)
        for t in range(length):
            if t % KEEP == 0:
                for n in range(states):
                    kept[i, t // KEEP, d, n] = h[n]
            raw = delta[i, t, d]
            dt = raw if raw > 20 else np.log1p(np.exp(raw))
            x = dt * u[i, t, d]
            total = np.float32(0)
            for n in range(states):
                h[n] = np.exp(dt * a[d, n]) * h[n] + x * b[i, t, n]
                total += h[n] * c[i, t, n]
            y[i, t, d] = total
    return y, kept


@numba.njit(parallel=True, fastmath=True, cache=True)
def _loop_backward(dy, u, delta, a, b, c, kept):
    """Gradients of u, delta, a, b, c; the sums over channels of one sample stay in one thread, in order."""
    batch, length, width = u.shape
    states = a.shape[1]
    du, ddelta = np.empty_like(u), np.empty_like(u)
    db, dc = np.zeros_like(b), np.zeros_like(c)
    da_each = np.zeros((batch, width, states), np.float32)
    for i in numba.prange(batch):
        decay, h = np.empty((KEEP, states), np.float32), np.empty((KEEP + 1, states), np.float32)
        carry = np.empty(states, np.float32)
        for d in range(width):
            carry[:] = 0
            for chunk in range(kept.shape[1] - 1, -1, -1):
                first = chunk * KEEP
                steps = min(KEEP, length - first)
                for n in range(states):
                    h[0, n] = kept[i, chunk, d, n]
                for s in range(steps):
                    raw = delta[i, first + s, d]
                    dt = raw if raw > 20 else np.log1p(np.exp(raw))
                    x = dt * u[i, first + s, d]
                    for n in range(states):
                        decay[s, n] = np.exp(dt * a[d, n])
                        h[s + 1, n] = decay[s, n] * h[s, n] + x * b[i, first + s, n]
                for s in range(steps - 1, -1, -1):
                    t = first + s
                    raw = delta[i, t, d]
                    dt = raw if raw > 20 else np.log1p(np.exp(raw))
                    grad, value = dy[i, t, d], u[i, t, d]
                    through_b, through_a = np.float32(0), np.float32(0)
                    for n in range(states):
                        dh = carry[n] + grad * c[i, t, n]
                        dc[i, t, n] += grad * h[s + 1, n]
                        db[i, t, n] += dh * dt * value
                        through_b += dh * b[i, t, n]
                        carry[n] = dh * decay[s, n]
                        exponent = carry[n] * h[s, n]
                        through_a += exponent * a[d, n]
                        da_each[i, d, n] += exponent * dt
                    du[i, t, d] = through_b * dt
                    ddelta[i, t, d] = (through_a + through_b * value) / (np.float32(1) + np.exp(-raw))
    return du, ddelta, da_each.sum(axis=0), db, dc


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        arrays = [x.detach().numpy() for x in inputs]
        y, ctx.kept = _loop_forward(*arrays)
        ctx.arrays = arrays
        return torch.from_numpy(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        compiled: Any = _loop_backward
        return tuple(torch.from_numpy(g) for g in compiled(grads[0].contiguous().numpy(), *ctx.arrays, ctx.kept))


def indexed(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The published reference's pattern: (B, L, D, N) at once, and one index expression per step under autograd."""
    dt = F.softplus(delta)
    decay, added = torch.exp(dt[..., None] * a), (dt * u)[..., None] * b[:, :, None]
    state, rows = added.new_zeros(added[:, 0].shape), []
    for t in range(u.shape[1]):
        state = decay[:, t] * state + added[:, t]
        rows.append((state * c[:, t, None]).sum(-1))
    return torch.stack(rows, dim=1)


def ours(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    y = selective_scan(u, delta, a, b, c, delta_softplus=True)
    assert isinstance(y, Tensor)
    return y


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    decay = -torch.arange(1.0, STATES + 1).expand(WIDTH, -1).contiguous()
    made = [normal(BATCH, LENGTH, WIDTH), normal(BATCH, LENGTH, WIDTH) - 3, decay, normal(BATCH, LENGTH, STATES),
            normal(BATCH, LENGTH, STATES)]  # fmt: skip
    return [x.requires_grad_() for x in made]


def once(way: Callable[..., Tensor], given: list[Tensor], dy: Tensor) -> tuple[float, float, list[Tensor]]:
    """(seconds forward, seconds both, y and gradients)."""
    start = time.perf_counter()
    y = way(*given)
    between = time.perf_counter()
    grads = torch.autograd.grad(y, given, dy)
    return between - start, time.perf_counter() - start, [y, *grads]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--indexed", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    numba.set_num_threads(args.threads)
    given = inputs()
    dy = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    ways: dict[str, Callable[..., Tensor]] = {"ours": ours, "compiled loop": _Compiled.apply}
    results = {name: once(way, given, dy)[2] for name, way in ways.items()}  # warm, and compiled
    for mine, theirs in zip(results["ours"], results["compiled loop"], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item()), "the two do not compute the same"
    if args.indexed:
        ways["indexed autograd"] = indexed
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(args.rounds):
        for name, way in ways.items():
            if name == "indexed autograd" and number >= 2:
                continue
            seconds[name].append(once(way, given, dy)[:2])
    rows = {
        name: {"forward_ms": round(1e3 * statistics.median(a for a, _ in times), 1),
               "both_ms": round(1e3 * statistics.median(b for _, b in times), 1), "rounds": len(times)}
        for name, times in seconds.items()
    }  # fmt: skip
    mine = rows["ours"]["both_ms"]
    result = {
        "command": " ".join(["python", "benchmarks/scan.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, torch {torch.__version__}, numba {numba.__version__}, {args.threads} threads",
        "shape": {"B": BATCH, "L": LENGTH, "D": WIDTH, "N": STATES},
        "times": rows,
        "forward_and_backward_over_compiled_loop": round(mine / rows["compiled loop"]["both_ms"], 2),
        "extra_memory_over_inputs": round(extra_memory(given, dy) / sum(x.nbytes for x in given), 2),
    }
    if args.indexed:
        result["indexed_autograd_over_ours"] = round(rows["indexed autograd"]["both_ms"] / mine, 1)
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def extra_memory(given: list[Tensor], dy: Tensor) -> int:
    """Peak bytes that one forward and backward of ours allocates beyond its inputs, results and gradients included."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        once(ours, given, dy)
    level = peak = 0
    events: Any = record.profiler
    changes = [(e.start_ns(), e.nbytes()) for e in events.kineto_results.events() if e.name() == "[memory]"]
    for _, change in sorted(changes, key=lambda one: one[0]):
        level += change
        peak = max(peak, level)
    return peak


if __name__ == "__main__":
    sys.exit(main())
