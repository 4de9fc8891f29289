"""Autoregressive pretraining of causal scans: ARM (Ren et al. 2024, "Autoregressive Pretraining with Mamba in Vision"), and RoMA,
which adds turned windows and a second scale (Wang et al. 2025, "RoMA: Scaling up Mamba-based Foundation Models for Remote
Sensing").

Letters: b sample, c band, h w pixels, n all places, k places that are encoded (all clusters but the last), m places that are
predicted (all but the first), d width, v values of a patch (row, column, band fastest), x y blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from swath.backbones.base import Backbone, Context, Tokens, sincos_grid
from swath.backbones.mamba import NOT_OURS, MambaConfig, from_published
from swath.kernels.linear import Linear
from swath.pretrain.clusters import ClusterDecoder, Clusters, clusters_of, tapped
from swath.pretrain.decoder import check_sizes
from swath.pretrain.masking import Grid, fill, token_validity
from swath.pretrain.objective import Draws, Objective, Outcome, context, of_samples, register, seen_pixels
from swath.pretrain.pixels import PixelHead
from swath.pretrain.rotation import Turned, rotate
from swath.shards.prepare import Batch

TARGET_EPS = 1e-6  # added to variances of targets


@dataclass(frozen=True)
class RoMAConfig:
    """`rotate`: a window of one of `windows` patches a side is turned by up to `max_angle` degrees. `block_weight` of the loss at
    the scale of blocks of `block` patches a side. `decoder_depth` blocks, each reading a tapped layer of the backbone.
    `normalise_patches`: targets are standardised per patch.

    `compat: released` is the published model where it differs: targets are taken from the turned image; a learned vector stands
    for the angle, on the diagonal tokens that are taken for the window; and of the pairs of block values, one in sixty is of one
    patch. What the published data loading does is not part of it: images are normalised twice, their patches scrambled and flat
    ones preferred, and images whose window is not of the largest side are skipped.
    """

    rotate: bool = True
    windows: tuple[int, ...] = (6, 4, 2)
    max_angle: float = 45.0
    block: int = 6
    block_weight: float = 0.1
    decoder_width: int = 512
    decoder_depth: int = 4
    decoder_heads: int = 8
    mlp_ratio: float = 4.0
    normalise_patches: bool = True
    compat: Literal["released"] | None = None


@dataclass
class Target:
    """images (B, C, H, W) to be predicted; valid (B, 1, H, W) and counted (B, M), which predicted patches are targets; None where
    all are."""

    images: Tensor
    valid: Tensor | None = None
    counted: Tensor | None = None


@register(RoMAConfig, {"roma": {}, "arm": {"rotate": False, "block_weight": 0.0}})
class RoMA(Objective):
    """Predict each cluster of patches, in raster order of clusters, from the clusters before it: mean squared error to patches of
    the image as it is, however a window of what is encoded was turned.

    Clusters are those of the backbone (`cluster` patches a side); the last one is never encoded. There are two terms, each a mean
    within its sample: of predicted patches, and `block_weight` times that of blocks. For the second, the prediction, put back to
    pixels with each patch's own mean and spread, and the image are averaged over `block`² pixels, so that a block of `block`²
    patches has the resolution of one patch, and compared in units of that block's standard deviation. (The paper says only that
    tokens are compared at a larger scale too. The code regroups them; were both sides of the same patch, that would merely weight
    the first term again.) What was not predicted or is invalid is in no mean; blocks are cut at the edge.

    A patch that is less than half valid is absent from the scan and no target. One before which nothing is valid is no target.
    Turning brings pixels of later clusters in the window into earlier ones; so it is described.
    """

    def __init__(self, config: RoMAConfig, backbone: Backbone, image_size: tuple[int, int], channels: Mapping[str, int]) -> None:
        super().__init__()
        _check(config)
        self.config, self.backbone = config, backbone
        self.cluster_grid(*image_size)
        (count,) = channels.values()
        width = config.decoder_width
        self.taps = tapped(backbone.depth, config.decoder_depth)
        self.decoder = ClusterDecoder(backbone.width, len(self.taps), width, config.decoder_heads, config.mlp_ratio)
        if config.rotate and config.compat:
            self.angle_embed = nn.Parameter(torch.zeros(1, 1, backbone.width))
            nn.init.normal_(self.angle_embed, std=0.02)
        elif config.rotate:
            self.angle = Linear(2, backbone.width)  # of its sine and cosine
            nn.init.normal_(self.angle.weight, std=0.02)
            nn.init.zeros_(self.angle.bias)
        self.head = PixelHead(width, (tuple(range(count)),), backbone.mask_unit)

    @classmethod
    def refusal(cls, backbone: Backbone) -> str | None:
        if "causal" in backbone.traits:
            return None
        return "it predicts tokens from those before, and here a token sees later ones too; mamba with directions 1 is causal"

    def forward(self, batch: Batch, draw: Draws) -> Outcome:
        ((modality, images_bchw),) = batch.images.items()
        images_bchw, valid_bthw = seen_pixels(batch, modality)
        valid_b1hw = None if valid_bthw is None else valid_bthw.all(dim=1, keepdim=True)
        grid = self.cluster_grid(images_bchw.shape[2], images_bchw.shape[3])
        clusters = clusters_of(grid, self.backbone.config.cluster, images_bchw.device)
        turned, seen_bchw, seen_valid = None, images_bchw, valid_b1hw
        if self.config.rotate:
            patch = self.backbone.mask_unit
            turned = rotate(images_bchw, valid_b1hw, draw, patch, self.config.windows, self.config.max_angle)
            seen_bchw, seen_valid = turned.images, turned.valid
            if self.config.compat:
                images_bchw, valid_b1hw = seen_bchw, seen_valid
        present_bk = None if seen_valid is None else token_validity(seen_valid, grid)[:, clusters.context]
        tokens = self.tokens(seen_bchw, context(batch, modality, self.backbone, draw), clusters, turned)
        tokens.present = present_bk
        made = self.head(self.decoder(self.decoder.read(self.encode(tokens)), clusters, present_bk))
        target = Target(images_bchw, valid_b1hw, counted(valid_b1hw, present_bk, clusters))
        error_bm, mean_bm, spread_bm = self.token_error(made, target, clusters)
        weight_b = batch.weight
        if target.counted is not None:
            weight_b = weight_b * target.counted.any(dim=1)
        parts = {"pixels": (1.0, mean_where(error_bm, target.counted))}
        if self.config.block_weight:
            parts["blocks"] = (self.config.block_weight, self.block_error(made, mean_bm, spread_bm, target, clusters))

        def picture() -> dict[str, Tensor]:
            index_bm = clusters.target.expand(len(images_bchw), -1)
            return self.head.paste(made, index_bm, mean_bm, spread_bm, images_bchw) | {"seen": seen_bchw}

        return of_samples(parts, weight_b, modality, picture)

    def cluster_grid(self, height: int, width: int) -> Grid:
        """The backbone's grid; ValueError, with a size that fits, where clusters do not divide it or there is only one."""
        grid, side = self.backbone.grid(height, width), self.backbone.config.cluster
        if grid[2] % side or grid[3] % side or grid[2] * grid[3] <= side**2:
            unit = side * self.backbone.mask_unit
            fits = [max(1, round(n / unit)) for n in (height, width)]
            fits = fits if fits != [1, 1] else [2, 2]
            raise ValueError(
                f"image of {height}×{width} pixels is not divisible into two or more clusters of {unit}×{unit} pixels (cluster "
                f"{side}); {fits[0] * unit}×{fits[1] * unit} would be"
            )
        block = self.config.block
        if self.config.compat and self.config.block_weight and (grid[2] % block or grid[3] % block):
            raise ValueError(f"compat: released needs a grid that block {block} divides, not {grid[2]}×{grid[3]} patches")
        return grid

    def tokens(self, images_bchw: Tensor, ctx: Context, clusters: Clusters, turned: Turned | None) -> Tokens:
        """Tokens of all clusters but the last, those of the turned window marked with the angle."""
        tokens = self.backbone.tokenize(images_bchw, ctx, clusters.context.expand(len(images_bchw), -1))
        if turned is None:
            return tokens
        rows, columns = clusters.grid[2:]
        if self.config.compat:
            inside_bn = turned.released_window(rows, columns, self.backbone.mask_unit)
            mark_b1d = self.angle_embed
        else:
            inside_bn = turned.window(rows, columns)
            mark_b1d = self.angle(torch.stack([turned.angle.sin(), turned.angle.cos()], dim=1))[:, None]
        tokens.x = tokens.x + inside_bn[:, clusters.context, None] * mark_b1d.to(tokens.x.dtype)
        return tokens

    def encode(self, tokens: Tokens) -> list[Tensor]:
        """(B, K, D) of every tapped layer, before its norm."""
        features = self.backbone.encode(tokens, taps=self.taps)
        return [features.taps[number][:, -tokens.x.shape[1] :] for number in self.taps]

    def token_error(self, made: list[Tensor], target: Target, clusters: Clusters) -> tuple[Tensor, Tensor, Tensor]:
        """Error, and mean and spread of its target, (B, M), of every predicted patch."""
        index_bm = clusters.target.expand(len(target.images), -1)
        return self.head.error(made, target.images, index_bm, target.valid, self.config.normalise_patches)

    def block_error(self, made: list[Tensor], mean_bm: Tensor, spread_bm: Tensor, target: Target, clusters: Clusters) -> Tensor:
        """(B,) mean error at the scale of blocks; mean and spread are those of `token_error`."""
        patch, block, (rows, columns) = self.backbone.mask_unit, self.config.block, clusters.grid[2:]
        cut = {"p": patch, "q": patch}
        patches_bnv = rearrange(target.images, "b c (r p) (s q) -> b (r s) (p q c)", **cut)
        pixels_bmv = patches_bnv[:, clusters.target]
        valid_bnv = torch.ones_like(patches_bnv[..., : patch**2])
        if target.valid is not None:
            valid_bnv = rearrange(target.valid, "b 1 (r p) (s q) -> b (r s) (p q)", **cut).to(patches_bnv.dtype)
        valid_bmv = valid_bnv[:, clusters.target]
        if target.counted is not None:
            valid_bmv = valid_bmv * target.counted[..., None]
        mean_bm1, spread_bm1 = mean_bm[..., None], spread_bm[..., None]
        prediction_bmv = made[0].float()
        index_bm = clusters.target.expand(len(patches_bnv), -1)

        def raster(x_bmv: Tensor) -> Tensor:
            return fill(x_bmv, index_bm, x_bmv.new_zeros(len(x_bmv), rows * columns, x_bmv.shape[2]))

        if self.config.compat:
            bands = target.images.shape[1]
            standardised = raster((pixels_bmv - mean_bm1) / spread_bm1), raster(valid_bmv.repeat_interleave(bands, dim=2))
            wanted, counts = (target_blocks_as_released(x, clusters, block) for x in standardised)
            square = (prediction_blocks_as_released(prediction_bmv, clusters, block) - wanted).square() * counts
            return square.sum(dim=(1, 2)) / counts.sum(dim=(1, 2)).clamp_min(1)
        whole = {**cut, "r": rows, "s": columns}
        residual_bmv = prediction_bmv * spread_bm1 + mean_bm1 - pixels_bmv
        residual, counts = (
            rearrange(raster(x_bmv), "b (r s) (p q c) -> b c (r p) (s q)", **whole) for x_bmv in (residual_bmv, valid_bmv)
        )
        return coarse_error(residual, target.images, counts, block, patch)


