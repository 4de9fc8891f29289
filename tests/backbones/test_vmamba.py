"""VMamba: the cross scan from four plain scans, maps, masked pixels, sizes, published names."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swath.backbones.base import Recomputed, create
from swath.backbones.vmamba import SS2D, VMamba, from_published
from swath.kernels.scan import selective_scan


def small(**options: object) -> VMamba:
    torch.manual_seed(0)
    backbone = create("vmamba_tiny", **{"bands": 3, "width": 8, "depths": (1, 1, 2, 1), **options})
    assert isinstance(backbone, VMamba)
    return backbone.eval()


def test_cross_scan_from_four_scans() -> None:
    """Copies of the map by rows, by columns and reversed, each scanned alone, put back and summed."""
    torch.manual_seed(0)
    op, u = SS2D(8, 4, 2.0, False), torch.randn(2, 3, 5, 16)
    total = torch.zeros(2, 3, 5, 16)
    for k in range(4):
        map_ = u.transpose(1, 2) if k % 2 else u
        line = map_.flatten(1, 2).flip(1) if k >= 2 else map_.flatten(1, 2)
        r, b, c = (line @ op.x_proj_weight[k].T).split([1, 4, 4], dim=2)
        y = selective_scan(
            line, r @ op.dt_projs_weight[k].T, -op.A_logs.view(4, 16, 4)[k].exp(), b, c, op.Ds.view(4, 16)[k],
            delta_bias=op.dt_projs_bias[k], delta_softplus=True,
        )  # fmt: skip
        assert isinstance(y, Tensor)
        y = (y.flip(1) if k >= 2 else y).unflatten(1, map_.shape[1:3])
        total = total + (y.transpose(1, 2) if k % 2 else y)
    assert torch.allclose(op.cross_scan(u), total, atol=1e-5)


def test_the_gate_is_applied_after_the_norm() -> None:
    torch.manual_seed(0)
    op, x = SS2D(8, 2, 2.0, True, conv_bias=True), torch.randn(2, 3, 5, 8)
    inner, gate = (x @ part.T for part in op.in_proj.weight.split(16))
    u = F.silu(op.conv2d(inner.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    assert torch.allclose(op(x), (op.out_norm(op.cross_scan(u)) * F.silu(gate)) @ op.out_proj.weight.T, atol=1e-6)


def test_features_and_gradients() -> None:
    backbone, images = small(gate=True).train(), torch.randn(2, 3, 64, 96)
    hidden = torch.tensor([[[True, False, False], [False] * 3]] * 2)
    features = backbone.encode(backbone.tokenize(backbone.hide(images, hidden)), taps=[-1, 0, 4])
    assert features.pooled.shape == (2, 64) == (2, backbone.pooled_width) and features.tokens.shape == (2, 6, 64)
    assert {s: tuple(m.shape) for s, m in features.maps.items()} == {
        4: (2, 8, 16, 24), 8: (2, 16, 8, 12), 16: (2, 32, 4, 6), 32: (2, 64, 2, 3),
    }  # fmt: skip
    assert torch.equal(features.maps[32].flatten(2).transpose(1, 2), features.tokens)
    assert features.taps[0].shape == (2, 384, 8) and features.taps[4].shape == features.tokens.shape
    (features.pooled.square().sum() + features.tokens.square().sum()).backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, name


def test_no_masked_pixel_reaches_a_feature() -> None:
    backbone, hidden = small(), torch.tensor([[[True, False], [False, True]]])
    first = torch.randn(1, 3, 64, 64)
    pixels = hidden.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    second = torch.where(pixels, torch.randn(1, 3, 64, 64), first)
    with torch.no_grad():
        one, other = (backbone(backbone.hide(images, hidden)) for images in (first, second))
        assert all(torch.equal(one.maps[s], other.maps[s]) for s in one.maps)
        assert not torch.equal(backbone(first).pooled, backbone(second).pooled)


class Pooled(nn.Module):
    """Only tensors leave a compiled or exported program."""

    def __init__(self, backbone: VMamba) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images_bchw: Tensor) -> Tensor:
        return self.backbone(images_bchw).pooled


def test_recomputation_compilation_export_and_autocast() -> None:
    backbone, images = small(depths=(1, 0, 0, 1)).train(), torch.randn(2, 3, 32, 64)
    plain = backbone(images).pooled
    weights = list(backbone.stages.parameters())
    kept = torch.autograd.grad(plain.square().sum(), weights)
    for block in backbone.modules():
        if isinstance(block, Recomputed):
            block.recompute = True
    again = torch.autograd.grad(backbone(images).pooled.square().sum(), weights)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    wrapped = Pooled(backbone.eval().requires_grad_(False))
    assert torch.allclose(torch.compile(wrapped, fullgraph=True, backend="aot_eager")(images), plain, atol=1e-5)
    assert torch.allclose(torch.export.export(wrapped, (images,)).module()(images), plain, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = wrapped(images)
    assert torch.isfinite(half).all() and F.cosine_similarity(half.float(), plain).min() > 0.99
    in_bf16 = backbone.bfloat16()(images.bfloat16()).pooled
    assert in_bf16.dtype == torch.bfloat16 and torch.isfinite(in_bf16).all()


@pytest.mark.parametrize(("name", "millions"), [("vmamba_tiny", 30.25), ("vmamba_small", 50.15), ("vmamba_base", 88.56)])
def test_published_parameter_counts(name: str, millions: float) -> None:
    """With the classifier of 1000 classes, without the values that stand for masked pixels."""
    with torch.device("meta"):
        backbone = create(name, bands=3)
        count = sum(p.numel() for n, p in backbone.named_parameters() if n != "fill") + 1000 * (backbone.width + 1)
    assert round(count / 1e6, 2) == millions


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters under VMamba's names."""
    named = {"stem.0.conv": "patch_embed.0", "stem.0.norm": "patch_embed.2", "stem.1.conv": "patch_embed.5",
             "stem.1.norm": "patch_embed.7", "norm": "classifier.norm"}  # fmt: skip
    theirs: dict[str, Tensor] = {"classifier.head.weight": torch.zeros(2, 64)}
    for name, tensor in state.items():
        head, _, last = name.rpartition(".")
        first, *rest = name.split(".")
        if head in named:
            theirs[f"{named[head]}.{last}"] = tensor
        elif first == "stages":
            tensor = tensor.view(-1, 1) if last == "A_logs" else tensor
            theirs[f"layers.{rest[0]}.blocks.{'.'.join(rest[1:])}"] = tensor
        elif first == "downsample":
            theirs[f"layers.{rest[0]}.downsample.{1 if rest[1] == 'conv' else 3}.{last}"] = tensor
    return theirs


def test_published_names_are_read_strictly() -> None:
    backbone = small()
    state = published(backbone.state_dict())
    ours = from_published(state, backbone.config)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in backbone.state_dict().items())
    with pytest.raises(ValueError, match="outnorm"):
        from_published(state | {"outnorm0.weight": torch.zeros(8)}, backbone.config)
    del state["layers.2.downsample.1.weight"]
    with pytest.raises(ValueError, match=r"no downsample\.2\.conv\.weight"):
        from_published(state, backbone.config)


def test_what_cannot_be_is_refused() -> None:
    backbone = small()
    with pytest.raises(ValueError, match=r"not divisible by the total stride 32; 64×32"):
        backbone(torch.zeros(1, 3, 56, 32))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        backbone(torch.zeros(1, 4, 32, 32))
    with pytest.raises(ValueError, match="mask pixels with `hide`"):
        backbone.tokenize(torch.zeros(1, 3, 64, 64), keep=torch.tensor([[0]]))
    with pytest.raises(ValueError, match="four numbers"):
        small(depths=(1, 1))
