"""SatMAE and SatMAE++: how each fixture's kind is run with our code; see `kinds.py`."""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from swath.backbones.base import Backbone, Context, gather
from swath.backbones.group_vit import GroupViT, GroupViTConfig
from swath.backbones.temporal_vit import TemporalViT, TemporalViTConfig
from swath.backbones.vit import ViT, ViTConfig
from swath.pretrain.masking import Mask, encode, ids_restore, mask_images
from swath.pretrain.objective import Objective
from swath.pretrain.objectives import satmae, satmae_pp
from swath.pretrain.objectives.satmae import SatMAE, SatMAEConfig
from swath.pretrain.objectives.satmae_pp import SatMAEPP, SatMAEPPConfig, Scales
from swath.pretrain.pixels import PixelHead
from swath.shards.prepare import Batch
from tests.parity.fixtures import Fixture, Replay

Results = dict[str, Tensor | float]


def _sizes(c: dict[str, Any]) -> dict[str, Any]:
    """Options that every backbone takes."""
    return {
        "image_size": c["img_size"], "patch": c["patch_size"], "width": c["embed_dim"], "depth": c["depth"],
        "heads": c["num_heads"], "mlp_ratio": c["mlp_ratio"],
    }  # fmt: skip


def _decoder(c: dict[str, Any]) -> dict[str, Any]:
    """Options that both objectives take."""
    return {
        "mask_ratio": c["mask_ratio"], "decoder_width": c["decoder_embed_dim"], "decoder_depth": c["decoder_depth"],
        "decoder_heads": c["decoder_num_heads"], "mlp_ratio": c["mlp_ratio"],
    }  # fmt: skip


def _groups(c: dict[str, Any]) -> GroupViT:
    groups = tuple(tuple(group) for group in c["channel_groups"])
    return GroupViT(GroupViTConfig(bands=c["in_chans"], groups=groups, group_width=c["channel_embed"], **_sizes(c)))


def _as_released(c: dict[str, Any]) -> dict[str, Any]:
    return {"spatial_mask": c["spatial_mask"], "group_width": c["decoder_channel_embed"], "compat": "order", **_decoder(c)}


def _batch(images: Tensor, **meta: Tensor) -> Batch:
    count = len(images)
    return Batch({"image": images}, {}, torch.arange(count), torch.zeros(count).long(), torch.ones(count), dict(meta))


