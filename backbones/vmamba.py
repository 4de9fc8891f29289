"""VMamba (Liu et al. 2024, "VMamba: Visual State Space Model"): a pyramid of four-direction scans.

Maps are channel-last throughout, and tokens stay where they are: a direction is an order of visits. Letters: b sample, h w rows
and columns of a map, l = h·w, k direction, d width, e inner width, s states, r rank.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swath.backbones.base import Backbone, Context, Features, Keep, Recomputed, Tokens, fitting, register
from swath.backbones.column import by_column
from swath.backbones.grid import boxes, check_images, pyramid_grid, refuse_keep
from swath.backbones.mamba import init_dt_bias
from swath.backbones.vit import Mlp
from swath.kernels.linear import Linear
from swath.kernels.scan import selective_scan

EPS = 1e-5
STRIDES = (4, 8, 16, 32)


class SS2D(nn.Module):
    """Cross scan: rows, columns, and both reversed, each with its own x_proj, dt_proj, A and D, summed at their places.

    Parameters are named as published; A_logs (4·E·S,) and Ds (4·E,) are vectors, which are spared weight decay.
    """

    def __init__(self, width: int, states: int, ratio: float, gate: bool, taps: int = 3, conv_bias: bool = False) -> None:
        super().__init__()
        inner, rank = int(ratio * width), math.ceil(width / 16)
        self.states, self.rank, self.gate = states, rank, gate
        self.in_proj = Linear(width, inner * (2 if gate else 1), bias=False)
        self.conv2d = nn.Conv2d(inner, inner, taps, padding=taps // 2, groups=inner, bias=conv_bias)
        self.x_proj_weight = nn.Parameter(torch.empty(4, rank + 2 * states, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(4, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(4, inner))
        self.A_logs = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(4 * inner))
        self.Ds = nn.Parameter(torch.ones(4 * inner))
        self.out_norm = nn.LayerNorm(inner, eps=EPS)
        self.out_proj = Linear(inner, width, bias=False)
        nn.init.uniform_(self.x_proj_weight, -(inner**-0.5), inner**-0.5)
        nn.init.uniform_(self.dt_projs_weight, -(rank**-0.5), rank**-0.5)
        init_dt_bias(self.dt_projs_bias)

    def forward(self, x_bhwd: Tensor) -> Tensor:
        """(B, H, W, D) → (B, H, W, D)."""
        x_bhwe = self.in_proj(x_bhwd)
        x_bhwe, z_bhwe = x_bhwe.chunk(2, dim=3) if self.gate else (x_bhwe, None)
        u_bhwe = F.silu(self.conv2d(x_bhwe.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        y_bhwe = self.out_norm(self.cross_scan(u_bhwe))
        if z_bhwe is not None:
            y_bhwe = y_bhwe * F.silu(z_bhwe)
        return self.out_proj(y_bhwe)

    def cross_scan(self, u_bhwe: Tensor) -> Tensor:
        """(B, H, W, E): the sum of the four scans."""
        rows, columns = u_bhwe.shape[1:3]
        u_ble = u_bhwe.flatten(1, 2)
        by_row = torch.arange(rows * columns, device=u_ble.device)
        column = by_column(rows, columns, u_ble.device)
        order_kl = torch.stack([by_row, column, by_row.flip(0), column.flip(0)])
        x_kblf = F.linear(u_ble, self.x_proj_weight.flatten(0, 1)).unflatten(2, (4, -1)).permute(2, 0, 1, 3)
        rank_kblr, b_kbls, c_kbls = x_kblf.split([self.rank, self.states, self.states], dim=3)
        delta_kble = rank_kblr @ self.dt_projs_weight.transpose(1, 2)[:, None]
        log_kes = self.A_logs.view(4, -1, self.states)
        # decays are fp32 also where the weights are not
        decay_kes = -torch.exp(log_kes.to(torch.promote_types(log_kes.dtype, torch.float32)))
        y_ble = selective_scan(
            u_ble, delta_kble, decay_kes, b_kbls, c_kbls, self.Ds.view(4, -1), delta_bias=self.dt_projs_bias, delta_softplus=True,
            order=order_kl,
        )  # fmt: skip
        assert isinstance(y_ble, Tensor)
        return y_ble.unflatten(1, (rows, columns))


class Block(Recomputed):
    """x += SS2D(LN(x)); x += MLP(LN(x))."""

    def __init__(self, width: int, states: int, ratio: float, gate: bool, conv_bias: bool, mlp_ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.op = SS2D(width, states, ratio, gate, conv_bias=conv_bias)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def compute(self, x_bhwd: Tensor) -> Tensor:
        x_bhwd = x_bhwd + self.op(self.norm(x_bhwd))
        return x_bhwd + self.mlp(self.norm2(x_bhwd))


class Halve(nn.Module):
    """A 3×3 convolution of stride 2 and a norm over channels: (B, H, W, C) → (B, H / 2, W / 2, D)."""

    def __init__(self, bands: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(bands, width, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        return self.norm(self.conv(x_bhwc.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


@dataclass(frozen=True)
class VMambaConfig:
    """`image_size` is taken for uniformity: there are no positions, every size that 32 divides is as good."""

    bands: int
    image_size: int = 224
    width: int = 96
    depths: tuple[int, int, int, int] = (2, 2, 8, 2)
    states: int = 1
    ratio: float = 1.0
    mlp_ratio: float = 4.0
    gate: bool = False
    conv_bias: bool = False


_SIZES = {
    "tiny": {"width": 96, "depths": (2, 2, 8, 2), "ratio": 1.0},
    "small": {"width": 96, "depths": (2, 2, 15, 2), "ratio": 2.0},
    "base": {"width": 128, "depths": (2, 2, 15, 2), "ratio": 2.0},
}


@register(VMambaConfig, {f"vmamba_{size}": options for size, options in _SIZES.items()})
class VMamba(Backbone):
    """Convolutional stem, four stages of scans at strides 4, 8, 16 and 32, each of twice the width of the one before.

    `grid` counts units of the total stride, which are what `hide` masks and what features have tokens for. `Tokens.x` is the
    stem's map, (B, H / 4 · W / 4, D), 64 to a unit. Maps are at every stride; only the last is normed.
    """

    tiny: ClassVar[dict[str, Any]] = {"bands": 4, "image_size": 64, "width": 8, "depths": (1, 1, 2, 1)}

    def __init__(self, config: VMambaConfig) -> None:
        super().__init__()
        if config.bands < 1 or len(config.depths) != 4 or min(config.depths) < 0 or config.width % 2:
            raise ValueError(f"bands must be at least 1, depths four numbers, width even: {config}")
        self.config = config
        self.width = self.pooled_width = 8 * config.width
        self.depth, self.mask_unit = sum(config.depths), STRIDES[-1]
        self.fill = nn.Parameter(torch.zeros(config.bands))
        self.stem = nn.ModuleList([Halve(config.bands, config.width // 2), Halve(config.width // 2, config.width)])
        widths = [config.width * 2**stage for stage in range(4)]
        self.stages = nn.ModuleList(
            nn.ModuleList(
                Block(width, config.states, config.ratio, config.gate, config.conv_bias, config.mlp_ratio) for _ in range(depth)
            )
            for width, depth in zip(widths, config.depths, strict=True)
        )
        self.downsample = nn.ModuleList(Halve(width, 2 * width) for width in widths[:-1])
        self.norm = nn.LayerNorm(self.width, eps=EPS)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def grid(self, height: int, width: int) -> tuple[int, int, int, int]:
        return pyramid_grid(height, width, self.mask_unit)

    def tokenize(self, images_bchw: Tensor, ctx: Context | None = None, keep: Keep | None = None) -> Tokens:
        check_images(images_bchw, self.config.bands)
        refuse_keep(keep)
        grid = self.grid(images_bchw.shape[2], images_bchw.shape[3])
        first, second = self.stem
        x_bhwd = second(F.gelu(first(images_bchw.permute(0, 2, 3, 1))))
        return Tokens(x_bhwd.flatten(1, 2), grid, boxes(grid, self.mask_unit, images_bchw.device))

    def encode(self, tokens: Tokens, keep: Keep | None = None, taps: Sequence[int] = ()) -> Features:
        """`taps` number blocks through all stages; each has its stage's width and number of tokens."""
        refuse_keep(tokens.keep if keep is None else keep)
        x_bhwd = tokens.x.unflatten(1, (tokens.grid[2] * self.mask_unit // STRIDES[0], -1))
        tapped = {-1: tokens.x} if -1 in taps else {}
        maps: dict[int, Tensor] = {}
        number = 0
        for stage, blocks in enumerate(self.stages):
            assert isinstance(blocks, nn.ModuleList)
            if stage:
                x_bhwd = self.downsample[stage - 1](x_bhwd)
            for block in blocks:
                x_bhwd = block(x_bhwd)
                if number in taps:
                    tapped[number] = x_bhwd.flatten(1, 2)
                number += 1
            if stage == 3:
                x_bhwd = self.norm(x_bhwd)
            maps[STRIDES[stage]] = x_bhwd.permute(0, 3, 1, 2)
        x_bnd = x_bhwd.flatten(1, 2)
        return Features(x_bnd.mean(dim=1), x_bnd, x_bnd[:, :0], maps, tapped)


RENAMED = {
    "patch_embed.0.": "stem.0.conv.", "patch_embed.2.": "stem.0.norm.", "patch_embed.5.": "stem.1.conv.",
    "patch_embed.7.": "stem.1.norm.", "classifier.norm.": "norm.",
    **{f"layers.{i}.blocks.": f"stages.{i}." for i in range(4)},
    **{f"layers.{i}.downsample.1.": f"downsample.{i}.conv." for i in range(3)},
    **{f"layers.{i}.downsample.3.": f"downsample.{i}.norm." for i in range(3)},
}  # fmt: skip


def op_from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`SS2D`'s parameters from a published operator's: the same names, A_logs as a vector."""
    return {name: tensor.flatten() if name.endswith("A_logs") else tensor for name, tensor in state.items()}


def from_published(state: Mapping[str, Tensor], config: VMambaConfig) -> dict[str, Tensor]:
    """`VMamba`'s parameters from a published classifier's (`vmambav2v_*`), whose head (`classifier.head.`) is left out.

    `fill` has no published counterpart and is zero. Raises ValueError for keys left over or missing, and for other shapes.
    """
    ours = {"fill": torch.zeros(config.bands)}
    for name, tensor in op_from_published({n: t for n, t in state.items() if not n.startswith("classifier.head.")}).items():
        prefix = next((old for old in RENAMED if name.startswith(old)), None)
        ours[name if prefix is None else RENAMED[prefix] + name.removeprefix(prefix)] = tensor
    return fitting(ours, VMamba, config)
