"""The hybrid of CNN and Mamba: ways and their gate from first principles, experts by hand, masked pixels, any size."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from swath.backbones.afm import AFM, Experts, Fusion, Scan, cosines, ways
from swath.backbones.base import create


def small(**options: Any) -> AFM:
    torch.manual_seed(0)
    backbone = create("afm_small", **{**AFM.tiny, **options})
    assert isinstance(backbone, AFM)
    return backbone.eval()


def test_a_scan_is_the_gated_sum_of_three_ways() -> None:
    torch.manual_seed(0)
    scan, x, turn = Scan(8, 4), torch.randn(2, 7, 8), torch.randn(6, 4)
    order = ways(7, x.device)
    got = scan(x, order, turn)
    normed = scan.norm(x)
    pairs = torch.view_as_complex(normed[:, 1:].unflatten(2, (4, 2)).contiguous()) * torch.polar(torch.ones(6, 4), turn)
    normed = torch.cat([normed[:, :1], torch.view_as_real(pairs).flatten(2)], dim=1)
    outs = [scan.mixer(normed, way[None]) for way in order]
    gate = scan.gate(torch.cat([out.mean(1) for out in outs], dim=1)).softmax(1)
    assert torch.allclose(got, x + sum(gate[:, k, None, None] * out for k, out in enumerate(outs)), atol=1e-5)


def test_ways_visit_every_token_once() -> None:
    order = ways(10, torch.device("cpu"))
    assert order[0].tolist() == list(range(10)) and torch.equal(order[2], order[0].flip(0))
    assert sorted(order[1].tolist()) == list(range(10)) and not torch.equal(order[1], order[0])


def test_experts_by_hand() -> None:
    torch.manual_seed(0)
    experts, x = Experts(6, 4, 2), torch.randn(3, 6)
    for sample, got in zip(x, experts(x), strict=True):
        share = (experts.router.weight @ sample).softmax(0)
        expected = sample.clone()
        for number, weight in [(0, 1.0), *((int(e) + 1, share[e]) for e in share.topk(2).indices)]:
            gate, value = (experts.enter[number] @ sample).chunk(2)
            expected = expected + weight * (experts.leave[number] @ (F.silu(gate) * value))
        assert torch.allclose(got, expected, atol=1e-5)


def test_cosine_components_tell_a_slope_from_a_plain() -> None:
    slope = torch.linspace(1, -1, 8)
    assert torch.allclose(cosines(8, slope) @ torch.ones(8), torch.tensor([1.0, 0.0]), atol=1e-6)
    mean, first = cosines(8, slope) @ slope
    assert abs(mean) < 1e-6 and first > 0.4
    assert Fusion(16, 8).eval()(torch.randn(1, 16, 1, 3)).shape == (1, 8, 1, 3)


def test_features_of_a_wide_image() -> None:
    backbone = small()
    features = backbone.encode(backbone.tokenize(torch.randn(2, 3, 64, 96)), taps=[-1, 2])
    assert {stride: level.shape[1:] for stride, level in features.maps.items()} == {
        8: (16, 8, 12),
        16: (16, 4, 6),
        32: (16, 2, 3),
    }
    assert torch.equal(features.maps[32].flatten(2).mT, features.tokens) and features.pooled.shape == (2, 48)
    assert features.taps[-1].shape == features.taps[2].shape == (2, 25, 16)
    assert backbone(torch.randn(1, 3, 32, 32)).tokens.shape == (1, 1, 16)


def test_positions_interpolate() -> None:
    backbone = small()
    double = backbone.positions(8, 8)
    smooth = F.avg_pool2d(double.T.unflatten(1, (8, 8))[None], 2)[0].flatten(1).T
    assert torch.equal(backbone.positions(4, 4), backbone.pos_embed[0]) and (smooth - backbone.pos_embed[0]).abs().mean() < 0.01
    own, finer = backbone.turns(4, 4, torch.device("cpu")).view(4, 4, 8), backbone.turns(8, 8, torch.device("cpu")).view(8, 8, 8)
    assert torch.allclose(finer.view(4, 2, 4, 2, 8).mean((1, 3)), own, atol=1e-5) and own[0, 1, :4].eq(own[0, 0, :4]).all()


def test_no_masked_pixel_reaches_a_feature() -> None:
    backbone, hidden = small(), torch.tensor([[[True, False, True], [False, True, True]]])
    nn.init.normal_(backbone.fill)
    images = torch.randn(1, 3, 64, 96)
    other = torch.where(hidden.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None], 1e6, images)
    assert torch.equal(backbone(backbone.hide(images, hidden)).pooled, backbone(backbone.hide(other, hidden)).pooled)


def test_gradients_reach_every_weight() -> None:
    backbone = small().train()
    features = backbone(torch.randn(2, 3, 64, 96))
    (features.tokens.square().sum() + features.pooled.square().sum()).backward()
    missing = [name for name, weight in backbone.named_parameters() if weight.grad is None or not weight.grad.isfinite().all()]
    assert missing == ["fill"]


def test_the_cnn_is_a_resnet_50() -> None:
    """Its 23,508,032 parameters without the classifier."""
    with torch.device("meta"):
        backbone = create("afm_small", bands=3)
    assert isinstance(backbone, AFM)
    assert sum(p.numel() for name, p in backbone.named_parameters() if name.startswith(("stem.", "layers."))) == 23_508_032


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="total stride 32; 64×96"):
        small()(torch.zeros(1, 3, 64, 90))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        small()(torch.zeros(1, 4, 64, 64))
    with pytest.raises(ValueError, match="mask pixels"):
        small().tokenize(torch.zeros(1, 3, 64, 64), keep=torch.zeros(1, 1).long())
    for options, message in (({"width": 18}, "divisible by 4"), ({"top": 0}, "at least 1"), ({"image_size": 70}, "64×64")):
        with pytest.raises(ValueError, match=message):
            small(**options)
