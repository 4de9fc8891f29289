"""How each fixture's kind is run with our code: kind → function of a fixture that gives its out., grad. and scalars."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swath.backbones.base import Context, gather
from swath.backbones.vit import ViT, ViTConfig
from swath.kernels.dispatch import use
from swath.kernels.scan import selective_scan
from swath.pretrain.masking import Mask, encode, ids_restore, mask_images
from swath.pretrain.objectives.mae import MAE, MAEConfig, load_published, published_name
from swath.shards.prepare import Batch
from tests.parity import kinds_hyper, kinds_less, kinds_mamba, kinds_roma, kinds_satmae, kinds_selective, kinds_spectralgpt
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
    objective = MAE(config, backbone, (side, side), {"rgb": c["in_chans"]})
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
        decoder = name.startswith(("decoder_", "mask_token"))
        gradient = objective.get_parameter(published_name(name, "rgb") if decoder else f"backbone.{name}").grad
        assert gradient is not None
        got[f"grad.{name}"] = gradient

    with torch.no_grad():
        mask = mask_images(backbone, images, None, draw, config.mask_ratio)
        prefix, tokens = encode(backbone, images, Context(), mask)
        got |= in_published_order(draw, prefix, tokens, mask)
        got["out.pred"] = objective.heads["rgb"](objective.decode(prefix, tokens, mask, everywhere=True))[0]
    return got


def in_published_order(draw: Replay, prefix: Tensor, tokens_bkd: Tensor, mask: Mask) -> Results:
    """The encoder's output in the shuffled order that published code keeps, its mask and where each token went."""
    count, kept = mask.seen_bk.shape[1] + mask.masked_bm.shape[1], mask.seen_bk.shape[1]
    rank_bk = draw.order("mask", count)[:, :kept].argsort(dim=1).argsort(dim=1)
    return {
        "out.latent": torch.cat([prefix, gather(tokens_bkd, rank_bk)], dim=1),
        "out.mask": torch.zeros(len(prefix), count).scatter(1, mask.masked_bm, 1.0),
        "out.ids_restore": ids_restore(draw, count),
    }


def _scan_arguments(fixture: Fixture, suffix: str = "") -> dict[str, Any]:
    """The scan's arguments channel-last; published ones are (B, D, L), and B, C (B, [G,] N, L)."""
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    found = {name: fixture.tensors[f"in.{name}{suffix}"] for name in names if f"in.{name}{suffix}" in fixture.tensors}
    return {
        name: (tensor.movedim(-1, 1) if name in ("u", "delta", "B", "C", "z") else tensor).clone().requires_grad_()
        for name, tensor in found.items()
    }


def _published(name: str, grad: Tensor) -> Tensor:
    return grad.movedim(1, -1) if name in ("u", "delta", "B", "C", "z") else grad


def scan(fixture: Fixture, implementation: str) -> Results:
    """Output, last state and all gradients of one scan."""
    given = _scan_arguments(fixture)
    with use(selective_scan=implementation):
        y_bld, last = selective_scan(**given, delta_softplus=fixture.config["delta_softplus"], return_last_state=True)
    grads = torch.autograd.grad(y_bld, list(given.values()), fixture.tensors["in.grad_out"].movedim(-1, 1))
    got: Results = {"out.y": y_bld.detach().movedim(1, -1), "out.last_state": last.detach()}
    return got | {f"grad.{name}": _published(name, grad) for name, grad in zip(given, grads, strict=True)}


def bidirectional_scan(fixture: Fixture, implementation: str) -> Results:
    """Two directions in one call; each kept apart as well, since the fixture records both."""
    forward, backward = _scan_arguments(fixture), _scan_arguments(fixture, "_b")
    shared: dict[str, Any] = {name: forward.pop(name) for name in ("u", "z")}
    both: dict[str, Any] = {name: torch.stack([forward[name], backward[name]]) for name in forward}
    length = fixture.config["L"]
    order = torch.stack([torch.arange(length), torch.arange(length).flip(0)])
    with use(selective_scan=implementation):
        y_bld: Any = selective_scan(**shared, **both, delta_softplus=True, order=order)
        y_kbld: Any = selective_scan(**shared, **both, delta_softplus=True, order=order, reduce="none")
    named = shared | forward | {f"{name}_b": tensor for name, tensor in backward.items()}
    grads = torch.autograd.grad(y_bld, list(named.values()), fixture.tensors["in.grad_out"].movedim(-1, 1))
    got: Results = {f"grad.{n}": _published(n.removesuffix("_b"), g) for n, g in zip(named, grads, strict=True)}
    got |= {"out.y": y_bld.detach().movedim(1, -1)}
    return got | {name: y.detach().movedim(1, -1) for name, y in zip(("out.y_forward", "out.y_backward"), y_kbld, strict=True)}


def cross_scan(fixture: Fixture, implementation: str) -> Results:
    """Four directions over a map that stays as it is; the fixture's parameters are per step, ours per place."""
    c = fixture.config
    rows = torch.arange(c["H"] * c["W"])
    columns = rows.view(c["H"], c["W"]).T.flatten()
    order_kl = torch.stack([rows, columns, rows.flip(0), columns.flip(0)])
    x = fixture.tensors["in.x"].clone().requires_grad_()
    given = {name: fixture.tensors[f"in.{name}"].clone().requires_grad_() for name in ("delta", "A", "B", "C", "D", "delta_bias")}

    def placed(tensor_bkfl: Tensor) -> Tensor:
        """(B, 4, F, L) by step → (4, B, L, F) by place."""
        by_step_kblf = tensor_bkfl.permute(1, 0, 3, 2)
        return torch.stack([t[:, order.argsort()] for t, order in zip(by_step_kblf, order_kl, strict=True)])

    arguments: dict[str, Any] = {name: placed(given[name]) for name in ("delta", "B", "C")}
    arguments |= {name: given[name].unflatten(0, (4, -1)) for name in ("A", "D", "delta_bias")}
    with use(selective_scan=implementation):
        u_bld = x.flatten(2).transpose(1, 2)
        y_kbld: Any = selective_scan(u_bld, **arguments, delta_softplus=True, order=order_kl, reduce="none")
        merged_bld: Any = selective_scan(u_bld, **arguments, delta_softplus=True, order=order_kl)
    merged = merged_bld.transpose(1, 2).unflatten(2, (c["H"], c["W"]))
    grads = torch.autograd.grad(merged, [x, *given.values()], fixture.tensors["in.grad_out"])
    by_step_bkdl = torch.stack([y[:, order] for y, order in zip(y_kbld.detach(), order_kl, strict=True)]).permute(1, 0, 3, 2)
    got: Results = {"out.y_dirs": by_step_bkdl, "out.merged": merged.detach()}
    return got | {f"grad.{name}": grad for name, grad in zip(["x", *given], grads, strict=True)}


def of_both(kind: Callable[[Fixture, str], Results]) -> Callable[[Fixture], Results]:
    """The reference is held against the fixture first, then what runs here."""

    def run(fixture: Fixture) -> Results:
        fixture.check(kind(fixture, "reference"))
        return kind(fixture, "cpu")

    return run


KINDS: dict[str, Callable[[Fixture], Results]] = {
    "mae": mae,
    "selective_scan": of_both(scan),
    "bidirectional_scan": of_both(bidirectional_scan),
    "cross_scan": of_both(cross_scan),
    **kinds_mamba.KINDS,
    **kinds_less.KINDS,
    **kinds_hyper.KINDS,
    **kinds_roma.KINDS,
    **kinds_satmae.KINDS,
    **kinds_selective.KINDS,
    **kinds_spectralgpt.KINDS,
}