def counted(valid_b1hw: Tensor | None, present_bk: Tensor | None, clusters: Clusters) -> Tensor | None:
    """(B, M) bool: patches that are half valid and have something before them to be predicted from; None where all have."""
    if valid_b1hw is None or present_bk is None:
        return None
    informed_bm = (clusters.sees() & present_bk[:, None]).any(dim=2)
    return token_validity(valid_b1hw, clusters.grid)[:, clusters.target] & informed_bm


def mean_where(error_bm: Tensor, counted_bm: Tensor | None) -> Tensor:
    """(B,) mean of what counts, 0 where nothing does."""
    if counted_bm is None:
        return error_bm.mean(dim=1)
    return (error_bm * counted_bm).sum(dim=1) / counted_bm.sum(dim=1).clamp_min(1)


def coarse_error(residual_bchw: Tensor, images_bchw: Tensor, counts_b1hw: Tensor, block: int, patch: int) -> Tensor:
    """(B,) mean square of the residual averaged over block² pixels, in units of the image's variance in blocks of block² patches.

    counts is 1 where a pixel is predicted and valid, else 0; cells are weighted by such pixels.
    """
    unit = block * patch
    room = (0, -images_bchw.shape[3] % unit, 0, -images_bchw.shape[2] % unit)
    residual, images, counts = (
        # x y blocks, u cells in a block, p pixels in a cell
        rearrange(
            F.pad(x, room), "b c (x u p) (y w q) -> b (x y) (u w) c (p q)", u=patch, w=patch, p=block, q=block
        )
        for x in (residual_bchw * counts_b1hw, images_bchw.float(), counts_b1hw.float())
    )  # fmt: skip
    total_bx = counts.sum(dim=(2, 3, 4)) * images.shape[3]
    mean_bx = (images * counts).sum(dim=(2, 3, 4)) / total_bx.clamp_min(1)
    square_bx = ((images - mean_bx[..., None, None, None]).square() * counts).sum(dim=(2, 3, 4))
    variance_bx = square_bx / (total_bx - 1).clamp_min(1) + TARGET_EPS
    pixels_bxu = counts.sum(dim=(3, 4))
    cell_bxuc = residual.sum(dim=4) / pixels_bxu.clamp_min(1)[..., None]
    error_bxu = cell_bxuc.square().mean(dim=3) / variance_bx[..., None]
    return (error_bxu * pixels_bxu).sum(dim=(1, 2)) / pixels_bxu.sum(dim=(1, 2)).clamp_min(1)


