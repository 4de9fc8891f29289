"""Hyperspectral masked autoencoder of LESS ViT (Si et al. 2025, arXiv:2503.12843): bands and places are dropped together.

The encoder is given the product of what is left. Of an optical and a radar modality each also has to reconstruct the other.

Letters: b sample, c channel, g group (one band of LESS), n place, s kept groups, k kept places, t encoded tokens, i = 1 + g rows
and j = 1 + n columns of the lattice, d width, m tokens of a head.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swath.backbones.base import Backbone, Context, ProductKeep, places
from swath.backbones.less import Block, LESSConfig, from_published
from swath.kernels.linear import Linear
from swath.pretrain.decoder import check_sizes, raster_positions
from swath.pretrain.masking import Grid, check_ratio, fill, kept, token_validity
from swath.pretrain.objective import Draws, Objective, Outcome, context, register, seen_pixels
from swath.pretrain.pixels import PixelHead
from swath.shards.prepare import Batch

LEAST = 2  # groups that are kept whatever the ratio


@dataclass(frozen=True)
class HyperMAEConfig:
    """Of the groups of bands that a pass is given `channel_mask_ratio` are dropped, two at least are kept, and then `mask_ratio`
    of the places. `passes`: what the encoder is given; by default optical, radar and multi where there are both, else all.

    `channel_dropout`: so many of a cube's groups are neither seen nor predicted, other ones in each draw (Si et al. 2026,
    arXiv:2605.18541, draw the share too; a batch needs one number): the lattice of the decoder, which takes the memory, is so
    much smaller. `decoder_channel_width`, `decoder_rank` and `decoder_layer_scale` are those of LESS's blocks. `compat`: as in
    the released code, a batch shares its dropped places where positions see a part of the field only, and terms are means over
    the batch.
    """

    mask_ratio: float = 0.75
    channel_mask_ratio: float = 0.5
    channel_dropout: float = 0.0
    passes: tuple[Literal["optical", "radar", "multi"], ...] = ()
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    decoder_channel_width: int = 4
    decoder_rank: int = 4
    decoder_layer_scale: float = 0.0
    mlp_ratio: float = 4.0
    normalise_patches: bool = True
    compat: bool = False


@runtime_checkable
class Spaced(Protocol):
    """A backbone that tells a decoder of any width where its tokens are, and which places see each other, as LESS does."""

    def encodings(self, grid: Grid, ctx: Context, device: torch.device, width: int) -> tuple[Tensor, Tensor]: ...

    def perception(self, place_bn: Tensor, columns: int, gsd_m: Tensor | None) -> Tensor | None: ...


@dataclass
class Dropped:
    """Of one pass: what is `keep`t, its rows (B, s) of the lattice; groups (B, G) and places (B, N) bool, which are not seen;
    enough (B,) bool, which samples have so many valid ones."""

    keep: ProductKeep
    rows_bs: Tensor
    groups_bg: Tensor
    places_bn: Tensor
    enough_b: Tensor


@dataclass
class View:
    """What a batch gives its passes: the whole image and what is known of it; ids (B, G) of the groups of the lattice, and drawn
    (B, C) their channels, None for all; targets (B, C, H, W) of those channels; valid pixels (B, G, H, W) and tokens (B, G, N),
    bool, None when all are."""

    images_bchw: Tensor
    ctx: Context
    grid: Grid
    ids_bg: Tensor
    drawn_bc: Tensor | None
    targets_bchw: Tensor
    pixels_bghw: Tensor | None
    valid_bgn: Tensor | None


class LatticeDecoder(nn.Module):
    """LESS blocks over the whole lattice of groups × places, where a learned token stands for each dropped entry: one kind for
    tokens, one for the class row, one for the class column."""

    def __init__(self, inside: int, config: HyperMAEConfig) -> None:
        super().__init__()
        width, channel = config.decoder_width, config.decoder_channel_width * config.decoder_heads
        check_sizes("decoder", width, config.decoder_depth, config.decoder_heads, config.mlp_ratio)
        if config.decoder_rank < 1 or channel < 1 or width % 4 or width % channel:
            raise ValueError(
                f"decoder_width {width} must be divisible by 4 and by decoder_heads × decoder_channel_width, {channel}, which "
                f"must be at least 1, as decoder_rank {config.decoder_rank} must"
            )
        self.embed = Linear(inside, width)
        self.mask_token, self.spatial_mask_token, self.channel_mask_token = (
            nn.Parameter(torch.zeros(1, 1, 1, width)) for _ in range(3)
        )
        sizes = (width, channel, width // channel * config.decoder_heads, config.decoder_heads, config.decoder_rank)
        self.blocks = nn.ModuleList(
            [Block(*sizes, config.mlp_ratio, layer_scale=config.decoder_layer_scale) for _ in range(config.decoder_depth)]
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        for token in (self.mask_token, self.spatial_mask_token, self.channel_mask_token):
            nn.init.normal_(token, std=0.02)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)

    def forward(self, x_btd: Tensor, entry_bt: Tensor, band_bgd: Tensor, position_bnd: Tensor, mask: Tensor | None) -> Tensor:
        """(B, G, N, D). x: what is seen; entry: its places in the lattice, row after row; band (1 or B, G, D) and position
        (1 or B, N, D) are added to what is of them; mask ([B,] J, J): who sees whom."""
        groups, count = band_bgd.shape[1], position_bnd.shape[1]
        x_btd = self.embed(x_btd)
        column_gjd = torch.cat(
            [self.spatial_mask_token[0].expand(groups, -1, -1), self.mask_token[0].expand(groups, count, -1)], dim=1
        )
        hidden_ijd = torch.cat([self.channel_mask_token[0].expand(-1, 1 + count, -1), column_gjd])
        hidden_bmd = hidden_ijd.flatten(0, 1).to(x_btd.dtype).expand(len(x_btd), -1, -1)
        x_bijd = fill(x_btd, entry_bt, hidden_bmd).unflatten(1, (1 + groups, 1 + count))
        band_bi1d, position_b1jd = F.pad(band_bgd, (0, 0, 1, 0))[:, :, None], F.pad(position_bnd, (0, 0, 1, 0))[:, None]
        x_bijd = x_bijd + band_bi1d.to(x_btd.dtype) + position_b1jd.to(x_btd.dtype)
        for block in self.blocks:
            x_bijd = block(x_bijd, mask)
        return self.norm(x_bijd[:, 1:, 1:])


@register(HyperMAEConfig, {"hyper_mae": {}})
class HyperMAE(Objective):
    """Reconstruct the pixels of dropped places, averaged over all groups, and of dropped groups, averaged over all places.

    The backbone sees the bands of all modalities as one image, in the order of `channels`; the last ones, `radar` of them, are
    radar. Each of a pass's two terms is the mean over the kinds (optical, radar) that have targets, and the loss their sum over
    the passes. Groups and places of which a token is less than half valid are dropped first; a sample with too few others, for
    instance without the modality, does not count in that pass, and its tokens are no targets of any.
    """

    needs = frozenset({"sparse", "product"})
    takes_pairs = True

    @classmethod
    def refusal(cls, backbone: Backbone) -> str | None:
        reason = super().refusal(backbone)
        if reason and hasattr(backbone.config, "attention"):
            return f"{reason}; attention: kronecker would make it so"
        return reason

    def __init__(
        self, config: HyperMAEConfig, backbone: Backbone, image_size: tuple[int, int], channels: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.config, self.backbone, self.bands = config, backbone, dict(channels)
        check_ratio(backbone, image_size, config.mask_ratio)
        for name in ("channel_mask_ratio", "channel_dropout"):
            if not 0 <= getattr(config, name) < 1:
                raise ValueError(f"{name} {getattr(config, name)} must be at least 0 and below 1")
        self.kinds = _kinds(backbone, self.bands)
        self.passes = _passes(tuple(config.passes), self.kinds)
        groups, heads = len(backbone.channels), {kind: backbone.channels[span] for kind, span in self.kinds.items()}
        self.drawn = groups
        if config.channel_dropout:
            sizes = {len(group) for group in backbone.channels}
            if len(self.kinds) > 1 or len(sizes) > 1:
                raise ValueError("channel_dropout is for a cube: groups of one size, of optical or of radar bands")
            self.drawn = min(groups, max(LEAST, kept(groups, config.channel_dropout)))
            (kind,), (size,) = self.kinds, sizes
            self.kinds = {kind: slice(0, self.drawn)}
            heads = {kind: tuple(tuple(range(g * size, (g + 1) * size)) for g in range(self.drawn))}
        self.decoder = LatticeDecoder(backbone.width, config)
        if not isinstance(backbone, Spaced):
            self.group_embed = nn.Parameter(torch.zeros(1, groups, config.decoder_width))
            nn.init.trunc_normal_(self.group_embed, std=0.02)
        self.heads = nn.ModuleDict(
            {kind: PixelHead(config.decoder_width, own, backbone.mask_unit) for kind, own in heads.items()}
        )

    def forward(self, batch: Batch, draw: Draws) -> Outcome:
        view = self.view(batch, draw)
        terms: dict[str, tuple[Tensor, Tensor]] = {}
        numerator, counts_b = torch.zeros_like(batch.weight).sum(), torch.zeros_like(batch.weight)
        picture: Callable[[], dict[str, Tensor]] | None = None
        for name in self.passes:
            dropped = self.drop(name, view, draw)
            made = self.predict(view, dropped)
            error_bgn, mean_bgn, spread_bgn = self.compare(made, view)
            own_b = batch.weight * dropped.enough_b
            for term, hidden in (("places", dropped.places_bn[:, None]), ("groups", dropped.groups_bg[:, :, None])):
                hidden_bgn = hidden.expand_as(error_bgn) if view.valid_bgn is None else hidden & view.valid_bgn
                mean_b, any_b = self._mean_of_kinds(error_bgn, hidden_bgn * own_b[:, None, None])
                total = (own_b * mean_b).sum()
                terms[f"{term}/{name}"] = (total.detach(), (own_b * any_b).sum())
                numerator = numerator + total
            counts_b = torch.maximum(counts_b, own_b)
            picture = partial(self._picture, batch, view, dropped, made, mean_bgn, spread_bgn)
        return Outcome(numerator, counts_b.sum(), terms, picture)

    def look(self, batch: Batch, draw: Draws) -> tuple[Tensor, Context]:
        return self.joined(batch)[0], self.told(batch, draw)

    def joined(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """(images (B, C, H, W), valid (B, C, H, W) or None) of all modalities; one that the batch has not is invalid."""
        like = next(iter(batch.images.values()))
        parts: list[Tensor] = []
        masks: list[Tensor | None] = []
        for name, count in self.bands.items():
            if name in batch.images:
                part_bchw, valid_bthw = seen_pixels(batch, name)
            else:
                part_bchw = like.new_zeros(len(like), count, *like.shape[2:])
                valid_bthw = torch.zeros_like(part_bchw[:, :1], dtype=torch.bool)
            parts.append(part_bchw)
            masks.append(None if valid_bthw is None else valid_bthw.repeat_interleave(count // valid_bthw.shape[1], dim=1))
        if all(mask is None for mask in masks):
            return torch.cat(parts, dim=1), None
        full = (
            torch.ones_like(part, dtype=torch.bool) if mask is None else mask for part, mask in zip(parts, masks, strict=True)
        )
        return torch.cat(parts, dim=1), torch.cat(list(full), dim=1)

    def told(self, batch: Batch, draw: Draws) -> Context:
        """What is known of the whole image; without the wavelengths of each modality the backbone's own stand in for all."""
        ctx = context(batch, next(iter(batch.images)), self.backbone, draw)
        known = [batch.wavelength_nm.get(name) for name in self.bands]
        wavelength_c = [one for one in known if one is not None]
        return replace(ctx, wavelength_nm=torch.cat(wavelength_c) if len(wavelength_c) == len(known) else None)

    def view(self, batch: Batch, draw: Draws) -> View:
        images_bchw, valid_bchw = self.joined(batch)
        grid = self.backbone.grid(images_bchw.shape[2], images_bchw.shape[3])
        channels, size, device = self.backbone.channels, len(images_bchw), images_bchw.device
        ids_bg, drawn_bc, targets_bchw = torch.arange(len(channels), device=device).expand(size, -1), None, images_bchw
        pixels_bghw = None if valid_bchw is None else valid_bchw[:, [group[0] for group in channels]]
        if self.drawn < len(channels):
            ids_bg = draw.order("groups", len(channels))[:, : self.drawn].sort(dim=1).values
            drawn_bc = torch.tensor(channels, device=device)[ids_bg].flatten(1)
            sample_b1 = torch.arange(size, device=device)[:, None]
            targets_bchw = images_bchw[sample_b1, drawn_bc]
            pixels_bghw = None if pixels_bghw is None else pixels_bghw[sample_b1, ids_bg]
        valid_bgn = None if pixels_bghw is None else token_validity(pixels_bghw, (pixels_bghw.shape[1], 1, *grid[2:]))
        valid_bgn = None if valid_bgn is None else valid_bgn.unflatten(1, (-1, grid[2] * grid[3]))
        return View(images_bchw, self.told(batch, draw), grid, ids_bg, drawn_bc, targets_bchw, pixels_bghw, valid_bgn)

    def drop(self, name: str, view: View, draw: Draws) -> Dropped:
        """Groups first, then places where all that is kept of them is valid: in each draw the lowest numbers stay."""
        config, (batch, groups), count = self.config, view.ids_bg.shape, view.grid[2] * view.grid[3]
        given = range(groups)[slice(None) if name == "multi" else self.kinds[name]]
        there_bg = None if view.valid_bgn is None else view.valid_bgn[:, given.start : given.stop].any(dim=2)
        number_bg, number_bn = draw.uniform(f"groups/{name}", len(given)), draw.uniform(f"places/{name}", count)
        if config.compat and getattr(self.backbone.config, "perception_m", 0):
            number_bn = number_bn[:1].expand(batch, -1)
        stay = min(len(given), max(LEAST, kept(len(given), config.channel_mask_ratio)))
        rows_bs = given.start + _lowest(number_bg, stay, there_bg)
        place_bn, stay = None, kept(count, config.mask_ratio)
        if view.valid_bgn is not None:
            place_bn = view.valid_bgn.gather(1, rows_bs[:, :, None].expand(-1, -1, count)).all(dim=1)
        positions_bk = _lowest(number_bn, stay, place_bn)
        every_b1 = torch.ones(batch, 1, dtype=torch.bool, device=rows_bs.device)
        return Dropped(
            ProductKeep(view.ids_bg.gather(1, rows_bs), positions_bk),
            rows_bs,
            every_b1.expand(-1, groups).scatter(1, rows_bs, False),
            every_b1.expand(-1, count).scatter(1, positions_bk, False),
            every_b1[:, 0] if place_bn is None else place_bn.sum(dim=1) > stay,
        )

    def predict(self, view: View, dropped: Dropped) -> dict[str, list[Tensor]]:
        """{kind: (B, G · N, V) of each layer of its head}, of every token of the lattice: those that were seen are too few to be
        worth leaving out."""
        keep, width, device = dropped.keep, self.config.decoder_width, view.images_bchw.device
        features = self.backbone.encode(self.backbone.tokenize(view.images_bchw, view.ctx, keep))
        count = view.grid[2] * view.grid[3]
        # a backbone has all of the class row and column before its tokens, or the corner alone, or none of them
        row_bk, column_bs = 1 + keep.positions, (1 + dropped.rows_bs) * (1 + count)
        first_bt = torch.cat([torch.zeros_like(row_bk[:, :1]), row_bk, column_bs], dim=1)[:, : features.prefix.shape[1]]
        lattice = (1, 1 + view.ids_bg.shape[1], 1, 1 + count)
        entry_bt = torch.cat([first_bt, places(ProductKeep(1 + dropped.rows_bs, row_bk), lattice)], dim=1)
        mask = None
        if isinstance(self.backbone, Spaced):
            position_bnd, band_bgd = self.backbone.encodings(view.grid, view.ctx, device, width)
            every_1n = torch.arange(count, device=device)[None]
            mask = self.backbone.perception(every_1n, view.grid[3], view.ctx.gsd_m)
        else:
            position_bnd, band_bgd = raster_positions(width, view.grid, device)[None], self.group_embed
        if self.drawn < band_bgd.shape[1]:
            band_bgd = band_bgd[0][view.ids_bg]
        x_btd = torch.cat([features.prefix, features.tokens], dim=1)
        x_bgnd = self.decoder(x_btd, entry_bt, band_bgd, position_bnd, mask)
        return {kind: self.head(kind)(x_bgnd[:, span].flatten(1, 2)) for kind, span in self.kinds.items()}

    def compare(self, made: dict[str, list[Tensor]], view: View) -> tuple[Tensor, Tensor, Tensor]:
        """Error, mean and spread of each token against its own patch, (B, G, N)."""
        count = view.grid[2] * view.grid[3]
        found: list[tuple[Tensor, ...]] = []
        for kind, span in self.kinds.items():
            index_bm = self._every(kind, view)
            valid_bghw = None if view.pixels_bghw is None else view.pixels_bghw[:, span]
            parts = self.head(kind).error(made[kind], view.targets_bchw, index_bm, valid_bghw, self.config.normalise_patches)
            found.append(tuple(part.unflatten(1, (-1, count)) for part in parts))
        error_bgn, mean_bgn, spread_bgn = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        return error_bgn, mean_bgn, spread_bgn

    def head(self, kind: str) -> PixelHead:
        head = self.heads[kind]
        assert isinstance(head, PixelHead)
        return head

    def _every(self, kind: str, view: View) -> Tensor:
        """(B, G · N): all tokens of a kind, in raster order of its own grid."""
        count = len(self.head(kind).channels) * view.grid[2] * view.grid[3]
        return torch.arange(count, device=view.images_bchw.device).expand(len(view.images_bchw), -1)

    def _mean_of_kinds(self, error_bgn: Tensor, weight_bgn: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) the mean over the kinds that have weight of each one's mean, and whether any has."""
        spans = self.kinds.values()
        error_kb = torch.stack([(error_bgn[:, span] * weight_bgn[:, span]).sum(dim=(1, 2)) for span in spans])
        weight_kb = torch.stack([weight_bgn[:, span].sum(dim=(1, 2)) for span in spans])
        if self.config.compat:
            error_kb, weight_kb = (x.sum(dim=1, keepdim=True).expand_as(x) for x in (error_kb, weight_kb))
        has_kb = weight_kb > 0
        mean_kb = error_kb / torch.where(has_kb, weight_kb, 1.0)
        return mean_kb.sum(dim=0) / has_kb.sum(dim=0).clamp_min(1), has_kb.any(dim=0)

    def _picture(
        self, batch: Batch, view: View, dropped: Dropped, made: dict[str, list[Tensor]], mean_bgn: Tensor, spread_bgn: Tensor
    ) -> dict[str, Tensor]:
        """Of one pass, in the bands of the batch's first modality; what a sample neither sees nor predicts stays as it is."""
        whole = seen = view.targets_bchw
        unseen_bgn = dropped.groups_bg[:, :, None] | dropped.places_bn[:, None]
        for kind, span in self.kinds.items():
            mean_bm, spread_bm, unseen_bm = (x[:, span].flatten(1) for x in (mean_bgn, spread_bgn, unseen_bgn))
            # a number past the last token is of none, and is not pasted
            index_bm = torch.where(unseen_bm, self._every(kind, view), unseen_bm.shape[1])
            pasted = self.head(kind).paste(made[kind], index_bm, mean_bm, spread_bm, whole)
            whole, seen = pasted["reconstruction"], torch.where(pasted["seen"].isnan(), torch.nan, seen)
        if view.drawn_bc is not None:
            index_bchw = view.drawn_bc[:, :, None, None].expand_as(whole)
            whole, seen = (view.images_bchw.scatter(1, index_bchw, x) for x in (whole, seen))
        images = {"input": view.images_bchw, "seen": seen, "reconstruction": whole}
        number = list(self.bands).index(next(iter(batch.images)))
        return {name: image.split(list(self.bands.values()), dim=1)[number] for name, image in images.items()}


