"""Masked autoencoder (He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners"), on every backbone.

Of a sparse backbone only visible tokens are embedded and encoded; of another one masked pixels are hidden. Letters: b sample,
m masked, n all tokens, d width, v values of a patch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swath.backbones.base import Backbone, sincos_grid
from swath.backbones.vit import ViTConfig, check_table, from_published
from swath.pretrain.decoder import Decoder, Positions
from swath.pretrain.masking import Mask, check_ratio, encode, mask_images, token_weights, units
from swath.pretrain.objective import Draws, Objective, Outcome, context, register, seen_pixels
from swath.pretrain.pixels import PixelHead
from swath.shards.prepare import Batch


@dataclass(frozen=True)
class MAEConfig:
    """`normalise_patches`: targets are standardised per patch (`norm_pix_loss` of the published code)."""

    mask_ratio: float = 0.75
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    mlp_ratio: float = 4.0
    normalise_patches: bool = True


@register(MAEConfig, {"mae": {}})
class MAE(Objective):
    """Reconstruct the pixels of masked patches: mean squared error over valid pixels of masked, at least half valid tokens.

    Tokens of several dates or groups of bands are masked independently, or at the same positions where the backbone takes
    products only; a learned vector tells the decoder which one a token is of.
    """

    def __init__(self, config: MAEConfig, backbone: Backbone, image_size: tuple[int, int], channels: Mapping[str, int]) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        check_ratio(backbone, image_size, config.mask_ratio)
        grid, width = units(backbone, *image_size), config.decoder_width
        self.decoder = Decoder(backbone.width, width, config.decoder_depth, config.decoder_heads, config.mlp_ratio)
        self.positions = Positions(width, grid)
        # a modality has a head of its own
        self.heads = nn.ModuleDict(
            {
                name: PixelHead(
                    width, backbone.channels if grid[:2] != (1, 1) else (tuple(range(count)),), backbone.mask_unit
                )
                for name, count in channels.items()
            }
        )  # fmt: skip

    def forward(self, batch: Batch, draw: Draws) -> Outcome:
        ((modality, images_bchw),) = batch.images.items()
        images_bchw, valid_bthw = seen_pixels(batch, modality)
        mask = mask_images(self.backbone, images_bchw, valid_bthw, draw, self.config.mask_ratio)
        prefix, tokens = encode(self.backbone, images_bchw, context(batch, modality, self.backbone, draw), mask)
        head = self.heads[modality]
        assert isinstance(head, PixelHead)
        made = head(self.decode(prefix, tokens, mask))
        error_bm, mean_bm, spread_bm = head.error(made, images_bchw, mask.masked_bm, valid_bthw, self.config.normalise_patches)
        weight_bm = token_weights(batch.weight, mask)
        numerator, weight = (error_bm * weight_bm).sum(), weight_bm.sum()

        def picture() -> dict[str, Tensor]:
            return head.paste(made, mask.masked_bm, mean_bm, spread_bm, images_bchw)

        return Outcome(numerator, weight, {f"pixels/{modality}": (numerator.detach(), weight)}, picture)

    def decode(self, prefix_bpd: Tensor, tokens_bkd: Tensor, mask: Mask, everywhere: bool = False) -> Tensor:
        """(B, M, D) decoder features at masked places; (B, N, D) in raster order with `everywhere`."""
        return self.decoder(prefix_bpd, tokens_bkd, mask, self.positions(mask.grid, tokens_bkd.device), None, everywhere)


def load_published(objective: MAE, backbone_config: ViTConfig, state: dict[str, Tensor]) -> None:
    """Load the published code's `model` dictionary, strict about every key."""
    encoder: dict[str, Tensor] = {}
    ours: dict[str, Tensor] = {}
    (modality,) = objective.heads
    for name, tensor in state.items():
        if name == "decoder_pos_embed":
            place = torch.arange(backbone_config.image_size // backbone_config.patch)
            check_table(tensor, sincos_grid(objective.config.decoder_width, place, place), name)
        elif name.startswith(("decoder_", "mask_token")):
            ours[published_name(name, modality)] = tensor
        else:
            encoder[name] = tensor
    ours.update({f"backbone.{name}": tensor for name, tensor in from_published(encoder, backbone_config).items()})
    objective.load_state_dict(ours, strict=True)


def published_name(name: str, modality: str) -> str:
    """What a parameter of the published decoder is called here."""
    if name.startswith("decoder_pred."):
        return name.replace("decoder_pred.", f"heads.{modality}.linear.0.")
    return name.replace("decoder_", "decoder.", 1) if name.startswith("decoder_") else f"decoder.{name}"
