"""What our parameters are called in published files, for those who look for them there."""

import re
from typing import Any

from swath.backbones import group_vit, less, mamba, rsmamba, vim, vmamba
from swath.hub.architecture import Architecture

_MAE = (
    (r"^decoder\.mask_token", "mask_token"), (r"^decoder\.", "decoder_"),
    (r"^heads?(?:\.\w+)?\.linear\.0\.", "decoder_pred."),
    (r"^pos_embed_spectral", "decoder_pos_embed_temporal"),
    (r"^up\.\w+\.enter\.", "proj_up_conv."), (r"^up\.\w+\.norm\.", "proj_up_norm."),
    (r"^up\.\w+\.blocks\.0\.", "up_block1."), (r"^up\.\w+\.blocks\.1\.", "up_block2."),
    (r"^(up_block\d\.)emit\.", r"\1proj_out."), (r"^(up_block\d\.)conv", r"\1res_block.conv"),
)  # fmt: skip
_LAYERS = ((r"^(?:backbone\.)?blocks\.", "layers."), (r"^(?:backbone\.)?norm\.", "norm_f."))
_NAMES: dict[Any, tuple[tuple[str, str], ...]] = {
    group_vit: ((r"^heads?(?:\.\w+)?\.linear\.", "decoder_pred."), *_MAE),
    less: (
        (r"^backbone\.", "encoder."), (r"^heads\.(\w+)\.linear\.0\.", r"decoder.decoder_\1_pred."),
        (r"^decoder\.(embed|blocks|norm)", r"decoder.decoder_\1"), (r"_embed\.proj\.(?=\D)", "_embed.proj.0."),
        (r"_embed\.mix\.", "_embed.proj.2."),
    ),
    mamba: (
        (r"^decoder\.query", "ar_token"), (r"^decoder\.keys", "enc2dec"), (r"^decoder\.norm\.", "ar_norm."),
        *((rf"^decoder\.norms\.{n}\.", f"norm_{n + 1}.") for n in range(4)),
        (r"^decoder\.blocks\.(\d+)\.(q|kv|proj)\.", r"dec_block.\1.attn2.\2."),
        (r"^decoder\.blocks\.(\d+)\.norm\.", r"dec_block.\1.norm2."), (r"norm_query", "norm2_1"), (r"norm_key", "norm2_2"),
        (r"^decoder\.blocks", "dec_block"), (r"^head\.linear\.0\.", "ar_pred."), *_LAYERS,
    ),
    vim: _LAYERS,
    rsmamba: (
        (r"^blocks\.(\d+)\.gate\.", r"gate_layers.\1.0."), (r"^blocks\.(\d+)\.mixer\.", r"layers.\1."),
        (r"^patch_embed\.(?=weight)", "patch_embed.projection."),
    ),
    vmamba: tuple((f"^{re.escape(ours)}", theirs) for theirs, ours in vmamba.RENAMED.items()),
}  # fmt: skip
_SELECTIVE = (
    (r"^decoder\.blocks\.(\d+)\.(q|kv|proj)\.", r"decoder_blocks.\1.cross_attn.\2."),
    (r"^decoder\.blocks\.(\d+)\.norm\.", r"decoder_blocks.\1.norm2."), (r"norm_query", "norm1"), *_MAE,
)  # fmt: skip


def as_published(text: str, found: Architecture) -> str:
    """`text` with names of our parameters as they are called in a published file, as near as names alone tell."""
    selective = found.objective is not None and found.objective[0] == "selective_mae"
    names = _SELECTIVE if selective else _NAMES.get(found.family, _MAE)

    def called(name: re.Match[str]) -> str:
        made = name[0]
        for ours, theirs in names:
            made = re.sub(ours, theirs, made)
        return made.removeprefix("backbone.")

    return re.sub(r"[A-Za-z_]\w*(?:\.\w+)*", called, text)
