"""3-D spectral vision transformer (SpectralGPT, Hong et al. 2024, arXiv:2311.07113): cubes of neighbouring bands as tokens.

Letters: b sample, h w pixels, g cubes along the spectrum, n places of the raster, k kept tokens, d width.
"""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swath.backbones.base import Context, fitting, register
from swath.backbones.grid import resize_positions
from swath.backbones.group_vit import SIZES, TINY, GridConfig, GridViT
from swath.kernels.embed import visible_patch_embedding


@dataclass(frozen=True)
class SpectralViTConfig(GridConfig):
    """`cube` neighbouring bands make one token; `bands` is a multiple of it."""

    cube: int = 3


class CubeEmbed(nn.Module):
    """A 3-D convolution whose stride is its kernel, applied only to the cubes that are asked for."""

    def __init__(self, cube: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(1, width, (cube, patch, patch), (cube, patch, patch))
        nn.init.xavier_uniform_(self.proj.weight.flatten(1))

    def forward(self, images_bchw: Tensor, index_bk: Tensor | None = None) -> Tensor:
        """(B, K, D); numbers of cubes run along the raster, then along the spectrum."""
        weight = self.proj.weight[:, 0]
        return visible_patch_embedding(stacked(images_bchw, weight.shape[1]), weight, self.proj.bias, index_bk)


def stacked(images_bchw: Tensor, bands: int) -> Tensor:
    """(B, bands, C / bands · H, W): each run of `bands` neighbouring bands below the one before, so that patches in raster order
    are those of the first run, then those of the second."""
    return images_bchw.unflatten(1, (-1, bands)).transpose(1, 2).flatten(2, 3)


@register(
    SpectralViTConfig, {f"spectral_vit_{s}_patch8": {**SIZES[s], "patch": 8, "bands": 12} for s in ("base", "large", "huge")}
)
class SpectralViT(GridViT):
    """One embedding shared by all cubes, learned positions along the raster and along the spectrum, no class token."""

    config: SpectralViTConfig
    tiny: ClassVar[dict[str, Any]] = {**TINY, "bands": 9}

    def __init__(self, config: SpectralViTConfig) -> None:
        if config.cube < 1 or config.bands % config.cube:
            fits = max(1, round(config.bands / max(1, config.cube))) * config.cube
            raise ValueError(f"{config.bands} bands cannot be cut into cubes of {config.cube}; {fits} could be")
        super().__init__(config, config.bands // config.cube, class_token=False)
        side = config.image_size // config.patch
        self.patch_embed = CubeEmbed(config.cube, config.patch, config.width)
        self.pos_embed_spatial = nn.Parameter(torch.zeros(1, side * side, config.width))
        self.pos_embed_temporal = nn.Parameter(torch.zeros(1, self.groups, config.width))
        nn.init.trunc_normal_(self.pos_embed_spatial, std=0.02)
        nn.init.trunc_normal_(self.pos_embed_temporal, std=0.02)

    @property
    def channels(self) -> tuple[tuple[int, ...], ...]:
        return tuple(zip(*[iter(range(self.config.bands))] * self.config.cube, strict=True))

    def embed(self, images_bchw: Tensor, ctx: Context | None, index_bk: Tensor | None) -> Tensor:
        return self.patch_embed(images_bchw, index_bk)

    def positions(self, grid: tuple[int, int, int, int], ctx: Context | None, batch: int, device: torch.device) -> Tensor:
        side = self.config.image_size // self.config.patch
        space_nd = resize_positions(self.pos_embed_spatial, (side, side), grid[2:]).to(self.pos_embed_spatial.dtype)
        return (self.pos_embed_temporal[:, :, None] + space_nd).flatten(1, 2)


def from_published(state: dict[str, Tensor], config: SpectralViTConfig) -> dict[str, Tensor]:
    """Our parameters from a published encoder's, whose queries, keys and values are three layers.

    Raises ValueError for names of anything else (split a checkpoint's decoder off first) and for missing ones.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if found := re.fullmatch(r"(.+\.attn\.)([qkv])(\.\w+)", name):
            parts = [f"{found[1]}{part}{found[3]}" for part in "qkv"]
            if missing := [part for part in parts if part not in state]:
                raise ValueError(f"{', '.join(missing)} is missing")
            ours[f"{found[1]}qkv{found[3]}"] = torch.cat([state[part] for part in parts])
        else:
            ours[name] = tensor
    return fitting(ours, SpectralViT, config)
