"""Which tokens are seen and which are to be predicted: per sample, from its own draw.

A sparse backbone is given the tokens that are kept; of any other one the pixels of masked units are hidden (DESIGN §2.5).
Letters: b sample, t date, n places of the grid, k kept, m masked.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from swath.backbones.base import Backbone, Context, Keep, ProductKeep, gather, places
from swath.pretrain.objective import Draws

UNITS = 16  # fewer units of masked pixels than this leave nothing to learn from

Grid = tuple[int, int, int, int]  # (dates, groups, rows, columns)


@dataclass
class Mask:
    """Of a grid: the places that are seen (B, K) and those that are predicted (B, M), ascending; `keep` is what a sparse backbone
    is told, None where pixels are hidden; enough (B,) says which samples have K valid tokens and one to predict; valid (B, N)
    bool, None when all places are."""

    grid: Grid
    seen_bk: Tensor
    masked_bm: Tensor
    keep: Keep | None
    enough_b: Tensor | None = None
    valid_bn: Tensor | None = None


def kept(tokens: int, mask_ratio: float) -> int:
    """How many of `tokens` are encoded. The published code truncates tokens·(1 - ratio) in Python floats, and so do we."""
    if not math.isfinite(mask_ratio):
        raise ValueError(f"mask_ratio must be a number between 0 and 1, not {mask_ratio}")
    return int(tokens * (1 - mask_ratio))


def units(backbone: Backbone, height: int, width: int) -> Grid:
    """The grid of what can be masked: the backbone's tokens if it is sparse, else units of `mask_unit` pixels."""
    grid = backbone.grid(height, width)
    if "sparse" in backbone.traits:
        return grid
    return 1, 1, height // backbone.mask_unit, width // backbone.mask_unit


def check_ratio(backbone: Backbone, size: tuple[int, int], mask_ratio: float, shared: bool = False) -> None:
    """ValueError unless some tokens of an image of `size` stay and some go, and hidden pixels leave enough units."""
    grid = units(backbone, *size)
    tokens = _choices(backbone, grid, shared)
    keep = kept(tokens, mask_ratio)
    if not 0 < keep < tokens:
        raise ValueError(f"mask_ratio {mask_ratio} keeps {keep} of {tokens} tokens; some must stay, some must go")
    if "sparse" not in backbone.traits and tokens < UNITS:
        side = backbone.mask_unit * 4
        raise ValueError(
            f"{type(backbone).__name__} masks pixels in units of {backbone.mask_unit}, of which {size[0]}×{size[1]} pixels have "
            f"{tokens}; {UNITS} are needed, as data.size={side} has"
        )


def _choices(backbone: Backbone, grid: Grid, shared: bool) -> int:
    """What a mask chooses among: all tokens, or the positions alone where groups share them or must (a product)."""
    return grid[2] * grid[3] * (1 if shared or "product" in backbone.traits else grid[0] * grid[1])


def token_validity(valid_bthw: Tensor, grid: Grid) -> Tensor:
    """(B, N) bool: places of the grid of which at least half the pixels are valid, each at its own date."""
    share_bthw = F.adaptive_avg_pool2d(valid_bthw.float(), grid[2:]) >= 0.5
    return share_bthw.expand(-1, grid[0], -1, -1).repeat_interleave(grid[1], dim=1).flatten(1)


