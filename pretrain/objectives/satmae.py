"""SatMAE (Cong et al. 2022, arXiv:2207.08051): a masked autoencoder whose tokens are of groups of bands, or of dates.

Letters: b sample, c channel, h w pixels, t date, g group of bands, n places of the raster or of the whole grid, m masked tokens,
p prefix (class tokens), d width, v pixels of a patch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from swath.backbones import group_vit, temporal_vit, vit
from swath.backbones.base import Backbone, Context, sincos, sincos_grid
from swath.backbones.group_vit import GroupViT, check_plain_table
from swath.backbones.temporal_vit import TemporalViT, date_codes
from swath.backbones.vit import ViT, check_table
from swath.kernels.patch_loss import masked_patch_loss
from swath.pretrain.decoder import Decoder, raster_positions
from swath.pretrain.masking import Grid, Mask, check_ratio, encode, fill, mask_images, token_weights
from swath.pretrain.objective import Draws, Objective, Outcome, context, register, seen_pixels
from swath.pretrain.pixels import PixelHead
from swath.shards.prepare import Batch

Picture = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class SatMAEConfig:
    """`spatial_mask`: one draw of places hides them in all dates and groups, else every token is drawn for itself.

    Where there are several groups, `group_width` channels of the decoder's position tell the group; where there are several
    dates, `date_width` each their year, month and hour. `normalise_patches`: targets are standardised per token (published for
    dates, not for groups). `compat` order: as released for groups, whose predictions, one group after the other, are compared
    with the bands in the image's order, and counted where the group of that band is masked.
    """

    mask_ratio: float = 0.75
    spatial_mask: bool = False
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    mlp_ratio: float = 4.0
    group_width: int = 128
    date_width: int = 64
    normalise_patches: bool = False
    compat: Literal["order"] | None = None


@register(SatMAEConfig, {"satmae": {}})
class SatMAE(Objective):
    """Reconstruct the pixels of masked tokens, each of one group of bands or one date: mean squared error over a token's valid
    pixels, then over masked, at least half valid tokens. A group of few bands weighs as much as one of many."""

    needs = frozenset({"sparse"})

    @classmethod
    def refusal(cls, backbone: Backbone) -> str | None:
        if len(backbone.channels) == 1 and "sparse" in backbone.traits:
            return "it has one date and one group of bands, for which objective mae is the same and does more"
        return refused_product(backbone) or super().refusal(backbone)

    def __init__(
        self, config: SatMAEConfig, backbone: Backbone, image_size: tuple[int, int], channels: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        check_ratio(backbone, image_size, config.mask_ratio, config.spatial_mask)
        grid = backbone.grid(*image_size)
        check_compat(config.compat, grid)
        check_widths(config.decoder_width, grid, config.group_width, config.date_width)
        width = config.decoder_width
        self.decoder = Decoder(backbone.width, width, config.decoder_depth, config.decoder_heads, config.mlp_ratio)
        # dates share a layer, groups do not
        self.head = PixelHead(width, backbone.channels, backbone.mask_unit, shared=grid[1] == 1)

    def forward(self, batch: Batch, draw: Draws) -> Outcome:
        ((modality, images_bchw),) = batch.images.items()
        images_bchw, valid_bthw = seen_pixels(batch, modality)
        ctx = context(batch, modality, self.backbone, draw)
        ratio, shared = self.config.mask_ratio, self.config.spatial_mask
        mask = mask_images(self.backbone, images_bchw, valid_bthw, draw, ratio, shared)
        prefix_bpd, tokens_bkd = encode(self.backbone, images_bchw, ctx, mask)
        as_released = self.config.compat == "order"
        x_bnd = self.decode(prefix_bpd, tokens_bkd, mask, ctx, everywhere=as_released)
        if not as_released:  # blank rows where nothing is predicted, so that each group has as many in every sample
            blank_bnd = x_bnd.new_zeros(len(x_bnd), mask.seen_bk.shape[1] + x_bnd.shape[1], x_bnd.shape[2])
            x_bnd = fill(x_bnd, mask.masked_bm, blank_bnd)
        compare = self._as_released if as_released else self._aligned
        error_bn, picture = compare(per_group(self.head, x_bnd), images_bchw, valid_bthw, mask)
        weight_bm = token_weights(batch.weight, mask)
        numerator, weight = (error_bn.gather(1, mask.masked_bm) * weight_bm).sum(), weight_bm.sum()
        return Outcome(numerator, weight, {f"pixels/{modality}": (numerator.detach(), weight)}, picture)

    def decode(self, prefix_bpd: Tensor, tokens_bkd: Tensor, mask: Mask, ctx: Context, everywhere: bool = False) -> Tensor:
        """(B, M, D) decoder features at masked places; (B, N, D) in raster order of the grid with `everywhere`."""
        config = self.config
        place, prefix = positions(
            config.decoder_width, mask.grid, tokens_bkd.device, config.group_width, config.date_width, ctx.time
        )  # fmt: skip
        return self.decoder(prefix_bpd, tokens_bkd, mask, place, prefix, everywhere)

    def _aligned(self, made: list[Tensor], images_bchw: Tensor, valid_bthw: Tensor | None, mask: Mask) -> tuple[Tensor, Picture]:
        """Errors (B, N) of tokens, each against its own bands."""
        head, patch = self.head, (self.head.patch, self.head.patch)
        every_bn = torch.arange(made[0].shape[1], device=images_bchw.device).expand(len(images_bchw), -1)
        valid: Sequence[Tensor | None] = [None] * len(made)
        if valid_bthw is not None:  # of each token's own date
            valid = valid_bthw.expand(-1, mask.grid[0], -1, -1).repeat_interleave(mask.grid[1], dim=1).split(1, dim=1)
        found = [
            masked_patch_loss(
                part_bnv, images_bchw[:, group], every_bn, patch=patch, normalise=self.config.normalise_patches, valid_b1hw=own
            )
            for part_bnv, group, own in zip(made, head.channels, valid, strict=True)
        ]

        def picture() -> dict[str, Tensor]:
            parts = [m.float() * spread[..., None] + mean[..., None] for m, (_, mean, spread) in zip(made, found, strict=True)]
            return pasted(image_of(parts, head, mask.grid), images_bchw, mask, head)

        return torch.cat([error_bn for error_bn, _, _ in found], dim=1), picture

    def _as_released(
        self, made: list[Tensor], images_bchw: Tensor, valid_bthw: Tensor | None, mask: Mask
    ) -> tuple[Tensor, Picture]:
        """Errors (B, N) of tokens' bands, which other tokens may have predicted, so that all are needed."""
        made_bchw = image_of(made, self.head, mask.grid, "order")
        target, mean, spread = images_bchw, torch.zeros(()), torch.ones(())
        if self.config.normalise_patches:
            target, mean, spread = standardised(images_bchw, valid_bthw, self.head.patch)
        error_bn = token_errors(made_bchw, target, valid_bthw, self.head)
        return error_bn, lambda: pasted(made_bchw.float() * spread + mean, images_bchw, mask, self.head)


