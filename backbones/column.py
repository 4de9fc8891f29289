"""What scanned columns share: patches, a class token visited in the middle, orders of visits, pooling, learned positions.

Tokens stay where they are, the class token in front; each direction visits them in its own order. Letters: b sample, k direction
or kept token, n places of the grid, l places of a sequence with the class token, d width.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swath.backbones.base import Backbone, Context, Features, Keep, Tokens, gather, mean_of, places, sincos_grid
from swath.backbones.grid import boxes, check_image_size, check_images, patch_grid, resize_positions
from swath.backbones.vit import PatchEmbed


class Column(Backbone):
    """Patches, a class token that is visited in the middle, blocks of one width, a norm; what scanned columns share.

    A subclass sets `blocks`, each called (x (B, L, D), order, mask), and `norm`, and says how places are visited (`ways`,
    `both_ways`).
    """

    band_axes: ClassVar = {"patch_embed.proj.weight": 1}
    traits = frozenset({"sparse", "ordered"})
    blocks: nn.ModuleList
    norm: nn.Module
    both_ways: bool  # whether each of the ways is also gone backwards
    wide_residual = False  # the residual stream in fp32 also where weights are in bf16

    def __init__(self, config: Any) -> None:
        super().__init__()
        check(config)
        self.config = config
        self.width = self.pooled_width = config.width
        self.depth, self.mask_unit = config.depth, config.patch
        self.patch_embed = PatchEmbed(config.bands, config.patch, config.width)
        self.prefix = int(config.class_token)
        if config.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        if config.positions == "learned":  # the class token's first
            side = config.image_size // config.patch
            self.pos_embed = nn.Parameter(torch.zeros(1, self.prefix + side * side, config.width))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def ways(self, rows: int, columns: int, device: torch.device) -> list[Tensor] | None:
        """The (N,) places of the grid by step, of every forward direction; None for raster order alone."""
        raise NotImplementedError

    def grid(self, height: int, width: int) -> tuple[int, int, int, int]:
        return 1, 1, *patch_grid(height, width, self.config.patch)

    def tokenize(self, images_bchw: Tensor, ctx: Context | None = None, keep: Keep | None = None) -> Tokens:
        check_images(images_bchw, self.config.bands)
        grid = self.grid(images_bchw.shape[2], images_bchw.shape[3])
        position_nd = self.positions(grid[2], grid[3], images_bchw.device).to(self.patch_embed.proj.weight.dtype)
        index_bk = None if keep is None else places(keep, grid)
        x_bkd = self.patch_embed(images_bchw, index_bk)
        x_bkd = x_bkd + (position_nd if index_bk is None else position_nd[index_bk])
        return Tokens(x_bkd, grid, boxes(grid, self.config.patch, images_bchw.device), keep)

    def positions(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """(rows · columns, D) positions, interpolated to the grid of `image_size` where the grid is another one."""
        side = self.config.image_size // self.config.patch
        if self.config.positions == "learned":
            return resize_positions(self.pos_embed[:, self.prefix :], (side, side), (rows, columns))
        row, column = ((torch.arange(n, dtype=torch.float64, device=device) + 0.5) * side / n - 0.5 for n in (rows, columns))
        return sincos_grid(self.width, row, column).float()

    def encode(self, tokens: Tokens, keep: Keep | None = None, taps: Sequence[int] = ()) -> Features:
        picked = tokens.keep if keep is None else keep
        index_bk = None if picked is None else places(picked, tokens.grid)
        x_bkd, present_bk = tokens.x, tokens.present
        if keep is not None:
            if tokens.keep is not None or index_bk is None:
                raise ValueError("keep picks among all tokens; of these only a kept subset was embedded")
            x_bkd = gather(x_bkd, index_bk)
            present_bk = None if present_bk is None else present_bk.gather(1, index_bk)
        if present_bk is not None:
            x_bkd = torch.where(present_bk[..., None], x_bkd, 0.0)
        x_bld, mask_bl = self._with_prefix(x_bkd, present_bk)
        if self.wide_residual:
            x_bld = x_bld.to(torch.promote_types(x_bld.dtype, torch.float32))
        order = self._order(tokens.grid, index_bk, x_bld.device)
        tapped = {-1: x_bld} if -1 in taps else {}
        for number, block in enumerate(self.blocks):
            x_bld = block(x_bld, order, mask_bl)
            if number in taps:
                tapped[number] = x_bld
        x_bld = self.norm(x_bld)
        prefix, x_bkd = x_bld[:, : self.prefix], x_bld[:, self.prefix :]
        maps: dict[int, Tensor] = {}
        if index_bk is None and present_bk is None:
            maps[self.config.patch] = x_bkd.transpose(1, 2).unflatten(2, tokens.grid[2:])
        return Features(self._pool(prefix, x_bkd, present_bk, tokens.grid, index_bk), x_bkd, prefix, maps, tapped)

    def _with_prefix(self, x_bkd: Tensor, present_bk: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.prefix:
            return x_bkd, present_bk
        first_11d = self.cls_token
        if self.config.positions == "learned":
            first_11d = first_11d + self.pos_embed[:, :1]
        x_bld = torch.cat([first_11d.to(x_bkd.dtype).expand(len(x_bkd), -1, -1), x_bkd], dim=1)
        return x_bld, None if present_bk is None else F.pad(present_bk, (1, 0), value=True)

    def _order(self, grid: tuple[int, int, int, int], index_bk: Tensor | None, device: torch.device) -> Tensor | None:
        """(K, L), or (K, B, L) of a kept subset: the place in the sequence that each step visits."""
        ways = self.ways(grid[2], grid[3], device)
        if ways is None and not self.prefix and not self.both_ways:
            return None
        order_kn = torch.stack([torch.arange(grid[2] * grid[3], device=device)] if ways is None else ways)
        order_kl = visits(order_kn, bool(self.prefix), self.both_ways)
        if index_bk is None:
            return order_kl
        place_bl = F.pad(index_bk + 1, (1, 0)) if self.prefix else index_bk
        return order_kl.argsort(dim=1)[:, place_bl].argsort(dim=2)

    def _pool(
        self, prefix_b1d: Tensor, x_bkd: Tensor, present_bk: Tensor | None, grid: tuple[int, ...], index_bk: Tensor | None
    ) -> Tensor:
        if self.config.pool == "class":
            return prefix_b1d[:, 0]
        if self.config.pool == "mean":
            return mean_of(x_bkd, present_bk)
        count = grid[2] * grid[3]
        place_bk = torch.arange(count, device=x_bkd.device)[None] if index_bk is None else index_bk
        there_bk = torch.ones_like(x_bkd[..., 0], dtype=torch.bool) if present_bk is None else present_bk
        return (mean_of(x_bkd, there_bk & (place_bk < count // 2)) + mean_of(x_bkd, there_bk & (place_bk >= count // 2))) / 2


def visits(order_kn: Tensor, prefix: bool, both_ways: bool) -> Tensor:
    """(K or 2 K, N [+ 1]) orders of the whole sequence: with a class token in front, it is visited after N // 2 others; both
    ways, each order is followed by its reverse."""
    if prefix:
        half = order_kn.shape[1] // 2
        order_kn = torch.cat([order_kn[:, :half] + 1, torch.zeros_like(order_kn[:, :1]), order_kn[:, half:] + 1], dim=1)
    return torch.stack([order_kn, order_kn.flip(1)], dim=1).flatten(0, 1) if both_ways else order_kn


def by_cluster(rows: int, columns: int, side: int, device: torch.device) -> Tensor:
    """(N,) places cluster by cluster of side² patches, clusters and patches inside each in raster order; cut at the edges."""
    row, column = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)
    cluster_rc = (row // side) * columns + column // side  # a number that ascends with clusters; raster breaks ties
    return cluster_rc.flatten().argsort(stable=True)


def by_column(rows: int, columns: int, device: torch.device) -> Tensor:
    """(N,) places column by column."""
    return torch.arange(rows * columns, device=device).view(rows, columns).T.flatten()


def check(config: Any) -> None:
    """ValueError for a configuration of a column that cannot be."""
    if config.bands < 1 or config.depth < 0:
        raise ValueError(f"bands must be at least 1, depth at least 0: {config}")
    if config.positions == "sincos" and config.width % 4:
        raise ValueError(f"width {config.width} must be divisible by 4 for sincos positions")
    if config.pool == "class" and not config.class_token:
        raise ValueError("pool: class needs class_token: true")
    check_image_size(config.image_size, config.patch)
