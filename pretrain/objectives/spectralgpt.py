"""SpectralGPT (Hong et al. 2024, arXiv:2311.07113): cubes of bands and pixels are masked one by one, and what is reconstructed is
held against its token and, at every place, against the sum over the spectrum.

Letters: b sample, c channel, h w pixels, g groups along the spectrum, p places of the raster, n = g · p all tokens, m masked,
d width, v values of a token (row, column, band fastest).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from swath.backbones.base import Backbone, gather
from swath.backbones.grid import resize_positions
from swath.backbones.spectral_vit import SpectralViTConfig, from_published
from swath.kernels.patch_loss import masked_patch_loss
from swath.pretrain.decoder import Decoder
from swath.pretrain.masking import Grid, Mask, check_ratio, encode, mask_images
from swath.pretrain.objective import Draws, Objective, Outcome, context, of_samples, register, seen_pixels
from swath.pretrain.pixels import PixelHead
from swath.shards.prepare import Batch


@dataclass(frozen=True)
class SpectralGPTConfig:
    """`normalise_patches`: targets are standardised per token, in both terms. `compat: sum` is the loss as released: the spectral
    term is of sums, not of means, and of raw targets even where the token term's are standardised."""

    mask_ratio: float = 0.90
    decoder_width: int = 512
    decoder_depth: int = 4
    decoder_heads: int = 16
    mlp_ratio: float = 4.0
    normalise_patches: bool = False
    compat: Literal["sum"] | None = None


