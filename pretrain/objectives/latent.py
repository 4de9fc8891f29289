"""Latent prediction (I-JEPA: Assran et al. 2023, "Self-Supervised Learning from Images with a Joint-Embedding Predictive
Architecture"; latent MIM: Wei et al. 2024): features instead of pixels are predicted where the mask hides the image.

A teacher, the moving average of the backbone, sees the whole image; what it makes of masked places is the target. Letters: b
sample, r block, m masked, n all tokens, d width, h w rows and columns of the grid.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swath.backbones.base import Backbone, Context, gather
from swath.kernels.linear import Linear
from swath.pretrain.decoder import Decoder, Positions
from swath.pretrain.masking import Mask, check_ratio, encode, mask_images, token_weights, units
from swath.pretrain.objective import Draws, Objective, Outcome, context, register, seen_pixels
from swath.shards.prepare import Batch

AREA, ASPECT = (0.15, 0.2), (0.75, 1.5)  # of a block: share of the image, height over width (Assran et al. 2023, §4)


@dataclass(frozen=True)
class LatentConfig:
    """`blocks` that may be hidden; 0 hides tokens at random, as latent MIM does. `mask_ratio` is exact for every sample: about
    what four blocks cover. `momentum` of the teacher at the start of the run, from where it grows linearly to 1. The published
    predictor is 6 deep beside ViT-B, 12 beside larger ones."""

    mask_ratio: float = 0.5
    blocks: int = 4
    predictor_width: int = 384
    predictor_depth: int = 6
    predictor_heads: int = 12
    momentum: float = 0.996


@register(LatentConfig, {"latent": {}})
class Latent(Objective):
    """Predict the teacher's features of masked, at least half valid tokens, standardised per token: smooth L1 error.

    The paper writes of a squared distance; its code, and its published models, use smooth L1 of standardised targets, and so do
    we: it has no scale to tune, and one odd token cannot rule a step. Two things differ from that code. All masked places are
    predicted in one pass, and see each other, where it predicts block by block. And what is hidden comes from each sample's own
    draw and is of one size, where it cuts all masks of a batch to the smallest: blocks that cover too much are cut, and random
    tokens are added where they cover too little.

    The teacher sees invalid pixels as the mean (0), as the backbone does when its features are used. What is exported and probed
    is the backbone; the teacher is in the checkpoint.
    """

    def __init__(
        self, config: LatentConfig, backbone: Backbone, image_size: tuple[int, int], channels: Mapping[str, int]
    ) -> None:
        super().__init__()
        if config.blocks < 0 or not 0 <= config.momentum <= 1:
            raise ValueError(f"blocks must be at least 0, and momentum between 0 and 1: {config}")
        self.config, self.backbone = config, backbone
        check_ratio(backbone, image_size, config.mask_ratio)
        width = config.predictor_width
        self.teacher = copy.deepcopy(backbone).requires_grad_(False).eval()
        self.predictor = Decoder(backbone.width, width, config.predictor_depth, config.predictor_heads, name="predictor")
        self.positions = Positions(width, units(backbone, *image_size), name="predictor")
        self.head = Linear(width, backbone.width)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> "Latent":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Batch, draw: Draws) -> Outcome:
        ((modality, images_bchw),) = batch.images.items()
        images_bchw, valid_bthw = seen_pixels(batch, modality)
        if self.config.blocks:
            in_blocks = BlockDraws(draw, units(self.backbone, *images_bchw.shape[2:])[2:], self.config.blocks)
            mask = mask_images(self.backbone, images_bchw, valid_bthw, in_blocks, self.config.mask_ratio)
        else:
            mask = mask_images(self.backbone, images_bchw, valid_bthw, draw, self.config.mask_ratio)
        ctx = context(batch, modality, self.backbone, draw)
        position_nd = self.positions(mask.grid, images_bchw.device)
        made_bmd = self.head(self.predictor(*encode(self.backbone, images_bchw, ctx, mask), mask, position_nd))
        error_bm = F.smooth_l1_loss(made_bmd.float(), self.targets(images_bchw, ctx, mask), reduction="none").mean(dim=2)
        weight_bm = token_weights(batch.weight, mask)
        numerator, weight = (error_bm * weight_bm).sum(), weight_bm.sum()
        return Outcome(
            numerator, weight, {f"features/{modality}": (numerator.detach(), weight)}, lambda: self.picture(images_bchw, mask)
        )

    @torch.no_grad()
    def targets(self, images_bchw: Tensor, ctx: Context, mask: Mask) -> Tensor:
        """(B, M, D) float32 features of the masked places as the teacher sees the whole image, each of mean 0 and deviation 1."""
        if mask.keep is not None:
            tokens_bnd = self.teacher(images_bchw, ctx).tokens
        else:  # on the grid of what is hidden, whatever the pyramid's own is
            every_bn = torch.cat([mask.seen_bk, mask.masked_bm], dim=1)
            tokens_bnd = encode(self.teacher, images_bchw, ctx, replace(mask, seen_bk=every_bn))[1]
        return F.layer_norm(gather(tokens_bnd, mask.masked_bm).float(), tokens_bnd.shape[2:])

    def after_start(self) -> None:
        self.teacher.load_state_dict(self.backbone.state_dict())

    @torch.no_grad()
    def after_step(self, skipped: Tensor) -> None:
        """The teacher follows the backbone, unless the step was `skipped`: its weights at 1 - momentum, statistics at once."""
        follow = (1 - self.config.momentum) * (1 - self.progress)
        for theirs, ours in zip(self.teacher.parameters(), self.backbone.parameters(), strict=True):
            theirs.copy_(torch.where(skipped, theirs, theirs.lerp(ours, follow)))
        for theirs, ours in zip(self.teacher.buffers(), self.backbone.buffers(), strict=True):
            theirs.copy_(torch.where(skipped, theirs, ours))

    def picture(self, images_bchw: Tensor, mask: Mask) -> dict[str, Tensor]:
        """The input, and what the backbone saw of it; both (B, C, H, W)."""
        channels = self.backbone.channels if mask.grid[:2] != (1, 1) else (tuple(range(images_bchw.shape[1])),)
        hidden_bn = torch.zeros(len(images_bchw), len(channels) * mask.grid[2] * mask.grid[3], device=images_bchw.device)
        hidden_bghw = hidden_bn.scatter(1, mask.masked_bm, 1.0).unflatten(1, (len(channels), *mask.grid[2:]))
        hidden_bghw = F.interpolate(hidden_bghw, images_bchw.shape[2:]).bool()
        seen_bchw = images_bchw.clone()
        for number, group in enumerate(channels):
            seen_bchw[:, group] = seen_bchw[:, group].masked_fill(hidden_bghw[:, number, None], float("nan"))
        return {"input": images_bchw, "seen": seen_bchw}


class BlockDraws:
    """`draw`, except that a number per token of a raster (of each of its groups alike) is the higher the earlier the block is
    that the token lies in, so that a mask of the highest numbers is made of blocks."""

    def __init__(self, draw: Draws, raster: tuple[int, int], blocks: int) -> None:
        self.draw, self.raster, self.blocks = draw, raster, blocks

    def uniform(self, stream: str, n: int) -> Tensor:
        """(B, n) float32 in [0, 1]: those in the first block highest, those in none lowest, in the order of `draw` among each
        other. A block's size and place are of the stream's own `blocks`."""
        rows, columns = self.raster
        size_br, shape_br, top_br, left_br = (
            self.draw.uniform(f"{stream}/blocks", 4 * self.blocks).double().unflatten(1, (self.blocks, 4)).unbind(2)
        )
        area_br = rows * columns * (AREA[0] + (AREA[1] - AREA[0]) * size_br)
        aspect_br = ASPECT[0] + (ASPECT[1] - ASPECT[0]) * shape_br
        row_brh = _span(top_br, (area_br * aspect_br).sqrt(), rows)
        column_brw = _span(left_br, (area_br / aspect_br).sqrt(), columns)
        inside_brn = (row_brh[..., None] & column_brw[:, :, None]).flatten(2)
        rank_r = torch.arange(self.blocks, 0, -1, device=inside_brn.device)
        rank_bn = (inside_brn * rank_r[:, None]).amax(dim=1).repeat(1, n // (rows * columns))
        return (self.draw.uniform(stream, n) + rank_bn) / (self.blocks + 1)

    def order(self, stream: str, n: int) -> Tensor:
        return self.uniform(stream, n).argsort(dim=1, stable=True)

    def choose(self, stream: str, scores: Tensor, k: int) -> Tensor:
        return self.draw.choose(stream, scores, k)


def _span(start_br: Tensor, length_br: Tensor, limit: int) -> Tensor:
    """(B, R, limit) bool: the cells of blocks of `length`, rounded, begun at a uniform `start`; some cell stays out."""
    cells_br = length_br.round().clamp(1, max(1, limit - 1))
    first_br = (start_br * (limit - cells_br + 1)).floor()
    place = torch.arange(limit, device=start_br.device)
    return (place >= first_br[..., None]) & (place < (first_br + cells_br)[..., None])
