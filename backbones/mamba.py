"""Mamba-1 mixers in K directions (Gu and Dao 2023), and the Mamba column that ARM and RoMA pretrain (Ren et al. 2024, Wang
et al. 2025).

Letters: b sample, k direction, n places of the grid, l places of a sequence, d width, e inner width, s states, r rank.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swath.backbones.base import Recomputed, fitting, register, sincos_grid
from swath.backbones.column import Column, by_cluster, by_column
from swath.kernels.conv import causal_conv1d
from swath.kernels.linear import Linear
from swath.kernels.scan import selective_scan

EPS = 1e-5
SUFFIXES = ("", "_b", "_c", "_c_b")  # published: forward, backward, by columns, by columns backward
# Our parameter → the published one of each direction.
PER_DIRECTION = {
    "A_log": "A{}_log", "D": "D{}", "conv_weight": "conv1d{}.weight", "conv_bias": "conv1d{}.bias",
    "x_weight": "x_proj{}.weight", "dt_weight": "dt_proj{}.weight", "dt_bias": "dt_proj{}.bias",
}  # fmt: skip
# What the objective or a classifier owns in a published file.
NOT_OURS = (
    "angle_embed", "norm_1.", "norm_2.", "norm_3.", "norm_4.", "enc2dec.", "dec_block.", "ar_token", "dec_pos_embed", "ar_norm.",
    "ar_pred.", "mask", "head.",
)  # fmt: skip


class Mixer(nn.Module):
    """Mamba-1 mixer: K directions with a convolution, x_proj, dt_proj, A and D of their own, sharing in_proj (so the gate) and
    out_proj; their mean. K = 1 is Mamba; 2 with an order and its reverse is Vim's v2; 4 is ARM's v3.

    What is to be spared weight decay, A_log too, lies end to end in vectors, (K·E,) and (K·E·S,): vectors are spared it.
    """

    def __init__(self, width: int, inner: int, directions: int = 1, states: int = 16, taps: int = 4, depth: int = 1) -> None:
        super().__init__()
        rank = math.ceil(width / 16)
        self.directions, self.rank, self.states = directions, rank, states
        self.in_proj = Linear(width, 2 * inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(directions, inner, taps))
        self.conv_bias = nn.Parameter(torch.empty(directions * inner))
        self.x_weight = nn.Parameter(torch.empty(directions, rank + 2 * states, inner))
        self.dt_weight = nn.Parameter(torch.empty(directions, inner, rank))
        self.dt_bias = nn.Parameter(torch.empty(directions * inner))
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(directions * inner))
        self.D = nn.Parameter(torch.ones(directions * inner))
        self.out_proj = Linear(inner, width, bias=False)
        for tensor, fan in ((self.conv_weight, taps), (self.conv_bias, taps), (self.x_weight, inner), (self.dt_weight, rank)):
            nn.init.uniform_(tensor, -(fan**-0.5), fan**-0.5)
        nn.init.uniform_(self.out_proj.weight, -((inner * depth) ** -0.5), (inner * depth) ** -0.5)
        init_dt_bias(self.dt_bias)

    def forward(self, x_bld: Tensor, order: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, L, D). order (K, L) or (K, B, L) int64: places by step; mask (B, L) bool: False where no token is."""
        x_ble, z_ble = self.in_proj(x_bld).chunk(2, dim=2)
        u_kble = self.convolve(x_ble, order, mask)
        y_ble = selective_scan(u_kble, **self.parameters_of(u_kble), z=z_ble, delta_softplus=True, order=order, mask=mask)
        assert isinstance(y_ble, Tensor)
        return self.out_proj(y_ble if self.directions == 1 else y_ble / self.directions)

    def convolve(self, x_ble: Tensor, order: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, L, E) → (K, B, L, E): every direction's causal convolution and SiLU."""
        return causal_conv1d(x_ble, self.conv_weight, self._each(self.conv_bias), order=order, mask=mask)

    def parameters_of(self, u_kble: Tensor) -> dict[str, Any]:
        """delta, A, B, C, D, delta_bias of the scan over u."""
        batch = u_kble.shape[1]
        x_kmf = u_kble.flatten(1, 2) @ self.x_weight.transpose(1, 2)
        rank_kmr, b_kms, c_kms = x_kmf.split([self.rank, self.states, self.states], dim=2)
        delta_kme = rank_kmr @ self.dt_weight.transpose(1, 2)
        placed = {name: t.unflatten(1, (batch, -1)) for name, t in (("delta", delta_kme), ("B", b_kms), ("C", c_kms))}
        # decays are fp32 also where the weights are not
        log_kes = self.A_log.view(self.directions, -1, self.states)
        decay_kes = -torch.exp(log_kes.to(torch.promote_types(log_kes.dtype, torch.float32)))
        return {**placed, "A": decay_kes, "D": self._each(self.D), "delta_bias": self._each(self.dt_bias)}

    def _each(self, vector: Tensor) -> Tensor:
        return vector.view(self.directions, -1)

    def empty_cache(self, batch: int) -> tuple[Tensor, Tensor]:
        """What `step` starts from: the last inputs of the convolution (B, E, W), and the state (B, E, S)."""
        _, inner, taps = self.conv_weight.shape
        like = self.conv_weight
        return like.new_zeros(batch, inner, taps), like.new_zeros(batch, inner, self.states, dtype=torch.float32)

    def step(self, x_bd: Tensor, cache: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One token (B, D) after those in `cache` → ((B, D), the next cache); the same as `forward`, one token at a time.

        Raises ValueError where there are more directions than one: only the first can be followed while it is written.
        """
        if self.directions != 1:
            raise ValueError(f"step needs one direction, not {self.directions}: the others begin at the end")
        x_be, z_be = self.in_proj(x_bd).chunk(2, dim=1)
        window_bew = torch.cat([cache[0][:, :, 1:], x_be[:, :, None].to(cache[0].dtype)], dim=2)
        u_be = F.silu((window_bew * self.conv_weight[0]).sum(dim=2) + self.conv_bias)
        u_k1e = u_be[None, :, None]
        y, state_kbes = selective_scan(
            u_k1e, **self.parameters_of(u_k1e), z=z_be[:, None], delta_softplus=True, initial_state=cache[1][None],
            return_last_state=True,
        )  # fmt: skip
        return self.out_proj(y[:, 0]), (window_bew, state_kbes[0])


def init_dt_bias(bias: Tensor, low: float = 1e-3, high: float = 0.1) -> None:
    """Fill with b such that softplus(b) is log-uniform in [low, high] (Mamba's initialisation)."""
    with torch.no_grad():
        step = torch.exp(torch.rand_like(bias) * (math.log(high) - math.log(low)) + math.log(low)).clamp_min(1e-4)
        bias.copy_(step + torch.log(-torch.expm1(-step)))


class SwiGLU(nn.Module):
    """w3(SiLU(w1 x) * w2 x), hidden width floor(8 d / 3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 8 * width // 3
        self.w1, self.w2 = Linear(width, hidden), Linear(width, hidden)
        self.w3 = Linear(hidden, width)

    def forward(self, x_bld: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x_bld)) * self.w2(x_bld))


class Block(Recomputed):
    """x += Mixer(LN(x)); x += SwiGLU(LN(x)) (ARM)."""

    def __init__(self, width: int, inner: int, directions: int, states: int, depth: int) -> None:
        super().__init__()
        self.mixer = Mixer(width, inner, directions, states, depth=depth)
        self.mlp = SwiGLU(width)
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.norm2 = nn.LayerNorm(width, eps=EPS)

    def compute(self, x_bld: Tensor, order: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x_bld = x_bld + self.mixer(self.norm1(x_bld), order, mask)
        return x_bld + self.mlp(self.norm2(x_bld))


@dataclass(frozen=True)
class MambaConfig:
    """`directions` 1 scans cluster by cluster (`cluster` patches a side; 1 is raster order), as pretraining does; 4 scans rows,
    columns and both reversed, for transfer. `pool`: the mean of patch tokens, of the means of the two halves around the class
    token (the published global pool), or the class token. `image_size` fixes the spacing of positions.
    """

    bands: int
    image_size: int = 192
    patch: int = 16
    width: int = 768
    depth: int = 12
    states: int = 16
    expand: int = 1
    directions: Literal[1, 4] = 1
    cluster: int = 4
    positions: Literal["sincos", "learned"] = "sincos"
    class_token: bool = False
    final_norm: bool = False
    pool: Literal["mean", "halves", "class"] = "mean"


_SIZES = {
    "tiny": {"width": 192, "depth": 12},
    "small": {"width": 384, "depth": 12},
    "base": {"width": 768, "depth": 12},
    "large": {"width": 1024, "depth": 24},
    "huge": {"width": 1536, "depth": 24},
}
_TRANSFER: dict[str, Any] = {
    "directions": 4, "positions": "learned", "class_token": True, "final_norm": True, "pool": "class", "image_size": 224,
}  # fmt: skip


@register(
    MambaConfig,
    {f"mamba_{s}": {**o, "patch": 16} for s, o in _SIZES.items()}
    | {f"mamba_{s}_transfer": {**o, "patch": 16, **_TRANSFER} for s, o in _SIZES.items()},
)
class Mamba(Column):
    """The column of ARM and RoMA: one causal direction in pretraining, without class token and final norm (an objective norms
    what it taps); the same weights in four directions for transfer (`spread`)."""

    tiny: ClassVar[dict[str, Any]] = {"bands": 4, "image_size": 32, "patch": 8, "width": 24, "depth": 2, "cluster": 2}

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        if config.directions not in (1, 4):
            raise ValueError(f"directions must be 1 or 4, not {config.directions}")
        self.both_ways = config.directions == 4
        if not self.both_ways:
            self.traits = self.traits | {"causal"}  # pyright: ignore[reportAttributeAccessIssue]
        inner = config.expand * config.width
        self.blocks = nn.ModuleList(
            [Block(config.width, inner, config.directions, config.states, config.depth) for _ in range(config.depth)]
        )
        self.norm = nn.LayerNorm(config.width, eps=EPS) if config.final_norm else nn.Identity()

    def ways(self, rows: int, columns: int, device: torch.device) -> list[Tensor] | None:
        if self.config.directions == 1:
            return [by_cluster(rows, columns, self.config.cluster, device)] if self.config.cluster > 1 else None
        return [torch.arange(rows * columns, device=device), by_column(rows, columns, device)]


def spread(state: Mapping[str, Tensor], config: MambaConfig, image_size: int = 192) -> dict[str, Tensor]:
    """Parameters of one direction, as `Mamba` pretrains them, in every direction of `config`.

    What pretraining has not is added: learned positions start as the fixed table of `image_size` stretched over the new grid,
    the class token at zero, the final norm at the identity. What is already there stays.
    """
    ours = {name: _repeat(name, tensor, config.directions) for name, tensor in state.items()}
    if config.positions == "learned" and "pos_embed" not in ours:
        side, table = config.image_size // config.patch, image_size // config.patch
        place = (torch.arange(side, dtype=torch.float64) + 0.5) * table / side - 0.5
        patches_nd = sincos_grid(config.width, place, place).float()
        ours["pos_embed"] = F.pad(patches_nd, (0, 0, int(config.class_token), 0))[None]
    if config.class_token:
        ours.setdefault("cls_token", torch.zeros(1, 1, config.width))
    if config.final_norm:
        ours.setdefault("norm.weight", torch.ones(config.width))
        ours.setdefault("norm.bias", torch.zeros(config.width))
    return ours


def _repeat(name: str, tensor: Tensor, directions: int) -> Tensor:
    if ".mixer." not in name or name.rpartition(".")[2] not in PER_DIRECTION:
        return tensor
    return tensor.repeat(directions, *(1,) * (tensor.ndim - 1))


def mixer_from_published(state: Mapping[str, Tensor], front: str = "") -> dict[str, Tensor]:
    """A `Mixer`'s parameters from a published one's, of as many directions as it has. ValueError for keys that it has not, or
    misses, with `front` before them."""
    directions = max(sum(form.format(suffix) in state for suffix in SUFFIXES) for form in PER_DIRECTION.values())
    taken = {"in_proj.weight": "in_proj.weight", "out_proj.weight": "out_proj.weight"}
    published = {name: [form.format(suffix) for suffix in SUFFIXES[:directions]] for name, form in PER_DIRECTION.items()}
    expected = {*taken, *(key for keys in published.values() for key in keys)}
    if expected != set(state):
        wrong = [f"{front}{key} is {'missing' if key in expected else 'not known'}" for key in sorted(expected ^ set(state))]
        raise ValueError(f"of a mixer of {directions} directions {', '.join(wrong)}")
    ours = {name: state[name] for name in taken}
    for name, keys in published.items():
        stacked = torch.stack([state[key] for key in keys])
        ours[name] = stacked.squeeze(2) if name == "conv_weight" else stacked if name.endswith("_weight") else stacked.flatten()
    return ours


def from_published(state: Mapping[str, Tensor], config: MambaConfig) -> dict[str, Tensor]:
    """`Mamba`'s parameters from those of RoMA or ARM, pretrained (one direction) or fine-tuned (four).

    A single direction is spread where `config` has four. The pretraining decoder's and a classifier's keys (`NOT_OURS`) are
    theirs to load. Raises ValueError for any other key that is left over or missing, and for another table of positions.
    """
    ours = column_from_published({name: t for name, t in state.items() if not name.startswith(NOT_OURS)}, config)
    table = ours.get("pos_embed")
    image_size = config.image_size
    if "cls_token" not in ours and table is not None:  # pretrained: positions are a fixed table
        side = math.isqrt(table.shape[1])
        place = torch.arange(side)
        fixed_nd = sincos_grid(config.width, place, place).float()
        if table.shape[1:] != fixed_nd.shape or (table[0] - fixed_nd).abs().max() > 1e-5:
            raise ValueError(f"pos_embed of shape {tuple(table.shape)} is not the fixed sin-cos table")
        image_size = side * config.patch
        del ours["pos_embed"]
    if config.directions == 4 and all(len(t) == 1 for name, t in ours.items() if name.endswith("conv_weight")):
        ours = spread(ours, config, image_size)
    return fitting(ours, Mamba, config)


def column_from_published(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Names of a scanned column: mixers stacked, layers as blocks, the class token's position from the middle to the front."""
    ours: dict[str, Tensor] = {}
    mixers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        layer, inside, part = name.partition(".mixer.")
        if inside:
            mixers.setdefault(layer, {})[part] = tensor
        else:
            ours[name.replace("layers.", "blocks.", 1).replace("norm_f.", "norm.", 1)] = tensor
    for layer, parts in mixers.items():
        for name, tensor in mixer_from_published(parts, f"{layer}.mixer.").items():
            ours[f"{layer.replace('layers.', 'blocks.', 1)}.mixer.{name}"] = tensor
    if config.class_token and "cls_token" in ours and "pos_embed" in ours:
        table = ours["pos_embed"]
        half = (table.shape[1] - 1) // 2
        ours["pos_embed"] = torch.cat([table[:, half : half + 1], table[:, :half], table[:, half + 1 :]], dim=1)
    return ours
