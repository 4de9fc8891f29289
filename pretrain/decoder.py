"""Decoders' parts: self-attention over what was seen and mask tokens at what was not (He et al. 2022), and blocks that only ask
the encoder (Fu et al. 2024, "Rethinking Patch Dependence for Masked Autoencoders").

Letters: b sample, n places of the grid, k seen, m masked, p prefix (class tokens), t = p + k + m, d width of the decoder.
"""

import math

import torch
from torch import Tensor, nn

from swath.backbones.base import Recomputed, gather, sincos_grid
from swath.backbones.vit import EPS, Block, Mlp, attend, init_weights
from swath.kernels.linear import Linear
from swath.pretrain.masking import Grid, Mask, visible


class Decoder(nn.Module):
    """Encoder features → features of the masked places. The last block, and what follows, run on what is asked for only, which
    changes no number and saves their arithmetic. ValueError for sizes that cannot be, as those of `name`."""

    def __init__(self, inside: int, width: int, depth: int, heads: int, mlp_ratio: float = 4.0, *, name: str = "decoder") -> None:
        super().__init__()
        check_sizes(name, width, depth, heads, mlp_ratio)
        self.width = width
        self.embed = Linear(inside, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList([Block(width, heads, mlp_ratio) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=EPS)
        init_weights(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, prefix_bpd: Tensor, tokens_bkd: Tensor, mask: Mask, position_bnd: Tensor, prefix_position_1pd: Tensor | None = None,
        everywhere: bool = False,
    ) -> Tensor:  # fmt: skip
        """(B, M, D) at the masked places; (B, N, D) in raster order of the grid with `everywhere`. prefix and tokens are of
        `masking.encode`; position is ([B,] N, D)."""
        seen_bkd, hidden_bmd = visible(tokens_bkd, mask)
        prefix, count = prefix_bpd.shape[1], seen_bkd.shape[1]
        entered = [prefix_bpd, seen_bkd] + ([] if hidden_bmd is None else [hidden_bmd])
        x_btd = self.embed(torch.cat(entered, dim=1))
        head_bpd, seen_bkd, hidden_bmd = x_btd.split([prefix, count, x_btd.shape[1] - prefix - count], dim=1)
        if prefix_position_1pd is not None:
            head_bpd = head_bpd + prefix_position_1pd.to(head_bpd.dtype)
        if not hidden_bmd.shape[1]:
            hidden_bmd = self.mask_token
        x_btd = torch.cat(
            [
                head_bpd,
                seen_bkd + at(position_bnd, mask.seen_bk).to(seen_bkd.dtype),
                (hidden_bmd + at(position_bnd, mask.masked_bm)).to(seen_bkd.dtype),
            ],
            dim=1,
        )
        wanted = x_btd.shape[1] - prefix if everywhere else mask.masked_bm.shape[1]
        for block in self.blocks[:-1]:
            x_btd = block(x_btd)
        for block in self.blocks[-1:]:
            x_btd = block(x_btd, wanted)
        x_btd = self.norm(x_btd[:, -wanted:])
        if not everywhere:
            return x_btd
        return gather(x_btd, torch.cat([mask.seen_bk, mask.masked_bm], dim=1).argsort(dim=1))


class CrossBlock(Recomputed):
    """Pre-norm block whose queries attend to what was encoded, `inside` wide, and never to each other; then an MLP."""

    def __init__(
        self, inside: int, width: int, heads: int, mlp_ratio: float, eps: float = EPS, *, norm_keys: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.norm_query = nn.LayerNorm(width, eps=eps)
        self.norm_key = nn.LayerNorm(inside, eps=eps) if norm_keys else nn.Identity()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.q, self.kv, self.proj = Linear(width, width), Linear(inside, 2 * width), Linear(width, width)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def compute(self, x_bmd: Tensor, key_btd: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B or 1, M, D) and (B, T, inside) → (B, M, D); mask (M, T) or (B, 1, M, T) bool, True where a query may look."""
        shape = (self.heads, x_bmd.shape[2] // self.heads)
        q_bhme = self.q(self.norm_query(x_bmd)).unflatten(2, shape).transpose(1, 2)
        k_bhte, v_bhte = self.kv(self.norm_key(key_btd)).unflatten(2, (2, *shape)).permute(2, 0, 3, 1, 4)
        y_bhme = attend(q_bhme.expand(len(key_btd), -1, -1, -1), k_bhte, v_bhte, mask)
        x_bmd = x_bmd + self.proj(y_bhme.transpose(1, 2).flatten(2))
        return x_bmd + self.mlp(self.norm(x_bmd))


def check_sizes(name: str, width: int, depth: int, heads: int, mlp_ratio: float) -> None:
    """ValueError, with the names of the options of `name`, unless there are blocks of these sizes."""
    if width < 1 or heads < 1 or width % heads:
        raise ValueError(f"{name}_width {width} must be divisible by {name}_heads {heads}, both at least 1")
    if depth < 0:
        raise ValueError(f"{name}_depth {depth} must be at least 0")
    if not 1 <= width * mlp_ratio < math.inf:
        raise ValueError(f"mlp_ratio {mlp_ratio} of {name}_width {width} must be at least 1 channel")


class Positions(nn.Module):
    """Fixed positions of the raster, and a learned vector for each (date, group) of tokens where there are several. ValueError
    for a width, that of `name`, which rows and columns cannot share."""

    def __init__(self, width: int, grid: Grid, *, name: str = "decoder") -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"{name}_width {width} must be divisible by 4 for its positions")
        self.width = width
        if grid[:2] != (1, 1):
            self.group_embed = nn.Parameter(torch.zeros(grid[0] * grid[1], width))
            nn.init.trunc_normal_(self.group_embed, std=0.02)

    def forward(self, grid: Grid, device: torch.device) -> Tensor:
        """(N, D) of all places of a grid."""
        place_nd = raster_positions(self.width, grid, device)
        if grid[:2] == (1, 1):
            return place_nd
        return (self.group_embed[:, None] + place_nd).flatten(0, 1)


def at(position: Tensor, index_bk: Tensor) -> Tensor:
    """(B, K, D): rows of a table (N, D), or of each sample's own (B, N, D)."""
    return position[index_bk] if position.ndim == 2 else gather(position.expand(len(index_bk), -1, -1), index_bk)


def raster_positions(width: int, grid: Grid, device: torch.device) -> Tensor:
    """(rows · columns, width) fixed positions of a grid's raster, float32."""
    rows, columns = (torch.arange(count, device=device) for count in grid[2:])
    return sincos_grid(width, rows, columns).float()
