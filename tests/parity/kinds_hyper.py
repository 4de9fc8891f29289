"""Hyperspectral MAE: how its fixtures are run with our code; see `kinds.py`."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from swath.backbones.less import LESS, LESSConfig, lattice
from swath.pretrain.objectives.hyper_mae import HyperMAE, HyperMAEConfig, load_published, published_name
from swath.shards.prepare import Batch
from tests.parity.fixtures import Fixture, Replay

Results = dict[str, Tensor | float]


def less_mae(fixture: Fixture) -> Results:
    """Each pass's encoder output in its published (shuffled) order, prediction, masks and loss terms; targets and gradients."""
    c, tensors = fixture.config, fixture.tensors
    optical, radar = tensors["in.optical"], tensors["in.radar"]
    side, count, bands = c["img_size"], len(optical), optical.shape[1] + radar.shape[1]
    backbone_config = LESSConfig(
        bands=bands, radar=radar.shape[1], image_size=side, patch=c["patch_size"], width=c["embed_dim"], depth=c["depth"],
        heads=c["num_heads"], channel_width=c["channel_embed_dims_per_head"], rank=c["rank"], mlp_ratio=c["mlp_ratio"],
        perception_m=c["attention_radius"] if c["use_perception_field_mask"] else 0, gsd_m=c["resolution"],
        qk_norm=c.get("qk_norm", False), layer_scale=c.get("init_values") or 0.0, compat=True,
    )  # fmt: skip
    config = HyperMAEConfig(
        mask_ratio=c["mask_ratio"], channel_mask_ratio=c["channel_mask_ratio"], passes=(c["modal"],) if c["modal"] else (),
        decoder_width=c["decoder_embed_dim"], decoder_depth=c["decoder_depth"], decoder_heads=c["decoder_num_heads"],
        decoder_channel_width=c["decoder_channel_embed_dims_per_head"], decoder_rank=c["rank"], mlp_ratio=c["mlp_ratio"],
        decoder_layer_scale=c.get("init_values") or 0.0, normalise_patches=c["norm_pix_loss"], compat=True,
    )  # fmt: skip
    backbone = LESS(backbone_config)
    images = {"optical": optical, "radar": radar}
    objective = HyperMAE(config, backbone, (side, side), {name: image.shape[1] for name, image in images.items()})
    load_published(objective, backbone_config, fixture.part("state"))
    # draw.<order>.<pass>.<channel|pos>
    ours, recorded = {"channel": "groups", "pos": "places"}, fixture.part("draw").items()
    draw = Replay(**{f"{ours[key.split('.')[2]]}/{key.split('.')[1]}": value for key, value in recorded})
    wavelength = {name: tensors[f"in.{name}_wv"][0].double() * 1000 for name in images}
    ids = torch.arange(count)
    batch = Batch(images, {}, ids, torch.zeros_like(ids), torch.ones(count), {}, wavelength)

    outcome = objective(batch, draw)
    loss = outcome.numerator / outcome.weight
    loss.backward()
    got: Results = {"total_loss": loss.item()}
    for name in objective.passes:
        terms = {term: outcome.terms[f"{term}/{name}"] for term in ("places", "groups")}
        got[f"{name}_pos_loss"], got[f"{name}_channel_loss"] = (float(total / weight) for total, weight in terms.values())
        got[f"{name}_loss"] = sum(float(total / weight) for total, weight in terms.values())
    for name in fixture.part("grad"):
        parameter, encoder = published_name(name), name.removeprefix("encoder.")
        if encoder != name:
            parameter = "backbone." + encoder.replace("_embed.proj.0.", "_embed.proj.").replace("_embed.proj.2.", "_embed.mix.")
        gradient = objective.get_parameter(parameter).grad
        assert gradient is not None
        got[f"grad.{name}"] = gradient.view(tensors[f"grad.{name}"].shape)

    with torch.no_grad():
        view = objective.view(batch, draw)
        for name in objective.passes:
            dropped = objective.drop(name, view, draw)
            features = backbone.encode(backbone.tokenize(view.images_bchw, view.ctx, dropped.keep))
            latent = lattice(features, dropped.rows_bs.shape[1])
            start = objective.kinds[name].start if name in objective.kinds else 0
            rows = _rank(draw.streams[f"groups/{name}"].gather(1, dropped.rows_bs - start))
            columns = _rank(draw.streams[f"places/{name}"].expand(count, -1).gather(1, dropped.keep.positions))
            got[f"out.{name}.latent"] = latent[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None]]
            made = objective.predict(view, dropped)
            got[f"out.{name}.recon"] = torch.cat([layers[0] for layers in made.values()], dim=1).unflatten(1, (bands, -1))
            got[f"out.{name}.channel_mask"] = dropped.groups_bg.float()
            got[f"out.{name}.pos_mask"] = dropped.places_bn.float()
            _, mean, spread = objective.compare(made, view)
            patches = rearrange(view.images_bchw, "b c (h p) (w q) -> b c (h w) (p q)", p=c["patch_size"], q=c["patch_size"])
            got["out.target"] = (patches - mean[..., None]) / spread[..., None]
        return got


def _rank(kept_bk: Tensor) -> Tensor:
    """(B, 1 + K): the class entry, then the order of the draw, as numbers among kept entries."""
    order = kept_bk.argsort(dim=1)
    return torch.cat([torch.zeros_like(order[:, :1]), 1 + order], dim=1)


KINDS: dict[str, Callable[[Fixture], Results]] = {"less_mae": less_mae}
