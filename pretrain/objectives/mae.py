"""Masked autoencoder (He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners").

Only visible patches are embedded and encoded; the decoder's last block, its head and the loss run on masked tokens only, which
changes no number and saves their arithmetic. Letters: b sample, k kept, m masked, n all tokens, d width, v values of a patch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from swath.backbones.base import Backbone, Features, gather, sincos_grid
from swath.backbones.vit import EPS, Block, ViTConfig, check_table, from_published, init_weights
from swath.kernels.linear import Linear
from swath.kernels.patch_loss import masked_patch_loss
from swath.pretrain.masking import fill, kept, random_mask
from swath.pretrain.objective import Draws, Objective, Outcome, context, register, token_validity
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
    """Reconstruct the pixels of masked patches: mean squared error over valid pixels of masked, at least half valid tokens."""

    needs = frozenset({"sparse"})

    def __init__(self, config: MAEConfig, backbone: Backbone, image_size: tuple[int, int], channels: Mapping[str, int]) -> None:
        super().__init__()
        grid = backbone.grid(*image_size)
        if grid[0] * grid[1] != 1:
            raise ValueError(
                f"mae predicts patches of one date and all bands together; this backbone has {grid[0]} dates × "
                f"{grid[1]} groups of bands"
            )
        tokens, self.patch = grid[2] * grid[3], image_size[0] // grid[2]
        self.config, self.backbone = config, backbone
        self.keep = kept(tokens, config.mask_ratio)
        if not 0 < self.keep < tokens:
            raise ValueError(f"mask_ratio {config.mask_ratio} keeps {self.keep} of {tokens} tokens; some must stay, some must go")
        width = config.decoder_width
        self.decoder_embed = Linear(backbone.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_blocks = nn.ModuleList(
            [Block(width, config.decoder_heads, config.mlp_ratio) for _ in range(config.decoder_depth)]
        )
        self.decoder_norm = nn.LayerNorm(width, eps=EPS)
        # a modality has a head of its own where there are several
        heads = {name: Linear(width, self.patch**2 * count) for name, count in channels.items()}
        self.decoder_pred = next(iter(heads.values())) if len(heads) == 1 else nn.ModuleDict(heads)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            init_weights(part)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, batch: Batch, draw: Draws) -> Outcome:
        ((modality, images_bchw),) = batch.images.items()
        valid_b1hw = batch.valid.get(modality)
        grid = self.backbone.grid(images_bchw.shape[2], images_bchw.shape[3])
        token_valid_bn = None
        weight_b = batch.weight
        if valid_b1hw is not None:
            images_bchw = torch.where(valid_b1hw, images_bchw, 0.0)
            token_valid_bn = token_validity(valid_b1hw, self.patch)
            # too little left to encode K valid tokens and predict one: the sample keeps its place and does not count
            weight_b = weight_b * (token_valid_bn.sum(dim=1) > self.keep)
        keep_bk, masked_bm = random_mask(draw, grid[2] * grid[3], self.keep, token_valid_bn)
        ctx = context(batch, modality, self.backbone, draw)
        features = self.backbone.encode(self.backbone.tokenize(images_bchw, ctx, keep_bk))
        prediction_bmv = self.decode(features, keep_bk, masked_bm, grid, modality=modality)
        patch, normalise = (self.patch, self.patch), self.config.normalise_patches
        error_bm, mean_bm, spread_bm = masked_patch_loss(
            prediction_bmv, images_bchw, masked_bm, patch=patch, normalise=normalise, valid_b1hw=valid_b1hw
        )
        weight_bm = weight_b[:, None].expand_as(error_bm)
        if token_valid_bn is not None:
            weight_bm = weight_bm * token_valid_bn.gather(1, masked_bm)
        numerator, weight = (error_bm * weight_bm).sum(), weight_bm.sum()

        def picture() -> dict[str, Tensor]:
            made_bmv = prediction_bmv * spread_bm[..., None] + mean_bm[..., None]
            return self._picture(images_bchw, masked_bm, made_bmv, grid)

        return Outcome(numerator, weight, {f"pixels/{modality}": (numerator.detach(), weight)}, picture)

    def decode(
        self, features: Features, keep_bk: Tensor, masked_bm: Tensor, grid: tuple[int, int, int, int], everywhere: bool = False,
        modality: str = "",
    ) -> Tensor:  # fmt: skip
        """(B, M, V) predictions at masked places; (B, N, V) in raster order with `everywhere`, for parity and inspection."""
        rows, columns = (torch.arange(n, device=keep_bk.device) for n in grid[2:])
        position_nd = sincos_grid(self.config.decoder_width, rows, columns).float()
        visible = self.decoder_embed(torch.cat([features.prefix, features.tokens], dim=1))
        prefix = features.prefix.shape[1]
        x_btd = torch.cat(
            [
                visible[:, :prefix],
                visible[:, prefix:] + position_nd[keep_bk].to(visible.dtype),
                (self.mask_token + position_nd[masked_bm]).to(visible.dtype),
            ],
            dim=1,
        )
        wanted = x_btd.shape[1] - prefix if everywhere else masked_bm.shape[1]
        for block in self.decoder_blocks[:-1]:
            x_btd = block(x_btd)
        for block in self.decoder_blocks[-1:]:
            x_btd = block(x_btd, wanted)
        x_btd = x_btd[:, -wanted:]
        head = self.decoder_pred[modality] if isinstance(self.decoder_pred, nn.ModuleDict) else self.decoder_pred
        prediction = head(self.decoder_norm(x_btd))
        if not everywhere:
            return prediction
        order = torch.cat([keep_bk, masked_bm], dim=1)
        return gather(prediction, order.argsort(dim=1))

    def _picture(
        self, images_bchw: Tensor, masked_bm: Tensor, made_bmv: Tensor, grid: tuple[int, int, int, int]
    ) -> dict[str, Tensor]:
        """Input, what the encoder saw, and the input with its masked patches replaced by the reconstruction."""
        bands = images_bchw.shape[1]
        layout = {"p": self.patch, "q": self.patch, "h": grid[2], "w": grid[3], "c": bands}
        flat_bnv = rearrange(images_bchw, "b c (h p) (w q) -> b (h w) (p q c)", **layout)

        def image(values_bnv: Tensor) -> Tensor:
            return rearrange(values_bnv, "b (h w) (p q c) -> b c (h p) (w q)", **layout)

        seen = fill(torch.full_like(made_bmv, float("nan")), masked_bm, flat_bnv)
        return {"input": images_bchw, "seen": image(seen), "reconstruction": image(fill(made_bmv, masked_bm, flat_bnv))}


def load_published(objective: MAE, backbone_config: ViTConfig, state: dict[str, Tensor]) -> None:
    """Load the published code's `model` dictionary, strict about every key."""
    encoder: dict[str, Tensor] = {}
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "decoder_pos_embed":
            place = torch.arange(backbone_config.image_size // backbone_config.patch)
            check_table(tensor, sincos_grid(objective.config.decoder_width, place, place), name)
        elif name.startswith(("decoder_", "mask_token")):
            ours[name] = tensor
        else:
            encoder[name] = tensor
    ours.update({f"backbone.{name}": tensor for name, tensor in from_published(encoder, backbone_config).items()})
    objective.load_state_dict(ours, strict=True)
