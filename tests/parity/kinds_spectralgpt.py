"""How SpectralGPT's fixtures are run: with the loss as released, and tokens' values band by band as published."""

import torch
from einops import rearrange
from torch import Tensor

from swath.backbones.base import Context, gather
from swath.backbones.spectral_vit import SpectralViT, SpectralViTConfig
from swath.pretrain.masking import encode, ids_restore, mask_images
from swath.pretrain.objectives.spectralgpt import SpectralGPT, SpectralGPTConfig, load_published, published_name
from swath.shards.prepare import Batch
from tests.parity.fixtures import Fixture, Replay


def spectralgpt(fixture: Fixture) -> dict[str, Tensor | float]:
    """Encoder output in the published (shuffled) token order, prediction everywhere, both terms and the listed gradients."""
    c = fixture.config
    side = c["img_size"]
    backbone_config = SpectralViTConfig(
        bands=c["num_frames"], image_size=side, patch=c["patch_size"], cube=c["t_patch_size"], width=c["embed_dim"],
        depth=c["depth"], heads=c["num_heads"], mlp_ratio=c["mlp_ratio"],
    )  # fmt: skip
    config = SpectralGPTConfig(
        mask_ratio=c["mask_ratio"], decoder_width=c["decoder_embed_dim"], decoder_depth=c["decoder_depth"],
        decoder_heads=c["decoder_num_heads"], mlp_ratio=c["mlp_ratio"], normalise_patches=c["norm_pix_loss"], compat="sum",
    )  # fmt: skip
    backbone = SpectralViT(backbone_config)
    objective = SpectralGPT(config, backbone, (side, side), {"image": c["num_frames"]})
    load_published(objective, backbone_config, fixture.part("state"))
    images = fixture.tensors["in.x"]
    draw = Replay(mask=fixture.tensors["draw.noise"])
    count = len(images)
    batch = Batch({"image": images}, {}, torch.arange(count), torch.zeros(count).long(), torch.ones(count))

    outcome = objective(batch, draw)
    loss = outcome.numerator / outcome.weight
    loss.backward()
    got: dict[str, Tensor | float] = {"loss": loss.item()}
    got |= {
        f"loss_{name}": (outcome.terms[term][0] / outcome.weight).item()
        for name, term in (("token", "tokens/image"), ("spectral", "spectral/image"))
    }
    got |= {f"grad.{name}": gradient(objective, name, backbone_config) for name in fixture.part("grad")}
    with torch.no_grad():
        mask = mask_images(backbone, images, None, draw, config.mask_ratio)
        prefix, tokens = encode(backbone, images, Context(), mask)
        tokens_of = len(fixture.tensors["draw.noise"][0])
        rank_bk = draw.order("mask", tokens_of)[:, : tokens.shape[1]].argsort(dim=1).argsort(dim=1)
        got["out.latent"] = gather(tokens, rank_bk)
        got["out.mask"] = torch.zeros(count, tokens_of).scatter(1, mask.masked_bm, 1.0)
        got["out.ids_restore"] = ids_restore(draw, tokens_of)
        made_bnv = objective.predict(prefix, tokens, mask)
        got["out.pred"] = rearrange(made_bnv, "b n (p q c) -> b n (c p q)", p=c["patch_size"], q=c["patch_size"])
    return got


def gradient(objective: SpectralGPT, name: str, config: SpectralViTConfig) -> Tensor:
    """Of a published parameter: what was fused is cut again, and bands come first."""
    part = next((part for part in "qkv" if f".attn.{part}." in name), "")
    decoder = name.startswith(("decoder_", "mask_token"))
    own = published_name(name)[0] if decoder else f"backbone.{name.replace(f'.attn.{part}.', '.attn.qkv.')}"
    found = objective.get_parameter(own).grad
    assert found is not None
    if own.startswith("head."):
        return rearrange(found, "(p q c) ... -> (c p q) ...", p=config.patch, q=config.patch)
    return found.chunk(3)["qkv".index(part)] if part else found


KINDS = {"spectralgpt": spectralgpt}
