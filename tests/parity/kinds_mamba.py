"""State-space kinds: kind → function of a fixture that gives its out., grad. and scalars, run with our backbones."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swath.backbones.column import by_column
from swath.backbones.mamba import PER_DIRECTION, SUFFIXES, Mamba, MambaConfig, Mixer, from_published, mixer_from_published
from swath.backbones.rsmamba import Block as RSMambaBlock
from swath.backbones.rsmamba import RSMamba, RSMambaConfig
from swath.backbones.rsmamba import from_published as rsmamba_from_published
from swath.backbones.vmamba import SS2D, op_from_published
from tests.parity.fixtures import Fixture

Results = dict[str, Tensor | float]


def gradient(mixer: Mixer, name: str) -> Tensor:
    """The gradient of the mixer's parameter that is published as `name`, in the published shape."""
    for ours, form in PER_DIRECTION.items():
        for k, suffix in enumerate(SUFFIXES[: mixer.directions]):
            if form.format(suffix) == name:
                grad = mixer.get_parameter(ours).grad
                assert grad is not None
                inside = (mixer.states,) if ours == "A_log" else grad.shape[2:]
                grad = grad.reshape(mixer.directions, -1, *inside)
                return grad[k][:, None] if ours == "conv_weight" else grad[k]
    grad = mixer.get_parameter(name).grad
    assert grad is not None
    return grad


def mixer_run(fixture: Fixture, directions: int, order: Tensor | None, scale: float = 1.0) -> tuple[Mixer, Results]:
    """The mixer, and its output, `scale` times, and all its gradients."""
    c = fixture.config
    mixer = Mixer(c["d_model"], c["expand"] * c["d_model"], directions, c["d_state"], c["d_conv"])
    mixer.load_state_dict(mixer_from_published(fixture.part("state")))
    x_bld = fixture.tensors["in.x"].clone().requires_grad_()
    y_bld = mixer(x_bld, order) * scale
    (y_bld * fixture.tensors["in.grad_out"]).sum().backward()
    assert x_bld.grad is not None
    got: Results = {"out.y": y_bld.detach(), "grad.in.x": x_bld.grad}
    return mixer, got | {f"grad.{n}": gradient(mixer, n) for n in fixture.part("grad") if n != "in.x"}


def mamba1_block(fixture: Fixture) -> Results:
    """One direction: the whole sequence at once, and token by token."""
    mixer, got = mixer_run(fixture, 1, None)
    x_bld = fixture.tensors["in.x"]
    with torch.no_grad():
        x_ble = mixer.in_proj(x_bld).chunk(2, dim=2)[0]
        got["out.conv_silu"] = mixer.convolve(x_ble)[0].transpose(1, 2)
        cache, rows = mixer.empty_cache(len(x_bld)), []
        for x_bd in x_bld.unbind(1):
            y_bd, cache = mixer.step(x_bd, cache)
            rows.append(y_bd)
    got |= {"out.y_step": torch.stack(rows, dim=1), "out.step_conv_state": cache[0], "out.step_ssm_state": cache[1]}
    return got


def vim_v2_mixer(fixture: Fixture) -> Results:
    """Forward and reverse; the published sum is halved where `if_divide_out`, as ours always is."""
    forward = torch.arange(fixture.config["L"])
    scale = 1.0 if fixture.config["if_divide_out"] else 2.0
    return mixer_run(fixture, 2, torch.stack([forward, forward.flip(0)]), scale)[1]


def roma_v3_mixer(fixture: Fixture) -> Results:
    """Rows and columns of a square grid, both ways, the class token standing and visited in the middle of each."""
    length = fixture.config["L"]
    side, half = round((length - 1) ** 0.5), length // 2
    by_row = torch.arange(length)
    grid = torch.cat([by_row[:half], by_row[half + 1 :]])  # the places of the grid's tokens
    column = grid[by_column(side, side, grid.device)]
    column = torch.cat([column[:half], by_row[half : half + 1], column[half:]])
    return mixer_run(fixture, 4, torch.stack([by_row, by_row.flip(0), column, column.flip(0)]))[1]


def roma_finetune_model(fixture: Fixture) -> Results:
    """The four-direction column under a linear head and cross entropy."""
    c = fixture.config
    config = MambaConfig(
        bands=fixture.tensors["in.x"].shape[1], image_size=c["img_size"], patch=c["patch_size"], width=c["embed_dim"],
        depth=c["depth"], directions=4, positions="learned", class_token=True, final_norm=True,
        pool="halves" if c["global_pool"] else "class",
    )  # fmt: skip
    state = fixture.part("state")
    backbone = Mamba(config)
    backbone.load_state_dict(from_published(state, config))
    head = {name: state[f"head.{name}"].clone().requires_grad_() for name in ("weight", "bias")}
    features = backbone(fixture.tensors["in.x"]).pooled
    logits = F.linear(features, head["weight"], head["bias"])
    loss = F.cross_entropy(logits, fixture.tensors["in.label"])
    loss.backward()
    got: Results = {"loss": loss.item(), "out.features": features.detach(), "out.logits": logits.detach()}
    for name in fixture.part("grad"):
        layer, inside, part = name.partition(".mixer.")
        if inside:
            mixer = backbone.get_submodule(layer.replace("layers.", "blocks.") + ".mixer")
            assert isinstance(mixer, Mixer)
            grad: Tensor | None = gradient(mixer, part)
        elif name.startswith("head."):
            grad = head[name.removeprefix("head.")].grad
        else:
            grad = backbone.get_parameter(name.replace("layers.", "blocks.").replace("norm_f.", "norm.")).grad
        assert grad is not None
        if name == "pos_embed":  # the class token's from the front to the middle
            half = (grad.shape[1] - 1) // 2 + 1
            grad = torch.cat([grad[:, 1:half], grad[:, :1], grad[:, half:]], dim=1)
        got[f"grad.{name}"] = grad
    return got


