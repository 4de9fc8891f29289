"""Vision Transformer (Dosovitskiy et al. 2021) in the form that masked autoencoders pretrain (He et al. 2022).

Parameters carry the names of the published MAE encoder. Letters: b sample, c band, h w pixels, p patch, n places of the
grid, k kept tokens, t all tokens with the class token, d width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swath.backbones.base import Backbone, Context, Features, Keep, Recomputed, Tokens, gather, places, register, sincos_grid
from swath.backbones.context import ContextEncoding
from swath.backbones.grid import boxes, check_image_size, check_images, patch_grid, resize_positions
from swath.kernels.embed import visible_patch_embedding
from swath.kernels.linear import Linear, linear

EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention. With `queries`, only the last `queries` tokens ask, and all are asked."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x_btd: Tensor, queries: int | None = None, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x_btd.shape
        shape = (self.heads, width // self.heads)
        if queries is None:
            q, k, v = self.qkv(x_btd).view(batch, length, 3, *shape).permute(2, 0, 3, 1, 4)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            q = linear(x_btd[:, -queries:], weight[:width], bias[:width])
            q = q.view(batch, queries, *shape).transpose(1, 2)
            k, v = linear(x_btd, weight[width:], bias[width:]).view(batch, length, 2, *shape).permute(2, 0, 3, 1, 4)
        y_bhqe = attend(q, k, v, mask)
        return self.proj(y_bhqe.transpose(1, 2).flatten(2))


def attend(q_bhqe: Tensor, k_bhte: Tensor, v_bhte: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention, to keys where `mask`, bool, is True. On a CPU it trains in fp32: torch's fused backward pass
    in bf16 is several times slower."""
    if q_bhqe.device.type != "cpu" or q_bhqe.dtype == torch.float32 or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q_bhqe, k_bhte, v_bhte, mask)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q_bhqe.float(), k_bhte.float(), v_bhte.float(), mask).to(q_bhqe.dtype)


class Mlp(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x_btd: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_btd)))