def prediction_blocks_as_released(prediction_bmv: Tensor, clusters: Clusters, block: int) -> Tensor:
    """(B, blocks - 1, V · block²), values before places: clusters one after another, 0 for the first, taken for raster order."""
    by_visit = clusters.visited[-len(clusters.target) :].argsort().argsort()
    first = len(clusters.visited) - len(clusters.target)
    grid = F.pad(prediction_bmv[:, by_visit], (0, 0, first, 0)).unflatten(1, clusters.grid[2:])
    return rearrange(grid, "b (x i) (y j) v -> b (x y) (v i j)", i=block, j=block)[:, 1:]


def target_blocks_as_released(target_bnv: Tensor, clusters: Clusters, block: int) -> Tensor:
    """(B, blocks - 1, block² · V), places before values, in raster order."""
    grid = target_bnv.unflatten(1, clusters.grid[2:])
    return rearrange(grid, "b (x i) (y j) v -> b (x y) (i j v)", i=block, j=block)[:, 1:]


def _check(config: RoMAConfig) -> None:
    if not config.windows or min(config.windows) < 1 or config.block < 1:
        raise ValueError(
            f"windows and block are numbers of patches, 1 or more; not windows {config.windows}, block {config.block}"
        )
    if config.block_weight < 0:
        raise ValueError(f"block_weight {config.block_weight} must be at least 0")
    check_sizes("decoder", config.decoder_width, config.decoder_depth, config.decoder_heads, config.mlp_ratio)
    if config.decoder_width % 4 or config.decoder_depth < 1:
        raise ValueError(
            f"decoder_width {config.decoder_width} must be divisible by 4, and decoder_depth {config.decoder_depth} at least 1"
        )