class Replayed(RSMamba):
    """With the recorded order of each layer's shuffled path."""

    recorded: list[Tensor]

    def shuffled(self, layer: int, count: int, device: torch.device) -> Tensor:
        return self.recorded[layer]


def rsmamba(fixture: Fixture) -> Results:
    """Pooled features, what enters the mixers (a copy per path, as published code stacks them), the gates, listed gradients."""
    c = fixture.config
    assert c["cls_position"] == "none" and c["out_type"] == "avg_featmap"
    config = RSMambaConfig(
        bands=fixture.tensors["in.x"].shape[1], image_size=c["img_size"], patch=c["patch_size"], stride=c["stride"],
        width=c["embed_dims"], depth=c["num_layers"], inner=c["inner"], states=c["state_size"],
        paths=3 if "shuffle" in c["path_type"] else 2 if "reverse" in c["path_type"] else 1,
        merge="gate" if c["path_type"].endswith("gate") else "mean",
    )  # fmt: skip
    backbone = Replayed(config)
    backbone.load_state_dict(rsmamba_from_published(fixture.part("state"), config))
    draws = fixture.part("draw.perm")
    backbone.recorded = [draws[str(layer)] for layer in range(len(draws))]
    entering: list[Tensor] = []  # by layer
    gates: list[Tensor] = []

    def enters(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        entering.append(given[0].detach())

    def gated(_: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        gates.append(made.detach().softmax(dim=1))

    for block in backbone.blocks:
        assert isinstance(block, RSMambaBlock)
        block.mixer.in_proj.register_forward_pre_hook(enters)
        if block.gate is not None:
            block.gate.register_forward_hook(gated)
    features = backbone(fixture.tensors["in.x"]).pooled
    (features * fixture.tensors["in.grad_out"]).sum().backward()

    got: Results = {"out.features": features.detach()}
    for number in map(int, fixture.part("out.mixer_in")):
        x_bnd = entering[number]
        paths = [x_bnd, x_bnd.flip(1), *(x_bnd[:, order] for order in backbone.recorded[number : number + 1])]
        got[f"out.mixer_in.{number}"] = torch.cat(paths[: config.paths])
    got |= {f"out.gate.{number}": gates[int(number)] for number in fixture.part("out.gate")}
    for name in fixture.part("grad"):
        kind, _, rest = name.partition(".")
        layer, _, part = rest.partition(".")
        if kind == "layers":
            mixer = backbone.get_submodule(f"blocks.{layer}.mixer")
            assert isinstance(mixer, Mixer)
            grad: Tensor | None = gradient(mixer, part)
        elif kind == "gate_layers":
            grad = backbone.get_parameter(f"blocks.{layer}.gate.weight").grad
        else:
            grad = backbone.get_parameter(name.replace(".projection", "")).grad
        assert grad is not None
        got[f"grad.{name}"] = grad
    return got


def vmamba_ss2d(fixture: Fixture) -> Results:
    """The operator on a map, in the layout that the fixture has."""
    c = fixture.config
    gate = "noz" not in c["forward_type"]
    op = SS2D(c["d_model"], c["d_state"], c["ssm_ratio"], gate, c["d_conv"], c["conv_bias"])
    op.load_state_dict(op_from_published(fixture.part("state")))
    x = fixture.tensors["in.x"].clone().requires_grad_()
    y = op(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if c["channel_first"] else op(x)
    (y * fixture.tensors["in.grad_out"]).sum().backward()
    assert x.grad is not None
    got: Results = {"out.y": y.detach(), "grad.in.x": x.grad}
    for name, expected in fixture.part("grad").items():
        if name != "in.x":
            grad = op.get_parameter(name).grad
            assert grad is not None
            got[f"grad.{name}"] = grad.view_as(expected) if name == "A_logs" else grad
    return got


KINDS: dict[str, Callable[[Fixture], Results]] = {
    "mamba1_block": mamba1_block,
    "vim_v2_mixer": vim_v2_mixer,
    "roma_v3_mixer": roma_v3_mixer,
    "roma_finetune_model": roma_finetune_model,
    "rsmamba": rsmamba,
    "vmamba_ss2d": vmamba_ss2d,
}
