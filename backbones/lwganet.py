"""LWGANet: a light pyramid whose blocks look at four ranges with a quarter of the channels each (arXiv 2501.10040).

Letters: b sample, c channel (or band, of images), h w rows and columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swath.backbones.base import Backbone, Context, Features, Keep, Recomputed, Tokens, register
from swath.backbones.dynamicvis import STRIDES
from swath.backbones.grid import boxes, check_images, pyramid_grid, refuse_keep
from swath.kernels.linear import Linear

# What a classifier owns in a published file.
NOT_OURS = ("avgpool_pre_head.", "head.")


class Downsample(nn.Module):
    """Half the size, twice the channels: a strided convolution beside a maximum (their "DRFD")."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 2 * width, 3, 1, 1, groups=width)
        self.conv_c = nn.Conv2d(2 * width, 2 * width, 3, 2, 1, groups=2 * width)
        self.norm_c = nn.BatchNorm2d(2 * width)
        self.norm_m = nn.BatchNorm2d(2 * width)
        self.fusion = nn.Conv2d(4 * width, 2 * width, 1)

    def forward(self, x_bchw: Tensor) -> Tensor:
        x_bchw = self.conv(x_bchw)
        largest = self.norm_m(F.max_pool2d(x_bchw, 3, 2, 1))
        return self.fusion(torch.cat([self.norm_c(F.gelu(self.conv_c(x_bchw))), largest], dim=1))