PUBLISHED = {
    "ar_token": "decoder.query", "enc2dec": "decoder.keys", "dec_block": "decoder.blocks", "ar_norm": "decoder.norm",
    "norm2_1": "norm_query", "norm2_2": "norm_key", "norm2": "norm",
}  # fmt: skip


def published_name(name: str) -> str:
    """What a parameter of the published decoder is called here."""
    if name.startswith("norm_"):
        number, _, kind = name.removeprefix("norm_").partition(".")
        return f"decoder.norms.{int(number) - 1}.{kind}"
    if name.startswith("ar_pred."):
        return f"head.linear.0.{name.removeprefix('ar_pred.')}"
    return ".".join(PUBLISHED.get(part, part) for part in name.split(".") if part != "attn2")


def load_published(objective: RoMA, config: MambaConfig, state: Mapping[str, Tensor]) -> None:
    """Load the `model` dictionary of RoMA's or ARM's code, strict about every key; RoMA's needs `compat: released`.

    Its tables of positions and its mask, which are fixed, must be those that we compute; else ValueError.
    """
    ours = {f"backbone.{name}": tensor for name, tensor in from_published(state, config).items()}
    for name, tensor in state.items():
        if name == "dec_pos_embed":
            side = torch.arange(config.image_size // config.patch)
            table_nd = sincos_grid(objective.config.decoder_width, side, side).float()
            if tensor.shape[1:] != table_nd.shape or (tensor[0] - table_nd).abs().max() > 1e-5:
                raise ValueError(f"dec_pos_embed of shape {tuple(tensor.shape)} is not the fixed sin-cos table")
        elif name == "mask":
            segment = torch.arange(len(tensor)) // config.cluster**2
            if not torch.equal(tensor == 0, segment[:, None] >= segment):
                raise ValueError("mask is not lower-triangular in clusters")
        elif name.startswith(NOT_OURS):
            ours[published_name(name)] = by_key(tensor, len(objective.taps)) if name.startswith("enc2dec") else tensor
    objective.load_state_dict(ours, strict=True)


def by_key(tensor: Tensor, count: int) -> Tensor:
    """Rows (D · J, …) of the published keys' layer as (J · D, …); there the J values of a channel lie side by side."""
    return tensor.unflatten(0, (-1, count)).transpose(0, 1).flatten(0, 1)