def random_mask(draw: Draws, tokens: int, keep: int, valid_bn: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(keep (B, K), masked (B, N - K)) int64, each ascending: the K smallest of one uniform number per token (He et al. 2022).

    Invalid tokens come last, so they are kept only where a sample has fewer than K valid ones.
    """
    if valid_bn is None:
        order_bn = draw.order("mask", tokens)
    else:
        order_bn = (draw.uniform("mask", tokens) + (~valid_bn) * 2.0).argsort(dim=1, stable=True)
    return order_bn[:, :keep].sort(dim=1).values, order_bn[:, keep:].sort(dim=1).values


def mask_images(
    backbone: Backbone, images_bchw: Tensor, valid_bthw: Tensor | None, draw: Draws, mask_ratio: float, shared: bool = False
) -> Mask:
    """A random mask as the backbone can take one: of tokens, of positions for all groups alike (`product`, or with `shared`), or
    of pixels."""
    grid = units(backbone, images_bchw.shape[2], images_bchw.shape[3])
    valid_bn = None if valid_bthw is None else token_validity(valid_bthw, grid)
    groups, per_group = grid[0] * grid[1], grid[2] * grid[3]
    product = "product" in backbone.traits
    shared = shared or product
    chosen_bn = valid_bn
    if shared and valid_bn is not None:
        chosen_bn = valid_bn.unflatten(1, (groups, per_group)).all(dim=1)
    count = _choices(backbone, grid, shared)
    keep = kept(count, mask_ratio)
    seen_bk, masked_bm = random_mask(draw, count, keep, chosen_bn)
    enough_b = None if chosen_bn is None else chosen_bn.sum(dim=1) > keep
    whole: Keep = seen_bk
    if shared:
        every_bg = torch.arange(groups, device=seen_bk.device).expand(len(seen_bk), -1)
        whole = ProductKeep(every_bg, seen_bk)
        seen_bk, masked_bm = places(whole, grid), places(ProductKeep(every_bg, masked_bm), grid)
    told = (whole if product else seen_bk) if "sparse" in backbone.traits else None
    return Mask(grid, seen_bk, masked_bm, told, enough_b, valid_bn)


def encode(backbone: Backbone, images_bchw: Tensor, ctx: Context, mask: Mask) -> tuple[Tensor, Tensor]:
    """(prefix (B, P, D), tokens) of what the mask leaves: (B, K, D) of a sparse backbone, else all (B, N, D) units of the image
    with the pixels of hidden and of invalid ones replaced."""
    if mask.keep is not None:
        features = backbone.encode(backbone.tokenize(images_bchw, ctx, mask.keep))
        return features.prefix, features.tokens
    hidden_bn = torch.ones(len(images_bchw), mask.grid[2] * mask.grid[3], dtype=torch.bool, device=images_bchw.device)
    hidden_bn = hidden_bn.scatter(1, mask.seen_bk, False)
    if mask.valid_bn is not None:
        hidden_bn = hidden_bn | ~mask.valid_bn
    features = backbone(backbone.hide(images_bchw, hidden_bn.unflatten(1, mask.grid[2:])), ctx)
    deepest_bdhw = features.maps[max(features.maps)]
    return features.prefix, F.adaptive_avg_pool2d(deepest_bdhw, mask.grid[2:]).flatten(2).transpose(1, 2)


def token_weights(weight_b: Tensor, mask: Mask) -> Tensor:
    """(B, M) how much each masked token counts: its sample's weight, 0 where it is less than half valid or its sample has too
    little to learn from."""
    if mask.valid_bn is None or mask.enough_b is None:
        return weight_b[:, None].expand_as(mask.masked_bm)
    return (weight_b * mask.enough_b)[:, None] * mask.valid_bn.gather(1, mask.masked_bm)


def visible(tokens_bkd: Tensor, mask: Mask) -> tuple[Tensor, Tensor | None]:
    """Of what `encode` gives: tokens (B, K, D) at the seen places, and (B, M, D) at the masked ones where it has them too."""
    if mask.keep is not None:
        return tokens_bkd, None
    return gather(tokens_bkd, mask.seen_bk), gather(tokens_bkd, mask.masked_bm)


def fill(values_bmp: Tensor, index_bm: Tensor, into_bnp: Tensor) -> Tensor:
    """`into` with the rows `index` of each sample replaced by `values`."""
    rows = index_bm[..., None].expand(-1, -1, into_bnp.shape[2])
    return into_bnp.scatter(1, rows, values_bmp.to(into_bnp.dtype))


def ids_restore(draw: Draws, tokens: int) -> Tensor:
    """(B, N) where each token went in the shuffled order, as the published code calls it."""
    return torch.argsort(draw.order("mask", tokens), dim=1)
