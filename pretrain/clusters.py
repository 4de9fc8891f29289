"""Autoregression over clusters of patches: which come before which, and the decoder that predicts each from those before (Ren et
al. 2024, "Autoregressive Pretraining with Mamba in Vision").

Letters: b sample, n all places, k places that are encoded (all clusters but the last), m places that are predicted (all but the
first), j tapped layer, d width, e width of a head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swath.backbones.column import by_cluster
from swath.backbones.mamba import EPS
from swath.backbones.vit import init_weights
from swath.kernels.linear import Linear
from swath.pretrain.decoder import CrossBlock, raster_positions
from swath.pretrain.masking import Grid


@dataclass
class Clusters:
    """A grid in clusters. visited (N,): places cluster by cluster; number (N,): the cluster of each place; context (K,): places
    of all but the last one, target (M,): of all but the first, both ascending."""

    grid: Grid
    visited: Tensor
    number: Tensor
    context: Tensor
    target: Tensor

    def sees(self) -> Tensor:
        """(M, K) bool: whether a place that is encoded lies in an earlier cluster than one that is predicted."""
        return self.number[self.target][:, None] > self.number[self.context]


def clusters_of(grid: Grid, side: int, device: torch.device) -> Clusters:
    """The clusters of side² patches, which divide the grid, themselves in raster order as their patches are."""
    visited_n = by_cluster(grid[2], grid[3], side, device)
    number_n = visited_n.argsort() // side**2
    return Clusters(grid, visited_n, number_n, visited_n[: -(side**2)].sort().values, visited_n[side**2 :].sort().values)


def tapped(depth: int, count: int) -> list[int]:
    """Numbers of the `count` layers that are read: evenly from the middle to the last one, 5, 7, 9, 11 of 12; -1 is the input."""
    return [round(depth - depth * (count - 1 - j) / (2 * max(1, count - 1))) - 1 for j in range(count)]


class ClusterDecoder(nn.Module):
    """Tapped layers of the backbone → features of the predicted places: block j reads its own map of all the taps."""

    def __init__(self, inside: int, taps: int, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.width = width
        self.norms = nn.ModuleList([nn.LayerNorm(inside, eps=EPS) for _ in range(taps)])
        self.keys = Linear(taps * inside, taps * width)
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList([CrossBlock(width, width, heads, mlp_ratio, EPS, norm_keys=True) for _ in range(taps)])
        self.norm = nn.LayerNorm(width, eps=EPS)
        init_weights(self)
        nn.init.normal_(self.query, std=0.02)

    def read(self, tapped_bkd: list[Tensor]) -> Tensor:
        """(B, K, J, D): what each block attends to."""
        normed = [norm(x_bkd) for norm, x_bkd in zip(self.norms, tapped_bkd, strict=True)]
        return self.keys(torch.cat(normed, dim=2)).unflatten(2, (len(self.blocks), self.width))

    def forward(self, keys_bkjd: Tensor, clusters: Clusters, present_bk: Tensor | None = None) -> Tensor:
        """(B, M, D) from what `read` gives: one query for all places, with their positions. present (B, K) bool, None for all."""
        position_nd = raster_positions(self.width, clusters.grid, keys_bkjd.device)
        x_bmd = self.query + position_nd[clusters.target]
        mask = clusters.sees()
        if present_bk is not None:
            there = mask & present_bk[:, None]
            # a query that sees nothing looks at absent tokens: a number, and no target
            mask = torch.where(there.any(dim=2, keepdim=True), there, mask)[:, None]
        for block, key_bkd in zip(self.blocks, keys_bkjd.unbind(2), strict=True):
            x_bmd = block(x_bmd, key_bkd, mask)
        return self.norm(x_bmd)