def _encoded(fixture: Fixture, backbone: Backbone, images: Tensor, mask: Mask, draw: Replay, ctx: Context) -> Results:
    """The encoder's output in the shuffled order that published code keeps, its mask and where each token went."""
    prefix, tokens_bkd = encode(backbone, images, ctx, mask)
    noise_bn, places, groups = draw.streams["mask"], mask.grid[2] * mask.grid[3], mask.grid[0] * mask.grid[1]
    order_bn = draw.order("mask", noise_bn.shape[1])
    shared = fixture.config.get("spatial_mask", False)
    kept_bk = order_bn[:, : mask.seen_bk.shape[1] // (groups if shared else 1)]
    if shared:
        kept_bk = (torch.arange(groups)[:, None] * places + kept_bk[:, None]).flatten(1)
    masked_bn = torch.zeros(len(images), groups * places).scatter(1, mask.masked_bm, 1.0)
    return {
        "out.latent": torch.cat([prefix, gather(tokens_bkd, torch.searchsorted(mask.seen_bk, kept_bk.contiguous()))], dim=1),
        "out.mask": masked_bn.unflatten(1, (groups, places)) if mask.grid[1] > 1 else masked_bn,
        "out.ids_restore": ids_restore(draw, noise_bn.shape[1]),
    }


def _gradients(fixture: Fixture, objective: Objective, head: PixelHead, head_name: str, modality: str) -> Results:
    """Of published names, heads of groups in the published order of rows."""
    got: Results = {}
    for name in fixture.part("grad"):
        if name.startswith(("decoder_", "mask_token")):
            ours = satmae.published_name(name, head_name)
        elif name.startswith(("proj_up_", "up_block")):
            ours = satmae_pp.published_up_name(name, modality)
        else:
            ours = f"backbone.{name}"
        gradient = objective.get_parameter(ours).grad
        assert gradient is not None, name
        if name.startswith("decoder_pred.") and name.split(".")[1].isdigit():
            gradient = rearrange(gradient, "(v c) ... -> (c v) ...", v=head.patch**2)
        got[f"grad.{name}"] = gradient
    return got


def _patches(images_bchw: Tensor, patch: int) -> Tensor:
    """(B, C, places, values of a patch)."""
    return rearrange(images_bchw, "b c (h p) (w q) -> b c (h w) (p q)", p=patch, q=patch)


def groups(fixture: Fixture) -> Results:
    """Latent, mask, prediction everywhere, loss, gradients."""
    c = fixture.config
    config = SatMAEConfig(normalise_patches=c["norm_pix_loss"], **_as_released(c))
    objective = SatMAE(config, _groups(c), (c["img_size"],) * 2, {"image": c["in_chans"]})
    satmae.load_published(objective, fixture.part("state"))
    images, draw, ctx = fixture.tensors["in.x"], Replay(mask=fixture.tensors["draw.noise"]), Context()
    outcome = objective(_batch(images), draw)
    loss = outcome.numerator / outcome.weight
    loss.backward()
    got: Results = {"loss": loss.item(), **_gradients(fixture, objective, objective.head, "head", "image")}
    with torch.no_grad():
        mask = mask_images(objective.backbone, images, None, draw, config.mask_ratio, config.spatial_mask)
        x_bnd = objective.decode(*encode(objective.backbone, images, ctx, mask), mask, ctx, everywhere=True)
        image = satmae.image_of(satmae.per_group(objective.head, x_bnd), objective.head, mask.grid, "order")
        got["out.pred"] = _patches(image, c["patch_size"])
        return got | _encoded(fixture, objective.backbone, images, mask, draw, ctx)


def temporal(fixture: Fixture) -> Results:
    """Latent, mask, prediction of every token, loss, gradients; widths of dates are fixed in the published code."""
    c = fixture.config
    frames = fixture.tensors["in.x"].shape[1]
    bands = frames * c["in_chans"]
    config = SatMAEConfig(normalise_patches=c["norm_pix_loss"], **_decoder(c))
    backbone = TemporalViT(TemporalViTConfig(bands=bands, frames=frames, **_sizes(c)))
    objective = SatMAE(config, backbone, (c["img_size"],) * 2, {"image": bands})
    satmae.load_published(objective, fixture.part("state"))
    images, draw = fixture.tensors["in.x"].flatten(1, 2), Replay(mask=fixture.tensors["draw.noise"])
    ctx = Context(time=fixture.tensors["in.ts"])
    outcome = objective(_batch(images, time=fixture.tensors["in.ts"]), draw)
    loss = outcome.numerator / outcome.weight
    loss.backward()
    got: Results = {"loss": loss.item(), **_gradients(fixture, objective, objective.head, "head", "image")}
    with torch.no_grad():
        mask = mask_images(backbone, images, None, draw, config.mask_ratio)
        x_bnd = objective.decode(*encode(backbone, images, ctx, mask), mask, ctx, everywhere=True)
        got["out.pred"] = objective.head(x_bnd)[0]
        return got | _encoded(fixture, backbone, images, mask, draw, ctx)


def _finer(fixture: Fixture, objective: SatMAEPP) -> tuple[Results, list[Tensor], Mask, Replay]:
    """Losses and gradients, the predicted images of every scale and the mask."""
    names = ["in.x", *(f"in.x{2**n}" for n in range(1, objective.config.blocks + 1))]
    images = [fixture.tensors[name] for name in names]
    satmae_pp.load_published(objective, fixture.part("state"))
    draw, ctx, config = Replay(mask=fixture.tensors["draw.noise"]), Context(), objective.config
    with torch.no_grad():
        mask = mask_images(objective.backbone, images[0], None, draw, config.mask_ratio, config.spatial_mask)
        made = objective.predict(images[0], "image", mask, ctx)
    images = [_same_side(fixture, image, one, 2**number) for number, (image, one) in enumerate(zip(images, made, strict=True))]
    outcome = objective.compare(Scales(images, [None] * len(images)), "image", torch.ones(len(images[0])), ctx, draw)
    total = outcome.numerator / outcome.weight
    total.backward()
    terms = {name.removesuffix("/image"): (amount / count).item() for name, (amount, count) in outcome.terms.items()}
    finer = [value for name, value in terms.items() if name != "pixels"]
    head = objective.heads["image"]
    assert isinstance(head, PixelHead)
    got: Results = {"loss": terms["pixels"], "ms_loss": sum(finer) / len(finer), "total": total.item()}
    got |= _gradients(fixture, objective, head, "heads.image", "image")
    if len(finer) > 1:
        got |= {name: value for name, value in terms.items() if name != "pixels"}
    return got, made, mask, draw


def _same_side(fixture: Fixture, target: Tensor, made: Tensor, scale: int) -> Tensor:
    """The target of an absolute error, moved by 1e-6 at pixels that the published prediction hit to within rounding and ours on
    the other side: the gradient there is the sign of noise."""
    name = f"out.pred_{scale}x"
    if name not in fixture.tensors:
        return target
    side = (fixture.tensors[name] - target).sign()
    other = (made - target).sign() != side
    assert ((made - target)[other].abs() <= fixture.meta["tensors"][name]["atol"]).all(), f"{fixture.name} {name}"
    return torch.where(other, made - side * 1e-6, target)


def finer_groups(fixture: Fixture) -> Results:
    """As `groups`, and the predicted image of every block with its error."""
    c = fixture.config
    backbone = _groups(c)
    objective = SatMAEPP(SatMAEPPConfig(**_as_released(c)), backbone, (c["img_size"],) * 2, {"image": c["in_chans"]})
    got, made, mask, draw = _finer(fixture, objective)
    with torch.no_grad():
        got |= _encoded(fixture, backbone, fixture.tensors["in.x"], mask, draw, Context())
    got["out.pred"] = _patches(made[0], c["patch_size"])
    return got | {f"out.pred_{2**number}x": image for number, image in enumerate(made) if number}


def finer_rgb(fixture: Fixture) -> Results:
    """One group, one block."""
    c = fixture.config
    backbone = ViT(ViTConfig(bands=c["in_chans"], **_sizes(c)))
    config = SatMAEPPConfig(blocks=1, **_decoder(c))
    objective = SatMAEPP(config, backbone, (c["img_size"],) * 2, {"image": c["in_chans"]})
    got, made, mask, _ = _finer(fixture, objective)
    got["out.pred"] = rearrange(made[0], "b c (h p) (w q) -> b (h w) (p q c)", p=c["patch_size"], q=c["patch_size"])
    got["out.mask"] = torch.zeros(made[0].shape[0], got["out.pred"].shape[1]).scatter(1, mask.masked_bm, 1.0)
    return got


KINDS: dict[str, Callable[[Fixture], Results]] = {
    "satmae_groupc": groups,
    "satmae_temporal": temporal,
    "satmae_pp_groupc": finer_groups,
    "satmae_pp_rgb": finer_rgb,
}
