"""Vision Mamba (Zhu et al. 2024, "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model").

Letters: b sample, n places of the grid, l places of a sequence with the class token, d width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swath.backbones.base import Recomputed, fitting, register
from swath.backbones.column import Column
from swath.backbones.mamba import EPS, Mixer, column_from_published


class RMSNorm(nn.Module):
    """x / rms(x), in fp32, times a weight, in whose dtype the result is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_bld: Tensor) -> Tensor:
        return F.rms_norm(x_bld, self.weight.shape, eps=EPS).to(self.weight.dtype) * self.weight


class Block(Recomputed):
    """x += Mixer(RMSNorm(x)), two directions, no MLP."""

    def __init__(self, width: int, expand: int, states: int, depth: int) -> None:
        super().__init__()
        self.mixer = Mixer(width, expand * width, 2, states, depth=depth)
        self.norm = RMSNorm(width)

    def compute(self, x_bld: Tensor, order: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return x_bld + self.mixer(self.norm(x_bld), order, mask)


@dataclass(frozen=True)
class VimConfig:
    """`image_size` fixes the spacing of positions; `pool`: the class token, or the mean of patch tokens (of all, or of the two
    halves around the class token and then of these two)."""

    bands: int
    image_size: int = 224
    patch: int = 16
    width: int = 384
    depth: int = 24
    states: int = 16
    expand: int = 2
    positions: Literal["sincos", "learned"] = "learned"
    class_token: bool = True
    pool: Literal["mean", "halves", "class"] = "class"


_WIDTHS = {"tiny": 192, "small": 384, "base": 768}


@register(VimConfig, {f"vim_{size}": {"width": width, "depth": 24, "patch": 16} for size, width in _WIDTHS.items()})
class Vim(Column):
    """Forward and backward over the raster with the class token in the middle; residuals in fp32, RMSNorm (v2)."""

    tiny: ClassVar[dict[str, Any]] = {"bands": 4, "image_size": 32, "patch": 8, "width": 24, "depth": 2}
    both_ways = True
    wide_residual = True

    def __init__(self, config: VimConfig) -> None:
        super().__init__(config)
        blocks = [Block(config.width, config.expand, config.states, config.depth) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.width)

    def ways(self, rows: int, columns: int, device: torch.device) -> None:
        return None


def from_published(state: Mapping[str, Tensor], config: VimConfig) -> dict[str, Tensor]:
    """`Vim`'s parameters from a published v2 model's, whose classifier (`head.`) is left out.

    Raises ValueError for any other key that is left over or missing.
    """
    return fitting(column_from_published({n: t for n, t in state.items() if not n.startswith("head.")}, config), Vim, config)
