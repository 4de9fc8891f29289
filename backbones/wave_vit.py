"""Wavelength-conditioned vision transformer: a band's patch weights are made from its wavelength, so any sensor's bands enter.

After DOFA (Xiong et al. 2024, arXiv:2403.15356), which makes them with a transformer; here they are a mixture of learned patch
projections whose shares are a smooth function of the wavelength. Letters: b sample, c band, p patch, k kept tokens, d width,
r projections of the mixture, f feature.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swath.backbones.base import Context, register
from swath.backbones.group_vit import SIZES, TINY, GridConfig, GridViT
from swath.backbones.vit import init_weights
from swath.kernels.embed import visible_patch_embedding
from swath.kernels.linear import Linear

_VISIBLE_NM, _OCTAVES_WIDE = 400.0, 5.0  # from 400 nm, five octaves reach the thermal infrared
_OCTAVES = 6


@dataclass(frozen=True)
class WaveViTConfig(GridConfig):
    """`bands` is the number of bands where no wavelengths are given, and how many bands without one can be told apart.

    `wavelength_nm` are those of the bands where the context has none. `mixture` patch projections are mixed for each band by a
    network of `hidden` units.
    """

    image_size: int = 224
    patch: int = 16
    wavelength_nm: tuple[float, ...] = ()
    mixture: int = 32
    hidden: int = 128


class WaveEmbed(nn.Module):
    """Patch weights of any bands. A band without a wavelength (radar) is known by a learned vector of its place."""

    def __init__(self, config: WaveViTConfig) -> None:
        super().__init__()
        self.unknown = nn.Parameter(torch.zeros(config.bands, config.hidden))
        self.enter = Linear(1 + 2 * _OCTAVES, config.hidden)
        self.mlp = Linear(config.hidden, config.hidden)
        self.mix_norm = nn.LayerNorm(config.hidden)
        self.mix = Linear(config.hidden, config.mixture)
        self.projections = nn.Parameter(torch.zeros(config.mixture, config.width, config.patch, config.patch))
        self.bias = nn.Parameter(torch.zeros(config.width))
        nn.init.normal_(self.unknown, std=1.0)
        # a mean over bands of products with `mixture` shares of unit size keeps the size of a patch
        nn.init.normal_(self.projections, std=1 / math.sqrt(config.mixture * config.patch**2))

    def weights(self, wavelength_nm: Tensor) -> Tensor:
        """(D, C, p, p) for wavelengths (C,), NaN or 0 where a band has none. A mean over bands: their number changes no size."""
        bands = len(wavelength_nm)
        known_c = torch.where(wavelength_nm > 0, wavelength_nm.double(), math.nan)
        place = torch.arange(bands, device=known_c.device).clamp(max=len(self.unknown) - 1)
        feature_cf = _features(known_c.nan_to_num(_VISIBLE_NM)).to(self.unknown.dtype)
        entered = torch.where(known_c.isnan()[:, None], self.unknown[place], self.enter(feature_cf))
        share_cr = self.mix(self.mix_norm(entered + self.mlp(F.gelu(entered))))
        mixed_cdpq = (share_cr / bands) @ self.projections.flatten(1).to(share_cr.dtype)
        return mixed_cdpq.view(bands, *self.projections.shape[1:]).transpose(0, 1)

    def forward(self, images_bchw: Tensor, wavelength_nm: Tensor, index_bk: Tensor | None = None) -> Tensor:
        weight = self.weights(wavelength_nm).to(self.bias.dtype)
        return visible_patch_embedding(images_bchw, weight, self.bias, index_bk)


def _features(wavelength_c: Tensor) -> Tensor:
    """(C, F) float64: position on a logarithmic scale, and its sines and cosines in octaves."""
    scale_c = (wavelength_c / _VISIBLE_NM).log2() / _OCTAVES_WIDE
    angle_cf = scale_c[:, None] * (math.pi * 2.0 ** torch.arange(_OCTAVES, dtype=torch.float64, device=wavelength_c.device))
    return torch.cat([scale_c[:, None], angle_cf.sin(), angle_cf.cos()], dim=1)


@register(WaveViTConfig, {f"wave_vit_{s}_patch16": {**SIZES[s], "patch": 16} for s in ("small", "base")})
class WaveViT(GridViT):
    """All bands together in one patch, through weights made from `ctx.wavelength_nm` (C,), NaN or 0 for a band without one.

    Any number of bands enters with it; without it, and without `wavelength_nm` in the configuration, `bands` unnamed ones.
    """

    config: WaveViTConfig
    traits = frozenset({"sparse", "any_bands"})
    tiny: ClassVar[dict[str, Any]] = {**TINY, "bands": 5, "mixture": 4, "hidden": 16}

    def __init__(self, config: WaveViTConfig) -> None:
        if config.attention != "joint":
            raise ValueError(f"all bands are one group here: attention must be joint, not {config.attention}")
        if config.wavelength_nm and len(config.wavelength_nm) != config.bands:
            raise ValueError(f"wavelength_nm must hold {config.bands}, one for each band, not {len(config.wavelength_nm)}")
        super().__init__(config, 1)
        if config.width % 4 or config.mixture < 1 or config.hidden < 1:
            raise ValueError(f"width must be divisible by 4, mixture and hidden at least 1: {config}")
        self.patch_embed = WaveEmbed(config)
        init_weights(self.patch_embed)

    def check_images(self, images_bchw: Tensor, ctx: Context | None) -> None:
        given = None if ctx is None else ctx.wavelength_nm
        if given is not None and given.ndim != 1:
            raise ValueError(f"ctx.wavelength_nm must be (C,), one for each band, not {tuple(given.shape)}")
        bands = self.config.bands if given is None else len(given)
        if images_bchw.ndim != 4 or images_bchw.shape[1] != bands:
            whose = "as the configuration says" if given is None else "one for each wavelength of the context"
            raise ValueError(f"images must be (B, {bands}, H, W), {whose}, not {tuple(images_bchw.shape)}")

    def with_bands(
        self, names: Sequence[str], chosen: Sequence[str], wavelength_nm: Sequence[float | None]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Weights are made anew, from the wavelengths of the bands that are chosen; they may be any. A band without one must be
        among those that were trained, where a vector stands for it."""
        bare = [n for n, known in zip(chosen, wavelength_nm, strict=True) if not known and n not in names]
        if bare:
            raise ValueError(f"{', '.join(bare)} has no wavelength to make weights from, and was not trained on")
        state = dict(self.state_dict())
        learned = state["patch_embed.unknown"]
        none = torch.zeros_like(learned[0])
        rows = [learned[min(names.index(n), len(learned) - 1)] if n in names else none for n in chosen]
        state["patch_embed.unknown"] = torch.stack(rows)
        return {"bands": len(chosen), "wavelength_nm": [known or 0.0 for known in wavelength_nm]}, state

    def embed(self, images_bchw: Tensor, ctx: Context | None, index_bk: Tensor | None) -> Tensor:
        if ctx is not None and ctx.wavelength_nm is not None:
            wavelength_nm = ctx.wavelength_nm
        else:
            wavelength_nm = images_bchw.new_tensor(
                self.config.wavelength_nm or [math.nan] * self.config.bands, dtype=torch.float32
            )
        return self.patch_embed(images_bchw, wavelength_nm, index_bk)

    def positions(self, grid: tuple[int, int, int, int], ctx: Context | None, batch: int, device: torch.device) -> Tensor:
        return self.sincos_positions(self.width, grid, device)[None]
