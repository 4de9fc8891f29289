"""LESS ViT: a token per band and patch, and attention that is low-rank in bands × positions (uiuctml/GeospatialFM).

The encoder works on a lattice: one row per band under a class row, one column per position beside a class column.

Letters: b sample, c band, h w pixels, g kept bands, n kept positions, k = g·n tokens, i rows (1 + g) and j columns (1 + n) of the
lattice, d width, r rank, e width of a head's factor.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swath.backbones.base import (
    Backbone,
    Context,
    Features,
    Keep,
    ProductKeep,
    Recomputed,
    Tokens,
    gather,
    mean_of,
    places,
    register,
    sincos,
)
from swath.backbones.context import ContextEncoding
from swath.backbones.grid import boxes, check_image_size, check_images, patch_grid
from swath.backbones.vit import Mlp
from swath.kernels.embed import visible_patch_embedding
from swath.kernels.kronecker import kronecker_attention
from swath.kernels.linear import Linear

EPS = 1e-6
Axes = tuple[Tensor, Tensor]  # (B, I) and (B, J) bool, which rows and columns of the lattice are there


class AttentionPool(nn.Module):
    """Multi-head attention in which only the first of each sequence asks: (…, L, E) → (…, E). seen: (B, L) bool, whom it asks."""

    def __init__(self, width: int, heads: int, eps: float, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.proj = Linear(width, width)
        self.q_norm = nn.LayerNorm(width // heads, eps=eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, eps=eps) if qk_norm else nn.Identity()

    def forward(self, x_bile: Tensor, seen_bl: Tensor | None = None) -> Tensor:
        batch, rows, length, width = x_bile.shape
        mask = None if seen_bl is None else seen_bl.repeat_interleave(rows, 0)[:, None, None]
        q_shqe = self.q(x_bile[:, :, 0]).reshape(batch * rows, 1, self.heads, -1).transpose(1, 2)
        k_shle, v_shle = self.kv(x_bile).reshape(batch * rows, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        y_shqe = F.scaled_dot_product_attention(
            self.q_norm(q_shqe).to(v_shle.dtype), self.k_norm(k_shle).to(v_shle.dtype), v_shle, attn_mask=mask
        )
        return self.proj(y_shqe.reshape(batch, rows, width))


class LowDimPool(nn.Module):
    """One vector per band and one per position: the class entry plus what it attends to along the other axis."""

    def __init__(self, width: int, channel: int, spatial: int, heads: int, eps: float, qk_norm: bool) -> None:
        super().__init__()
        self.channel_linear = Linear(width, channel)
        self.spatial_linear = Linear(width, spatial)
        self.channel_norm = nn.LayerNorm(channel, eps=eps)
        self.spatial_norm = nn.LayerNorm(spatial, eps=eps)
        self.channel_pool = AttentionPool(channel, heads, eps, qk_norm)
        self.spatial_pool = AttentionPool(spatial, heads, eps, qk_norm)

    def forward(self, x_bijd: Tensor, there: Axes | None = None) -> tuple[Tensor, Tensor]:
        """(B, I, channel), (B, J, spatial)."""
        rows_bi, columns_bj = there or (None, None)
        c_bije, s_bjie = self.channel_linear(x_bijd), self.spatial_linear(x_bijd).transpose(1, 2)
        c_bie = c_bije[:, :, 0] + self.channel_pool(self.channel_norm(c_bije), columns_bj)
        s_bje = s_bjie[:, :, 0] + self.spatial_pool(self.spatial_norm(s_bjie), rows_bi)
        return c_bie, s_bje


class Branch(nn.Module):
    """Queries and keys (B, R, H, L, E) for each rank, values (B, H, L, E) for all of them."""

    def __init__(self, width: int, heads: int, rank: int, eps: float, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.rank = heads, rank
        self.qk = Linear(width, 2 * rank * width)
        self.v = Linear(width, width)
        self.q_norm = nn.LayerNorm(width // heads, eps=eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, eps=eps) if qk_norm else nn.Identity()

    def forward(self, x_ble: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = self.qk(x_ble).unflatten(2, (2, self.heads, self.rank, -1)).permute(2, 0, 4, 3, 1, 5)
        v = self.v(x_ble).unflatten(2, (self.heads, -1)).transpose(1, 2)
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v


class LowRankAttention(nn.Module):
    """Both branches and the projection of their Kronecker product. rows: (B, I) bool, who is seen of the channels."""

    def __init__(self, width: int, channel: int, spatial: int, heads: int, rank: int, eps: float, qk_norm: bool) -> None:
        super().__init__()
        self.channel_branch = Branch(channel, heads, rank, eps, qk_norm)
        self.spatial_branch = Branch(spatial, heads, rank, eps, qk_norm)
        self.proj = Linear(width, width)

    def forward(self, c_bie: Tensor, s_bje: Tensor, mask: Tensor | None, rows_bi: Tensor | None = None) -> Tensor:
        (qc, kc, vc), (qs, ks, vs) = self.channel_branch(c_bie), self.spatial_branch(s_bje)
        mask_c = None if rows_bi is None else rows_bi[:, None].expand(-1, rows_bi.shape[1], -1)
        return kronecker_attention(qc, kc, vc, qs, ks, vs, self.proj.weight, self.proj.bias, mask=mask, mask_c=mask_c)


class Scale(nn.Module):
    """LayerScale (Touvron et al. 2021)."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(Recomputed):
    """Low-rank attention over the lattice (B, I, J, D), then an MLP; pre-norm. mask: ([B,] J, J) bool, who sees whom; of what is
    not `there`, the mask lets nothing be seen either."""

    def __init__(self, width: int, channel: int, spatial: int, heads: int, rank: int, mlp_ratio: float = 4.0,
                 eps: float = EPS, qk_norm: bool = False, layer_scale: float = 0.0) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.low_dim_pool = LowDimPool(width, channel, spatial, heads, eps, qk_norm)
        self.channel_norm = nn.LayerNorm(channel, eps=eps)
        self.spatial_norm = nn.LayerNorm(spatial, eps=eps)
        self.attn = LowRankAttention(width, channel, spatial, heads, rank, eps, qk_norm)
        self.ls1 = Scale(width, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.ls2 = Scale(width, layer_scale) if layer_scale else nn.Identity()

    def compute(self, x_bijd: Tensor, mask: Tensor | None = None, there: Axes | None = None) -> Tensor:
        c_bie, s_bje = self.low_dim_pool(self.norm1(x_bijd), there)
        rows_bi = None if there is None else there[0]
        x_bijd = x_bijd + self.ls1(self.attn(self.channel_norm(c_bie), self.spatial_norm(s_bje), mask, rows_bi))
        return x_bijd + self.ls2(self.mlp(self.norm2(x_bijd)))


class BandEmbed(nn.Module):
    """A patch of one band → 2 D → ReLU → D, the same for every band."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, 2 * width, patch, patch)
        self.mix = Linear(2 * width, width)

    def forward(self, images_bchw: Tensor, positions_bn: Tensor | None = None) -> Tensor:
        """(B, C, N, D), of the patches at `positions` only where they are given."""
        bands = images_bchw.shape[1]
        index = None if positions_bn is None else positions_bn.repeat_interleave(bands, 0)
        images_s1hw = images_bchw.reshape(-1, 1, *images_bchw.shape[2:])
        x_snd = visible_patch_embedding(images_s1hw, self.proj.weight, self.proj.bias, index)
        return self.mix(F.relu(x_snd)).unflatten(0, (-1, bands))


@dataclass
class SpacedTokens(Tokens):
    """Tokens with what the class row and column are told: position (B or 1, n, D), band (B or 1, g, D), halves of the encoding;
    and the size of a pixel: gsd_m (B,), or None for the configuration's."""

    position: Tensor = field(default_factory=lambda: torch.empty(0))
    band: Tensor = field(default_factory=lambda: torch.empty(0))
    gsd_m: Tensor | None = None


@dataclass(frozen=True)
class LESSConfig:
    """`radar`: how many of the bands, the last ones, are radar, which has its own embed. `channel_width`: of a head's factor
    for bands (the factor for positions has width / heads / channel_width). `perception_m`: how far a position sees, 0 for
    everywhere. `gsd_m` and `wavelength_nm` stand in where the context has none; without `wavelength_nm` the optical bands are
    spread evenly over 400 … 2500 nm. A band whose wavelength is not a positive number (radar) has no encoding of it.

    Positions are metres, so that any `image_size` continues them. `compat`: as in the released code, encoded is the number
    of the patch times metres per pixel, and micrometres. `context` adds an encoding of place, date and ground sampling distance
    to every token.
    """

    bands: int
    image_size: int = 224
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    channel_width: int = 4
    rank: int = 4
    mlp_ratio: float = 4.0
    radar: int = 0
    perception_m: float = 640.0
    gsd_m: float = 10.0
    wavelength_nm: tuple[float, ...] = ()
    qk_norm: bool = False
    layer_scale: float = 0.0
    pool: Literal["mean", "class"] = "mean"
    compat: bool = False
    context: bool = False


_SIZES = {
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
    "large": {"width": 1024, "depth": 24, "heads": 16},
}


@register(LESSConfig, {f"less_{size}_patch16": options for size, options in _SIZES.items()})
class LESS(Backbone):
    """One group per band. `Features.prefix` is the class token, the class row (n) and the class column (g); see `lattice`.

    Maps are the mean over bands. Of a product of bands and positions only what is kept is embedded; scattered tokens do not fit.
    Nor do they as the ones that are present, which of each sample are some bands × some positions (a missing band, padding).
    """

    traits = frozenset({"sparse", "product"})
    tiny: ClassVar = {"bands": 3, "image_size": 16, "patch": 4, "width": 24, "depth": 1, "heads": 2, "channel_width": 3}

    def __init__(self, config: LESSConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.width = self.pooled_width = config.width
        self.depth, self.mask_unit = config.depth, config.patch
        if config.radar < config.bands:
            self.optical_patch_embed = BandEmbed(config.patch, config.width)
        if config.radar:
            self.radar_patch_embed = BandEmbed(config.patch, config.width)
        self.cls_token, self.spatial_cls_token, self.channel_cls_token = (
            nn.Parameter(torch.zeros(1, 1, config.width)) for _ in range(3)
        )
        channel = config.channel_width * config.heads
        spatial = config.width // channel * config.heads
        sizes = (config.width, channel, spatial, config.heads, config.rank, config.mlp_ratio, EPS, config.qk_norm)
        self.blocks = nn.ModuleList([Block(*sizes, config.layer_scale) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.width, eps=EPS)
        self.context = ContextEncoding(config.width) if config.context else None
        for token in (self.cls_token, self.spatial_cls_token, self.channel_cls_token):
            nn.init.normal_(token, std=0.02)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)

    def grid(self, height: int, width: int) -> tuple[int, int, int, int]:
        return 1, self.config.bands, *patch_grid(height, width, self.config.patch)

    @property
    def channels(self) -> tuple[tuple[int, ...], ...]:
        return tuple((band,) for band in range(self.config.bands))

    def with_bands(
        self, names: Sequence[str], chosen: Sequence[str], wavelength_nm: Sequence[float | None]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A band is a group: one that goes takes its tokens along. Optical bands have their weights in common, so that new ones
        need a wavelength only; radar stays behind them."""
        optical = self.config.bands - self.config.radar
        radar = [name in names[optical:] for name in chosen]
        bare = [n for n, known in zip(chosen, wavelength_nm, strict=True) if n not in names and not (known and optical)]
        if bare:
            raise ValueError(f"{', '.join(bare)} was not trained on, and has no wavelength by which it would be an optical band")
        if radar != sorted(radar):
            raise ValueError(f"radar bands come last: {', '.join(n for n, last in zip(chosen, radar, strict=True) if last)}")
        gone = ("radar_patch_embed.",) * (not any(radar)) + ("optical_patch_embed.",) * all(radar)
        state = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(gone)}
        known_nm = [known or 0.0 for known in wavelength_nm]
        return {"bands": len(chosen), "radar": sum(radar), "wavelength_nm": known_nm}, state

    def tokenize(self, images_bchw: Tensor, ctx: Context | None = None, keep: Keep | None = None) -> SpacedTokens:
        """`ctx.gsd_m` (B,) and `ctx.wavelength_nm` (C,) place the tokens; the configuration's stand in for them, and for a NaN of
        the former."""
        check_images(images_bchw, self.config.bands)
        grid, product, ctx = self.grid(*images_bchw.shape[2:]), _product(keep), ctx or Context()
        x_bgnd = self._embed(images_bchw, product)
        device = images_bchw.device
        position_bnd, band_bgd = self.encodings(grid, ctx, device, self.width)
        if product is not None:
            position_bnd, band_bgd = _kept(position_bnd, product.positions), _kept(band_bgd, product.groups)
        x_bkd = (x_bgnd + position_bnd[:, None] + band_bgd[:, :, None]).flatten(1, 2)
        if self.context is not None:
            x_bkd = x_bkd + self.context(ctx, len(x_bkd))[:, None]
        return SpacedTokens(x_bkd, grid, boxes(grid, self.config.patch, device), keep, None, position_bnd, band_bgd, ctx.gsd_m)

    def _embed(self, images_bchw: Tensor, keep: ProductKeep | None) -> Tensor:
        """(B, g, n, D). Where samples keep optical and radar bands in numbers of their own, both embeds see all that is kept."""
        optical = self.config.bands - self.config.radar
        if keep is not None:
            images_bchw = images_bchw[torch.arange(len(images_bchw), device=images_bchw.device)[:, None], keep.groups]
            positions = keep.positions
        else:
            positions = None
        if not self.config.radar:
            return self.optical_patch_embed(images_bchw, positions)
        if not optical:
            return self.radar_patch_embed(images_bchw, positions)
        if keep is None:
            parts = (self.optical_patch_embed(images_bchw[:, :optical]), self.radar_patch_embed(images_bchw[:, optical:]))
            return torch.cat(parts, dim=1)
        both = (self.radar_patch_embed(images_bchw, positions), self.optical_patch_embed(images_bchw, positions))
        return torch.where((keep.groups >= optical)[:, :, None, None], *both)

    def encodings(self, grid: tuple[int, int, int, int], ctx: Context, device: torch.device, width: int) -> tuple[Tensor, Tensor]:
        """What tokens are told of their position (B or 1, N, width) and of their band (1, C, width): half of each encoding, so
        that the sum is their mean. In the weights' dtype, so that a backbone loaded in bf16 stays in it."""
        position_bnd = self.positions(grid, ctx.gsd_m, device, width)
        band_1cd = self.wavelengths(ctx.wavelength_nm, width).to(device)[None]
        return (position_bnd / 2).to(self.cls_token.dtype), (band_1cd / 2).to(self.cls_token.dtype)

    def perception(self, place_bn: Tensor, columns: int, gsd_m: Tensor | None) -> Tensor | None:
        """Who sees whom of the class column and the places `place` (B or 1, n), see `perception_field`; None for all see all."""
        if not self.config.perception_m:
            return None
        reach_b = self.config.perception_m / (self._gsd(gsd_m, place_bn.device) * self.config.patch)
        return perception_field(place_bn, columns, reach_b)

    def positions(
        self, grid: tuple[int, int, int, int], gsd_m: Tensor | None, device: torch.device, width: int | None = None
    ) -> Tensor:
        """(B or 1, N, width) float64: columns, then rows, in metres from the first patch; of the backbone's width by default."""
        rows, columns = grid[2:]
        gsd_b = self._gsd(gsd_m, device) * (1 if self.config.compat else self.config.patch)
        half = (width or self.width) // 2
        by_row, by_column = (
            sincos(half, (gsd_b[:, None] * torch.arange(count, device=device)).flatten()).view(len(gsd_b), count, half)
            for count in (rows, columns)
        )
        shape = (-1, rows, columns, -1)
        return torch.cat([by_column[:, None].expand(*shape), by_row[:, :, None].expand(*shape)], dim=3).flatten(1, 2)

    def wavelengths(self, wavelength_nm: Tensor | None = None, width: int | None = None) -> Tensor:
        """(C, width) float64, 0 for a band without a wavelength; ValueError for another number of bands."""
        config = self.config
        optical = config.bands - config.radar
        if wavelength_nm is None:
            even = [400 + 2100 * band / max(1, optical - 1) for band in range(optical)]
            known = config.wavelength_nm or [*even, *[torch.nan] * config.radar]
            wavelength_nm = torch.tensor(known, dtype=torch.float64, device=self.cls_token.device)
        if wavelength_nm.shape != (config.bands,):
            raise ValueError(f"wavelength_nm must be ({config.bands},), one a band, not {tuple(wavelength_nm.shape)}")
        known_c = torch.isfinite(wavelength_nm) & (wavelength_nm > 0)
        encoding_cd = sincos(width or self.width, wavelength_nm.double() / (1000 if config.compat else 1))
        return torch.where(known_c[:, None], encoding_cd, 0.0)

    def _gsd(self, gsd_m: Tensor | None, device: torch.device) -> Tensor:
        if gsd_m is None:
            return torch.full((1,), self.config.gsd_m, dtype=torch.float64, device=device)
        gsd_b = gsd_m.to(device=device, dtype=torch.float64)
        return torch.where(gsd_b.isnan(), self.config.gsd_m, gsd_b)

    def encode(self, tokens: Tokens, keep: Keep | None = None, taps: Sequence[int] = ()) -> Features:
        if not isinstance(tokens, SpacedTokens):
            raise ValueError(f"tokens must be those of LESS.tokenize, which know where they are, not {type(tokens).__name__}")
        product = _product(keep) or _product(tokens.keep)
        x_bkd, position_bnd, band_bgd, present_bk = tokens.x, tokens.position, tokens.band, tokens.present
        if keep is not None and product is not None:
            index_bk = places(product, tokens.grid)
            x_bkd, present_bk = gather(x_bkd, index_bk), None if present_bk is None else present_bk.gather(1, index_bk)
            position_bnd, band_bgd = _kept(position_bnd, product.positions), _kept(band_bgd, product.groups)
        batch, per_group, groups = len(x_bkd), position_bnd.shape[1], band_bgd.shape[1]
        there = None
        if present_bk is not None:  # a NaN would pass through a share of 0
            x_bkd = torch.where(present_bk[..., None], x_bkd, 0.0)
            there = _axes(present_bk.unflatten(1, (groups, per_group)))
        row_bnd, column_bgd = self.channel_cls_token + position_bnd, self.spatial_cls_token + band_bgd
        corner_bijd = self.cls_token[None].expand(batch, -1, -1, -1)
        first_bijd = torch.cat([corner_bijd, row_bnd[:, None].expand(batch, -1, -1, -1)], dim=2).to(x_bkd.dtype)
        column_bijd = column_bgd[:, :, None].expand(batch, -1, -1, -1).to(x_bkd.dtype)
        x_bgjd = torch.cat([column_bijd, x_bkd.unflatten(1, (groups, per_group))], dim=2)
        x_bijd = torch.cat([first_bijd, x_bgjd], dim=1)
        count, columns = tokens.grid[2] * tokens.grid[3], tokens.grid[3]
        place_bn = torch.arange(count, device=x_bkd.device)[None] if product is None else product.positions
        mask = self.perception(place_bn, columns, tokens.gsd_m)
        if there is not None:
            seen_b1j = there[1][:, None]
            mask = seen_b1j.expand(-1, seen_b1j.shape[2], -1) if mask is None else mask & seen_b1j
        tapped = {-1: _flat(x_bijd)} if -1 in taps else {}
        for number, block in enumerate(self.blocks):
            x_bijd = block(x_bijd, mask, there)
            if number in taps:
                tapped[number] = _flat(x_bijd)
        x_btd = _flat(self.norm(x_bijd))
        prefix, x_bkd = x_btd[:, : 1 + per_group + groups], x_btd[:, 1 + per_group + groups :]
        maps: dict[int, Tensor] = {}
        if product is None:
            map_bnd = _mean_of_bands(x_bkd.unflatten(1, (groups, per_group)), there)
            maps[self.config.patch] = map_bnd.transpose(1, 2).unflatten(2, tokens.grid[2:])
        pooled_bd = prefix[:, 0] if self.config.pool == "class" else mean_of(x_bkd, present_bk)
        return Features(pooled_bd, x_bkd, prefix, maps, tapped)


def perception_field(place_bn: Tensor, columns: int, reach_b: Tensor) -> Tensor:
    """(B, 1 + n, 1 + n) bool, or without B where there is one for all: places of a raster of `columns` that are no further apart
    than `reach` (B or 1,) patches see each other, and the class entry before them sees and is seen always."""
    row_bn, column_bn = (place_bn // columns).float(), (place_bn % columns).float()
    # squares of whole numbers: exact, whatever the device; the margin is for a reach that is a rounded quotient
    square_bnn = (row_bn[:, :, None] - row_bn[:, None]).square() + (column_bn[:, :, None] - column_bn[:, None]).square()
    seen_bjj = F.pad(square_bnn <= (reach_b.square() * (1 + 1e-9))[:, None, None], (1, 0, 1, 0), value=True)
    return seen_bjj[0] if len(seen_bjj) == 1 else seen_bjj


def _axes(present_bgn: Tensor) -> Axes:
    """The class row with the bands that are there, the class column with the positions. Raises ValueError, outside compiled
    code, for tokens that are not all of a product."""
    group_bg, position_bn = present_bgn.any(dim=2), present_bgn.any(dim=1)
    if not torch.compiler.is_compiling():  # a look at the contents: compiled code has no branch for it
        product_b = (present_bgn == group_bg[:, :, None] & position_bn[:, None]).flatten(1).all(dim=1)
        if not product_b.all():
            raise ValueError(
                f"the tokens present of sample {int(product_b.int().argmin())} are scattered; "
                "LESS takes those of some bands × some positions, each with each"
            )
    return F.pad(group_bg, (1, 0), value=True), F.pad(position_bn, (1, 0), value=True)


def _mean_of_bands(x_bgnd: Tensor, there: Axes | None) -> Tensor:
    """(B, N, D), zero at a position that is not there."""
    if there is None:
        return x_bgnd.mean(dim=1)
    group_bg, position_bn = there[0][:, 1:], there[1][:, 1:]
    mean_bnd = mean_of(x_bgnd.flatten(2), group_bg).unflatten(1, x_bgnd.shape[2:])
    return torch.where(position_bn[..., None], mean_bnd, 0.0)


def lattice(features: Features, groups: int) -> Tensor:
    """(B, 1 + groups, 1 + n, D): what a LESS decoder reads, the class row and column with the tokens of `groups` kept bands."""
    x_bgnd = features.tokens.unflatten(1, (groups, -1))
    per_group = x_bgnd.shape[2]
    first_b1jd, column_bg1d = features.prefix[:, None, : 1 + per_group], features.prefix[:, 1 + per_group :, None]
    return torch.cat([first_b1jd, torch.cat([column_bg1d, x_bgnd], dim=2)], dim=1)


def _flat(x_bijd: Tensor) -> Tensor:
    """(B, P + K, D): the class row with its corner, the class column, the tokens."""
    return torch.cat([x_bijd[:, 0], x_bijd[:, 1:, 0], x_bijd[:, 1:, 1:].flatten(1, 2)], dim=1)


def _kept(x_bnd: Tensor, index_bk: Tensor) -> Tensor:
    """The rows `index_bk` of tables that samples share or have of their own."""
    return gather(x_bnd.expand(len(index_bk), -1, -1), index_bk)


def _product(keep: Keep | None) -> ProductKeep | None:
    if isinstance(keep, Tensor):
        raise ValueError(
            f"LESS keeps whole bands × positions, not {tuple(keep.shape)} scattered tokens; "
            "pass ProductKeep(groups (B, g), positions (B, n))"
        )
    return keep


def _check(config: LESSConfig) -> None:
    if config.bands < 1 or config.depth < 0 or config.heads < 1 or config.rank < 1 or config.channel_width < 1:
        raise ValueError(f"bands, heads, rank and channel_width must be at least 1, depth at least 0: {config}")
    if not 0 <= config.radar <= config.bands:
        raise ValueError(f"radar {config.radar} must be 0 … {config.bands}, the number of bands that are radar")
    if config.width % 4 or config.width % (config.heads * config.channel_width):
        product = config.heads * config.channel_width
        raise ValueError(f"width {config.width} must be divisible by 4 and by heads × channel_width, {product}")
    if config.wavelength_nm and len(config.wavelength_nm) != config.bands:
        raise ValueError(f"wavelength_nm must be {config.bands} numbers, one a band, not {len(config.wavelength_nm)}")
    if config.gsd_m <= 0 or config.perception_m < 0:
        raise ValueError(f"gsd_m {config.gsd_m} must be positive, perception_m {config.perception_m} not negative")
    check_image_size(config.image_size, config.patch)


def from_published(state: dict[str, Tensor], config: LESSConfig) -> dict[str, Tensor]:
    """Our parameters from a published encoder's (keys with or without `encoder.`): its 3-D kernels are one band deep.

    Raises ValueError for an embed that the configuration has no bands for.
    """
    ours = {}
    for name, tensor in state.items():
        name = name.removeprefix("encoder.")
        for kind, bands in (("optical", config.bands - config.radar), ("radar", config.radar)):
            if name.startswith(f"{kind}_patch_embed.") and not bands:
                raise ValueError(f"{name} embeds {kind} bands, and of {config.bands} bands {config.radar} are radar")
        if name.endswith("patch_embed.proj.0.weight"):
            tensor = tensor.squeeze(2)
        elif name.endswith("patch_embed.proj.2.weight"):
            tensor = tensor.flatten(1)
        ours[name.replace("_embed.proj.0.", "_embed.proj.").replace("_embed.proj.2.", "_embed.mix.")] = tensor
    return ours
