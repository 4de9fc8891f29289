"""Temporal vision transformer (SatMAE, Cong et al. 2022, arXiv:2207.08051): frames of one place, each token dated.

Letters: b sample, f frame, h w pixels, n places of the raster, k kept tokens, d width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from swath.backbones.base import Context, fitting, register, sincos, sincos_grid
from swath.backbones.context import civil
from swath.backbones.group_vit import SIZES, TINY, GridConfig, GridViT
from swath.backbones.spectral_vit import stacked
from swath.backbones.vit import PatchEmbed, check_table, init_weights
from swath.kernels.embed import visible_patch_embedding

FIRST_YEAR = 2002


@dataclass(frozen=True)
class TemporalViTConfig(GridConfig):
    """`bands` counts all frames' bands, frame by frame. `date_width` channels of the position hold each of year, month, hour."""

    image_size: int = 224
    patch: int = 16
    frames: int = 3
    date_width: int = 128


@register(
    TemporalViTConfig, {f"temporal_vit_{s}_patch16": {**SIZES[s], "patch": 16, "bands": 9} for s in ("base", "large", "huge")}
)
class TemporalViT(GridViT):
    """One patch embedding for all frames, tokens frame by frame, fixed positions that tell place, year, month and hour.

    `ctx.time` is (B, frames, 3) codes (year - 2002, month - 1, hour), or (B, frames) seconds since 1970 (UTC); without it frame
    number f counts as hour f of the first month.
    """

    config: TemporalViTConfig
    tiny: ClassVar[dict[str, Any]] = {**TINY, "bands": 6, "frames": 3, "date_width": 4}

    def __init__(self, config: TemporalViTConfig) -> None:
        if config.frames < 1 or config.bands % config.frames:
            fits = max(1, round(config.bands / max(1, config.frames))) * max(1, config.frames)
            raise ValueError(f"{config.bands} bands cannot be those of {config.frames} frames; {fits} could be")
        super().__init__(config, 1)
        space = config.width - 3 * config.date_width
        if config.date_width % 2 or config.date_width < 2 or space < 4 or space % 4:
            raise ValueError(
                f"date_width {config.date_width} must be even and leave, three times, a multiple of 4 of width {config.width}"
            )
        self.patch_embed = PatchEmbed(config.bands // config.frames, config.patch, config.width)
        init_weights(self.patch_embed)

    def grid(self, height: int, width: int) -> tuple[int, int, int, int]:
        return (self.config.frames, *super().grid(height, width)[1:])

    def check_images(self, images_bchw: Tensor, ctx: Context | None) -> None:
        super().check_images(images_bchw, ctx)
        shape = (len(images_bchw), self.config.frames)
        if ctx is not None and ctx.time is not None and tuple(ctx.time.shape) not in (shape, (*shape, 3)):
            raise ValueError(f"ctx.time must be {shape} seconds or {(*shape, 3)} codes, not {tuple(ctx.time.shape)}")

    def seen(self, ctx: Context | None) -> Context | None:
        return None if ctx is None else replace(ctx, time=None)  # the positions hold the dates

    @property
    def channels(self) -> tuple[tuple[int, ...], ...]:
        return tuple(zip(*[iter(range(self.config.bands))] * (self.config.bands // self.config.frames), strict=True))

    def with_bands(
        self, names: Sequence[str], chosen: Sequence[str], wavelength_nm: Sequence[float | None]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The same bands of every frame; those left out count as zero, as in a plain ViT."""
        channels, frames = self.channels_of(names, chosen), self.config.frames
        of_frame = channels[: len(channels) // frames]
        if channels != [frame * (self.config.bands // frames) + channel for frame in range(frames) for channel in of_frame]:
            raise ValueError(f"the {frames} frames share their weights: take the same bands of each, frame by frame")
        state, name = dict(self.state_dict()), "patch_embed.proj.weight"
        state[name] = state[name].index_select(1, torch.tensor(of_frame, device=state[name].device))
        return {"bands": len(channels)}, state

    def embed(self, images_bchw: Tensor, ctx: Context | None, index_bk: Tensor | None) -> Tensor:
        project = self.patch_embed.proj
        return visible_patch_embedding(stacked(images_bchw, project.in_channels), project.weight, project.bias, index_bk)

    def positions(self, grid: tuple[int, int, int, int], ctx: Context | None, batch: int, device: torch.device) -> Tensor:
        space_nd = self.sincos_positions(self.width - 3 * self.config.date_width, grid, device)
        code_bf3 = date_codes(None if ctx is None else ctx.time, self.config.frames, device)
        date = sincos(self.config.date_width, code_bf3.flatten()).float().view(*code_bf3.shape[:2], 1, -1)
        dates, frames = len(code_bf3), grid[0]
        space = space_nd.expand(dates, frames, -1, -1)
        return torch.cat([space, date.expand(-1, -1, len(space_nd), -1)], dim=3).flatten(1, 2)


def date_codes(time: Tensor | None, frames: int, device: torch.device) -> Tensor:
    """(B or 1, frames, 3) year - 2002, month - 1, hour of a context's time; where it is absent or NaN, frame f is hour f of the
    first month."""
    frame = torch.arange(frames, device=device)
    absent_1f3 = torch.stack([frame * 0, frame * 0, frame], dim=1)[None]
    if time is None:
        return absent_1f3
    if time.ndim == 3:
        return time
    year, month, _, hour = civil(time)
    return torch.where(time.isnan()[..., None], absent_1f3, torch.stack([year - FIRST_YEAR, month - 1, hour], dim=2))


def from_published(state: dict[str, Tensor], config: TemporalViTConfig) -> dict[str, Tensor]:
    """Our parameters from a published temporal encoder's, whose position table must be the one that we compute.

    Raises ValueError for names of anything else (split a checkpoint's decoder off first), for missing ones and another table.
    """
    ours = {name: tensor for name, tensor in state.items() if name != "pos_embed"}
    if "pos_embed" in state:
        place = torch.arange(config.image_size // config.patch)
        check_table(state["pos_embed"], sincos_grid(config.width - 3 * config.date_width, place, place), "pos_embed")
    return fitting(ours, TemporalViT, config)
