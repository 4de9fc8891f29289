"""The selective scan on a CPU: blocks of sequences and chunks of steps that stay in cache, and never (B, L, D, N) at once.

Within a chunk everything but h = a h + b is one call over all its steps. The state is kept before every chunk; backward
recomputes a chunk from it. Letters as in `reference.py`; e is a channel within its group. Tensors are (T, S, G, N, E).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from swath.kernels.scan.op import KEEP
from swath.kernels.scan.reference import Scan, check_contents, visits

STEPS = KEEP["cpu"]
# Elements of (T, S, G, N, E) at a time; backward has three such buffers, forward two. More means fewer calls, and is for large
# inputs.
_BLOCK = (5 << 16, 1 << 20)
# Of these, what a thread must have to be worth waking: with less, two threads gain a fifth, and lose much on a busy machine.
_PER_THREAD = 1 << 18


def forward(x: Scan, softplus: bool, reverse: bool, summed: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(y in the dtype of u, last state (K, S, D, N), states before every chunk (K, kept, D, N), none unless `save`)."""
    check_contents(x.order, x.cu_seqlens, x.delta.shape[2])
    plan = _Plan(x, softplus, reverse, STEPS if save else None, buffers=2)
    with plan.threads():
        return _forward(plan, summed, save)


def _forward(plan: "_Plan", summed: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    x = plan.x
    directions, batch, length, width = x.delta.shape
    y_kmd = torch.zeros(1 if summed else directions, batch * length, width, dtype=plan.dtype)
    last_ksdn = torch.zeros(directions, plan.sequences, width, plan.states, dtype=plan.dtype)
    kept = torch.zeros(directions, plan.kept if save else 0, width, plan.states, dtype=plan.dtype)
    for k in range(directions):
        direction = plan.direction(k)
        for block in plan.blocks():
            state = plan.initial(k, block)
            for chunk in plan.chunks(k, block):
                if save:
                    plan.keep(kept[k], chunk, state)
                _, h = chunk.run(direction, state[: chunk.rows])
                chunk.put(y_kmd[0 if summed else k], chunk.output(direction, h), more=summed and k > 0)
                state[: chunk.rows] = h[-1]
            last_ksdn[k, block] = state.transpose(2, 3).flatten(1, 2)
    y = y_kmd.unflatten(1, (batch, length))
    return (y[0] if summed else y).to(x.u.dtype), last_ksdn, kept


def backward(
    x: Scan, softplus: bool, reverse: bool, summed: bool, kept: Tensor, dy: Tensor, dlast: Tensor | None
) -> dict[str, Tensor]:
    """{argument: gradient, in the form of `Scan` and in its argument's dtype}; dy as y, dlast (K, S, D, N) as the last state."""
    plan = _Plan(x, softplus, reverse, STEPS, buffers=3)
    with plan.threads():
        return _backward(plan, softplus, summed, kept, dy, dlast)


def _backward(plan: "_Plan", softplus: bool, summed: bool, kept: Tensor, dy: Tensor, dlast: Tensor | None) -> dict[str, Tensor]:
    x = plan.x
    directions, batch, length, width = x.delta.shape
    dy_kmd = dy.reshape(1 if summed else directions, batch * length, width)
    made = {name: torch.zeros(value.shape, dtype=plan.dtype) for name, value in x._asdict().items()
            if value is not None and value.is_floating_point()}  # fmt: skip
    flat = {name: made[name].flatten(-3, -2) for name in ("u", "delta", "z") if name in made}
    flat |= {name: made[name].flatten(1, 2) for name in ("B", "C")}
    for k in range(directions):
        direction = plan.direction(k)
        mine = {name: flat[name][min(k, len(flat[name]) - 1)] for name in ("u", "delta", "B", "C")}
        if x.z is not None:
            mine["z"] = flat["z"]
        da_gne = torch.zeros_like(direction.a_gne)
        dskip_d, dbias_d = torch.zeros(width, dtype=plan.dtype), torch.zeros(width, dtype=plan.dtype)
        for block in plan.blocks():
            carry = plan.layout(dlast[k, block]) if dlast is not None else torch.zeros_like(plan.initial(k, block))
            for chunk in plan.chunks(k, block, last_first=True):
                state, rows = plan.kept_state(kept[k], chunk), chunk.rows
                a, h = chunk.run(direction, state)
                dy_tsd = dy_kmd[0 if summed else k].index_select(0, chunk.place).to(plan.dtype).view(chunk.shape)
                dy_tsd = chunk.zeroed(dy_tsd)
                if chunk.z is not None:
                    gate = torch.sigmoid(chunk.z)
                    slope = gate * (1 + chunk.z * (1 - gate))
                    dz = dy_tsd * slope * chunk.output(direction, h, gated=False)
                    chunk.put(mine["z"], dz, more=k > 0)
                    dy_tsd = dy_tsd * (gate * chunk.z)
                grads, carry[:rows] = chunk.gradients(direction, state, a, h, dy_tsd, carry[:rows])
                da_gne += grads.pop("A")
                dskip_d += (dy_tsd * chunk.u).sum(dim=(0, 1))
                if softplus:
                    grads["delta"] *= torch.where(chunk.raw > 20, 1.0, torch.sigmoid(chunk.raw))
                grads["delta"] = chunk.zeroed(grads["delta"])
                dbias_d += grads["delta"].sum(dim=(0, 1))
                if direction.skip_d is not None:
                    grads["u"] += dy_tsd * direction.skip_d
                for name, grad in grads.items():
                    chunk.put(mine[name], grad, more=name == "u" and len(x.u) == 1 and k > 0)
            if x.initial_state is not None:
                made["initial_state"][k, block] = carry.transpose(2, 3).flatten(1, 2)
        made["A"][k] = da_gne.transpose(1, 2).flatten(0, 1)
        for name, grad in (("D", dskip_d), ("delta_bias", dbias_d)):
            if name in made:
                made[name][min(k, len(made[name]) - 1)] += grad
    return {name: grad.to(getattr(x, name).dtype) for name, grad in made.items()}


@dataclass
class _Direction:
    """What all chunks of a direction share."""

    a_gne: Tensor
    doubling_gne: Tensor  # A log2(e): exp(dt A) = 2 ** (dt A log2(e)), and torch's exp2 takes a third of its exp's time
    skip_d: Tensor | None


@dataclass
class _Chunk:
    """Some steps of some sequences, gathered; absent tokens have dt = u = B = C = 0, which leaves the state as it is."""

    place: Tensor  # (T·S,) in the flattened (B·L) tensors; absent ones point at 0 and carry zeros
    present: Tensor | None  # (T, S, 1)
    first: int  # step
    numbers: Tensor  # (S,) of the sequences
    u: Tensor  # (T, S, D)
    raw: Tensor  # (T, S, D) delta with its bias
    dt: Tensor  # (T, S, D)
    b: Tensor  # (T, S, G, N)
    c: Tensor  # (T, S, G, N)
    z: Tensor | None  # (T, S, D)
    buffers: tuple[Tensor, ...]

    @property
    def shape(self) -> torch.Size:
        return self.u.shape

    @property
    def rows(self) -> int:
        return self.u.shape[1]

    def run(self, direction: _Direction, state: Tensor) -> tuple[Tensor, Tensor]:
        """(a = exp(dt A), the state after each step)."""
        a, h = self._buffer(0, direction), self._buffer(1, direction)
        torch.mul(self._rows(self.dt), direction.doubling_gne, out=a).exp2_()
        torch.mul(self._rows(self.dt * self.u), self.b[..., None], out=h)
        before = state
        for a_t, h_t in zip(a, h, strict=True):
            before = h_t.addcmul_(a_t, before)
        return a, h

    def output(self, direction: _Direction, h: Tensor, gated: bool = True) -> Tensor:
        y_tsd = (self.c[..., None, :] @ h).view(self.shape)
        if direction.skip_d is not None:
            y_tsd = y_tsd + direction.skip_d * self.u
        return y_tsd * F.silu(self.z) if gated and self.z is not None else y_tsd

    def gradients(
        self, direction: _Direction, state: Tensor, a: Tensor, h: Tensor, dy_tsd: Tensor, carry: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """(gradients of u, delta (after softplus), A, B, C; gradient of the state before the chunk); overwrites `a` and `h`."""
        dy = self._rows(dy_tsd)
        scratch = self._buffer(2, direction)
        # sums over e by product and sum: batched matrix-vector products are six times slower here
        grads = {"C": torch.mul(h, dy, out=scratch).sum(dim=4)}
        dh = torch.mul(dy, self.c[..., None], out=scratch)
        dh_t, a_t = dh.unbind(0), a.unbind(0)
        later = dh_t[-1].add_(carry)
        for mine, decay in zip(reversed(dh_t[:-1]), reversed(a_t[1:]), strict=True):
            later = mine.addcmul_(decay, later)
        before = dh[0] * a[0]
        exponent = a.mul_(dh)  # its gradient, after the next two lines
        exponent[1:].mul_(h[:-1])
        exponent[0].mul_(state)
        grads["B"] = torch.mul(dh, self._rows(self.dt * self.u), out=h).sum(dim=4)
        through_b = (self.b[..., None, :] @ dh).view(self.shape)
        grads["u"] = through_b * self.dt
        grads["delta"] = torch.mul(exponent, direction.a_gne, out=h).sum(dim=3).view(self.shape).addcmul_(through_b, self.u)
        grads["A"] = exponent.mul_(self._rows(self.dt)).sum(dim=(0, 1))
        return grads, before

    def put(self, into_m: Tensor, value_ts: Tensor, more: bool) -> None:
        """Into rows of a (M, …) tensor, which are zero unless `more` says that there may be something to add to."""
        value_m = value_ts.flatten(0, 1)
        if self.present is not None:
            into_m.index_add_(0, self.place, value_m)
            return
        # each place once, which index_add_ cannot know and pays for
        into_m.index_copy_(0, self.place, value_m + into_m.index_select(0, self.place) if more else value_m)

    def zeroed(self, tensor: Tensor) -> Tensor:
        return tensor if self.present is None else torch.where(self.present, tensor, 0.0)

    def _rows(self, tensor_tsd: Tensor) -> Tensor:
        """(T, S, G, 1, E)"""
        steps, rows, groups = self.b.shape[:3]
        return tensor_tsd.view(steps, rows, groups, 1, -1)

    def _buffer(self, number: int, direction: _Direction) -> Tensor:
        shape = (*self.u.shape[:2], *direction.a_gne.shape)
        count = self.u.shape[0] * self.u.shape[1] * direction.a_gne.numel()
        return self.buffers[number][:count].view(shape)


class _Plan:
    """Which sequences go together, and in which steps."""

    def __init__(self, x: Scan, softplus: bool, reverse: bool, steps: int | None, buffers: int) -> None:
        """steps: of a chunk; None: as many as there is room for."""
        self.x, self.softplus = x, softplus
        self.dtype = torch.float64 if x.u.dtype == torch.float64 else torch.float32
        self.place_kst = visits(x, reverse)
        self.sequences, self.longest = self.place_kst.shape[1:]
        self.groups, self.states = x.B.shape[3:]
        _, batch, length, width = x.delta.shape
        elements = min(max(x.delta[0].numel() // 4, _BLOCK[0]), _BLOCK[1])
        self.per_block = max(1, elements // max(1, STEPS * width * self.states))
        self.kept = batch * length // STEPS + self.sequences
        if x.cu_seqlens is None:
            self.length_s = torch.full((batch,), length)
            first_s = torch.arange(batch) * length
        else:
            self.length_s, first_s = x.cu_seqlens.long().diff(), x.cu_seqlens[:-1].long()
        self.slot_s = first_s // STEPS + torch.arange(self.sequences)
        self.by_length = self.length_s.argsort(descending=True, stable=True)
        self.step = min(self.per_block, self.sequences) * width * self.states
        self.steps = steps or max(STEPS, _BLOCK[1] // max(1, self.step))
        count = self.step * min(self.steps, self.longest)
        self.buffers = tuple(torch.empty(count, dtype=self.dtype) for _ in range(buffers))

    @contextmanager
    def threads(self) -> Iterator[None]:
        """As many of torch's threads as the usual steps feed."""
        before = torch.get_num_threads()
        torch.set_num_threads(max(1, min(before, self.step * STEPS // _PER_THREAD)))
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def direction(self, k: int) -> _Direction:
        a_gne = self.x.A[k].to(self.dtype).unflatten(0, (self.groups, -1)).transpose(1, 2).contiguous()
        skip = self.x.D
        return _Direction(a_gne, a_gne * math.log2(math.e), None if skip is None else skip[min(k, len(skip) - 1)].to(self.dtype))

    def blocks(self) -> Iterator[Tensor]:
        """Sequence numbers, longest first."""
        if self.sequences:
            yield from self.by_length.split(self.per_block)

    def layout(self, state_sdn: Tensor) -> Tensor:
        """(S, G, N, E), a copy."""
        return (
            state_sdn.to(self.dtype).unflatten(1, (self.groups, -1)).transpose(2, 3).clone(memory_format=torch.contiguous_format)
        )

    def initial(self, k: int, block: Tensor) -> Tensor:
        if self.x.initial_state is not None:
            return self.layout(self.x.initial_state[k, block])
        width = self.x.delta.shape[3]
        return torch.zeros(len(block), self.groups, self.states, width // self.groups, dtype=self.dtype)

    def keep(self, kept: Tensor, chunk: _Chunk, state: Tensor) -> None:
        kept[self._slots(chunk)] = state[: chunk.rows].transpose(2, 3).flatten(1, 2)

    def kept_state(self, kept: Tensor, chunk: _Chunk) -> Tensor:
        return self.layout(kept[self._slots(chunk)])

    def _slots(self, chunk: _Chunk) -> Tensor:
        """(S,) where the states before this chunk are kept."""
        return self.slot_s[chunk.numbers] + chunk.first // STEPS

    def chunks(self, k: int, block: Tensor, last_first: bool = False) -> Iterator[_Chunk]:
        """The chunks of a block; sequences that have ended are left out."""
        x = self.x
        place_st = self.place_kst[min(k, len(self.place_kst) - 1)][block]
        length_s = self.length_s[block]

        def found(tensor: Tensor, places: Tensor, present: Tensor | None, tail: int) -> Tensor:
            """(T, S, …), 0 where absent."""
            flat = tensor.flatten(0, 1)
            taken = flat.index_select(0, places).to(self.dtype)
            if present is not None:
                taken.masked_fill_(~present.reshape(-1, *(1,) * tail), 0.0)
            return taken

        firsts = range(0, int(length_s[0]), self.steps)
        for first in reversed(firsts) if last_first else firsts:
            rows = len(block) if x.cu_seqlens is None else int((length_s > first).sum())
            place_ts = place_st[:rows, first : first + self.steps].T
            steps = len(place_ts)
            present = None
            if x.mask is not None or x.cu_seqlens is not None:
                present = place_ts >= 0
                place_ts = place_ts.clamp_min(0)
                if x.mask is not None:
                    present &= x.mask.flatten()[place_ts]
            places = place_ts.flatten()
            own = min(k, len(x.u) - 1)
            u, raw = (found(t, places, present, 1).view(steps, rows, -1) for t in (x.u[own], x.delta[k]))
            b, c = (found(t[k], places, present, 2).view(steps, rows, *t.shape[3:]) for t in (x.B, x.C))
            z = None if x.z is None else found(x.z, places, present, 1).view(steps, rows, -1)
            if x.delta_bias is not None:
                raw = raw + x.delta_bias[min(k, len(x.delta_bias) - 1)].to(self.dtype)
            dt = F.softplus(raw, threshold=20.0) if self.softplus else raw
            if present is not None:
                present = present[..., None]
                dt = torch.where(present, dt, 0.0)
            yield _Chunk(places, present, first, block[:rows], u, raw, dt, b, c, z, self.buffers)
