"""A CNN beside a Mamba column, fused scale by scale (after AFM-Net, arXiv 2510.27155).

The published repository lacks its attention and expert blocks, and no weights are published: `Fusion` and `Experts` follow the
description. Letters: b sample, c channel (or band, of images), h w rows and columns, k way, n tokens, l tokens with the class
token, d width, e inner width, x expert.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swath.backbones.base import Backbone, Context, Features, Keep, Recomputed, Tokens, register
from swath.backbones.dynamicvis import RMSNorm, SharedMixer
from swath.backbones.grid import boxes, check_images, pyramid_grid, refuse_keep, resize_positions
from swath.kernels.linear import Linear

PATCH, STRIDES = 16, (8, 16, 32)


def conv_norm(bands: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(bands, width, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width))


class Bottleneck(Recomputed):
    """ResNet's (He et al. 2016), with the stride in the 3×3 convolution."""

    def __init__(self, bands: int, width: int, stride: int) -> None:
        super().__init__()
        self.reduce, self.conv, self.expand = (
            conv_norm(bands, width, 1),
            conv_norm(width, width, 3, stride),
            conv_norm(width, 4 * width, 1),
        )
        self.skip = conv_norm(bands, 4 * width, 1, stride) if stride > 1 or bands != 4 * width else nn.Identity()

    def compute(self, x_bchw: Tensor) -> Tensor:
        y_bchw = self.expand(F.relu(self.conv(F.relu(self.reduce(x_bchw)))))
        return F.relu(self.skip(x_bchw) + y_bchw)


class Scan(Recomputed):
    """x += sum over three ways of g_k Mixer(norm(x)): forward, shuffled, reversed, with the same weights; g = softmax of a linear
    map of the ways' means. `turn` (N, D/2): angles by which pairs of channels of all but the class token turn (RoPE)."""

    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.mixer = SharedMixer(width, states)
        self.gate = Linear(3 * width, 3, bias=False)

    def compute(self, x_bld: Tensor, order_kl: Tensor, turn_nd: Tensor) -> Tensor:
        first, rest = self.norm(x_bld).split([1, x_bld.shape[1] - 1], dim=1)
        even, odd = rest.unflatten(2, (-1, 2)).unbind(dim=3)
        cos, sin = turn_nd.cos().to(rest.dtype), turn_nd.sin().to(rest.dtype)
        turned_bnd = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=3).flatten(2)
        y_kble = self.mixer.along(torch.cat([first, turned_bnd], dim=1), order_kl, None, "none")
        # out_proj is linear: of the means instead of all tokens of all ways
        mean_bkd = self.mixer.out_proj(y_kble.mean(dim=2).transpose(0, 1))
        share_bk = self.gate(mean_bkd.flatten(1)).softmax(dim=1)
        return x_bld + self.mixer.out_proj(torch.einsum("bk,kble->ble", share_bk.to(y_kble.dtype), y_kble))