def _lowest(number_bn: Tensor, keep: int, valid_bn: Tensor | None) -> Tensor:
    """(B, keep) ascending: where the lowest numbers are, of valid entries first."""
    if valid_bn is not None:
        number_bn = number_bn + (~valid_bn) * 2.0
    return number_bn.argsort(dim=1, stable=True)[:, :keep].sort(dim=1).values


def _kinds(backbone: Backbone, bands: Mapping[str, int]) -> dict[str, slice]:
    """{optical or radar: its groups}; ValueError where the modalities are not the backbone's bands, radar last."""
    radar, total = getattr(backbone.config, "radar", 0), sum(bands.values())
    listed = ", ".join(f"{name} {count}" for name, count in bands.items())
    if total != backbone.config.bands:
        raise ValueError(f"the backbone has {backbone.config.bands} bands, and the modalities {total}: {listed}")
    ends = [sum(list(bands.values())[:number]) for number in range(len(bands) + 1)]
    if total - radar not in ends:
        raise ValueError(f"radar {radar} must be the bands of the last modalities, of {listed}; list those of radar last")
    for group in backbone.channels:
        if any(group[0] < end <= group[-1] for end in ends):
            raise ValueError(f"channels {group} are one group of the backbone, and of two modalities: {listed}")
    optical = sum(group[0] < total - radar for group in backbone.channels)
    spans = {"optical": slice(0, optical), "radar": slice(optical, len(backbone.channels))}
    return {kind: span for kind, span in spans.items() if span.start < span.stop}


def _passes(asked: tuple[str, ...], kinds: Mapping[str, slice]) -> tuple[str, ...]:
    possible = (*kinds, "multi") if len(kinds) > 1 else tuple(kinds)
    if wrong := [name for name in asked if name not in possible]:
        raise ValueError(f"passes cannot be {', '.join(wrong)}: of these bands there are {', '.join(possible)}")
    return asked or possible


def load_published(objective: HyperMAE, backbone_config: LESSConfig, state: dict[str, Tensor]) -> None:
    """Load the published code's weights (before its rotary positions), strict about every key."""
    encoder = {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}
    ours = {f"backbone.{name}": tensor for name, tensor in from_published(encoder, backbone_config).items()}
    ours.update({published_name(name): tensor for name, tensor in state.items() if name not in encoder})
    objective.load_state_dict(ours, strict=True)


def published_name(name: str) -> str:
    """What a parameter of the published decoder is called here."""
    for kind in ("optical", "radar"):
        name = name.replace(f"decoder.decoder_{kind}_pred.", f"heads.{kind}.linear.0.")
    return name.replace("decoder.decoder_", "decoder.")
