"""LESS and DynamicVis: how each fixture's kind is run with our code; see `kinds.py`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from swath.backbones import dynamicvis
from swath.backbones.less import Block, perception_field
from swath.backbones.mamba import mixer_from_published
from tests.parity.fixtures import Fixture

Results = dict[str, Tensor | float]


def less_block(fixture: Fixture) -> Results:
    """One block: both pooled vectors, both branches, the attention, the output, every gradient."""
    c = fixture.config
    block = Block(
        c["dim"], c["channel_dim"], c["spatial_dim"], c["num_heads"], c["rank"], c["mlp_ratio"],
        qk_norm=c["qk_norm"], layer_scale=c["init_values"] or 0.0,
    )  # fmt: skip
    block.load_state_dict(fixture.part("state"))
    mask, side = None, round(c["patches"] ** 0.5)
    seen = torch.ones(c["patches"] + 1, c["patches"] + 1, dtype=torch.bool)
    if c["radius"]:
        reach = torch.tensor([c["radius"] / (c["patch_size"] * c["resolution"])], dtype=torch.float64)
        mask = seen = perception_field(torch.arange(c["patches"])[None], side, reach)
    x = fixture.tensors["in.x"].clone().requires_grad_()
    y = block(x, mask)
    weights = dict(block.named_parameters())
    grads = torch.autograd.grad(y, [x, *weights.values()], fixture.tensors["in.grad_out"])
    got: Results = {f"grad.{name}": grad for name, grad in zip(["in.x", *weights], grads, strict=True)}
    got["out.y"] = y.detach()
    if "out.perception_mask" in fixture.tensors:
        got["out.perception_mask"] = seen
    with torch.no_grad():
        pooled = block.low_dim_pool(block.norm1(x))
        normed = (block.channel_norm(pooled[0]), block.spatial_norm(pooled[1]))
        got["out.attn"] = block.attn(*normed, mask)
        for axis, part, entry, where in zip(("channel", "spatial"), pooled, normed, (None, mask), strict=True):
            q, k, v = block.attn.get_submodule(f"{axis}_branch")(entry)
            got[f"out.pooled_{axis}"] = part
            got[f"out.{axis}_branch"] = F.scaled_dot_product_attention(q, k, v[:, None].expand_as(q), attn_mask=where)
    return got


def dynamicvis_block(fixture: Fixture) -> Results:
    """One routed block, what it picks, and its inner block on all tokens."""
    c = fixture.config
    state = {name: tensor.clone().requires_grad_() for name, tensor in fixture.part("state").items()}
    gate, norm, x = (fixture.tensors[f"in.{name}"].clone().requires_grad_() for name in ("gate_w", "rms_w", "x"))
    block = dynamicvis.Block(c["dim"], c["ratio"], state["A_log"].shape[1])
    mixer = {f"mixer.{name}": tensor for name, tensor in mixer_from_published(state).items()}
    weights = {"gate.weight": gate[None], "norm.weight": norm, **mixer}
    assert weights.keys() == block.state_dict().keys()
    y = functional_call(block, weights, (x, c["rows"]))
    block.load_state_dict({name: tensor.detach() for name, tensor in weights.items()})
    wanted = {"in.x": x, "in.gate_w": gate, "in.rms_w": norm, **state}
    grads = torch.autograd.grad(y, list(wanted.values()), fixture.tensors["in.grad_out"])
    got: Results = {f"grad.{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    with torch.no_grad():
        score, got["out.kept"] = block.route(x)
        got["out.prob"] = score.softmax(dim=1)
        got["out.dense_block"] = x + block.mixer(block.norm(x))
    return got | {"out.y": y.detach()}


KINDS: dict[str, Callable[[Fixture], Results]] = {"less_low_rank_block": less_block, "dynamicvis_block": dynamicvis_block}
