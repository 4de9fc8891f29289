"""What holds for every objective, on each kind of backbone that it can train: draws belong to samples and not to batches, and
nothing that stands in an invalid pixel is ever seen."""

from collections.abc import Mapping
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

from swath.backbones.base import Backbone
from swath.backbones.base import registry as backbones
from swath.pretrain.objective import Objective, Outcome, pairs, registry
from swath.shards.draw import Draw
from tests.small_objectives import batch_of, small, smooth_images


def kinds(row: Mapping[str, str | None]) -> list[str]:
    """Of the backbones that an objective can train one of each kind: how it is masked, with dates or groups or not. Not those
    that normalise by statistics of the batch, on which their numbers then hang."""
    chosen: dict[object, str] = {}
    for name in (name for name, why in row.items() if why is None):
        with torch.device("meta"):
            made: Backbone = backbones.entry(name).build(backbones.configure(name, **backbones.entry(name).build.tiny))
        if not any(isinstance(module, nn.BatchNorm2d) for module in made.modules()):
            side = 4 * made.mask_unit
            dates, groups = made.grid(side, side)[:2]
            chosen.setdefault((made.traits & {"sparse", "product"}, dates > 1, groups > 1), name)
    return list(chosen.values())


SWEEP = [(name, backbone) for name, row in pairs().items() for backbone in kinds(row)]


@pytest.fixture(scope="module", params=SWEEP, ids=[f"{o}-{b}" for o, b in SWEEP])
def objective(request: pytest.FixtureRequest) -> Objective:
    return small(*request.param).train()


def gradients(objective: Objective, images: Tensor, valid: Tensor | None) -> tuple[Outcome, dict[str, Tensor]]:
    objective.zero_grad()
    outcome = objective(*batch_of(images, valid))
    outcome.numerator.backward()
    return outcome, {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def validity(objective: Objective, images: Tensor) -> Tensor:
    """(B, dates, H, W): a corner of the first sample is invalid, cut through tokens, and strewn pixels of the second; of the last
    date only, where there are several."""
    side = images.shape[2]
    dates = objective.backbone.grid(side // objective.scale, side // objective.scale)[0]
    valid = torch.ones(len(images), dates, side, side, dtype=torch.bool)
    valid[0, -1, : side // 3, : side // 2 + 1] = False
    valid[1, -1, 1::5, ::3] = False
    return valid


def of_channels(valid: Tensor, images: Tensor) -> Tensor:
    return valid.repeat_interleave(images.shape[1] // valid.shape[1], dim=1)


def test_a_sample_is_drawn_for_whatever_its_batch(objective: Objective) -> None:
    """Batches of one, and the batch in another order, sum up to the same: numbers, terms, and what was hidden bit for bit."""
    images = smooth_images(objective, 4)
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0])
    rows = [2, 0, 3, 1]

    def outcome(*samples: int) -> Outcome:
        batch, draw = batch_of(images[list(samples)], ids=list(samples))
        return objective(replace(batch, weight=weight[list(samples)]), draw)

    with torch.no_grad():
        whole, turned, single = outcome(0, 1, 2, 3), outcome(*rows), [outcome(n) for n in range(4)]
        assert whole.weight > 0
        for parts in ([turned], single):
            # sums of fp32, and products of matrices of another shape
            assert sum(p.weight.item() for p in parts) == pytest.approx(whole.weight.item(), rel=1e-6)
            assert sum(p.numerator.item() for p in parts) == pytest.approx(whole.numerator.item(), rel=1e-4)
            for name, (amount, count) in whole.terms.items():
                assert sum(p.terms[name][0].item() for p in parts) == pytest.approx(amount.item(), rel=1e-4), name
                assert sum(p.terms[name][1].item() for p in parts) == pytest.approx(count.item(), rel=1e-6), name
        assert single[2].numerator == 0 and single[2].weight == 0
        if whole.picture is not None and turned.picture is not None and "seen" in (seen := whole.picture()):
            hidden = seen["seen"].isnan()
            assert torch.equal(turned.picture()["seen"].isnan(), hidden[rows])
            assert not hidden.any() or not torch.equal(hidden[0], hidden[1])


class Spy:
    """Draws that remember whether they were asked."""

    def __init__(self, draw: Draw) -> None:
        self.draw, self.asked = draw, False

    def uniform(self, stream: str, n: int) -> Tensor:
        self.asked = True
        return self.draw.uniform(stream, n)

    def order(self, stream: str, n: int) -> Tensor:
        self.asked = True
        return self.draw.order(stream, n)

    def choose(self, stream: str, scores: Tensor, k: int) -> Tensor:
        self.asked = True
        return self.draw.choose(stream, scores, k)


def test_another_visit_is_another_draw_and_the_same_is_the_same(objective: Objective) -> None:
    """Another sample, visit or seed gives another loss of the same pixels, unless nothing is drawn at all."""
    images = smooth_images(objective, 2)
    batch, draw = batch_of(images)
    spy = Spy(draw)
    with torch.no_grad():
        first = objective(batch, spy).numerator
        again = objective(*batch_of(images)).numerator
        others = [
            objective(*made).numerator
            for made in (batch_of(images, visit=1), batch_of(images, seed=4), batch_of(images, ids=[8, 9]))
        ]
    assert torch.equal(first, again)
    assert len({first.item(), *(other.item() for other in others)}) == (4 if spy.asked else 1)


def test_torch_s_generator_is_left_alone(objective: Objective) -> None:
    images = smooth_images(objective, 2)
    before = torch.get_rng_state()
    with torch.no_grad():
        first = objective(*batch_of(images)).numerator
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(99)
        assert torch.equal(objective(*batch_of(images)).numerator, first)


def test_invalid_pixels_change_nothing(objective: Objective) -> None:
    """Loss and gradients bit for bit, whatever stands there: numbers, infinities, none, each in a part of them."""
    images = smooth_images(objective, 3)
    valid = validity(objective, images)
    there = of_channels(valid, images)
    anything = torch.tensor([1e6, -3e38, float("nan"), float("inf"), -float("inf")])
    filler = anything[torch.arange(images.numel()) % len(anything)].view_as(images)
    expected, wanted = gradients(objective, torch.where(there, images, 0.0), valid)
    got, made = gradients(objective, torch.where(there, images, filler), valid)
    assert torch.equal(got.numerator, expected.numerator) and torch.equal(got.weight, expected.weight) and got.weight > 0
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], wanted[name]) and torch.isfinite(made[name]).all() for name in wanted)