class PointGate(nn.Module):
    """x · sigmoid of two 1×1 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.p_conv = nn.Sequential(
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.BatchNorm2d(4 * width),
            nn.GELU(),
            nn.Conv2d(4 * width, width, 1, bias=False),
        )

    def forward(self, x_bchw: Tensor) -> Tensor:
        return x_bchw * self.p_conv(x_bchw).sigmoid()


class StripGate(nn.Module):
    """x · sigmoid of long thin convolutions, upright and along both diagonals, at a third of the resolution."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        upright = {"kernel_size": (kernel, 3), "padding": (kernel // 2, 1), "groups": width, "bias": False}
        level = {"kernel_size": (3, kernel), "padding": (1, kernel // 2), "groups": width, "bias": False}
        self.H_att1, self.H_att2 = nn.Conv2d(width, width, **upright), nn.Conv2d(width, width, **upright)
        self.V_att1, self.V_att2 = nn.Conv2d(width, width, **level), nn.Conv2d(width, width, **level)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x_bchw: Tensor) -> Tensor:
        largest = F.max_pool2d(x_bchw, 3, 1, 1)
        # a reflection needs more pixels than it is wide
        edge = "reflect" if min(x_bchw.shape[2:]) > 2 else "replicate"
        filter_c1pq = blur(x_bchw.shape[1]).to(x_bchw)  # made here: what is not a weight does not survive loading
        small = F.conv2d(F.pad(largest, (1, 2, 1, 2), edge), filter_c1pq, stride=3, groups=x_bchw.shape[1])
        along = unshear(self.H_att2(shear(small)))
        across = unshear(self.V_att2(shear(small.mT).mT).mT).mT
        gate = self.norm(self.H_att1(small) + self.V_att1(small) + along + across).sigmoid()
        return x_bchw * F.interpolate(gate, x_bchw.shape[2:], mode="nearest")


def blur(width: int) -> Tensor:
    """(C, 1, 4, 4): the binomial filter of anti-aliased pooling (Zhang 2019)."""
    row = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return (row[:, None] * row / 64).repeat(width, 1, 1, 1)


def shear(x_bchw: Tensor) -> Tensor:
    """(B, C, H, W + H - 1): row r moved right by r, so that diagonals stand upright."""
    height, width = x_bchw.shape[2:]
    return F.pad(x_bchw, (0, height)).flatten(2)[..., :-height].unflatten(2, (height, width + height - 1))


def unshear(x_bchw: Tensor) -> Tensor:
    """Back from `shear`: (B, C, H, W)."""
    height = x_bchw.shape[2]
    return F.pad(x_bchw.flatten(2), (0, height)).unflatten(2, (height, -1))[..., : x_bchw.shape[3] - height + 1]


def pool(x_bchw: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each 2×2, and where it stood."""
    return F.max_pool2d(x_bchw, 2, return_indices=True)


def unpool(x_bchw: Tensor, index_bchw: Tensor) -> Tensor:
    """Back where the largest stood, 0 elsewhere."""
    batch, width, height, columns = x_bchw.shape
    out_bcn = x_bchw.new_zeros(batch, width, 4 * height * columns)
    return out_bcn.scatter(2, index_bchw.flatten(2), x_bchw.flatten(2)).unflatten(2, (2 * height, 2 * columns))


class WideGate(nn.Module):
    """Two large receptive fields weighed place by place, on pooled maps (as LSK; stages 1 and 2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(width, width, 1)
        self.conv0 = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.conv_spatial = nn.Conv2d(width, width, 7, padding=9, groups=width, dilation=3)
        self.conv1 = nn.Conv2d(width, width // 2, 1)
        self.conv2 = nn.Conv2d(width, width // 2, 1)
        self.conv_squeeze = nn.Conv2d(2, 2, 7, padding=3)
        self.conv = nn.Conv2d(width // 2, width, 1)
        self.proj_2 = nn.Conv2d(width, width, 1)

    def forward(self, x_bchw: Tensor) -> Tensor:
        x_bchw, index = pool(x_bchw)
        x_bchw = F.gelu(self.proj_1(x_bchw))
        near = self.conv0(x_bchw)
        near, far = self.conv1(near), self.conv2(self.conv_spatial(near))
        both = torch.cat([near, far], dim=1)
        summary = torch.cat([both.mean(dim=1, keepdim=True), both.amax(dim=1, keepdim=True)], dim=1)
        share = self.conv_squeeze(summary).sigmoid()
        gate = self.conv(near * share[:, :1] + far * share[:, 1:])
        return unpool(self.proj_2(x_bchw * gate), index)


class GlobalAttention(nn.Module):
    """Self-attention with heads of 4 channels; on pooled maps in stage 3."""

    def __init__(self, width: int, head: int = 4) -> None:
        super().__init__()
        self.head = head
        inner = max(1, width // head) * head
        self.qkv = Linear(width, 3 * inner, bias=False)
        self.proj = Linear(inner, width, bias=False)

    def forward(self, x_bchw: Tensor) -> Tensor:
        qkv = self.qkv(x_bchw.flatten(2).mT).unflatten(2, (3, -1, self.head))
        q_bhne, k_bhne, v_bhne = qkv.permute(2, 0, 3, 1, 4)
        y_bhne = F.scaled_dot_product_attention(q_bhne, k_bhne, v_bhne)
        return self.proj(y_bhne.transpose(1, 2).flatten(2)).mT.unflatten(2, x_bchw.shape[2:])


class PooledAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.attn = GlobalAttention(width)

    def forward(self, x_bchw: Tensor) -> Tensor:
        x_bchw, index = pool(x_bchw)
        return unpool(self.norm(self.attn(x_bchw)), index)


class Block(Recomputed):
    """A quarter of the channels through each range, then an MLP; one residual around both.

    Recomputed in training, its batch norms see each batch twice, and their running statistics move twice as fast.
    """

    def __init__(self, width: int, stage: int, kernel: int, mlp_ratio: float) -> None:
        super().__init__()
        quarter, hidden = width // 4, int(width * mlp_ratio)
        self.mlp = nn.Sequential(
            nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.GELU(), nn.Conv2d(hidden, width, 1, bias=False)
        )
        self.PA = PointGate(quarter)
        self.LA = nn.Sequential(nn.Conv2d(quarter, quarter, 3, 1, 1, bias=False), nn.BatchNorm2d(quarter), nn.GELU())
        self.MRA = StripGate(quarter, kernel)
        self.GA = WideGate(quarter) if stage < 2 else PooledAttention(quarter) if stage == 2 else GlobalAttention(quarter)
        self.norm = nn.Identity() if stage == 2 else nn.BatchNorm2d(quarter)
        self.norm1 = nn.BatchNorm2d(width)

    def compute(self, x_bchw: Tensor) -> Tensor:
        point, near, middle, wide = x_bchw.chunk(4, dim=1)
        ranges = (point + self.PA(point), self.LA(near), self.MRA(middle), self.norm(wide + self.GA(wide)))
        return x_bchw + self.norm1(self.mlp(torch.cat(ranges, dim=1)))


@dataclass(frozen=True)
class LWGANetConfig:
    """`width` of the first stage, doubled by each. There are no positions: `image_size` is what the network is made for."""

    bands: int
    image_size: int = 224
    width: int = 64
    depths: tuple[int, int, int, int] = (1, 2, 4, 2)
    kernel: int = 11
    mlp_ratio: float = 2.0


_SIZES = {
    "l0": {"width": 32, "depths": (1, 2, 4, 2)},
    "l1": {"width": 64, "depths": (1, 2, 4, 2)},
    "l2": {"width": 96, "depths": (1, 4, 4, 2)},
}
_SIZES["small"] = _SIZES["l1"]


@register(LWGANetConfig, {f"lwganet_{size}": options for size, options in _SIZES.items()})
class LWGANet(Backbone):
    """Four stages at strides 4, 8, 16 and 32. Tokens are the last stage's; what is masked is masked in pixels. `small` is L1."""

    band_axes: ClassVar = {"stem.0.weight": 1, "fill": 0}
    tiny: ClassVar = {"bands": 3, "image_size": 64, "width": 16, "depths": (1, 1, 1, 1)}

    def __init__(self, config: LWGANetConfig) -> None:
        super().__init__()
        if config.bands < 1 or min(config.depths) < 0 or config.width % 8 or config.kernel % 2 == 0:
            raise ValueError(f"bands must be at least 1, depths at least 0, width divisible by 8, kernel odd: {config}")
        pyramid_grid(config.image_size, config.image_size, STRIDES[-1])
        self.config = config
        self.width = self.pooled_width = 8 * config.width
        self.depth, self.mask_unit = sum(config.depths), STRIDES[-1]
        self.fill = nn.Parameter(torch.zeros(config.bands))
        self.stem = nn.Sequential(nn.Conv2d(config.bands, config.width, 4, 4, bias=False), nn.BatchNorm2d(config.width))
        self.stages = nn.ModuleList(
            nn.ModuleList([Block(config.width * 2**stage, stage, config.kernel, config.mlp_ratio) for _ in range(depth)])
            for stage, depth in enumerate(config.depths)
        )
        self.downs = nn.ModuleList([Downsample(config.width * 2**stage) for stage in range(3)])
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def grid(self, height: int, width: int) -> tuple[int, int, int, int]:
        return pyramid_grid(height, width, self.mask_unit)

    def tokenize(self, images_bchw: Tensor, ctx: Context | None = None, keep: Keep | None = None) -> Tokens:
        """The stem's map as (B, H/4 · W/4, D); grid and boxes are those of the last stage."""
        check_images(images_bchw, self.config.bands)
        refuse_keep(keep)
        grid = self.grid(images_bchw.shape[2], images_bchw.shape[3])
        return Tokens(self.stem(images_bchw).flatten(2).mT, grid, boxes(grid, self.mask_unit, images_bchw.device))

    def encode(self, tokens: Tokens, keep: Keep | None = None, taps: Sequence[int] = ()) -> Features:
        refuse_keep(keep)
        x_bchw = tokens.x.mT.unflatten(2, (8 * tokens.grid[2], 8 * tokens.grid[3]))
        tapped = {-1: tokens.x} if -1 in taps else {}
        maps: dict[int, Tensor] = {}
        number = 0
        for stride, stage, down in zip(STRIDES, self.stages, (*self.downs, None), strict=True):
            assert isinstance(stage, nn.ModuleList)
            for block in stage:
                x_bchw = block(x_bchw)
                if number in taps:
                    tapped[number] = x_bchw.flatten(2).mT
                number += 1
            maps[stride] = x_bchw
            x_bchw = x_bchw if down is None else down(x_bchw)
        x_bnd = x_bchw.flatten(2).mT
        return Features(x_bnd.mean(dim=1), x_bnd, x_bnd[:, :0], maps, tapped)


def from_published(state: dict[str, Tensor], config: LWGANetConfig) -> dict[str, Tensor]:
    """Our parameters from a published classifier's, whose head is its own, and which has no fill for masked pixels: ours is 0.

    Raises ValueError where its blur is another one; what else is over, strict loading names.
    """
    ours = {"fill": torch.zeros(config.bands)}
    for name, tensor in state.items():
        if name.startswith(NOT_OURS):
            continue
        if name.endswith("max_m2.filt"):
            if not torch.allclose(tensor, blur(len(tensor))):
                raise ValueError(f"{name} is not the binomial filter of 4×4")
            continue
        parts = name.split(".")
        if parts[0] == "Stem":
            parts[:2] = ["stem", {"proj": "0", "norm": "1"}.get(parts[1], parts[1])]
        elif parts[0] == "stages" and int(parts[1]) % 2:
            parts[:2] = ["downs", str(int(parts[1]) // 2)]
        elif parts[0] == "stages":
            parts[1:3] = [str(int(parts[1]) // 2)]
        ours[
            ".".join("GA" if part in ("GA12", "GA3", "GA4") else part for part in parts if part != "conv" or "LA" not in parts)
        ] = tensor
    return ours
