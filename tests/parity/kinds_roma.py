"""Autoregressive pretraining: kind → function of a fixture that gives its out., grad. and scalars."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from swath.backbones.base import Context
from swath.backbones.mamba import NOT_OURS, Mamba, MambaConfig, Mixer
from swath.pretrain.clusters import clusters_of
from swath.pretrain.objectives import roma
from swath.pretrain.objectives.roma import RoMA, RoMAConfig, Target
from swath.pretrain.rotation import Turned
from tests.parity.fixtures import Fixture
from tests.parity.kinds_mamba import gradient

Results = dict[str, Tensor | float]
HEAD = 64  # width of one of the published decoder's heads
EVERY = 97  # of a block's values, what the fixture keeps


def roma_pretrain(fixture: Fixture) -> Results:
    """What enters the scan, tapped layers, keys, prediction, both terms with what they pair, and listed gradients."""
    c = fixture.config
    images, original = (fixture.tensors[f"in.{name}"].float() / 64 - 2 for name in ("x_u8", "x_ori_u8"))
    bands, *size = images.shape[1:]
    patch = c["patch_size"]
    backbone_config = MambaConfig(bands=bands, image_size=size[0], patch=patch, width=c["embed_dim"], depth=c["depth"])
    config = RoMAConfig(decoder_width=c["dec_embed_dim"], decoder_heads=c["dec_embed_dim"] // HEAD, compat="released")
    backbone = Mamba(backbone_config)
    objective = RoMA(config, backbone, (size[0], size[1]), {"rgb": bands})
    roma.load_published(objective, backbone_config, fixture.part("state"))
    clusters = clusters_of(objective.cluster_grid(*size), backbone_config.cluster, images.device)
    top, left, crop = (fixture.tensors[f"in.{name}"][:, 0] for name in ("tops", "lefts", "crop"))
    turned = Turned(images, None, top, left, crop // patch, torch.zeros(len(images)))

    tokens = objective.tokens(images, Context(), clusters, turned)
    tapped = objective.encode(tokens)
    keys = objective.decoder.read(tapped)
    made = objective.head(objective.decoder(keys, clusters))
    target = Target(original)
    error, mean, spread = objective.token_error(made, target, clusters)
    blocks = objective.block_error(made, mean, spread, target, clusters)
    loss = error.mean() + config.block_weight * blocks.mean()
    loss.backward()

    # published order is by clusters
    first = config.block**2
    encoded, predicted = (
        clusters.visited[part].argsort().argsort() for part in (slice(len(clusters.context)), slice(-len(clusters.target), None))
    )
    got: Results = {
        "out.block1_input": tokens.x[:, encoded].detach(),
        "out.enc2dec": keys[:, encoded].transpose(2, 3).detach(),
        "out.pred_b0": made[0][0, predicted].detach(),
        "out.token_loss": error[:, predicted].detach(),
        "out.angle_tokens": turned.released_window(*clusters.grid[2:], patch)[:, clusters.context][:, encoded],
        "loss_token": error.mean().item(),
        "loss_ms_as_coded": blocks.mean().item(),
        "loss_total": loss.item(),
    }
    got |= {f"out.enc_layer{n + 1}": x[:, encoded].detach() for n, x in zip(objective.taps, tapped, strict=True)}
    rows, columns = clusters.grid[2:]
    outside = torch.ones(rows, columns, dtype=torch.bool)
    outside[: config.block, : config.block] = False
    got["loss_ms_as_described"] = error[:, outside.flatten()[clusters.target]].mean().item()

    # what is paired: the same functions on numbers of patches, and of values
    values = bands * patch**2
    place = torch.arange(rows * columns, dtype=torch.float64)[None, :, None].expand(1, -1, values)
    value = torch.arange(values, dtype=torch.float64).expand_as(place)
    pairs = [
        (
            roma.prediction_blocks_as_released(x[:, clusters.target] + 1, clusters, config.block)[0] - 1,
            roma.target_blocks_as_released(x, clusters, config.block)[0],
        )
        for x in (place, value)
    ]
    same_place, same_value = (mine == theirs for mine, theirs in pairs)
    got["out.ms_pred_patch"], got["out.ms_target_patch"] = pairs[0][0][:, :first], pairs[0][1][:, ::values]
    got["ms_fraction_same_patch"] = same_place.double().mean().item()
    got["ms_fraction_same_patch_and_value"] = (same_place & same_value).double().mean().item()
    got["ms_fraction_zero_padding"] = (pairs[0][0] < 0).double().mean().item()
    standardised = (patches(original, patch)[:, clusters.target] - mean[..., None]) / spread[..., None]
    whole = torch.zeros(len(images), rows * columns, values).index_copy(1, clusters.target, standardised)
    by_block = {
        "pred": roma.prediction_blocks_as_released(made[0].detach(), clusters, config.block),
        "target": roma.target_blocks_as_released(whole, clusters, config.block),
    }
    got |= {f"out.ms_{name}_blocks_b0": vectors[0][:, ::EVERY] for name, vectors in by_block.items()}
    return got | {f"grad.{name}": published_gradient(objective, name) for name in fixture.part("grad")}


def patches(images_bchw: Tensor, patch: int) -> Tensor:
    return rearrange(images_bchw, "b c (r p) (s q) -> b (r s) (p q c)", p=patch, q=patch)


def published_gradient(objective: RoMA, name: str) -> Tensor:
    layer, inside, part = name.partition(".mixer.")
    if inside:
        mixer = objective.get_submodule("backbone." + layer.replace("layers.", "blocks.") + ".mixer")
        assert isinstance(mixer, Mixer)
        return gradient(mixer, part)
    ours = roma.published_name(name) if name.startswith(NOT_OURS) else "backbone." + name.replace("layers.", "blocks.")
    grad = objective.get_parameter(ours).grad
    assert grad is not None
    if name.startswith("enc2dec."):
        grad = grad.unflatten(0, (len(objective.taps), -1)).transpose(0, 1).flatten(0, 1)
    return grad


KINDS: dict[str, Callable[[Fixture], Results]] = {"roma_pretrain": roma_pretrain}
