"""How each fixture's kind is run with our code: kind → function of a fixture that gives its out., grad. and scalars."""

from collections.abc import Callable

import torch
from torch import Tensor

from swath.backbones.base import gather
from swath.backbones.vit import ViT, ViTConfig
from swath.pretrain.masking import places, random_mask
from swath.pretrain.objectives.mae import MAE, MAEConfig, load_published
from swath.shards.prepare import Batch
from tests.parity.fixtures import Fixture, Replay

Results = dict[str, Tensor | float]


def mae(fixture: Fixture) -> Results:
    """Encoder output in the published (shuffled) token order, prediction everywhere, loss and the listed gradients."""
    c = fixture.config
    side = c["img_size"]
    backbone_config = ViTConfig(
        bands=c["in_chans"], image_size=side, patch=c["patch_size"], width=c["embed_dim"], depth=c["depth"],
        heads=c["num_heads"], mlp_ratio=c["mlp_ratio"],
    )  # fmt: skip
    config = MAEConfig(
        mask_ratio=c["mask_ratio"], decoder_width=c["decoder_embed_dim"], decoder_depth=c["decoder_depth"],
        decoder_heads=c["decoder_num_heads"], mlp_ratio=c["mlp_ratio"], normalise_patches=c["norm_pix_loss"],
    )  # fmt: skip
    backbone = ViT(backbone_config)
    objective = MAE(config, backbone, (side, side), c["in_chans"])
    load_published(objective, backbone_config, fixture.part("state"))
    images = fixture.tensors["in.x"]
    draw = Replay(mask=fixture.tensors["draw.noise"])
    count = len(images)
    batch = Batch({"rgb": images}, {}, torch.arange(count), torch.zeros(count).long(), torch.ones(count))

    outcome = objective(batch, draw)
    loss = outcome.numerator / outcome.weight
    loss.backward()
    got: Results = {"loss": loss.item()}
    for name in fixture.part("grad"):
        ours = name if name.startswith(("decoder_", "mask_token")) else f"backbone.{name}"
        gradient = objective.get_parameter(ours).grad
        assert gradient is not None
        got[f"grad.{name}"] = gradient

    with torch.no_grad():
        grid = backbone.grid(side, side)
        tokens = grid[2] * grid[3]
        order = draw.order("mask", tokens)
        keep, masked = random_mask(draw, tokens, objective.keep)
        features = backbone.encode(backbone.tokenize(images, keep=keep))
        rank_in_keep = order[:, : objective.keep].argsort(dim=1).argsort(dim=1)
        got["out.latent"] = torch.cat([features.prefix, gather(features.tokens, rank_in_keep)], dim=1)
        got["out.pred"] = objective.decode(features, keep, masked, grid, everywhere=True)
        got["out.mask"] = torch.zeros(count, tokens).scatter(1, masked, 1.0)
        got["out.ids_restore"] = places(draw, tokens)
    return got


KINDS: dict[str, Callable[[Fixture], Results]] = {"mae": mae}
