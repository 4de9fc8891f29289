"""SatMAE++ (Noman et al. 2024, arXiv:2403.05419): SatMAE that also predicts its image at twice and four times the resolution.

Letters: b sample, c channel, h w pixels, g group of bands, n places of the raster, m masked tokens, d width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swath.backbones.base import Backbone, Context, Recomputed
from swath.backbones.vit import EPS
from swath.pretrain.decoder import Decoder
from swath.pretrain.masking import Mask, check_ratio, encode, mask_images, token_weights
from swath.pretrain.objective import Draws, Objective, Outcome, context, of_samples, register, seen_pixels
from swath.pretrain.objectives.satmae import (
    check_compat,
    check_widths,
    from_published,
    group_of_channel,
    image_of,
    pasted,
    patch_sums,
    per_group,
    positions,
    refused_product,
    token_errors,
)
from swath.pretrain.pixels import PixelHead
from swath.shards.prepare import Batch


@dataclass(frozen=True)
class SatMAEPPConfig:
    """`blocks` double the resolution one after the other: two as published for ten bands, one for RGB. The loss is
    `pixel_weight` · mean squared error of masked tokens + `scale_weight` · the mean over blocks of their absolute errors, over
    all pixels as published, with `masked_only` over those of masked tokens.

    `spatial_mask`, `group_width` and `compat` are SatMAE's; the prediction enters the blocks in the order of its channels.
    """

    mask_ratio: float = 0.75
    spatial_mask: bool = False
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    mlp_ratio: float = 4.0
    group_width: int = 128
    blocks: int = 2
    pixel_weight: float = 0.6
    scale_weight: float = 0.4
    masked_only: bool = False
    compat: Literal["order"] | None = None


class UpBlock(Recomputed):
    """Features at twice the resolution; `image` makes an image of them. Tensors (B, C, H, W) are channels-last in memory."""

    def __init__(self, bands: int, width: int) -> None:
        super().__init__()
        self.up_conv = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
        self.up_norm = nn.LayerNorm(width, eps=EPS)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.res_norm = nn.LayerNorm(width, eps=EPS)
        self.emit = nn.Conv2d(width, bands, 3, padding=1)
        for convolution in (self.conv1, self.conv2, self.emit):  # the transposed one keeps torch's default
            nn.init.xavier_uniform_(convolution.weight)
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)

    def compute(self, x_bchw: Tensor) -> Tensor:
        x_bchw = F.leaky_relu(over_channels(self.up_norm, self.up_conv(x_bchw)), inplace=True)
        inner = self.conv2(F.relu(self.conv1(x_bchw), inplace=True))
        return over_channels(self.res_norm, torch.add(x_bchw, inner, alpha=0.5))

    def image(self, x_bchw: Tensor) -> Tensor:
        # The bias is added here: oneDNN sums its gradient, of an absolute error all ±1, term by term, and loses three digits.
        assert self.emit.bias is not None
        return F.conv2d(x_bchw, self.emit.weight, padding=1) + self.emit.bias[:, None, None]


class Upsampling(nn.Module):
    """A predicted image (B, C, H, W) → images at 2, 4, … times its size, one for each block."""

    def __init__(self, bands: int, blocks: int) -> None:
        super().__init__()
        width = 4 * bands
        self.enter = nn.Conv2d(bands, width, 1)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.blocks = nn.ModuleList([UpBlock(bands, width) for _ in range(blocks)])

    def forward(self, x_bchw: Tensor) -> list[Tensor]:
        x_bchw = F.gelu(self.enter(x_bchw.contiguous(memory_format=torch.channels_last)))
        x_bchw = over_channels(self.norm, x_bchw)
        images = []
        for block in self.blocks:
            assert isinstance(block, UpBlock)
            x_bchw = block(x_bchw)
            images.append(block.image(x_bchw))
        return images


def over_channels(norm: nn.LayerNorm, x_bchw: Tensor) -> Tensor:
    """Of channels-last memory, which this neither copies nor leaves."""
    return norm(x_bchw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@dataclass
class Scales:
    """Images (B, C, H, W) at 1, 2, 4, … times the backbone's size and which of their pixels are valid, (B, 1, H, W) or None."""

    images: list[Tensor]
    valid: list[Tensor | None]