@register(SpectralGPTConfig, {"spectralgpt": {}})
class SpectralGPT(Objective):
    """Mean squared error of masked tokens, plus that of the spectrum's sum at every place, seen or not.

    A sum over G tokens has an error that grows as G²: on untrained weights and inputs in [0, 1] it is 15 times the token term
    for four. Here it is divided by G², so that means are compared and both terms are of one size. Either term is a mean over a
    sample's own tokens or places, at least half valid ones. Positions of the decoder are learned, one table of places and one
    of groups; the first is interpolated to other rasters than that of the backbone's `image_size`.
    """

    backbone: Backbone

    @classmethod
    def refusal(cls, backbone: Backbone) -> str | None:
        side = backbone.config.image_size
        dates, groups = backbone.grid(side, side)[:2]
        if "sparse" not in backbone.traits or "product" in backbone.traits:
            return "it masks tokens of all groups one by one, and this backbone does not encode any subset of tokens"
        if dates != 1:
            return f"its tokens are of one date, and this backbone has {dates}"
        sizes = [len(group) for group in backbone.channels]
        if groups == 1:
            return "its loss is of a spectrum of tokens, and this backbone has one for all bands"
        if len(set(sizes)) != 1:
            return f"it adds up tokens along the spectrum, so groups must have equally many bands, not {sizes}"
        return None

    def __init__(
        self, config: SpectralGPTConfig, backbone: Backbone, image_size: tuple[int, int], channels: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        check_ratio(backbone, image_size, config.mask_ratio)
        width, side = config.decoder_width, backbone.config.image_size
        _, groups, rows, columns = backbone.grid(side, side)
        self.raster = (rows, columns)
        self.decoder = Decoder(backbone.width, width, config.decoder_depth, config.decoder_heads, config.mlp_ratio)
        self.pos_embed_spatial = nn.Parameter(torch.zeros(1, rows * columns, width))
        self.pos_embed_spectral = nn.Parameter(torch.zeros(1, groups, width))
        nn.init.trunc_normal_(self.pos_embed_spatial, std=0.02)
        nn.init.trunc_normal_(self.pos_embed_spectral, std=0.02)
        self.head = PixelHead(width, backbone.channels, backbone.mask_unit)

    def forward(self, batch: Batch, draw: Draws) -> Outcome:
        ((modality, images_bchw),) = batch.images.items()
        images_bchw, valid_b1hw = seen_pixels(batch, modality)
        mask = mask_images(self.backbone, images_bchw, valid_b1hw, draw, self.config.mask_ratio)
        prefix, tokens = encode(self.backbone, images_bchw, context(batch, modality, self.backbone, draw), mask)
        made_bnv = self.predict(prefix, tokens, mask)
        every_bn = torch.arange(made_bnv.shape[1], device=made_bnv.device).repeat(len(made_bnv), 1)
        error_bn, mean_bn, spread_bn = self.head.error(
            [made_bnv], images_bchw, every_bn, valid_b1hw, self.config.normalise_patches
        )
        hidden_bn = torch.zeros_like(every_bn, dtype=torch.bool).scatter(1, mask.masked_bm, True)
        raw = self.config.compat == "sum" or not self.config.normalise_patches
        target_bchw = self.spectrum(images_bchw, mask.grid, None if raw else (mean_bn, spread_bn))
        error_bp = self._spectral_error(made_bnv, target_bchw, mask.grid, valid_b1hw)

        weight_b = batch.weight if mask.enough_b is None else batch.weight * mask.enough_b
        valid_bn = torch.ones_like(hidden_bn) if mask.valid_bn is None else mask.valid_bn
        token_b = _mean(error_bn, hidden_bn & valid_bn)
        spectral_b = _mean(error_bp, valid_bn[:, : error_bp.shape[1]])  # of one date: every group is as valid
        if self.config.compat == "sum":
            spectral_b = spectral_b * mask.grid[1] ** 2

        def picture() -> dict[str, Tensor]:
            index_bm = mask.masked_bm
            made = [gather(made_bnv, index_bm)]
            return self.head.paste(made, index_bm, mean_bn.gather(1, index_bm), spread_bn.gather(1, index_bm), images_bchw)

        return of_samples({"tokens": (1.0, token_b), "spectral": (1.0, spectral_b)}, weight_b, modality, picture)

    def predict(self, prefix_bpd: Tensor, tokens_bkd: Tensor, mask: Mask) -> Tensor:
        """(B, N, V) of every token, from what the encoder made of the seen ones."""
        decoded_bnd = self.decoder(prefix_bpd, tokens_bkd, mask, self.positions(mask.grid), everywhere=True)
        return self.head(decoded_bnd)[0]

    def positions(self, grid: Grid) -> Tensor:
        """(N, D) of all tokens."""
        space_pd = resize_positions(self.pos_embed_spatial, self.raster, grid[2:])
        return (self.pos_embed_spectral[0, :, None] + space_pd).flatten(0, 1)

    def spectrum(self, images_bchw: Tensor, grid: Grid, standard: tuple[Tensor, Tensor] | None) -> Tensor:
        """(B, C / G, H, W): the images' mean over the groups, of each token's pixels in units of its own (mean, spread) (B, N) if
        these are given."""
        stacked_bchw = self.head.stacked(images_bchw)
        if standard is not None:
            mean_b1hw, spread_b1hw = (self._spread_out(each_bn, grid) for each_bn in standard)
            stacked_bchw = (stacked_bchw - mean_b1hw) / spread_b1hw
        return stacked_bchw.unflatten(2, (grid[1], -1)).mean(dim=2)

    def _spread_out(self, each_bn: Tensor, grid: Grid) -> Tensor:
        """(B, 1, G · H, W): each token's number at its pixels, groups below each other."""
        each_b1hw = each_bn.view(len(each_bn), 1, grid[1] * grid[2], grid[3])
        return each_b1hw.repeat_interleave(self.head.patch, 2).repeat_interleave(self.head.patch, 3)

    def _spectral_error(self, made_bnv: Tensor, target_bchw: Tensor, grid: Grid, valid_b1hw: Tensor | None) -> Tensor:
        """(B, P) mean squared difference over the valid pixels of each place."""
        made_bpv = made_bnv.unflatten(1, (grid[1], -1)).mean(dim=1, dtype=torch.float32)
        every_bp = torch.arange(made_bpv.shape[1], device=made_bpv.device).repeat(len(made_bpv), 1)
        patch = (self.head.patch, self.head.patch)
        return masked_patch_loss(made_bpv, target_bchw, every_bp, patch=patch, normalise=False, valid_b1hw=valid_b1hw)[0]


def _mean(values_bn: Tensor, counted_bn: Tensor) -> Tensor:
    """(B,) mean of what counts; 0 where nothing does."""
    return (values_bn * counted_bn).sum(dim=1) / counted_bn.sum(dim=1).clamp_min(1)


def load_published(objective: SpectralGPT, backbone_config: SpectralViTConfig, state: dict[str, Tensor]) -> None:
    """Load the published code's `model` dictionary, strict about every key; tables are of the backbone's `image_size`."""
    encoder = {name: tensor for name, tensor in state.items() if not name.startswith(("decoder_", "mask_token"))}
    ours = {f"backbone.{name}": tensor for name, tensor in from_published(encoder, backbone_config).items()}
    parts: dict[str, dict[str, Tensor]] = {}
    for name in state.keys() - encoder.keys():
        own, part = published_name(name)
        parts.setdefault(own, {})[part] = state[name]
    for own, tensors in parts.items():
        if own.startswith("head."):
            ours[own] = band_last(tensors[""], backbone_config)
        elif "" in tensors:
            ours[own] = tensors[""]
        elif missing := [part for part in "qkv" if part not in tensors]:
            raise ValueError(f"{own.replace('.qkv.', f'.{missing[0]}.')} is missing")
        else:
            ours[own] = torch.cat([tensors[part] for part in "qkv"])
    objective.load_state_dict(ours, strict=True)


def published_name(name: str) -> tuple[str, str]:
    """Our parameter that a published one of the decoder is, or is a part of, and which: q, k, v, or nothing for the whole."""
    if name.startswith("decoder_pred."):
        return name.replace("decoder_pred.", "head.linear.0."), ""
    if name.startswith("decoder_pos_embed_"):
        return name.removeprefix("decoder_").replace("temporal", "spectral"), ""
    own = name.replace("decoder_", "decoder.", 1) if name.startswith("decoder_") else f"decoder.{name}"
    for part in "qkv":
        if f".attn.{part}." in own:
            return own.replace(f".attn.{part}.", ".attn.qkv."), part
    return own, ""


def band_last(rows: Tensor, config: SpectralViTConfig) -> Tensor:
    """Rows of the published prediction layer, ordered band, row, column within a token, in our order: row, column, band."""
    return rearrange(rows, "(c p q) ... -> (p q c) ...", p=config.patch, q=config.patch, c=config.cube)
