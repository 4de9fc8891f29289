"""The published graph of MAE written plainly, to be compared with ours at equal processor time.

Every patch is embedded and those that are not kept are then dropped; attention forms its scores; the decoder predicts every
patch, and the loss, taken everywhere, is multiplied by the mask. The numbers are those of `swath.pretrain.objectives.mae` (a test
compares them) and so are the parameters, so a run is probed like any other.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swath.backbones.base import Backbone, gather, sincos_grid
from swath.backbones.vit import Attention, Block, Mlp, ViT
from swath.pretrain.objective import Draws, Outcome
from swath.pretrain.objectives.mae import MAE, MAEConfig
from swath.pretrain.pixels import PixelHead
from swath.shards.prepare import Batch


class PlainMAE(MAE):
    """MAE of a plain ViT, images without invalid pixels."""

    def __init__(self, config: MAEConfig, backbone: Backbone, image_size: tuple[int, int], channels: Mapping[str, int]) -> None:
        super().__init__(config, backbone, image_size, channels)
        rows, columns = (torch.arange(side // backbone.mask_unit) for side in image_size)
        self.encoder_places = nn.Buffer(sincos_grid(backbone.width, rows, columns).float(), persistent=False)
        self.decoder_places = nn.Buffer(sincos_grid(config.decoder_width, rows, columns).float(), persistent=False)

    def forward(self, batch: Batch, draw: Draws) -> Outcome:
        ((modality, images_bchw),) = batch.images.items()
        backbone, decoder, head = self.backbone, self.decoder, self.heads[modality]
        assert isinstance(backbone, ViT) and isinstance(head, PixelHead)
        count = len(self.encoder_places)
        order_bn = draw.order("mask", count)
        restore_bn = order_bn.argsort(dim=1)
        keep_bk = order_bn[:, : int(count * (1 - self.config.mask_ratio))]

        projection = backbone.patch_embed.proj
        x_bnd = F.conv2d(images_bchw, projection.weight, projection.bias, projection.stride).flatten(2).transpose(1, 2)
        x_bkd = gather(x_bnd + self.encoder_places, keep_bk)
        x_btd = torch.cat([backbone.cls_token.expand(len(x_bkd), -1, -1), x_bkd], dim=1)
        for block in backbone.blocks:
            x_btd = plain_block(block, x_btd)
        x_btd = F.linear(backbone.norm(x_btd), decoder.embed.weight, decoder.embed.bias)

        hidden_bmd = decoder.mask_token.expand(len(x_btd), count - keep_bk.shape[1], -1)
        x_bnd = gather(torch.cat([x_btd[:, 1:], hidden_bmd.to(x_btd.dtype)], dim=1), restore_bn) + self.decoder_places
        x_btd = torch.cat([x_btd[:, :1], x_bnd], dim=1)
        for block in decoder.blocks:
            x_btd = plain_block(block, x_btd)
        (last,) = head.linear
        assert isinstance(last, nn.Linear)
        made_bnv = F.linear(decoder.norm(x_btd), last.weight, last.bias)[:, 1:]

        target_bnv = patches(images_bchw, backbone.mask_unit)
        if self.config.normalise_patches:
            spread_bn1 = (target_bnv.var(dim=2, keepdim=True) + 1e-6).sqrt()
            target_bnv = (target_bnv - target_bnv.mean(dim=2, keepdim=True)) / spread_bn1
        error_bn = (made_bnv.float() - target_bnv).square().mean(dim=2)
        masked_bn = (restore_bn >= keep_bk.shape[1]).float() * batch.weight[:, None]
        numerator, weight = (error_bn * masked_bn).sum(), masked_bn.sum()
        return Outcome(numerator, weight, {f"pixels/{modality}": (numerator.detach(), weight)})


def patches(images_bchw: Tensor, side: int) -> Tensor:
    """(B, N, V), channel fastest."""
    batch, bands, height, width = images_bchw.shape
    cut = images_bchw.reshape(batch, bands, height // side, side, width // side, side)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, side * side * bands)


def plain_block(block: nn.Module, x_btd: Tensor) -> Tensor:
    assert isinstance(block, Block)
    x_btd = x_btd + plain_attention(block.attn, block.norm1(x_btd))
    return x_btd + plain_mlp(block.mlp, block.norm2(x_btd))


def plain_attention(attention: Attention, x_btd: Tensor) -> Tensor:
    batch, length, width = x_btd.shape
    qkv = F.linear(x_btd, attention.qkv.weight, attention.qkv.bias)
    q, k, v = qkv.reshape(batch, length, 3, attention.heads, width // attention.heads).permute(2, 0, 3, 1, 4)
    share_bhtt = ((q * q.shape[3] ** -0.5) @ k.transpose(2, 3)).softmax(dim=3)
    y_btd = (share_bhtt @ v).transpose(1, 2).reshape(batch, length, width)
    return F.linear(y_btd, attention.proj.weight, attention.proj.bias)


def plain_mlp(mlp: Mlp, x_btd: Tensor) -> Tensor:
    hidden = F.gelu(F.linear(x_btd, mlp.fc1.weight, mlp.fc1.bias))
    return F.linear(hidden, mlp.fc2.weight, mlp.fc2.bias)
