"""DynamicVis: a pyramid in which each block scans only the tokens that its gate picks (KyanChen/DynamicVis).

Letters: b sample, c band, h w pixels, n tokens of a stage, s picked tokens, l = rows + s scanned ones, d width, e inner width,
k directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swath.backbones.base import Backbone, Context, Features, Keep, Recomputed, Tokens, gather, register
from swath.backbones.grid import boxes, check_images, pyramid_grid, refuse_keep, resize_positions
from swath.backbones.mamba import Mixer, mixer_from_published
from swath.kernels.conv import causal_conv1d
from swath.kernels.linear import Linear
from swath.kernels.scan import selective_scan


class SharedMixer(Mixer):
    """A mixer of one direction, taken forwards and backwards with the same weights; the mean of both."""

    def __init__(self, width: int, states: int = 16) -> None:
        super().__init__(width, 2 * width, directions=1, states=states)

    def forward(self, x_bld: Tensor, order: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, L, D). order (K, L) int64: the ways to take, forwards and backwards when None."""
        if order is None:
            forth = torch.arange(x_bld.shape[1], device=x_bld.device)
            order = torch.stack([forth, forth.flip(0)])
        return self.out_proj(self.along(x_bld, order, mask, "sum") / len(order))

    def along(self, x_bld: Tensor, order_kl: Tensor, mask: Tensor | None, reduce: str) -> Tensor:
        """Gated states before out_proj: the sum of all ways (B, L, E), or with `reduce="none"` each (K, B, L, E)."""
        ways = len(order_kl)
        x_ble, z_ble = self.in_proj(x_bld).chunk(2, dim=2)
        u_kble = causal_conv1d(x_ble, self.conv_weight.expand(ways, -1, -1), self.conv_bias, order=order_kl, mask=mask)
        given = self.parameters_of(u_kble)
        given |= {name: given[name].expand(ways, *given[name].shape[1:]) for name in ("A", "D", "delta_bias")}
        y = selective_scan(u_kble, **given, z=z_ble, delta_softplus=True, order=order_kl, mask=mask, reduce=reduce)
        assert isinstance(y, Tensor)
        return y


