"""RSMamba (Chen et al. 2024, "RSMamba: Remote Sensing Image Classification with State Space Model").

Overlapping patches, and one Mamba mixer a layer that takes the same tokens along several paths. Letters: b sample, h w rows and
columns of mask units, k path, n places of the grid, d width, e inner width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swath.backbones.base import Backbone, Context, Features, Keep, Recomputed, Tokens, fitting, mean_of, register
from swath.backbones.grid import boxes, check_images, patch_grid, refuse_keep, resize_positions
from swath.backbones.mamba import Mixer, mixer_from_published
from swath.kernels.conv import causal_conv1d
from swath.kernels.linear import Linear
from swath.kernels.scan import selective_scan

EPS = 1e-6
_INSTEAD = "give `tokenize_hidden` what is hidden, since its patches overlap"
# Odd 63-bit numbers that mix places and layers well (SplitMix64's, halved to fit a signed integer).
_STRIDE, _LAYER, _MIX = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB


class Block(Recomputed):
    """x += sum over paths of g_k Mixer(LN(x) along path k); g = softmax of a linear map of the paths' token means, or 1 / K.

    The norm is one for all layers, so its weight and bias come from outside.
    """

    def __init__(self, width: int, inner: int, states: int, depth: int, paths: int, gated: bool) -> None:
        super().__init__()
        self.paths = paths
        self.mixer = Mixer(width, inner, 1, states, depth=depth)
        self.gate = Linear(paths * width, paths, bias=False) if gated else None

    def compute(self, x_bnd: Tensor, weight: Tensor, bias: Tensor, order_kn: Tensor, mask: Tensor | None = None) -> Tensor:
        mixer, paths = self.mixer, self.paths
        x_bne, z_bne = mixer.in_proj(F.layer_norm(x_bnd, weight.shape, weight, bias, EPS)).chunk(2, dim=2)
        u_kbne = causal_conv1d(x_bne, mixer.conv_weight.repeat(paths, 1, 1), mixer.conv_bias, order=order_kn, mask=mask)
        shared = mixer.parameters_of(u_kbne)
        shared |= {"A": shared["A"].repeat(paths, 1, 1), "D": mixer.D, "delta_bias": mixer.dt_bias}
        y = selective_scan(
            u_kbne,
            **shared,
            z=z_bne,
            delta_softplus=True,
            order=order_kn,
            mask=mask,
            reduce="sum" if self.gate is None else "none",
        )
        assert isinstance(y, Tensor)
        if self.gate is None:
            return x_bnd + mixer.out_proj(y / paths)
        # out_proj is linear: of the means instead of all tokens of all paths
        mean_bkd = mixer.out_proj(torch.stack([mean_of(y_bne, mask) for y_bne in y], dim=1))
        gate_bk = self.gate(mean_bkd.flatten(1)).softmax(dim=1)
        return x_bnd + mixer.out_proj(torch.einsum("bk,kbne->bne", gate_bk.to(y.dtype), y))


@dataclass(frozen=True)
class RSMambaConfig:
    """`paths` 1: forward; 2: and reverse; 3: and shuffled. `merge` of paths: a gate, or their mean. The shuffled order is fixed,
    another for every layer; with `redraw` it is drawn anew (torch's generator) at every training step, as published.
    """

    bands: int
    image_size: int = 224
    patch: int = 16
    stride: int = 8
    width: int = 192
    depth: int = 24
    inner: int = 384
    states: int = 16
    paths: Literal[1, 2, 3] = 3
    merge: Literal["gate", "mean"] = "gate"
    redraw: bool = False


_SIZES = {
    "small": {"width": 192, "depth": 16, "inner": 384},
    "base": {"width": 192, "depth": 24, "inner": 384},
    "large": {"width": 256, "depth": 36, "inner": 512},
    "huge": {"width": 320, "depth": 48, "inner": 640},
}


@register(RSMambaConfig, {f"rsmamba_{size}": {**options, "patch": 16} for size, options in _SIZES.items()})
class RSMamba(Backbone):
    """Overlapping patches, gated paths, one norm before all mixers; final norm, mean over tokens, norm.

    Not sparse, since patches share pixels: `hide` masks units of one patch, and `tokenize_hidden` drops what touches one.
    """

    traits = frozenset({"ordered"})
    tiny: ClassVar[dict[str, Any]] = {"bands": 4, "image_size": 32, "patch": 8, "stride": 4, "width": 24, "depth": 2, "inner": 48}

    def __init__(self, config: RSMambaConfig) -> None:
        super().__init__()
        if config.bands < 1 or config.depth < 0 or config.paths not in (1, 2, 3) or config.patch % config.stride:
            raise ValueError(f"bands must be at least 1, paths 1, 2 or 3, and stride must divide patch: {config}")
        self.config = config
        self.width = self.pooled_width = config.width
        self.depth, self.mask_unit = config.depth, config.patch
        self.fill = nn.Parameter(torch.zeros(config.bands))
        self.patch_embed = nn.Conv2d(config.bands, config.width, config.patch, config.stride, bias=False)
        rows, columns = self.grid(config.image_size, config.image_size)[2:]
        self.pos_embed = nn.Parameter(torch.zeros(1, rows * columns, config.width))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        gated = config.merge == "gate" and config.paths > 1
        self.blocks = nn.ModuleList(
            Block(config.width, config.inner, config.states, config.depth, config.paths, gated) for _ in range(config.depth)
        )
        self.pre_norm, self.ln1, self.ln2 = (nn.LayerNorm(config.width, eps=EPS) for _ in range(3))

    def grid(self, height: int, width: int) -> tuple[int, int, int, int]:
        patch_grid(height, width, self.config.patch)
        return 1, 1, *((side - self.config.patch) // self.config.stride + 1 for side in (height, width))  # type: ignore[return-value]

    def tokenize(self, images_bchw: Tensor, ctx: Context | None = None, keep: Keep | None = None) -> Tokens:
        check_images(images_bchw, self.config.bands)
        refuse_keep(keep, _INSTEAD)
        grid = self.grid(images_bchw.shape[2], images_bchw.shape[3])
        own = self.grid(self.config.image_size, self.config.image_size)[2:]
        x_bnd = self.patch_embed(images_bchw).flatten(2).transpose(1, 2)
        x_bnd = x_bnd + resize_positions(self.pos_embed, own, grid[2:]).to(self.patch_embed.weight.dtype)
        return Tokens(x_bnd, grid, boxes(grid, self.config.stride, images_bchw.device, self.config.patch))

    def tokenize_hidden(self, images_bchw: Tensor, hidden_bhw: Tensor, ctx: Context | None = None) -> Tokens:
        """Tokens of images where `hidden` (B, H / mask_unit, W / mask_unit) bool is True for what must not be seen: every token
        that touches a hidden unit is absent (`Tokens.present`). ValueError for a mask of another shape."""
        units = tuple(side // self.mask_unit for side in images_bchw.shape[2:])
        if tuple(hidden_bhw.shape[1:]) != units or hidden_bhw.dtype != torch.bool:
            raise ValueError(f"hidden must be (B, {units[0]}, {units[1]}) bool, not {tuple(hidden_bhw.shape)} {hidden_bhw.dtype}")
        tokens = self.tokenize(self.hide(images_bchw, hidden_bhw), ctx)
        across = self.config.patch // self.config.stride  # strides that a token covers
        cells_bhw = hidden_bhw.repeat_interleave(across, 1).repeat_interleave(across, 2)
        touched_bhw = F.max_pool2d(cells_bhw[:, None].float(), across, stride=1)[:, 0] > 0
        present_bn = ~touched_bhw.flatten(1)
        return Tokens(torch.where(present_bn[..., None], tokens.x, 0.0), tokens.grid, tokens.box, present=present_bn)

    def shuffled(self, layer: int, count: int, device: torch.device) -> Tensor:
        """(N,) int64: the place that each step of the shuffled path visits in a layer; the same wherever it is computed."""
        if self.config.redraw and self.training:
            return torch.randperm(count, device=device)
        mixed = torch.arange(1, count + 1, device=device) * _STRIDE + layer * (_LAYER >> 8)
        for _ in range(2):
            mixed = (mixed ^ ((mixed >> 29) & 0x7FFFFFFFF)) * _MIX
        return (mixed ^ ((mixed >> 32) & 0xFFFFFFFF)).argsort(stable=True)

    def encode(self, tokens: Tokens, keep: Keep | None = None, taps: Sequence[int] = ()) -> Features:
        refuse_keep(tokens.keep if keep is None else keep, _INSTEAD)
        x_bnd, mask = tokens.x, tokens.present
        if mask is not None:
            x_bnd = torch.where(mask[..., None], x_bnd, 0.0)
        raster = torch.arange(x_bnd.shape[1], device=x_bnd.device)
        tapped = {-1: x_bnd} if -1 in taps else {}
        for number, block in enumerate(self.blocks):
            ways = [raster, raster.flip(0)][: self.config.paths]
            if self.config.paths == 3:
                ways.append(self.shuffled(number, len(raster), x_bnd.device))
            x_bnd = block(x_bnd, self.pre_norm.weight, self.pre_norm.bias, torch.stack(ways), mask)
            if number in taps:
                tapped[number] = x_bnd
        x_bnd = self.ln1(x_bnd)
        maps: dict[int, Tensor] = {}
        if mask is None:
            maps[self.config.stride] = self._map(x_bnd.transpose(1, 2).unflatten(2, tokens.grid[2:]))
        return Features(self.ln2(mean_of(x_bnd, mask)), x_bnd, x_bnd[:, :0], maps, tapped)

    def _map(self, x_bdhw: Tensor) -> Tensor:
        """(B, D, H / stride, W / stride): of every cell of `stride` pixels the mean of the tokens that cover it."""
        across = self.config.patch // self.config.stride
        around = (across - 1,) * 4
        sum_bdhw, count_11hw = (F.avg_pool2d(F.pad(m, around), across, 1) for m in (x_bdhw, torch.ones_like(x_bdhw[:1, :1])))
        return sum_bdhw / count_11hw


def from_published(state: Mapping[str, Tensor], config: RSMambaConfig) -> dict[str, Tensor]:
    """`RSMamba`'s parameters from a published backbone's, without or with the prefix of its classifier (`backbone.`), whose
    head (`head.`) is left out. `fill` has no published counterpart and is zero.

    Raises ValueError for keys left over or missing, and for other shapes.
    """
    ours: dict[str, Tensor] = {"fill": torch.zeros(config.bands)}
    mixers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        parts = name.removeprefix("backbone.").split(".")
        if parts[0] == "layers":
            mixers.setdefault(parts[1], {})[".".join(parts[2:])] = tensor
        elif parts[0] == "gate_layers":
            ours[f"blocks.{parts[1]}.gate.weight"] = tensor
        elif parts[0] != "head":
            ours[".".join(parts).replace("patch_embed.projection.", "patch_embed.")] = tensor
    for layer, part in mixers.items():
        ours |= {
            f"blocks.{layer}.mixer.{name}": tensor for name, tensor in mixer_from_published(part, f"layers.{layer}.").items()
        }
    return fitting(ours, RSMamba, config)