class Fusion(Recomputed):
    """A bottleneck of depthwise separable convolutions, gated by channel and by place.

    The channel gate sees the lowest 2 × 2 components of each channel's cosine transform (frequency-enhanced attention).
    """

    def __init__(self, bands: int, width: int) -> None:
        super().__init__()
        inner = max(8, bands // 8)
        self.inside = nn.Sequential(
            conv_norm(bands, inner, 1), nn.GELU(), conv_norm(inner, inner, 3, groups=inner), conv_norm(inner, width, 1), nn.GELU()
        )
        self.channel = nn.Sequential(Linear(4 * width, max(8, width // 4)), nn.GELU(), Linear(max(8, width // 4), width))
        self.place = nn.Conv2d(2, 1, 7, padding=3)
        self.skip = conv_norm(bands, width, 1)

    def compute(self, x_bchw: Tensor) -> Tensor:
        y_bchw = self.inside(x_bchw)
        upright, across = (cosines(count, y_bchw) for count in y_bchw.shape[2:])
        component_bcuv = torch.einsum("bchw,uh,vw->bcuv", y_bchw, upright, across)
        y_bchw = y_bchw * self.channel(component_bcuv.flatten(1)).sigmoid()[:, :, None, None]
        summary = torch.cat([y_bchw.mean(dim=1, keepdim=True), y_bchw.amax(dim=1, keepdim=True)], dim=1)
        return self.skip(x_bchw) + y_bchw * self.place(summary).sigmoid()


def cosines(count: int, like: Tensor) -> Tensor:
    """(2, count): the mean, and the slowest cosine, as weights of a mean."""
    place = (torch.arange(count, device=like.device) + 0.5) / count
    return (torch.stack([torch.ones_like(place), (math.pi * place).cos()]) / count).to(like.dtype)


class Experts(nn.Module):
    """x + shared(x) + the `top` SwiGLU experts that a softmax router likes best, each by its share (DeepSeek-V2)."""

    def __init__(self, width: int, experts: int, top: int) -> None:
        super().__init__()
        self.top = top
        hidden = width // 2
        self.router = Linear(width, experts, bias=False)
        self.enter = nn.Parameter(torch.empty(experts + 1, 2 * hidden, width))
        self.leave = nn.Parameter(torch.empty(experts + 1, width, hidden))
        nn.init.uniform_(self.enter, -(width**-0.5), width**-0.5)
        nn.init.uniform_(self.leave, -(hidden**-0.5), hidden**-0.5)

    def forward(self, x_bd: Tensor) -> Tensor:
        share_bx = self.router(x_bd).float().softmax(dim=1)
        best_bt = share_bx.argsort(dim=1, descending=True, stable=True)[:, : self.top]
        share_bx = torch.zeros_like(share_bx).scatter(1, best_bt, share_bx.gather(1, best_bt))
        # one vector a sample: all experts at once cost less than sorting samples among them
        gate_bxe, value_bxe = torch.einsum("xed,bd->bxe", self.enter, x_bd).chunk(2, dim=2)
        out_bxd = torch.einsum("xde,bxe->bxd", self.leave, F.silu(gate_bxe) * value_bxe)
        weight_bx = F.pad(share_bx, (1, 0), value=1.0).to(out_bxd.dtype)  # the first is shared by all
        return x_bd + torch.einsum("bx,bxd->bd", weight_bx, out_bxd)


@dataclass
class BranchTokens(Tokens):
    """x (B, N, D): the Mamba branch's patches; stem (B, C, H/4, W/4): the CNN's."""

    stem: Tensor | None = None


@dataclass(frozen=True)
class AFMConfig:
    """CNN of bottlenecks (4 × `cnn_widths` channels, `cnn_depths`); Mamba branch of `width`, read after `depths` blocks; both
    are brought to `adapter` channels, and fused to `fused` at strides 8, 16 and 32. `image_size` is that of learned positions."""

    bands: int
    image_size: int = 224
    cnn_widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    cnn_depths: tuple[int, int, int, int] = (3, 4, 6, 3)
    width: int = 192
    depths: tuple[int, int, int] = (3, 3, 4)
    states: int = 16
    adapter: int = 128
    fused: int = 256
    experts: int = 8
    top: int = 2


@register(AFMConfig, {"afm_small": {}})
class AFM(Backbone):
    """Tokens are the fused map at stride 32; pooled is what the experts make of the means of all three fused maps.

    Taps are numbered by the Mamba branch's blocks. The shuffled way is one fixed permutation for each number of tokens.
    """

    band_axes: ClassVar = {"stem.0.0.weight": 1, "patch_embed.weight": 1, "fill": 0}
    tiny: ClassVar = {
        "bands": 3, "image_size": 64, "cnn_widths": (4, 4, 8, 8), "cnn_depths": (1, 1, 1, 1), "width": 16, "depths": (1, 1, 1),
        "states": 4, "adapter": 8, "fused": 16, "experts": 3,
    }  # fmt: skip

    def __init__(self, config: AFMConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.width, self.pooled_width = config.fused, 3 * config.fused
        self.depth, self.mask_unit = sum(config.depths), STRIDES[-1]
        self.fill = nn.Parameter(torch.zeros(config.bands))
        self.stem = nn.Sequential(conv_norm(config.bands, config.cnn_widths[0], 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        before, layers = config.cnn_widths[0], []
        for stage, (width, depth) in enumerate(zip(config.cnn_widths, config.cnn_depths, strict=True)):
            blocks = [Bottleneck(before if n == 0 else 4 * width, width, 2 if n == 0 and stage else 1) for n in range(depth)]
            before = 4 * width
            layers.append(nn.Sequential(*blocks))
        self.layers = nn.ModuleList(layers)
        self.patch_embed = nn.Conv2d(config.bands, config.width, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (config.image_size // PATCH) ** 2, config.width))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.02)
        self.scans = nn.ModuleList(
            nn.ModuleList([Scan(config.width, config.states) for _ in range(depth)]) for depth in config.depths
        )
        self.cnn_adapters = nn.ModuleList([nn.Conv2d(4 * width, config.adapter, 1) for width in config.cnn_widths[1:]])
        self.scan_adapters = nn.ModuleList([Linear(config.width, config.adapter) for _ in STRIDES])
        self.fusions = nn.ModuleList([Fusion(2 * config.adapter + n * config.fused, config.fused) for n in range(3)])
        self.experts = Experts(self.pooled_width, config.experts, config.top)

    def grid(self, height: int, width: int) -> tuple[int, int, int, int]:
        return pyramid_grid(height, width, self.mask_unit)

    def tokenize(self, images_bchw: Tensor, ctx: Context | None = None, keep: Keep | None = None) -> BranchTokens:
        """Both branches' first maps; grid and boxes are those of the last stage."""
        check_images(images_bchw, self.config.bands)
        refuse_keep(keep)
        grid = self.grid(images_bchw.shape[2], images_bchw.shape[3])
        x_bnd = self.patch_embed(images_bchw).flatten(2).mT
        x_bnd = x_bnd + self.positions(2 * grid[2], 2 * grid[3]).to(x_bnd.dtype)
        return BranchTokens(x_bnd, grid, boxes(grid, self.mask_unit, images_bchw.device), stem=self.stem(images_bchw))

    def positions(self, rows: int, columns: int) -> Tensor:
        """(rows · columns, D), interpolated where the grid is not that of `image_size`."""
        side = self.config.image_size // PATCH
        return resize_positions(self.pos_embed, (side, side), (rows, columns))

    def turns(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """(rows · columns, D/2) angles: the first half by row, the second by column, in patches of an `image_size` image."""
        quarter, side = self.config.width // 4, self.config.image_size // PATCH
        speed = 10000.0 ** (-torch.arange(quarter, device=device) / quarter)
        row, column = (((torch.arange(n, device=device) + 0.5) * side / n - 0.5)[:, None] * speed for n in (rows, columns))
        both = [row[:, None].expand(-1, columns, -1), column[None].expand(rows, -1, -1)]
        return torch.cat(both, dim=2).flatten(0, 1)

    def encode(self, tokens: Tokens, keep: Keep | None = None, taps: Sequence[int] = ()) -> Features:
        refuse_keep(keep)
        if not isinstance(tokens, BranchTokens) or tokens.stem is None:
            raise ValueError(f"tokens must be those of AFM.tokenize, which hold both branches, not {type(tokens).__name__}")
        rows, columns = 2 * tokens.grid[2], 2 * tokens.grid[3]
        x_bld = torch.cat([self.cls_token.to(tokens.x.dtype).expand(len(tokens.x), -1, -1), tokens.x], dim=1)
        order_kl, turn_nd = ways(x_bld.shape[1], x_bld.device), self.turns(rows, columns, x_bld.device)
        tapped = {-1: x_bld} if -1 in taps else {}
        map_bchw, fused, maps, number = self.layers[0](tokens.stem), [], {}, 0
        parts = (self.layers[1:], self.scans, self.cnn_adapters, self.scan_adapters, self.fusions)
        for stride, layer, scans, cnn_adapter, scan_adapter, fusion in zip(STRIDES, *parts, strict=True):
            map_bchw = layer(map_bchw)
            assert isinstance(scans, nn.ModuleList)
            for scan in scans:
                x_bld = scan(x_bld, order_kl, turn_nd)
                if number in taps:
                    tapped[number] = x_bld
                number += 1
            scanned = scan_adapter(x_bld[:, 1:]).mT.unflatten(2, (rows, columns))
            size = map_bchw.shape[2:]
            near = [cnn_adapter(map_bchw), F.interpolate(scanned, size, mode="bilinear", align_corners=False)]
            earlier = [F.adaptive_avg_pool2d(map_of, size) for map_of in fused]
            maps[stride] = fusion(torch.cat([*near, *earlier], dim=1))
            fused.append(maps[stride])
        x_bnd = fused[-1].flatten(2).mT
        pooled = self.experts(torch.cat([map_of.mean(dim=(2, 3)) for map_of in fused], dim=1))
        return Features(pooled, x_bnd, x_bnd[:, :0], maps, tapped)


def ways(length: int, device: torch.device) -> Tensor:
    """(3, length): forward, shuffled (the fractional parts of the golden ratio's multiples, sorted), reversed."""
    forth = torch.arange(length, device=device)
    shuffled = (forth.double() * 0.6180339887498949 % 1).argsort(stable=True)
    return torch.stack([forth, shuffled, forth.flip(0)])


def _check(config: AFMConfig) -> None:
    if config.bands < 1 or min(*config.depths, config.experts, config.top) < 1 or min(config.cnn_depths) < 1:
        raise ValueError(f"bands, depths, experts and top must be at least 1: {config}")
    if config.width % 4:
        raise ValueError(f"width {config.width} must be divisible by 4, for positions that turn by row and column")
    pyramid_grid(config.image_size, config.image_size, STRIDES[-1])