class Block(Recomputed):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def compute(self, x_btd: Tensor, queries: int | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, T, D), or (B, queries, D): the last `queries` tokens only, where no others are needed; `mask` as in `attend`."""
        residual = x_btd if queries is None else x_btd[:, -queries:]
        x_bqd = residual + self.attn(self.norm1(x_btd), queries, mask)
        return x_bqd + self.mlp(self.norm2(x_bqd))


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, applied only to the patches that are asked for."""

    def __init__(self, bands: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(bands, width, patch, patch)

    def forward(self, images_bchw: Tensor, keep: Tensor | None = None) -> Tensor:
        return visible_patch_embedding(images_bchw, self.proj.weight, self.proj.bias, keep)


@dataclass(frozen=True)
class ViTConfig:
    """`image_size` fixes the spacing of positions; any other size that `patch` divides interpolates them.

    `pool` of patch tokens after the final norm: their mean, the class token instead, or `texture`: mean, standard deviation and
    mean absolute difference of neighbours side by side (3 · width numbers). A mean keeps what is there, the others how it lies.
    `context` adds an encoding of place, date and ground sampling distance to every token.
    """

    bands: int
    image_size: int = 224
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    positions: Literal["sincos", "learned"] = "sincos"
    pool: Literal["mean", "class", "texture"] = "mean"
    context: bool = False


_SIZES = {
    "tiny": {"width": 192, "depth": 12, "heads": 3},
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
    "large": {"width": 1024, "depth": 24, "heads": 16},
    "huge": {"width": 1280, "depth": 32, "heads": 16},
}


@register(ViTConfig, {f"vit_{s}_patch{p}": {**o, "patch": p} for s, o in _SIZES.items() for p in (4, 8, 14, 16)})
class ViT(Backbone):
    """Patches of all bands together (one group), a class token, pre-norm blocks, a final norm."""

    traits = frozenset({"sparse"})
    tiny: ClassVar[dict[str, Any]] = {"bands": 4, "image_size": 32, "patch": 8, "width": 48, "depth": 2, "heads": 3}

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.width = config.width
        self.pooled_width = config.width * (3 if config.pool == "texture" else 1)
        self.depth, self.mask_unit = config.depth, config.patch
        self.patch_embed = PatchEmbed(config.bands, config.patch, config.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        side = config.image_size // config.patch
        if config.positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, side * side, config.width))
        self.blocks = nn.ModuleList([Block(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.width, eps=EPS)
        self.context = ContextEncoding(config.width) if config.context else None
        init_weights(self)
        nn.init.normal_(self.cls_token, std=0.02)
        if config.positions == "learned":
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def grid(self, height: int, width: int) -> tuple[int, int, int, int]:
        return 1, 1, *patch_grid(height, width, self.config.patch)

    def tokenize(self, images_bchw: Tensor, ctx: Context | None = None, keep: Keep | None = None) -> Tokens:
        check_images(images_bchw, self.config.bands)
        grid = self.grid(images_bchw.shape[2], images_bchw.shape[3])
        # in the weights' dtype, so that a backbone loaded in bf16 stays in it
        position_nd = self.positions(grid[2], grid[3], images_bchw.device).to(self.patch_embed.proj.weight.dtype)
        index_bk = None if keep is None else places(keep, grid)
        x_bkd = self.patch_embed(images_bchw, index_bk)
        x_bkd = x_bkd + (position_nd if index_bk is None else position_nd[index_bk])
        if self.context is not None:
            x_bkd = x_bkd + self.context(ctx, len(x_bkd))[:, None]
        return Tokens(x_bkd, grid, boxes(grid, self.config.patch, images_bchw.device), keep)

    def positions(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """(rows · columns, D) positions, interpolated to the grid of `image_size` where the grid is another one."""
        side = self.config.image_size // self.config.patch
        if self.config.positions == "sincos":
            row, column = ((torch.arange(n, dtype=torch.float64, device=device) + 0.5) * side / n - 0.5 for n in (rows, columns))
            return sincos_grid(self.width, row, column).float()
        return resize_positions(self.pos_embed, (side, side), (rows, columns))

    def encode(self, tokens: Tokens, keep: Keep | None = None, taps: Sequence[int] = ()) -> Features:
        x_bkd, present_bk = tokens.x, tokens.present
        if keep is not None:
            index_bk = places(keep, tokens.grid)
            x_bkd, present_bk = gather(x_bkd, index_bk), None if present_bk is None else present_bk.gather(1, index_bk)
        mask = None
        if present_bk is not None:
            x_bkd = torch.where(present_bk[..., None], x_bkd, 0.0)
            mask = F.pad(present_bk, (1, 0), value=True)[:, None, None]
        x_btd = torch.cat([self.cls_token.to(x_bkd.dtype).expand(len(x_bkd), -1, -1), x_bkd], dim=1)
        tapped = {-1: x_btd} if -1 in taps else {}
        for number, block in enumerate(self.blocks):
            x_btd = block(x_btd) if mask is None else block(x_btd, None, mask)
            if number in taps:
                tapped[number] = x_btd
        x_btd = self.norm(x_btd)
        prefix, x_bkd = x_btd[:, :1], x_btd[:, 1:]
        maps: dict[int, Tensor] = {}
        if keep is None and tokens.keep is None:
            maps[self.config.patch] = x_bkd.transpose(1, 2).unflatten(2, tokens.grid[2:])
        return Features(self._pool(prefix, x_bkd, maps, present_bk), x_bkd, prefix, maps, tapped)

    def _pool(self, prefix_b1d: Tensor, x_bkd: Tensor, maps: dict[int, Tensor], present_bk: Tensor | None) -> Tensor:
        if self.config.pool == "class":
            return prefix_b1d[:, 0]
        if present_bk is not None:
            if self.config.pool == "texture":
                raise ValueError("texture pooling needs all tokens to be present; take pool mean or class")
            share_bk = present_bk / present_bk.sum(dim=1, keepdim=True).clamp_min(1)
            return (x_bkd * share_bk[..., None]).sum(dim=1)
        mean_bd = x_bkd.mean(dim=1)
        if self.config.pool == "mean":
            return mean_bd
        # EPS: the gradient of a root at 0, which a constant image has, is infinite
        spread_bd = (x_bkd.var(dim=1, correction=0) + EPS).sqrt()
        if maps:
            map_bdhw = maps[self.config.patch]
            steps = [map_bdhw.diff(dim=axis).abs().flatten(2) for axis in (2, 3)]
        else:  # of a kept subset, those that follow each other
            steps = [x_bkd.diff(dim=1).abs().transpose(1, 2)]
        step_bdn = torch.cat(steps, dim=2)
        # a single token has no neighbour, and differs from none
        step_bd = step_bdn.sum(dim=2) / max(1, step_bdn.shape[2])
        return torch.cat([mean_bd, spread_bd, step_bd], dim=1)


def _check(config: ViTConfig) -> None:
    if config.bands < 1 or config.depth < 0 or config.heads < 1:
        raise ValueError(f"bands and heads must be at least 1, depth at least 0: {config}")
    if config.width % (4 if config.positions == "sincos" else 1) or config.width % config.heads:
        raise ValueError(f"width {config.width} must be divisible by heads {config.heads}, and by 4 for sincos positions")
    check_image_size(config.image_size, config.patch)


def init_weights(module: nn.Module) -> None:
    """MAE's initialisation: Xavier-uniform matrices, zero biases; a patch projection's bias keeps the default."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, PatchEmbed):
            nn.init.xavier_uniform_(part.proj.weight.flatten(1))


def from_published(state: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """Our parameters from a published MAE encoder's. Its fixed position table, with a class row, must be the one we compute; of a
    learned one the class token takes the class row.

    Raises ValueError when the table is another one (a swapped row and column half, another grid).
    """
    ours = {name: tensor for name, tensor in state.items() if name != "pos_embed"}
    if config.positions == "learned":
        ours["pos_embed"] = state["pos_embed"][:, 1:]
        ours["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    elif "pos_embed" in state:
        place = torch.arange(config.image_size // config.patch)
        check_table(state["pos_embed"], sincos_grid(config.width, place, place), "pos_embed")
    return ours


def check_table(theirs_1nd: Tensor, ours_nd: Tensor, name: str) -> None:
    """ValueError unless a published position table is a zero class row and then ours, to the noise of float32 tables (1e-5)."""
    table = torch.cat([torch.zeros(1, ours_nd.shape[1]), ours_nd.float()])
    if theirs_1nd.shape[1:] != table.shape or (theirs_1nd[0] - table).abs().max() > 1e-5:
        raise ValueError(f"{name} of shape {tuple(theirs_1nd.shape)} is not the fixed sin-cos table of {tuple(table.shape)}")
