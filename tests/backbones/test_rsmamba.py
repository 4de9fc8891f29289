"""RSMamba: a fixed shuffle, tokens that touch what is hidden, gates, sizes, published names."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swath.backbones.base import Recomputed, Tokens, create
from swath.backbones.rsmamba import RSMamba, from_published

CPU = torch.device("cpu")


def small(**options: object) -> RSMamba:
    torch.manual_seed(0)
    tiny = {"bands": 3, "image_size": 32, "patch": 8, "stride": 4, "width": 24, "depth": 2, "inner": 32}
    backbone = create("rsmamba_small", **{**tiny, **options})
    assert isinstance(backbone, RSMamba)
    return backbone.eval()


@pytest.mark.parametrize("options", [{}, {"merge": "mean"}, {"paths": 2}, {"paths": 1}])
def test_features_and_gradients(options: dict[str, object]) -> None:
    backbone, images = small(**options).train(), torch.randn(2, 3, 32, 48)
    features = backbone.encode(backbone.tokenize(images), taps=[-1, 1])
    assert features.pooled.shape == (2, 24) == (2, backbone.pooled_width) and features.tokens.shape == (2, 77, 24)
    assert (
        features.maps[4].shape == (2, 24, 8, 12) and features.taps[1].shape == (2, 77, 24) and features.prefix.shape == (2, 0, 24)
    )
    assert backbone.tokenize(images).box[12].tolist() == [4, 4, 8, 8]
    grid = features.tokens.unflatten(
        1, (7, 11)
    )  # tokens of 8 × 8 pixels every 4: cell (2, 3) is in four of them, a corner in one
    assert torch.allclose(features.maps[4][:, :, 2, 3], grid[:, 1:3, 2:4].mean((1, 2)), atol=1e-6)
    assert torch.allclose(features.maps[4][:, :, 0, -1], grid[:, 0, -1], atol=1e-6)
    (features.pooled.square() @ torch.rand(24)).sum().backward()
    for name, parameter in backbone.named_parameters():
        if name != "fill":
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, name


def test_the_shuffle_is_fixed_and_a_permutation() -> None:
    backbone, images = small(), torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone(images).pooled, backbone(images).pooled)
    orders = torch.stack([backbone.shuffled(layer, 729, CPU) for layer in range(48)])
    assert torch.equal(orders.sort(dim=1).values, torch.arange(729).expand(48, -1))
    centred = orders.double() - 364
    similar = (centred @ centred.T) / centred[0].square().sum()
    assert (similar - torch.eye(48)).abs().max() < 0.2  # layers differ
    assert (centred @ torch.arange(-364, 365).double() / centred[0].square().sum()).abs().max() < 0.2  # none is in order
    assert orders[0, :6].tolist() == [621, 586, 210, 617, 207, 510]  # of trained weights' layout: never to change
    drawn = small(redraw=True)
    assert torch.equal(drawn(images).pooled, backbone(images).pooled)
    drawn.train()
    assert not torch.equal(drawn(images).pooled, drawn(images).pooled)


def test_tokens_that_touch_what_is_hidden_are_absent() -> None:
    backbone, images = small(), torch.randn(2, 3, 32, 40)
    hidden = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(1)) > 0.7
    tokens = backbone.tokenize_hidden(images, hidden)
    assert tokens.present is not None and tokens.present.any() and not tokens.present.all()
    pixels = hidden.repeat_interleave(8, 1).repeat_interleave(8, 2)
    for place, (top, left, height, width) in enumerate(tokens.box.tolist()):
        touched = pixels[:, top : top + height, left : left + width].flatten(1).any(dim=1)
        assert torch.equal(tokens.present[:, place], ~touched)
    other = torch.where(pixels[:, None], torch.randn(2, 3, 32, 40), images)
    with torch.no_grad():
        first = backbone.encode(tokens, taps=[-1, 0])
        second = backbone.encode(backbone.tokenize_hidden(other, hidden), taps=[-1, 0])
    assert torch.equal(first.tokens, second.tokens) and torch.equal(first.pooled, second.pooled)
    assert torch.equal(first.taps[0], second.taps[0]) and torch.equal(first.taps[-1], second.taps[-1]) and not first.maps
    assert torch.equal(backbone(backbone.hide(images, hidden)).pooled, backbone(backbone.hide(other, hidden)).pooled)


class Restricted(RSMamba):
    """Of a shorter sequence, in the order in which its tokens are visited in the whole one."""

    places: Tensor
    whole: int

    def shuffled(self, layer: int, count: int, device: torch.device) -> Tensor:
        visited = super().shuffled(layer, self.whole, device).argsort()[self.places]
        return visited.argsort()


@pytest.mark.parametrize("merge", ["gate", "mean"])
def test_absent_tokens_are_as_if_they_were_not_there(merge: str) -> None:
    backbone, images = small(merge=merge), torch.randn(1, 3, 32, 40)
    hidden = torch.zeros(1, 4, 5, dtype=torch.bool)
    hidden[0, 1, 1] = hidden[0, 3, 4] = True
    tokens = backbone.tokenize_hidden(images, hidden)
    assert tokens.present is not None
    short = Restricted(backbone.config)
    short.load_state_dict(backbone.state_dict())
    short.places, short.whole = tokens.present[0].nonzero()[:, 0], tokens.present.shape[1]
    with torch.no_grad():
        masked = backbone.encode(tokens)
        plain = short.encode(Tokens(tokens.x[:, short.places], (1, 1, 1, len(short.places)), tokens.box))
    assert torch.allclose(masked.tokens[:, short.places], plain.tokens, atol=1e-5)
    assert torch.allclose(masked.pooled, plain.pooled, atol=1e-5)


class Pooled(nn.Module):
    """Only tensors leave a compiled or exported program."""

    def __init__(self, backbone: RSMamba) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images_bchw: Tensor) -> Tensor:
        return self.backbone(images_bchw).pooled


def test_recomputation_compilation_export_and_autocast() -> None:
    backbone, images = small(depth=1).train(), torch.randn(2, 3, 16, 24)
    plain = backbone(images).pooled
    weights = list(backbone.blocks.parameters())
    kept = torch.autograd.grad(plain.square() @ torch.arange(24.0), weights, torch.ones(2))
    for block in backbone.blocks:
        assert isinstance(block, Recomputed)
        block.recompute = True
    again = torch.autograd.grad(backbone(images).pooled.square() @ torch.arange(24.0), weights, torch.ones(2))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    wrapped = Pooled(backbone.eval().requires_grad_(False))
    assert torch.allclose(torch.compile(wrapped, fullgraph=True, backend="aot_eager")(images), plain, atol=1e-5)
    assert torch.allclose(torch.export.export(wrapped, (images,)).module()(images), plain, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = wrapped(images)
    assert torch.isfinite(half).all() and F.cosine_similarity(half.float(), plain).min() > 0.99
    in_bf16 = backbone.bfloat16()(images.bfloat16()).pooled
    assert in_bf16.dtype == torch.bfloat16 and torch.isfinite(in_bf16).all()


@pytest.mark.parametrize(
    ("name", "millions"), [("rsmamba_small", 4.34), ("rsmamba_base", 6.37), ("rsmamba_large", 16.23), ("rsmamba_huge", 33.03)]
)
def test_published_parameter_counts(name: str, millions: float) -> None:
    """Without the values that stand for masked pixels."""
    with torch.device("meta"):
        backbone = create(name, bands=3)
    assert round(sum(p.numel() for n, p in backbone.named_parameters() if n != "fill") / 1e6, 2) == millions
    assert backbone.grid(224, 224) == (1, 1, 27, 27)


def test_published_names_are_read_strictly() -> None:
    backbone = small()
    state: dict[str, Tensor] = {"backbone.head.fc.weight": torch.zeros(3, 24)}
    # published name, published shape; None as it is
    forms = {
        "conv_weight": ("conv1d.weight", (32, 1, 4)), "conv_bias": ("conv1d.bias", None), "x_weight": ("x_proj.weight", (34, 32)),
        "dt_weight": ("dt_proj.weight", (32, 2)), "dt_bias": ("dt_proj.bias", None), "A_log": ("A_log", (32, 16)),
    }  # fmt: skip
    for name, tensor in backbone.state_dict().items():
        parts = name.split(".")
        if parts[0] == "fill":
            continue
        if parts[-2:] == ["gate", "weight"]:
            name = f"gate_layers.{parts[1]}.0.weight"
        elif parts[0] == "blocks":
            published, shape = forms.get(parts[-1], (".".join(parts[3:]), None))
            tensor, name = tensor if shape is None else tensor.view(shape), f"layers.{parts[1]}.{published}"
        state[f"backbone.{name.replace('patch_embed.', 'patch_embed.projection.')}"] = tensor
    ours = from_published(state, backbone.config)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in backbone.state_dict().items())
    with pytest.raises(ValueError, match="cls_token"):
        from_published(state | {"backbone.cls_token": torch.zeros(1, 1, 24)}, backbone.config)
    del state["backbone.gate_layers.1.0.weight"]
    with pytest.raises(ValueError, match=r"no blocks\.1\.gate\.weight"):
        from_published(state, backbone.config)


def test_positions_interpolate() -> None:
    backbone = small()
    with torch.no_grad():
        own, other = backbone.tokenize(torch.zeros(1, 3, 32, 32)).x[0], backbone.tokenize(torch.zeros(1, 3, 64, 48)).x[0]
    assert torch.equal(own, backbone.pos_embed[0]) and other.shape == (15 * 11, 24) and torch.isfinite(other).all()


def test_what_cannot_be_is_refused() -> None:
    backbone = small()
    with pytest.raises(ValueError, match=r"not divisible by patch 8; 32×32"):
        backbone(torch.zeros(1, 3, 36 - 1, 32))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        backbone(torch.zeros(1, 4, 32, 32))
    with pytest.raises(ValueError, match="tokenize_hidden"):
        backbone.encode(backbone.tokenize(torch.zeros(1, 3, 32, 32)), torch.tensor([[0]]))
    with pytest.raises(ValueError, match=r"hidden must be \(B, 4, 4\)"):
        backbone.tokenize_hidden(torch.zeros(1, 3, 32, 32), torch.zeros(1, 2, 4, dtype=torch.bool))
    for options in ({"stride": 3}, {"paths": 4}, {"bands": 0}):
        with pytest.raises(ValueError, match="must divide patch"):
            small(**options)