def halves(images_bchw: Tensor, valid_b1hw: Tensor | None, times: int) -> Scales:
    """The images halved so often, smallest first: bilinear by ½ without anti-aliasing, which is the mean of 2 × 2 pixels, here of
    the valid ones; valid where at least two of the four are."""
    images, valid = [images_bchw], [valid_b1hw]
    for _ in range(times):
        small_bchw = F.avg_pool2d(images[0], 2)
        if (mask := valid[0]) is not None:
            share_b1hw = F.avg_pool2d(mask.float(), 2)
            mask = share_b1hw >= 0.5
            small_bchw = torch.where(mask, small_bchw / share_b1hw.clamp_min(0.25), 0.0)
        images.insert(0, small_bchw)
        valid.insert(0, mask)
    return Scales(images, valid)


@register(SatMAEPPConfig, {"satmae_pp": {}})
class SatMAEPP(Objective):
    """Masked reconstruction at the backbone's resolution, and absolute error at finer ones of what blocks of convolutions make of
    the whole prediction. Every term is a mean within its sample, over valid pixels of at least half valid tokens."""

    needs = frozenset({"sparse"})

    @classmethod
    def refusal(cls, backbone: Backbone) -> str | None:
        if reason := refused_product(backbone) or super().refusal(backbone):
            return reason
        if backbone.grid(backbone.mask_unit, backbone.mask_unit)[0] > 1:
            return "it predicts one image, and this backbone takes several dates; satmae does that"
        return None

    def __init__(
        self, config: SatMAEPPConfig, backbone: Backbone, image_size: tuple[int, int], channels: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        if config.blocks < 1:
            raise ValueError(f"blocks must be at least 1, not {config.blocks}: satmae and mae have none")
        if config.pixel_weight < 0 or config.scale_weight < 0:
            raise ValueError(f"pixel_weight {config.pixel_weight} and scale_weight {config.scale_weight} must be at least 0")
        self.scale = 2**config.blocks
        check_ratio(backbone, image_size, config.mask_ratio, config.spatial_mask)
        grid = backbone.grid(*image_size)
        check_compat(config.compat, grid)
        check_widths(config.decoder_width, grid, config.group_width)
        width = config.decoder_width
        self.decoder = Decoder(backbone.width, width, config.decoder_depth, config.decoder_heads, config.mlp_ratio)
        # a modality has a head of its own
        self.heads, self.up = nn.ModuleDict(), nn.ModuleDict()
        for name, count in channels.items():
            groups = backbone.channels if grid[1] > 1 else (tuple(range(count)),)
            self.heads[name] = PixelHead(width, groups, backbone.mask_unit, shared=False)
            self.up[name] = Upsampling(count, config.blocks)

    def forward(self, batch: Batch, draw: Draws) -> Outcome:
        ((modality, images_bchw),) = batch.images.items()
        height, width = images_bchw.shape[2:]
        if height % self.scale or width % self.scale:
            raise ValueError(f"images must be {self.scale} times as large as the backbone's, not {height}×{width}")
        scales = halves(*seen_pixels(batch, modality), self.config.blocks)
        return self.compare(scales, modality, batch.weight, context(batch, modality, self.backbone, draw, self.scale), draw)

    def compare(self, scales: Scales, modality: str, weight_b: Tensor, ctx: Context, draw: Draws) -> Outcome:
        """Predict and compare, given the images of every scale."""
        config, head = self.config, self.heads[modality]
        assert isinstance(head, PixelHead)
        images_bchw, valid_b1hw = scales.images[0], scales.valid[0]
        mask = mask_images(self.backbone, images_bchw, valid_b1hw, draw, config.mask_ratio, config.spatial_mask)
        made = self.predict(images_bchw, modality, mask, ctx)
        counts_bm = token_weights(torch.ones_like(weight_b), mask)
        weight_b = weight_b * (counts_bm.sum(dim=1) > 0)
        error_bm = token_errors(made[0], images_bchw, valid_b1hw, head).gather(1, mask.masked_bm)
        pixels_b = (error_bm * counts_bm).sum(dim=1) / counts_bm.sum(dim=1).clamp_min(1)
        area_bcn = self._area(mask, counts_bm)[:, group_of_channel(head)]
        finer = [
            absolute(one, target, valid, area_bcn, head.patch * 2**number)
            for number, (one, target, valid) in enumerate(zip(made, scales.images, scales.valid, strict=True))
            if number
        ]
        share = config.scale_weight / config.blocks
        parts = {"pixels": (config.pixel_weight, pixels_b)}
        parts |= {f"l1_{2**number}x": (share, error_b) for number, error_b in enumerate(finer, start=1)}

        def picture() -> dict[str, Tensor]:
            return pasted(made[0], images_bchw, mask, head)

        return of_samples(parts, weight_b, modality, picture)

    def predict(self, images_bchw: Tensor, modality: str, mask: Mask, ctx: Context) -> list[Tensor]:
        """Images at 1, 2, … times the backbone's size, visible places too. With `compat` order their channels are compared with
        the image's one by one."""
        prefix_bpd, tokens_bkd = encode(self.backbone, images_bchw, ctx, mask)
        config, head = self.config, self.heads[modality]
        assert isinstance(head, PixelHead)
        place, prefix = positions(config.decoder_width, mask.grid, tokens_bkd.device, config.group_width)
        x_bnd = self.decoder(prefix_bpd, tokens_bkd, mask, place, prefix, everywhere=True)
        made_bchw = image_of(per_group(head, x_bnd), head, mask.grid, config.compat)
        return [made_bchw, *self.up[modality](made_bchw)]

    def _area(self, mask: Mask, counts_bm: Tensor) -> Tensor:
        """(B, G, N) which tokens' pixels count at finer scales, as 0 or 1."""
        tokens = mask.grid[1] * mask.grid[2] * mask.grid[3]
        if self.config.masked_only:
            area_bn = counts_bm.new_zeros(len(counts_bm), tokens).scatter(1, mask.masked_bm, counts_bm)
        else:
            area_bn = counts_bm.new_ones(len(counts_bm), tokens) if mask.valid_bn is None else mask.valid_bn.to(counts_bm.dtype)
        return area_bn.unflatten(1, (mask.grid[1], -1))


def absolute(made_bchw: Tensor, target_bchw: Tensor, valid_b1hw: Tensor | None, area_bcn: Tensor, patch: int) -> Tensor:
    """(B,) mean absolute error over valid pixels of the patches whose `area` is 1; 0 where there are none."""
    error_bchw = (made_bchw.float() - target_bchw).abs()
    if valid_b1hw is None:
        count_b1n = area_bcn.new_tensor(float(patch**2))
    else:
        error_bchw = torch.where(valid_b1hw, error_bchw, 0.0)
        count_b1n = patch_sums(valid_b1hw, patch)
    total_b = (patch_sums(error_bchw, patch) * area_bcn).sum(dim=(1, 2))
    return total_b / (count_b1n * area_bcn).sum(dim=(1, 2)).clamp_min(1)


def load_published(objective: SatMAEPP, state: dict[str, Tensor]) -> None:
    """Load the published code's `model` dictionary, of groups or RGB, strict about every key and table; see `satmae`."""
    (modality,) = objective.heads
    head, config = objective.heads[modality], objective.config
    assert isinstance(head, PixelHead)
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(("proj_up_", "up_block"))}
    ours = from_published(
        rest, objective.backbone, head, f"heads.{modality}", config.decoder_width, config.group_width, 0, config.compat
    )  # fmt: skip
    ours |= {published_up_name(name, modality): tensor for name, tensor in state.items() if name not in rest}
    objective.load_state_dict(ours, strict=True)


def published_up_name(name: str, modality: str) -> str:
    """What a parameter of the published upsampling head is called here. Its blocks count from 1; a single one has no number."""
    part, _, rest = name.partition(".")
    if part.startswith("up_block"):
        number = int(part.removeprefix("up_block") or 1) - 1
        return f"up.{modality}.blocks.{number}.{rest.removeprefix('res_block.').replace('proj_out', 'emit')}"
    return f"up.{modality}.{part.replace('proj_up_conv', 'enter').replace('proj_up_norm', 'norm')}.{rest}"