class RMSNorm(nn.Module):
    """x / rms(x) · weight, in fp32."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class Block(Recomputed):
    """A gate that picks a share 1 / ratio of the tokens, and a scan of these behind one token a row, its mean.

    p = softmax over all tokens of a linear score. Picked tokens become x + p (x + mixer(norm(x))), the others x + p x. As p is
    about 1 / n, that is next to nothing; with `relative` the mixer's part is weighted by p / max p instead.
    `spatial`: picked tokens are scanned in raster order, not by falling score. `noise`: scale of Gumbel noise on the scores in
    training, which decides who is picked.
    """

    def __init__(
        self, width: int, ratio: int, states: int = 16, spatial: bool = False, relative: bool = False, noise: float = 0.0
    ) -> None:
        super().__init__()
        self.ratio, self.spatial, self.relative, self.noise = ratio, spatial, relative, noise
        self.gate = Linear(width, 1, bias=False)
        self.norm = RMSNorm(width)
        self.mixer = SharedMixer(width, states)

    def route(self, x_bnd: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, N), fp32, and picked tokens (B, S) in the order of the scan."""
        score_bn = self.gate(x_bnd)[..., 0].float()
        drawn_bn = score_bn.detach()
        if self.training and self.noise:
            drawn_bn = drawn_bn - self.noise * torch.empty_like(drawn_bn).exponential_().log()
        # stable: equal scores, many in bf16, are picked alike on every device
        kept_bs = drawn_bn.argsort(dim=1, descending=True, stable=True)[:, : max(1, score_bn.shape[1] // self.ratio)]
        return score_bn, kept_bs.sort(dim=1).values if self.spatial else kept_bs

    def compute(self, x_bnd: Tensor, rows: int) -> Tensor:
        score_bn, kept_bs = self.route(x_bnd)
        share_bn = score_bn.softmax(dim=1)
        weight_bn = (score_bn - score_bn.amax(dim=1, keepdim=True)).exp() if self.relative else share_bn
        means_bhd = x_bnd.unflatten(1, (rows, -1)).mean(dim=2)
        x_bld = torch.cat([means_bhd, gather(x_bnd, kept_bs)], dim=1)
        y_bsd = self.mixer(self.norm(x_bld))[:, rows:]
        step_bsd = (y_bsd * weight_bn.gather(1, kept_bs)[..., None]).to(x_bnd.dtype)
        # of the size of the whole stage there is only this besides x
        out_bnd = x_bnd * (1 + share_bn[..., None]).to(x_bnd.dtype)
        return out_bnd.scatter_add_(1, kept_bs[..., None].expand_as(step_bsd), step_bsd)


class Downsample(nn.Module):
    """An overlapping convolution and a LayerNorm: (B, C, H, W) → (B, H/s · W/s, D)."""

    def __init__(self, bands: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(bands, width, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x_bchw: Tensor) -> Tensor:
        # channels last, so that the tokens are a view of the result and not a copy
        x_bchw = x_bchw.contiguous(memory_format=torch.channels_last)
        return self.norm(self.projection(x_bchw).permute(0, 2, 3, 1).flatten(1, 2))


@dataclass(frozen=True)
class DynamicVisConfig:
    """`image_size` is that of the learned positions at stride 4; others interpolate them. `ratios`: how many tokens of a stage
    one picked token stands for. `spatial`, `relative`, `noise`: see `Block`; published training has a noise of 0.1, which comes
    from torch's generator and not from the sample's draws, and so is not the default. `pool_norm`: a LayerNorm of the pooled."""

    bands: int
    image_size: int = 512
    widths: tuple[int, int, int, int] = (96, 192, 384, 768)
    depths: tuple[int, int, int, int] = (2, 4, 16, 4)
    ratios: tuple[int, int, int, int] = (8, 4, 2, 1)
    states: int = 16
    spatial: bool = False
    relative: bool = False
    noise: float = 0.0
    pool_norm: bool = False


_SIZES = {
    "base": {"widths": (96, 192, 384, 768), "depths": (2, 4, 16, 4)},
    "large": {"widths": (128, 256, 512, 1024), "depths": (2, 4, 32, 4)},
}
STRIDES = (4, 8, 16, 32)


@register(DynamicVisConfig, {f"dynamicvis_{size}": options for size, options in _SIZES.items()})
class DynamicVis(Backbone):
    """Four stages at strides 4, 8, 16 and 32. Tokens are the last stage's; what is masked is masked in pixels."""

    band_axes: ClassVar = {"embeds.0.projection.weight": 1, "fill": 0}
    tiny: ClassVar = {"bands": 3, "image_size": 64, "widths": (8, 12, 16, 24), "depths": (1, 1, 1, 1), "states": 4}

    def __init__(self, config: DynamicVisConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.width = self.pooled_width = config.widths[-1]
        self.depth, self.mask_unit = sum(config.depths), STRIDES[-1]
        self.fill = nn.Parameter(torch.zeros(config.bands))
        self.pos_embed = nn.Parameter(torch.zeros(1, (config.image_size // STRIDES[0]) ** 2, config.widths[0]))
        shapes = zip(pairwise((config.bands, *config.widths)), (7, 3, 3, 3), (4, 2, 2, 2), strict=True)
        self.embeds = nn.ModuleList([Downsample(*widths, kernel, stride) for widths, kernel, stride in shapes])
        options = (config.states, config.spatial, config.relative, config.noise)
        self.stages = nn.ModuleList(
            nn.ModuleList([Block(width, ratio, *options) for _ in range(depth)])
            for width, ratio, depth in zip(config.widths, config.ratios, config.depths, strict=True)
        )
        self.norms = nn.ModuleList([nn.LayerNorm(width, eps=1e-6) for width in config.widths])
        self.pool_norm = nn.LayerNorm(self.width, eps=1e-6) if config.pool_norm else nn.Identity()
        nn.init.normal_(self.pos_embed, std=0.02)

    def grid(self, height: int, width: int) -> tuple[int, int, int, int]:
        return pyramid_grid(height, width, self.mask_unit)

    def tokenize(self, images_bchw: Tensor, ctx: Context | None = None, keep: Keep | None = None) -> Tokens:
        """The first stage's tokens, (B, H/4 · W/4, D); grid and boxes are those of the last stage."""
        check_images(images_bchw, self.config.bands)
        refuse_keep(keep)
        grid = self.grid(images_bchw.shape[2], images_bchw.shape[3])
        x_bnd = self.embeds[0](images_bchw)
        # in place: the norm's backward pass needs what entered it, not what left it
        x_bnd += self.positions(8 * grid[2], 8 * grid[3]).to(x_bnd.dtype)
        return Tokens(x_bnd, grid, boxes(grid, self.mask_unit, images_bchw.device))

    def positions(self, rows: int, columns: int) -> Tensor:
        """(rows · columns, D), interpolated where the grid is not that of `image_size`."""
        side = self.config.image_size // STRIDES[0]
        return resize_positions(self.pos_embed, (side, side), (rows, columns))

    def encode(self, tokens: Tokens, keep: Keep | None = None, taps: Sequence[int] = ()) -> Features:
        refuse_keep(keep)
        if tokens.present is not None:
            raise ValueError("DynamicVis is not sparse: hide pixels (Backbone.hide) instead of tokens")
        x_bnd = tokens.x
        rows, columns = 8 * tokens.grid[2], 8 * tokens.grid[3]
        tapped = {-1: x_bnd} if -1 in taps else {}
        maps: dict[int, Tensor] = {}
        number = 0
        for stride, stage, norm, following in zip(STRIDES, self.stages, self.norms, (*self.embeds[1:], None), strict=True):
            assert isinstance(stage, nn.ModuleList)
            for block in stage:
                x_bnd = block(x_bnd, rows)
                if number in taps:
                    tapped[number] = x_bnd
                number += 1
            x_bnd = norm(x_bnd)
            maps[stride] = x_bnd.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
            if following is not None:
                x_bnd = following(maps[stride])
                rows, columns = rows // 2, columns // 2
        pooled = self.pool_norm(x_bnd.mean(dim=1))
        return Features(pooled, x_bnd, x_bnd[:, :0], maps, tapped)


def _check(config: DynamicVisConfig) -> None:
    if config.bands < 1 or min(config.depths) < 0 or min(config.ratios) < 1 or config.noise < 0:
        raise ValueError(f"bands and ratios must be at least 1, depths and noise at least 0: {config}")
    pyramid_grid(config.image_size, config.image_size, STRIDES[-1])


def from_published(state: dict[str, Tensor], config: DynamicVisConfig) -> dict[str, Tensor]:
    """Our parameters from a published backbone's (`layers.stage.0|1|2.…`), which has no fill for masked pixels: ours is 0.

    Raises ValueError for a key that is none of the published backbone's.
    """
    renamed = {"spatial_gate": "gate", "spatial_mamba_mixer.pre_norm": "norm", "spatial_mamba_mixer.mamba_layer": "mixer"}
    ours = {"fill": torch.zeros(config.bands)}
    mixers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        name = name.removeprefix("backbone.")
        if name == "pos_embed":
            ours[name] = tensor
        elif name.startswith("post_meanpool_norm."):
            ours[name.replace("post_meanpool_norm", "pool_norm")] = tensor
        elif name.startswith("layers."):
            _, stage, kind, rest = name.split(".", 3)
            for theirs, mine in renamed.items():
                rest = rest.replace(theirs, mine)
            block, inside, part = rest.partition(".mixer.")
            if inside:
                mixers.setdefault(f"stages.{stage}.{block}.mixer", {})[part] = tensor
            else:
                ours[f"{('embeds', 'stages', 'norms')[int(kind)]}.{stage}.{rest}"] = tensor
        else:
            raise ValueError(f"{name} is no parameter of a published DynamicVis backbone (layers.…, pos_embed)")
    for name, parts in mixers.items():
        ours |= {f"{name}.{part}": tensor for part, tensor in mixer_from_published(parts).items()}
    return ours
