"""SelectiveMAE's fixture: scores, the ids of every regime, and one pass with given ids."""

from collections.abc import Callable

import torch
from torch import Tensor

from swath.backbones.base import gather
from swath.backbones.vit import ViT, ViTConfig
from swath.kernels.hog import hog_descriptor
from swath.pretrain.objectives.selective_mae import (
    SelectiveMAE,
    SelectiveMAEConfig,
    closeness,
    load_published,
    published_name,
    released_score,
)
from swath.shards.prepare import Batch
from tests.parity.fixtures import Fixture, Replay

Results = dict[str, Tensor | float]

_RUN = 1024  # epochs of the run: a power of two, so that shares of it are exact


def selective_mae(fixture: Fixture) -> Results:
    """Descriptor and score; ids at every listed epoch; encoder, decoder, losses and gradients with the ids of the first one."""
    c = fixture.config
    objective, backbone = model_of(fixture)
    images, first = fixture.tensors["in.x"], fixture.tensors["draw.sel0"]
    patch = (c["patch_size"], c["patch_size"])
    count, places = len(images), (c["img_size"] // c["patch_size"]) ** 2
    with torch.no_grad():
        tokens_bnd = backbone.tokenize(images).x
    got: Results = {
        "out.tokens": tokens_bnd,
        "out.hog_desc": hog_descriptor(images, patch, cell=8, window=patch[0]),
        "out.hog_scores": released_score(images, patch),
        "out.hog_p": objective.odds(images, None, (tuple(range(c["in_chans"])),)),
    }
    encoded = objective.counts(backbone.grid(*images.shape[2:]))[1]
    able_bn = torch.ones(count, places, dtype=torch.bool)
    chosen, drawn = {}, {}
    for epoch in c["epochs"]:
        objective.progress = epoch / _RUN
        drawn[epoch], unselected = _draws(fixture, objective, tokens_bnd, epoch, encoded)
        chosen[epoch] = objective.expand(tokens_bnd, first, able_bn, encoded, Replay(**drawn[epoch]))
        got[f"out.sel.epoch{epoch}"], got[f"out.unsel.epoch{epoch}"] = chosen[epoch], unselected

    epoch = c["epochs"][0]
    objective.progress = epoch / _RUN
    unselected = got[f"out.unsel.epoch{epoch}"]
    assert isinstance(unselected, Tensor)
    recorded = {"first": first, "predicted": unselected.gather(1, fixture.tensors["draw.rec_pick"]), **drawn[epoch]}
    outcome = objective(_batch(images), Replay(**recorded))
    loss = outcome.numerator / outcome.weight
    loss.backward()
    got["loss"] = loss.item()
    for name in fixture.part("grad"):
        decoder = name.startswith(("decoder_", "mask_token"))
        gradient = objective.get_parameter(published_name(name, "rgb") if decoder else f"backbone.{name}").grad
        assert gradient is not None
        got[f"grad.{name}"] = gradient

    with torch.no_grad():
        each = [slice(b, b + 1) for b in range(count)]
        alone = [objective(_batch(images[b]), Replay(**{n: t[b] for n, t in recorded.items()})) for b in each]
        got["out.loss_per_sample"] = torch.stack([outcome.numerator / outcome.weight for outcome in alone])
        tokens = backbone.tokenize(images)
        odds_bn = torch.ones(count, places)
        picked = objective.select(tokens.x, odds_bn, None, tokens.grid, Replay(**recorded))
        features = backbone.encode(tokens, picked.encoded)
        memory = torch.cat([features.prefix, features.tokens], dim=1)
        rank_bk = chosen[epoch].argsort(dim=1).argsort(dim=1)  # back to the order in which they were added
        got["out.latent"] = torch.cat([features.prefix, gather(features.tokens, rank_bk)], dim=1)
        got["out.mask"] = torch.zeros(count, places).scatter(1, picked.predicted, 1.0)
        got["out.pred"] = objective.heads["rgb"](objective.decode(memory, picked.predicted, tokens.grid))[0]
    return got


def model_of(fixture: Fixture) -> tuple[SelectiveMAE, ViT]:
    c, select = fixture.config, fixture.config["select"]
    backbone_config = ViTConfig(
        bands=c["in_chans"], image_size=c["img_size"], patch=c["patch_size"], width=c["embed_dim"], depth=c["depth"],
        heads=c["num_heads"], mlp_ratio=c["mlp_ratio"],
    )  # fmt: skip
    start, *stages = select["expansion_step"]
    assert start == 0 and len(stages) == 4
    to_far, far, to_random, random = (epoch / _RUN for epoch in stages)
    config = SelectiveMAEConfig(
        mask_ratio=1 - select["keep_rate"], predicted_ratio=c["kept_mask_ratio"],
        first_ratio=select["init_rate"] / select["keep_rate"], stages=(to_far, far, to_random, random),
        decoder_width=c["decoder_embed_dim"], decoder_depth=c["decoder_depth"], decoder_heads=c["decoder_num_heads"],
        mlp_ratio=c["mlp_ratio"], normalise_patches=c["norm_pix_loss"], compat="uniform",
    )  # fmt: skip
    backbone = ViT(backbone_config)
    objective = SelectiveMAE(config, backbone, (c["img_size"], c["img_size"]), {"rgb": c["in_chans"]})
    load_published(objective, backbone_config, fixture.part("state"))
    return objective, backbone


def _draws(
    fixture: Fixture, objective: SelectiveMAE, tokens_bnd: Tensor, epoch: int, encoded: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Which ids the recorded permutations mean, by round, and what is left in the released code's order.

    It draws ranks, the same for the whole batch, among what is left of a list in ascending order of likeness. The list that it
    leaves stays in that order, but where all were drawn it is in the order of the permutation.
    """
    unit_bnd = torch.nn.functional.normalize(tokens_bnd.double(), dim=2)
    chosen_bk = fixture.tensors["draw.sel0"]
    missing, rounds = encoded - chosen_bk.shape[1], objective.config.rounds
    drawn: dict[str, Tensor] = {}
    left_bn = torch.empty(0)
    for number in range(rounds):
        near, far, others = objective.mixture(missing // rounds + (missing % rounds if number == rounds - 1 else 0))
        taken_bn = torch.zeros(tokens_bnd.shape[:2], dtype=torch.bool).scatter(1, chosen_bk, True)
        likeness_bn = closeness(unit_bnd, chosen_bk).masked_fill(taken_bn, torch.inf)
        left_bn = likeness_bn.argsort(dim=1, stable=True)[:, : tokens_bnd.shape[1] - chosen_bk.shape[1]]
        parts = [left_bn[:, left_bn.shape[1] - near :], left_bn[:, :far]]
        left_bn = left_bn[:, far : left_bn.shape[1] - near]
        if others:
            rank = fixture.tensors[f"draw.randperm.epoch{epoch}.{number}"]
            assert len(rank) == left_bn.shape[1]
            drawn[f"random{number}"] = left_bn[:, rank[:others]]
            parts.append(drawn[f"random{number}"])
            all_random = objective.progress >= objective.config.stages[-1]
            left_bn = left_bn[:, rank[others:] if all_random else rank[others:].sort().values]
        chosen_bk = torch.cat([chosen_bk, *parts], dim=1)
    return drawn, left_bn


def _batch(images: Tensor) -> Batch:
    count = len(images)
    return Batch({"rgb": images}, {}, torch.arange(count), torch.zeros(count).long(), torch.ones(count))


KINDS: dict[str, Callable[[Fixture], Results]] = {"selectivemae": selective_mae}