def refused_product(backbone: Backbone) -> str | None:
    if "product" in backbone.traits:
        return "it masks single tokens, and this one keeps products of groups and positions only, which hyper_mae draws"
    return None


def check_compat(compat: str | None, grid: Grid) -> None:
    if compat == "order" and (grid[0] > 1 or grid[1] == 1):
        raise ValueError("compat: order is about the bands of several groups at one date, which this backbone does not have")


def check_widths(width: int, grid: Grid, group_width: int, date_width: int = 0) -> None:
    """ValueError unless the parts of the decoder's position fit into `width` channels."""
    groups, dates = group_width * (grid[1] > 1), date_width * (grid[0] > 1)
    space = width - groups - 3 * dates
    if space < 4 or space % 4 or groups % 2 or dates % 2:
        raise ValueError(
            f"decoder_width {width} less group_width {groups} and three times date_width {dates}, which must be even, leaves "
            f"{space} for the place; it must be a multiple of 4"
        )


def positions(
    width: int, grid: Grid, device: torch.device, group_width: int, date_width: int = 0, time: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Fixed positions of all places, (N, D) or with dates of their own (B, N, D), and of what stands before them (1, 1, D).

    Channels tell the place, then of several groups which one, a class token being one more, then of several dates when.
    """
    dates, groups = grid[:2]
    own = group_width * (groups > 1) + 3 * date_width * (dates > 1)
    space_nd = raster_positions(width - own, grid, device)
    code_bt3 = date_codes(time, dates, device)[:, :, None, None] if dates > 1 else space_nd.new_zeros(1, 1, 1, 1, 3)
    shape = (len(code_bt3), dates, groups, len(space_nd))
    parts, before = [space_nd.expand(*shape, -1)], [space_nd.new_zeros(width - own)]
    if groups > 1:
        group_gd = sincos(group_width, torch.arange(groups + 1, device=device)).float()
        parts.append(group_gd[:-1, None].expand(*shape, -1))
        before.append(group_gd[-1])
    if dates > 1:
        code_d = sincos(date_width, code_bt3.flatten()).float()
        parts.append(code_d.view(*shape[:2], 1, 1, -1).expand(*shape, -1))
        before.append(space_nd.new_zeros(3 * date_width))
    place_bnd = torch.cat(parts, dim=4).flatten(1, 3)
    return place_bnd[0] if len(place_bnd) == 1 else place_bnd, torch.cat(before)[None, None]


# --- from decoder features of all tokens to images, of which each group of channels has tokens of its own ---


def per_group(head: PixelHead, x_bnd: Tensor) -> list[Tensor]:
    """(B, places, V) predictions of each (date, group), from features of all tokens (B, N, D)."""
    if head.shared:
        return list(head.linear[0](x_bnd).chunk(len(head.channels), dim=1))
    return [linear(part_bnd) for linear, part_bnd in zip(head.linear, x_bnd.chunk(len(head.channels), dim=1), strict=True)]


def image_of(made: list[Tensor], head: PixelHead, grid: Grid, compat: str | None = None) -> Tensor:
    """(B, C, H, W) from predictions of each (date, group). With `compat` order, channels are as groups give them."""
    layout = {"h": grid[2], "w": grid[3], "p": head.patch, "q": head.patch}
    parts = [rearrange(part_bnv, "b (h w) (p q c) -> b c (h p) (w q)", **layout) for part_bnv in made]
    order = list(chain(*head.channels))
    if compat == "order" or order == sorted(order):
        return torch.cat(parts, dim=1)
    channel = dict(zip(order, chain(*(part.unbind(1) for part in parts)), strict=True))
    return torch.stack([channel[number] for number in sorted(order)], dim=1)


def patch_sums(x_bchw: Tensor, patch: int) -> Tensor:
    """(B, C, N) float32: the sum over each patch of `patch`² pixels."""
    return x_bchw.float().unflatten(3, (-1, patch)).sum(4).unflatten(2, (-1, patch)).sum(3).flatten(2)


def token_errors(made_bchw: Tensor, target_bchw: Tensor, valid_b1hw: Tensor | None, head: PixelHead) -> Tensor:
    """(B, G · N) mean squared error of every token over its channels and valid pixels; 0 for one without any."""
    square_bchw = (made_bchw.float() - target_bchw) ** 2
    if valid_b1hw is None:
        error_bcn = patch_sums(square_bchw, head.patch) / head.patch**2
    else:
        count_b1n = patch_sums(valid_b1hw, head.patch)
        error_bcn = patch_sums(torch.where(valid_b1hw, square_bchw, 0.0), head.patch) / count_b1n.clamp_min(1)
    return torch.cat([error_bcn[:, list(group)].mean(dim=1) for group in head.channels], dim=1)


def standardised(images_bchw: Tensor, valid_b1hw: Tensor | None, patch: int) -> tuple[Tensor, Tensor, Tensor]:
    """The images with mean 0 and spread 1 over each patch of all channels together, and both, (B, 1, H, W), as released."""

    def spread_out(x_bn: Tensor) -> Tensor:
        map_b1hw = x_bn.unflatten(1, (-1, images_bchw.shape[3] // patch))[:, None]
        return map_b1hw.repeat_interleave(patch, 2).repeat_interleave(patch, 3)

    valid_b1hw = torch.ones_like(images_bchw[:, :1], dtype=torch.bool) if valid_b1hw is None else valid_b1hw
    count_bn = patch_sums(valid_b1hw, patch)[:, 0] * images_bchw.shape[1]
    mean = spread_out(patch_sums(images_bchw, patch).sum(1) / count_bn.clamp_min(1))
    away_bchw = torch.where(valid_b1hw, images_bchw - mean, 0.0)
    spread = spread_out((patch_sums(away_bchw**2, patch).sum(1) / (count_bn - 1).clamp_min(1) + 1e-6).sqrt())
    return away_bchw / spread, mean, spread


def pasted(made_bchw: Tensor, images_bchw: Tensor, mask: Mask, head: PixelHead) -> dict[str, Tensor]:
    """Input, what the encoder saw, and the input with its masked patches replaced by the prediction; all (B, C, H, W)."""
    groups, rows, columns = len(head.channels), *mask.grid[2:]
    masked_bn = torch.zeros(len(images_bchw), groups * rows * columns, device=images_bchw.device)
    masked_bghw = masked_bn.scatter(1, mask.masked_bm, 1.0).unflatten(1, (groups, rows, columns)) > 0
    masked_bchw = masked_bghw[:, group_of_channel(head)].repeat_interleave(head.patch, 2).repeat_interleave(head.patch, 3)
    return {
        "input": images_bchw,
        "seen": torch.where(masked_bchw, float("nan"), images_bchw),
        "reconstruction": torch.where(masked_bchw, made_bchw.float(), images_bchw),
    }


def group_of_channel(head: PixelHead) -> list[int]:
    """Of each channel of the image, which (date, group) it is in."""
    return [number for _, number in sorted((channel, number) for number, g in enumerate(head.channels) for channel in g)]


# --- published weights ---

_ENCODERS: dict[type, Callable[[dict[str, Tensor], Any], dict[str, Tensor]]] = {
    GroupViT: group_vit.from_published,
    TemporalViT: temporal_vit.from_published,
    ViT: vit.from_published,
}


def load_published(objective: SatMAE, state: dict[str, Tensor]) -> None:
    """Load the published code's `model` dictionary, of groups or of dates, strict about every key and table.

    ValueError for a decoder of groups whose bands are not in the image's order unless `compat` is order: it was trained so.
    """
    config = objective.config
    ours = from_published(
        state, objective.backbone, objective.head, "head", config.decoder_width, config.group_width, config.date_width,
        config.compat,
    )  # fmt: skip
    objective.load_state_dict(ours, strict=True)


def from_published(
    state: dict[str, Tensor], backbone: Backbone, head: PixelHead, head_name: str, width: int, group_width: int, date_width: int,
    compat: str | None,
) -> dict[str, Tensor]:  # fmt: skip
    """Our parameters of encoder, decoder and head from published ones, whose tables must be those that we compute."""
    order = list(chain(*head.channels))
    if order != sorted(order) and compat != "order":
        raise ValueError("released decoders of groups predict bands in the image's order; objective.compat=order takes them")
    config: Any = backbone.config
    place = torch.arange(config.image_size // config.patch)
    grid = backbone.grid(config.image_size, config.image_size)
    own = group_width * (grid[1] > 1) + 3 * date_width * (grid[0] > 1)
    encoder, ours = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in state.items():
        if name == "decoder_pos_embed":
            check_table(tensor, sincos_grid(width - own, place, place), name)
        elif name == "decoder_channel_embed":
            check_plain_table(tensor, sincos(group_width, torch.arange(grid[1] + 1)).float(), name)
        elif name.startswith(("decoder_", "mask_token")):
            ours[published_name(name, head_name)] = from_channel_major(name, tensor, head)
        else:
            encoder[name] = tensor
    ours.update({f"backbone.{name}": tensor for name, tensor in _ENCODERS[type(backbone)](encoder, config).items()})
    return ours


def published_name(name: str, head_name: str) -> str:
    """What a parameter of the published decoder is called here."""
    kind, _, rest = name.partition(".")
    if kind == "decoder_pred":  # a layer for each group has a number
        return f"{head_name}.linear.{rest if rest[0].isdigit() else f'0.{rest}'}"
    return name.replace("decoder_", "decoder.", 1) if name.startswith("decoder_") else f"decoder.{name}"


def from_channel_major(name: str, tensor: Tensor, head: PixelHead) -> Tensor:
    """A published head's rows: of groups they are (channel, row, column), here and elsewhere (row, column, channel)."""
    parts = name.split(".")
    if parts[0] != "decoder_pred" or not parts[1].isdigit():
        return tensor
    return rearrange(tensor, "(c v) ... -> (v c) ...", v=head.patch**2)
