"""Vision transformers over a grid of (dates × band groups) × places, and the band-group ViT of SatMAE and SatMAE++.

SatMAE (Cong et al. 2022, arXiv:2207.08051) and SatMAE++ (Noman et al. 2024, arXiv:2403.05419) share this encoder. Letters:
b sample, c band, h w pixels, g groups (dates and band groups together), n places of the raster, k kept tokens, t all tokens
with the class token, d width, e width of a head, r ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
    fitting,
    gather,
    places,
    register,
    sincos,
    sincos_grid,
    whole_groups,
)  # fmt: skip
from swath.backbones.context import ContextEncoding
from swath.backbones.grid import boxes, check_image_size, check_images, patch_grid
from swath.backbones.vit import EPS, Mlp, PatchEmbed, attend, check_table, init_weights
from swath.kernels.axial import axial_attention
from swath.kernels.joint import joint_attention
from swath.kernels.kronecker import kronecker_attention
from swath.kernels.linear import Linear

SIZES: dict[str, dict[str, Any]] = {
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
    "large": {"width": 1024, "depth": 24, "heads": 16},
    "huge": {"width": 1280, "depth": 32, "heads": 16},
}
TINY: dict[str, Any] = {"image_size": 32, "patch": 8, "width": 32, "depth": 2, "heads": 4}
Shape = tuple[int, int] | None  # (groups, places) of tokens that fill a product; None for scattered ones


class GridAttention(nn.Module):
    """Self-attention of all tokens with all, or with `axial` of the first half of the heads along the groups of a place and of
    the second half along the places of a group (heads split as in CSWin, Dong et al. 2022); the same parameters either way.

    A class token asks all tokens; with `axial`, others do not ask it.
    """

    def __init__(self, width: int, heads: int, axial: bool = False) -> None:
        super().__init__()
        self.heads, self.axial = heads, axial
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x_btd: Tensor, shape: Shape, masks: Sequence[Tensor | None]) -> Tensor:
        batch, length, width = x_btd.shape
        qkv = self.qkv(x_btd).view(batch, length, 3, self.heads, width // self.heads)
        if not self.axial:
            y_bthe = _joint(qkv, masks[0])
        elif shape is None:
            half = self.heads // 2
            y_bthe = torch.cat([_joint(qkv[:, :, :, :half], masks[0]), _joint(qkv[:, :, :, half:], masks[1])], dim=2)
        else:
            y_bthe = self._along_axes(qkv, shape)
        return self.proj(y_bthe.flatten(2))

    def _along_axes(self, qkv_bt3he: Tensor, shape: tuple[int, int]) -> Tensor:
        half, prefix = self.heads // 2, qkv_bt3he.shape[1] - shape[0] * shape[1]
        grid = qkv_bt3he[:, prefix:].unflatten(1, shape)
        q, k, v = grid.unbind(3)
        spectral = axial_attention(q[..., :half, :], k[..., :half, :], v[..., :half, :], "spectral")
        spatial = axial_attention(q[..., half:, :], k[..., half:, :], v[..., half:, :], "spatial")
        y_bkhe = torch.cat([spectral, spatial], dim=3).flatten(1, 2)
        if not prefix:
            return y_bkhe
        q, k, v = qkv_bt3he.permute(2, 0, 3, 1, 4)
        asked = F.scaled_dot_product_attention(q[:, :, :prefix], k, v).transpose(1, 2)
        return torch.cat([asked.to(y_bkhe.dtype), y_bkhe], dim=1)


def _joint(qkv_bt3he: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = qkv_bt3he.permute(2, 0, 3, 1, 4)
    if mask is None and q.device.type != "cuda":  # where there is nothing to choose from, and bf16 trains faster so
        return attend(q, k, v).transpose(1, 2)
    return joint_attention(q, k, v, mask=mask).transpose(1, 2)


class KroneckerAttention(nn.Module):
    """Low-rank attention between groups and between places, each on the mean over the other axis, joined by a Kronecker product
    (LESS ViT, uiuctml/GeospatialFM, which pools by attention). A class token is one more group and one more place."""

    def __init__(self, width: int, heads: int, rank: int) -> None:
        super().__init__()
        head = width // heads
        channel = max(d for d in range(1, math.isqrt(head) + 1) if head % d == 0)
        self.heads, self.rank = heads, rank
        self.spectral = Linear(width, (2 * rank + 1) * heads * channel)
        self.spatial = Linear(width, (2 * rank + 1) * heads * (head // channel))
        self.proj = Linear(width, width)

    def forward(self, x_btd: Tensor, shape: Shape, masks: Sequence[Tensor | None]) -> Tensor:
        assert shape is not None  # scattered tokens were refused
        prefix = x_btd.shape[1] - shape[0] * shape[1]
        cls_bpd, grid_bgnd = x_btd[:, :prefix], x_btd[:, prefix:].unflatten(1, shape)
        qc, kc, vc = self._split(self.spectral(torch.cat([cls_bpd, grid_bgnd.mean(dim=2)], dim=1)))
        qs, ks, vs = self._split(self.spatial(torch.cat([cls_bpd, grid_bgnd.mean(dim=1)], dim=1)))
        y_bgnd = kronecker_attention(qc, kc, vc, qs, ks, vs, self.proj.weight, self.proj.bias)
        return torch.cat([y_bgnd[:, :prefix, :prefix].flatten(1, 2), y_bgnd[:, prefix:, prefix:].flatten(1, 2)], dim=1)

    def _split(self, z_blf: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = z_blf.view(*z_blf.shape[:2], 2 * self.rank + 1, self.heads, -1).permute(0, 2, 3, 1, 4)
        return z[:, : self.rank], z[:, self.rank : -1], z[:, -1]


class GridBlock(Recomputed):
    """Pre-norm transformer block over a grid."""

    def __init__(self, config: "GridConfig") -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        if config.attention == "kronecker":
            self.attn = KroneckerAttention(width, heads, config.rank)
        else:
            self.attn = GridAttention(width, heads, axial=config.attention == "axial")
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))

    def compute(self, x_btd: Tensor, shape: Shape, masks: Sequence[Tensor | None]) -> Tensor:
        x_btd = x_btd + self.attn(self.norm1(x_btd), shape, masks)
        return x_btd + self.mlp(self.norm2(x_btd))


@dataclass(frozen=True)
class GridConfig:
    """What every transformer over a grid has. `bands` counts the channels of the image as it enters.

    `image_size` fixes the spacing of positions; any other size that `patch` divides interpolates them. `attention`: of all
    tokens with all (`joint`, the published one), along each axis (`axial`), or low-rank with `rank` ranks (`kronecker`, for
    which a kept subset must be a product). `context` adds an encoding of place, date and ground sampling distance.
    """

    bands: int
    image_size: int = 96
    patch: int = 8
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    attention: Literal["joint", "axial", "kronecker"] = "joint"
    rank: int = 4
    pool: Literal["mean", "class"] = "mean"
    context: bool = False


class GridViT(Backbone):
    """The encoder over a grid of tokens; a family says how images are embedded (`embed`) and where tokens are (`positions`)."""

    traits: ClassVar[frozenset[str]] = frozenset({"sparse"})

    def __init__(self, config: GridConfig, groups: int, class_token: bool = True) -> None:
        super().__init__()
        _check(config, class_token)
        self.config, self.groups = config, groups
        self.width = self.pooled_width = config.width
        self.depth, self.mask_unit = config.depth, config.patch
        if config.attention == "kronecker":  # of the instance: the configuration decides
            self.traits = frozenset({"sparse", "product"})  # pyright: ignore[reportAttributeAccessIssue]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width)) if class_token else None
        self.blocks = nn.ModuleList([GridBlock(config) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.width, eps=EPS)
        self.context = ContextEncoding(config.width) if config.context else None
        init_weights(self)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)

    def embed(self, images_bchw: Tensor, ctx: Context | None, index_bk: Tensor | None) -> Tensor:
        """(B, K, D) of the tokens at `index`, numbers in raster order of the grid; None for all."""
        raise NotImplementedError

    def positions(self, grid: tuple[int, int, int, int], ctx: Context | None, batch: int, device: torch.device) -> Tensor:
        """(1 or batch, N, D) positions of all places of the grid."""
        raise NotImplementedError

    def grid(self, height: int, width: int) -> tuple[int, int, int, int]:
        return 1, self.groups, *patch_grid(height, width, self.config.patch)

    def tokenize(self, images_bchw: Tensor, ctx: Context | None = None, keep: Keep | None = None) -> Tokens:
        self.check_images(images_bchw, ctx)
        self._check_keep(keep)
        batch, _, height, width = images_bchw.shape
        grid = self.grid(height, width)
        index_bk = None if keep is None else places(keep, grid)
        x_bkd = self.embed(images_bchw, ctx, index_bk)
        # in the weights' dtype, so that a backbone loaded in bf16 stays in it
        position_bnd = self.positions(grid, ctx, batch, images_bchw.device).to(self.norm.weight.dtype)
        if index_bk is not None:
            position_bnd = gather(position_bnd.expand(batch, -1, -1), index_bk)
        x_bkd = x_bkd + position_bnd
        if self.context is not None:
            x_bkd = x_bkd + self.context(self.seen(ctx), batch)[:, None]
        return Tokens(x_bkd, grid, boxes(grid, self.config.patch, images_bchw.device), keep)

    def check_images(self, images_bchw: Tensor, ctx: Context | None) -> None:
        """ValueError unless the images are (B, bands, H, W)."""
        check_images(images_bchw, self.config.bands)

    def seen(self, ctx: Context | None) -> Context | None:
        """What the context encoding sees of the context."""
        return ctx

    def encode(self, tokens: Tokens, keep: Keep | None = None, taps: Sequence[int] = ()) -> Features:
        self._check_keep(keep)
        x_bkd, present = tokens.x, tokens.present
        if keep is not None:
            index_bk = places(keep, tokens.grid)
            x_bkd = gather(x_bkd, index_bk)
            present = None if present is None else present.gather(1, index_bk)
        if present is not None:  # a NaN would pass through a weight of 0
            x_bkd = torch.where(present[..., None], x_bkd, 0.0)
        prefix = 0 if self.cls_token is None else 1
        shape, masks = self._sight(tokens.keep if keep is None else keep, tokens.grid, present, prefix, x_bkd.device)
        x_btd = x_bkd
        if self.cls_token is not None:
            x_btd = torch.cat([self.cls_token.to(x_bkd.dtype).expand(len(x_bkd), -1, -1), x_bkd], dim=1)
        tapped = {-1: x_btd} if -1 in taps else {}
        for number, block in enumerate(self.blocks):
            x_btd = block(x_btd, shape, masks)
            if number in taps:
                tapped[number] = x_btd
        x_btd = self.norm(x_btd)
        cls_bpd, x_bkd = x_btd[:, :prefix], x_btd[:, prefix:]
        pooled_bd = cls_bpd[:, 0] if self.config.pool == "class" else _mean(x_bkd, present, 1)
        maps: dict[int, Tensor] = {}
        if keep is None and tokens.keep is None:
            groups = tokens.grid[0] * tokens.grid[1]
            raster = (groups, tokens.grid[2] * tokens.grid[3])
            of_place = None if present is None else present.unflatten(1, raster)
            map_bnd = _mean(x_bkd.unflatten(1, raster), of_place, 1)
            maps[self.config.patch] = map_bnd.transpose(1, 2).unflatten(2, tokens.grid[2:])
        return Features(pooled_bd, x_bkd, cls_bpd, maps, tapped)

    def _check_keep(self, keep: Keep | None) -> None:
        if "product" in self.traits and keep is not None and not isinstance(keep, ProductKeep):
            raise ValueError("kronecker attention takes kept groups × kept positions: give a ProductKeep, not scattered tokens")

    def _sight(
        self, keep: Keep | None, grid: tuple[int, int, int, int], present: Tensor | None, prefix: int, device: torch.device
    ) -> tuple[Shape, tuple[Tensor | None, ...]]:
        """The product that tokens fill, if they do, and which token may attend to which: (B, T, T) bool, None for all."""
        per_group = grid[2] * grid[3]
        shape: Shape = (grid[0] * grid[1], per_group)
        if isinstance(keep, ProductKeep):
            shape = (keep.groups.shape[1], keep.positions.shape[1])
        elif keep is not None:
            shape = None
        if self.config.attention == "kronecker" and present is not None:
            raise ValueError("kronecker attention takes tokens that are all present; keep a product of those that are")
        seen_b1t = None if present is None else F.pad(present, (prefix, 0), value=True)[:, None]
        if self.config.attention != "axial":
            return shape, (None if seen_b1t is None else seen_b1t.expand(-1, seen_b1t.shape[2], -1),)
        if shape is not None and present is None:
            return shape, (None, None)
        index_bk = torch.arange(grid[0] * grid[1] * per_group, device=device)[None] if keep is None else places(keep, grid)
        masks = []
        for place_bk in (index_bk % per_group, index_bk // per_group):
            # a class token stands at no place: it asks all, and is not asked
            place_bt = F.pad(place_bk, (prefix, 0), value=-1)
            sees_btt = (place_bt[:, :, None] == place_bt[:, None]) | (place_bt[:, :, None] == -1)
            masks.append(sees_btt if seen_b1t is None else sees_btt & seen_b1t)
        return None, tuple(masks)

    def sincos_positions(self, width: int, grid: tuple[int, int, int, int], device: torch.device) -> Tensor:
        """(rows · columns, width) fixed positions, interpolated to the raster of `image_size` where the raster is another one."""
        side = self.config.image_size // self.config.patch
        row, column = ((torch.arange(n, dtype=torch.float64, device=device) + 0.5) * side / n - 0.5 for n in grid[2:])
        return sincos_grid(width, row, column).float()


def _mean(x: Tensor, present: Tensor | None, axis: int) -> Tensor:
    """The mean along an axis, of what is present."""
    if present is None:
        return x.mean(dim=axis)
    share = present.to(x.dtype)[..., None]
    return (x * share).sum(dim=axis) / share.sum(dim=axis).clamp(min=1)


def _check(config: GridConfig, class_token: bool) -> None:
    if config.bands < 1 or config.depth < 0 or config.heads < 1 or config.rank < 1:
        raise ValueError(f"bands, heads and rank must be at least 1, depth at least 0: {config}")
    if config.width % config.heads:
        raise ValueError(f"width {config.width} must be divisible by heads {config.heads}")
    if config.attention == "axial" and config.heads % 2:
        raise ValueError(f"axial attention gives half of the heads to each axis: heads must be even, not {config.heads}")
    check_image_size(config.image_size, config.patch)
    if config.pool == "class" and not class_token:
        raise ValueError("this encoder has no class token: pool must be mean")


SENTINEL2 = ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9))  # of B2…B8, B8A, B11, B12, as published


@dataclass(frozen=True)
class GroupViTConfig(GridConfig):
    """`groups` are lists of bands, each band in exactly one. By default the published ones for ten bands (B2, B3, B4, B8 | B5,
    B6, B7, B8A | B11, B12), else fours of neighbours. `group_width` channels of the position tell the group, by its number among
    the groups, or by `group_numbers`, which others keep when a group goes."""

    groups: tuple[tuple[int, ...], ...] = ()
    group_width: int = 256
    group_numbers: tuple[int, ...] = ()


def _groups(config: GroupViTConfig) -> list[list[int]]:
    given = config.groups or (SENTINEL2 if config.bands == 10 else ())
    if not given:
        return [list(range(first, min(first + 4, config.bands))) for first in range(0, config.bands, 4)]
    if sorted(band for group in given for band in group) != list(range(config.bands)) or not all(given):
        raise ValueError(f"groups must hold each of the bands 0 … {config.bands - 1} once, not {given}")
    return [list(group) for group in given]


@register(GroupViTConfig, {f"group_vit_{s}_patch8": {**SIZES[s], "patch": 8, "bands": 10} for s in ("base", "large", "huge")})
class GroupViT(GridViT):
    """One patch embedding per group of bands, tokens group by group, fixed positions that tell place and group."""

    config: GroupViTConfig
    tiny: ClassVar[dict[str, Any]] = {**TINY, "bands": 10, "group_width": 8}

    def __init__(self, config: GroupViTConfig) -> None:
        bands = _groups(config)
        super().__init__(config, len(bands))
        space = config.width - config.group_width
        if config.group_width % 2 or config.group_width < 2 or space < 4 or space % 4:
            raise ValueError(f"group_width {config.group_width} must be even and leave a multiple of 4 of width {config.width}")
        if config.group_numbers and len(config.group_numbers) != len(bands):
            raise ValueError(f"group_numbers must hold {len(bands)}, one for each group, not {len(config.group_numbers)}")
        self.bands = bands
        self.patch_embed = nn.ModuleList([PatchEmbed(len(group), config.patch, config.width) for group in bands])
        init_weights(self.patch_embed)

    @property
    def channels(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(group) for group in self.bands)

    def with_bands(
        self, names: Sequence[str], chosen: Sequence[str], wavelength_nm: Sequence[float | None]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Groups go as a whole: what is left is the encoding of the tokens of the others alone."""
        channels = self.channels_of(names, chosen)
        kept = whole_groups(self.bands, channels, names)
        numbers = list(self.config.group_numbers) or list(range(len(self.bands)))
        state = {}
        for name, tensor in self.state_dict().items():
            part, _, rest = name.removeprefix("patch_embed.").partition(".")
            if not name.startswith("patch_embed."):
                state[name] = tensor
            elif int(part) in kept:
                state[f"patch_embed.{kept.index(int(part))}.{rest}"] = tensor
        groups = [[channels.index(channel) for channel in self.bands[group]] for group in kept]
        options = {"bands": len(channels), "groups": groups, "group_numbers": [numbers[group] for group in kept]}
        return options, state

    def embed(self, images_bchw: Tensor, ctx: Context | None, index_bk: Tensor | None) -> Tensor:
        if index_bk is None:
            return torch.cat([e(images_bchw[:, g]) for e, g in zip(self.patch_embed, self.bands, strict=True)], dim=1)
        # How many tokens of a group are kept differs by sample: each embedding sees all kept places, and its own are picked.
        per_group = (images_bchw.shape[2] // self.config.patch) * (images_bchw.shape[3] // self.config.patch)
        place_bk, group_bk1 = index_bk % per_group, (index_bk // per_group)[..., None]
        total = None
        for number, (embed, group) in enumerate(zip(self.patch_embed, self.bands, strict=True)):
            x_bkd = embed(images_bchw[:, group], place_bk)
            total = x_bkd if total is None else torch.where(group_bk1 == number, x_bkd, total)
        assert total is not None
        return total

    def positions(self, grid: tuple[int, int, int, int], ctx: Context | None, batch: int, device: torch.device) -> Tensor:
        space_nd = self.sincos_positions(self.width - self.config.group_width, grid, device)
        number_g = torch.arange(grid[1], device=device)
        if self.config.group_numbers:
            number_g = torch.tensor(self.config.group_numbers, device=device)
        group_gd = sincos(self.config.group_width, number_g).float()
        space = space_nd[None].expand(grid[1], -1, -1)
        return torch.cat([space, group_gd[:, None].expand(-1, len(space_nd), -1)], dim=2).flatten(0, 1)[None]


def from_published(state: dict[str, Tensor], config: GroupViTConfig) -> dict[str, Tensor]:
    """Our parameters from a published SatMAE or SatMAE++ group encoder's, whose tables must be the ones that we compute.

    Raises ValueError for names of anything else (split a checkpoint's decoder off first), for missing ones and other tables.
    """
    ours = {name: tensor for name, tensor in state.items() if name not in ("pos_embed", "channel_embed")}
    if "pos_embed" in state:
        place = torch.arange(config.image_size // config.patch)
        check_table(state["pos_embed"], sincos_grid(config.width - config.group_width, place, place), "pos_embed")
    if "channel_embed" in state:
        table = sincos(config.group_width, torch.arange(len(_groups(config)))).float()
        check_plain_table(state["channel_embed"], table, "channel_embed")
    return fitting(ours, GroupViT, config)


def check_plain_table(theirs_1nd: Tensor, ours_nd: Tensor, name: str) -> None:
    """ValueError unless a published table without a class row is ours, to the noise of float32 tables (1e-5)."""
    if theirs_1nd.shape[1:] != ours_nd.shape or (theirs_1nd[0] - ours_nd).abs().max() > 1e-5:
        raise ValueError(f"{name} of shape {tuple(theirs_1nd.shape)} is not the fixed sin-cos table of {tuple(ours_nd.shape)}")