def test_all_valid_equals_no_mask(objective: Objective) -> None:
    images = smooth_images(objective, 2)
    plain, expected = gradients(objective, images, None)
    masked, got = gradients(objective, images, torch.ones_like(validity(objective, images)))
    assert torch.allclose(plain.numerator, masked.numerator, rtol=1e-5) and torch.allclose(plain.weight, masked.weight, rtol=1e-6)
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert torch.allclose(got[name], gradient, rtol=1e-3, atol=1e-4 * scale + 1e-7), name


def test_constant_images(objective: Objective) -> None:
    images = torch.zeros_like(smooth_images(objective, 2))
    images[1] = 7.0
    outcome, made = gradients(objective, images, None)
    assert torch.isfinite(outcome.numerator) and outcome.weight > 0
    assert made and all(torch.isfinite(gradient).all() for gradient in made.values())


def test_one_sample(objective: Objective) -> None:
    outcome, made = gradients(objective, smooth_images(objective, 1), None)
    assert torch.isfinite(outcome.numerator) and outcome.numerator > 0 and outcome.weight > 0
    assert made and all(torch.isfinite(gradient).all() for gradient in made.values())


def test_a_batch_of_nodata(objective: Objective) -> None:
    """Weight and loss are 0, and gradients finite."""
    images = smooth_images(objective, 2)
    outcome, made = gradients(objective, torch.full_like(images, float("nan")), torch.zeros_like(validity(objective, images)))
    assert outcome.numerator == 0 and outcome.weight == 0
    assert all(torch.isfinite(gradient).all() for gradient in made.values())


def test_a_sample_of_nodata_keeps_its_place(objective: Objective) -> None:
    """The batch is as without it, in numbers and in gradients, to the rounding of sums."""
    images = smooth_images(objective, 3)
    valid = torch.ones_like(validity(objective, images))
    expected, wanted = gradients(objective, images[:2], valid[:2])
    images[2], valid[2] = float("nan"), False
    got, made = gradients(objective, images, valid)
    assert torch.allclose(got.weight, expected.weight, rtol=1e-6)
    assert torch.allclose(got.numerator, expected.numerator, rtol=1e-4)
    for name, gradient in wanted.items():
        scale = gradient.abs().max().item()
        assert torch.allclose(made[name], gradient, rtol=1e-3, atol=1e-4 * scale + 1e-7), name


RATIOS = [
    next((name, backbone) for name, backbone in SWEEP if name == objective)
    for objective in registry.names()
    if any(field.name == "mask_ratio" for field in fields(registry.entry(objective).config))
]


@pytest.mark.parametrize("ratio", [1.0, 0.999])
@pytest.mark.parametrize(("name", "backbone"), RATIOS)
def test_a_mask_that_leaves_no_token_is_refused(name: str, backbone: str, ratio: float) -> None:
    with pytest.raises(ValueError, match="mask_ratio"):
        small(name, backbone, mask_ratio=ratio)
