"""RoMA and ARM beyond parity: what is predicted from what, and each defect of the published code."""

import math
import warnings
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from swath.backbones.base import Context, Tokens, create, registry
from swath.kernels.dispatch import use
from swath.pretrain.clusters import Clusters, clusters_of, tapped
from swath.pretrain.objective import Objective, Outcome, build
from swath.pretrain.objectives.roma import RoMA, Target, coarse_error, load_published
from swath.pretrain.rotation import Turned
from swath.shards.draw import Draw
from swath.shards.prepare import Batch
from tests.parity.fixtures import ROOT, read

CPU = torch.device("cpu")


def model(name: str = "roma", size: tuple[int, int] = (32, 48), bands: int = 3, cluster: int = 2, **options: Any) -> RoMA:
    torch.manual_seed(0)
    backbone = create("mamba_tiny", bands=bands, image_size=32, patch=8, width=24, depth=2, cluster=cluster)
    small = {"decoder_width": 32, "decoder_heads": 2} | ({"windows": (3, 2), "block": 2} if name == "roma" else {})
    objective = build(name, backbone, size, {"image": bands}, **{**small, **options})
    assert isinstance(objective, RoMA)
    with torch.no_grad():  # away from what initialisation makes equal or zero
        for parameter in objective.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return objective


def pictures(count: int = 4, *size: int, bands: int = 3) -> Tensor:
    return torch.randn(count, bands, *(size or (32, 48)), generator=torch.Generator().manual_seed(1))


def batch_of(images: Tensor, valid: Tensor | None = None, first: int = 0) -> tuple[Batch, Draw]:
    ids = torch.arange(first, first + len(images))
    visits = torch.zeros_like(ids)
    masks = {} if valid is None else {"image": valid}
    return Batch({"image": images}, masks, ids, visits, torch.ones(len(images))), Draw(3, ids, visits)


def gradients(objective: Objective, images: Tensor, valid: Tensor | None) -> tuple[Outcome, dict[str, Tensor]]:
    objective.zero_grad()
    outcome = objective(*batch_of(images, valid))
    outcome.numerator.backward()
    return outcome, {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}


def watch(objective: RoMA, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the objective encodes and what it compares with, of its next forward pass."""
    seen: dict[str, Any] = {}
    tokens, token_error = objective.tokens, objective.token_error

    def encodes(images: Tensor, ctx: Context, clusters: Clusters, turned: Turned | None) -> Tokens:
        made = tokens(images, ctx, clusters, turned)
        seen.update(encoded=images, turned=turned, clusters=clusters, tokens=made.x.detach())
        return made

    def compares(made: list[Tensor], target: Target, clusters: Clusters) -> tuple[Tensor, Tensor, Tensor]:
        seen.update(target=target, made=made)
        return token_error(made, target, clusters)

    monkeypatch.setattr(objective, "tokens", encodes)
    monkeypatch.setattr(objective, "token_error", compares)
    return seen


def perfect(images: Tensor, clusters: Clusters) -> Tensor:
    """(B, M, V) standardised pixels of the predicted patches."""
    patches = rearrange(images, "b c (r p) (s q) -> b (r s) (p q c)", p=8, q=8)[:, clusters.target]
    return (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()


# The defects of the published code, in the order of its issues.


def test_the_target_of_a_turned_window_is_not_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published: the copy that targets come from is none, and is turned as well."""
    objective, images = model(), pictures()
    given, seen = images.clone(), watch(objective, monkeypatch)
    objective(*batch_of(images))
    assert torch.equal(images, given) and torch.equal(seen["target"].images, given)
    assert (seen["encoded"] != given).flatten(1).any(1).all()
    aliased = model(compat="released")
    seen = watch(aliased, monkeypatch)
    aliased(*batch_of(images))
    assert torch.equal(seen["target"].images, seen["encoded"]) and not torch.equal(seen["encoded"], given)


def test_the_angle_is_given_to_the_tokens_of_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published: to the diagonal of the image's corner."""
    objective, images = model(windows=(2,)), 0.01 * pictures(2)
    images[0, :, 16:, 8:24] = pictures(1, 16, 16)[0]
    images[1, :, 8:24, 24:40] = pictures(1, 16, 16)[0]
    seen = watch(objective, monkeypatch)
    objective(*batch_of(images))
    clusters, turned = seen["clusters"], seen["turned"]
    plain = objective.backbone.tokenize(turned.images, keep=clusters.context.expand(2, -1)).x
    marked = torch.zeros(2, 24, dtype=torch.bool)
    marked[:, clusters.context] = (seen["tokens"] != plain).any(2)
    context = torch.zeros(24, dtype=torch.bool).index_fill(0, clusters.context, True)
    expected = torch.zeros(2, 4, 6, dtype=torch.bool)
    expected[0, 2:4, 1:3] = expected[1, 1:3, 3:5] = True
    assert torch.equal(marked, expected.flatten(1) & context)


def test_every_image_is_used_whatever_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published: an image whose window is not of the largest side raises, and the next one is taken instead."""
    objective = model(size=(192, 192), windows=(6, 4, 2), cluster=4)
    poor = (torch.arange(192.0)[:, None] / 4 + torch.arange(192.0) / 3).sin().repeat(3, 1, 1)
    poor[:, :120, :120] = 0.0  # wider than any window, around rich patches: three a side, and one
    some, one = poor.clone(), poor.clone()
    some[:, 40:64, 40:64] = 3 * pictures(1, 24, 24)[0]
    one[:, 48:56, 48:56] = 3 * pictures(1, 8, 8)[0]
    images = torch.stack([pictures(1, 192, 192)[0], some, one, torch.zeros(3, 192, 192)])
    seen = watch(objective, monkeypatch)
    outcome = objective(*batch_of(images))
    assert seen["turned"].side.tolist() == [6, 4, 2, 6]
    alone = [objective(*batch_of(images[i : i + 1], first=i)).numerator for i in range(4)]
    assert outcome.weight == 4 and torch.allclose(outcome.numerator, torch.stack(alone).sum(), rtol=1e-5)


def test_blocks_compare_the_same_pixels() -> None:
    """A perfect prediction has no error in blocks, and the error of a patch falls on its own pixels.

    Published: of sixty pairs, one is of one patch.
    """
    objective, images = model(), pictures()
    clusters, target = clusters_of((1, 1, 4, 6), 2, CPU), Target(images)
    made = perfect(images, clusters)
    _, mean, spread = objective.token_error([made], target, clusters)
    assert objective.block_error([made], mean, spread, target, clusters).max() < 1e-8
    released = model(compat="released")
    assert released.block_error([made], mean, spread, target, clusters).min() > 0.5
    made[0, 5] += 1.0
    made.requires_grad_()
    objective.block_error([made], mean, spread, target, clusters).sum().backward()
    assert made.grad is not None
    touched = made.grad.abs() > 1e-6
    assert touched[0, 5].all() and touched.any(2).sum() == 1


def test_a_block_holds_what_stands_there() -> None:
    """Any prediction, put back into the image patch by patch: its error is that of the image's own blocks, of unlike contrast."""
    objective = model()
    images = pictures() * (1 + torch.arange(32.0)[:, None] + torch.arange(48.0))
    clusters, target = clusters_of((1, 1, 4, 6), 2, CPU), Target(images)
    made = torch.randn(4, len(clusters.target), 192)
    _, mean, spread = objective.token_error([made], target, clusters)
    residual, counts = torch.zeros_like(images), torch.zeros(4, 1, 32, 48)
    for number, place in enumerate(clusters.target.tolist()):
        rows, columns = (slice(8 * at, 8 * at + 8) for at in divmod(place, 6))
        values = (made[:, number] * spread[:, number, None] + mean[:, number, None]).view(4, 8, 8, 3).permute(0, 3, 1, 2)
        residual[:, :, rows, columns] = values - images[:, :, rows, columns]
        counts[:, :, rows, columns] = 1.0
    got = objective.block_error([made], mean, spread, target, clusters)
    assert torch.allclose(got, coarse_error(residual, images, counts, 2, 8), rtol=1e-4)


def test_blocks_are_another_scale() -> None:
    """What cancels within block² pixels counts for nothing there; what does not, counts in units of the block's spread."""
    images = pictures(1, 16, 16) * 5
    everywhere = torch.ones(1, 1, 16, 16)
    checks = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2) * 2.0 - 1
    assert coarse_error(checks.expand(1, 3, -1, -1), images, everywhere, 2, 4).item() < 1e-10
    blocks = rearrange(images, "b c (x i) (y j) -> (b x y) (c i j)", i=8, j=8)
    even = coarse_error(torch.full((1, 3, 16, 16), 2.0), images, everywhere, 2, 4)
    assert torch.allclose(even, (4 / blocks.var(1)).mean(), rtol=1e-4)


def test_blocks_that_the_image_cuts() -> None:
    """A block of 3 patches over 4 × 6: the rest counts for what it is."""
    images, residual = pictures(1), torch.zeros(1, 3, 32, 48)
    residual[..., 24:, :] = 1.0
    got = coarse_error(residual, images, torch.ones(1, 1, 32, 48), 3, 8)
    expected = sum((1 / images[0, :, 24:, x : x + 24].var()) * 24 * 8 for x in (0, 24)) / (32 * 48)
    # cells of 3 × 3 pixels: the last row of them is of two
    assert torch.allclose(got[0], torch.as_tensor(expected), rtol=1e-4)


def test_images_are_normalised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is encoded, but for the window, and what is predicted are the batch's pixels, bit for bit."""
    for name in ("arm", "roma"):
        objective, images = model(name), pictures() * 3 + 5
        seen = watch(objective, monkeypatch)
        objective(*batch_of(images))
        assert torch.equal(seen["target"].images, images)
        outside = torch.ones(4, 1, 32, 48, dtype=torch.bool)
        if name == "roma":
            window = seen["turned"].window(4, 6).view(4, 1, 4, 6)
            outside = ~window.repeat_interleave(8, 2).repeat_interleave(8, 3)
        assert torch.equal(torch.where(outside, seen["encoded"], 0), torch.where(outside, images, 0))
        assert name == "roma" or torch.equal(
            seen["tokens"], objective.backbone.tokenize(images, keep=seen["clusters"].context.expand(4, -1)).x
        )


# (the fifth, scores that prefer flat patches: test_rotation.py)


def test_the_angle_itself_is_encoded() -> None:
    objective, images = model(), pictures(1)
    clusters = clusters_of((1, 1, 4, 6), 2, CPU)

    def marked(angle: float) -> Tensor:
        where = torch.tensor([1])
        turned = Turned(images, None, where, where, where * 2, torch.tensor([angle]))
        return objective.tokens(images, Context(), clusters, turned).x.detach()

    none, little, much, other = (marked(angle) for angle in (0.0, 0.01, 0.7, -0.7))
    assert (little - none).norm() < 0.05 * (much - none).norm() and (much - other).norm() > (much - none).norm()


# What is predicted from what.


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("name", ["arm", "roma"])
def test_no_prediction_sees_its_own_or_a_later_cluster(name: str, cluster: int) -> None:
    """With the window turned beforehand: pixels of cluster c reach predictions of all clusters after c, and of no other."""
    objective, images = model(name, cluster=cluster), pictures(1)
    clusters = clusters_of(objective.cluster_grid(32, 48), cluster, CPU)
    where = torch.tensor([1])
    turned = Turned(images, None, where, where, where * 2, torch.tensor([0.4])) if name == "roma" else None

    def predictions(x_bchw: Tensor) -> Tensor:
        keys = objective.decoder.read(objective.encode(objective.tokens(x_bchw, Context(), clusters, turned)))
        return objective.head(objective.decoder(keys, clusters))[0][0]

    before, number = predictions(images), clusters.number[clusters.target]
    for changed in range(int(number.max()) + 1):
        inside = (clusters.number == changed).view(4, 6).repeat_interleave(8, 0).repeat_interleave(8, 1)
        after = predictions(torch.where(inside, images + 1, images))
        assert torch.equal((before != after).any(1), number > changed)


def test_clusters_and_taps() -> None:
    clusters = clusters_of((1, 1, 4, 6), 2, CPU)
    assert clusters.number.view(4, 6).tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2
    assert set(range(24)) - set(clusters.context.tolist()) == {16, 17, 22, 23}
    assert set(range(24)) - set(clusters.target.tolist()) == {0, 1, 6, 7}
    assert tapped(12, 4) == [5, 7, 9, 11] and tapped(24, 4) == [11, 15, 19, 23]
    assert tapped(2, 4) == [0, 0, 1, 1] and tapped(1, 1) == [0] and tapped(0, 2) == [-1, -1]


def test_the_last_cluster_is_never_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = model("arm")
    seen = watch(objective, monkeypatch)
    objective(*batch_of(pictures()))
    assert seen["tokens"].shape[1] == 20 and seen["made"][0].shape == (4, 20, 192)


# Invalid pixels, and batches.


@pytest.mark.parametrize("name", ["arm", "roma"])
@pytest.mark.parametrize("filler", [0.0, 1e6, float("nan"), float("inf")])
def test_invalid_pixels_change_nothing(name: str, filler: float) -> None:
    objective, images = model(name), pictures()
    valid = torch.ones(4, 1, 32, 48, dtype=torch.bool)
    valid[0, :, :11, :19] = False
    valid[2, :, 20:] = False
    valid[3, :, 3:5, 8:30] = False
    expected, wanted = gradients(objective, torch.where(valid, images, 0.0), valid)
    outcome, got = gradients(objective, torch.where(valid, images, filler), valid)
    assert torch.equal(outcome.numerator, expected.numerator) and torch.equal(outcome.weight, expected.weight)
    assert wanted.keys() == got.keys() and all(torch.equal(got[n], wanted[n]) for n in wanted)
    assert outcome.weight == 4 and all(torch.isfinite(g).all() for g in got.values())


@pytest.mark.parametrize("name", ["arm", "roma"])
@pytest.mark.parametrize("compat", [None, "released"])
def test_all_valid_equals_no_mask(name: str, compat: str | None) -> None:
    objective, images = model(name, compat=compat), pictures()
    plain, wanted = gradients(objective, images, None)
    masked, got = gradients(objective, images, torch.ones(4, 1, 32, 48, dtype=torch.bool))
    assert torch.allclose(plain.numerator, masked.numerator, rtol=1e-6) and torch.equal(plain.weight, masked.weight)
    assert all(torch.allclose(got[n], g, rtol=1e-3, atol=1e-6) for n, g in wanted.items())  # sums in another order


def test_absent_tokens_are_neither_seen_nor_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, images = model("arm"), pictures(1)
    valid = torch.ones(1, 1, 32, 48, dtype=torch.bool)
    valid[:, :, :16, :16] = False  # the first cluster: the second has nothing before it
    valid[:, :, 16:24, :8] = False  # a patch
    valid[:, :, 24:27, 40:] = False  # less than half of one, of the last cluster
    seen = watch(objective, monkeypatch)
    outcome = objective(*batch_of(images, valid))
    counted, clusters = seen["target"].counted[0], seen["clusters"]
    assert set(clusters.target[~counted].tolist()) == {2, 3, 8, 9, 12} and outcome.weight == 1
    assert torch.isfinite(outcome.numerator)


def test_the_valid_pixels_of_an_absent_token_reach_nothing() -> None:
    """Neither through the scan nor as keys, nor as a part of blocks."""
    objective, images = model("roma", rotate=False), pictures(2)
    valid = torch.ones(2, 1, 32, 48, dtype=torch.bool)
    valid[:, :, 11:16, 16:24] = False  # 24 of 64 pixels of a patch of the second cluster are left
    outcome, wanted = gradients(objective, images, valid)
    images[:, :, 8:11, 16:24] += 3
    other, got = gradients(objective, images, valid)
    assert torch.equal(outcome.numerator, other.numerator) and all(torch.equal(got[n], g) for n, g in wanted.items())

    clusters = clusters_of((1, 1, 4, 6), 2, CPU)
    present, keys = torch.ones(1, 20, dtype=torch.bool), torch.randn(1, 20, 4, 32)
    present[0, 7] = False
    features = objective.decoder(keys, clusters, present)
    keys[0, 7] += 1
    assert torch.equal(objective.decoder(keys, clusters, present), features)


def test_samples_without_enough_do_not_count() -> None:
    for name in ("arm", "roma"):
        objective, images = model(name), pictures(3)
        valid = torch.zeros(3, 1, 32, 48, dtype=torch.bool)
        valid[0] = True
        valid[1, :, 16:, 32:] = True  # only the last cluster: nothing to predict it from
        outcome, got = gradients(objective, images, valid)
        alone, wanted = gradients(objective, images[:1], valid[:1])
        assert outcome.weight == alone.weight == 1
        assert torch.allclose(outcome.numerator, alone.numerator, rtol=1e-6)
        assert all(torch.allclose(got[n], g, rtol=1e-3, atol=1e-6) for n, g in wanted.items())
        nothing, got = gradients(objective, images[1:], valid[1:])
        assert nothing.weight == 0 and nothing.numerator == 0 and not any(g.any() for g in got.values())


@pytest.mark.parametrize("name", ["arm", "roma"])
def test_the_loss_does_not_depend_on_the_batch(name: str) -> None:
    """Cut and permuted, with samples of unequal validity."""
    objective, images = model(name), pictures(6)
    valid = torch.ones(6, 1, 32, 48, dtype=torch.bool)
    valid[1, :, 10:] = False
    valid[4, :, :, :29] = False
    whole = objective(*batch_of(images, valid))
    parts = [objective(*batch_of(images[i : i + 2], valid[i : i + 2], first=i)) for i in (0, 2, 4)]
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    batch = Batch({"image": images[order]}, {"image": valid[order]}, order, order * 0, torch.ones(6))
    parts_of_one = objective(batch, Draw(3, order, order * 0))
    assert sum(p.weight for p in parts) == whole.weight == parts_of_one.weight == 6
    for one in (torch.stack([p.numerator for p in parts]).sum(), parts_of_one.numerator):
        assert torch.allclose(one, whole.numerator, rtol=1e-5)
    for term, (total, weight) in whole.terms.items():
        assert weight == 6 and torch.allclose(torch.stack([p.terms[term][0] for p in parts]).sum(), total, rtol=1e-5)
    scale = {"pixels/image": 1.0, "blocks/image": 0.1}
    summed = torch.stack([scale[term] * total for term, (total, _) in whole.terms.items()]).sum()
    assert torch.allclose(summed, whole.numerator, rtol=1e-5) and len(whole.terms) == (2 if name == "roma" else 1)


@pytest.mark.parametrize(("size", "bands"), [((16, 32), 1), ((48, 16), 13), ((80, 32), 2)])
@pytest.mark.parametrize("normalise", [True, False])
def test_sizes_and_bands(size: tuple[int, int], bands: int, normalise: bool) -> None:
    """Another size than it was built for, one sample, each with windows and blocks larger than the image."""
    objective = model(bands=bands, normalise_patches=normalise, windows=(6, 4, 2), block=6)
    outcome = objective(*batch_of(pictures(1, *size, bands=bands)))
    outcome.numerator.backward()
    assert torch.isfinite(outcome.numerator) and outcome.weight == 1
    missing = [n for n, p in objective.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not missing and outcome.picture is not None
    assert {k: v.shape for k, v in outcome.picture().items()} == dict.fromkeys(
        ("input", "seen", "reconstruction"), (1, bands, *size)
    )


def test_constant_images_are_finite() -> None:
    for compat in (None, "released"):
        outcome, got = gradients(model(compat=compat), torch.full((2, 3, 32, 48), 7.0), None)
        assert torch.isfinite(outcome.numerator) and all(torch.isfinite(g).all() for g in got.values())


def test_bf16_autocast_is_close() -> None:
    objective, images = model(), pictures()
    exact = objective(*batch_of(images)).numerator
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = objective(*batch_of(images)).numerator
    assert rough.dtype == torch.float32
    assert torch.allclose(exact, rough, rtol=0.02)  # bf16 keeps 8 bits; the loss averages many of them


# Training.


def train(objective: Objective, images: Tensor, steps: int, lr: float) -> Tensor:
    optimizer, losses = torch.optim.AdamW(objective.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05), []
    for _ in range(steps):
        outcome = objective(*batch_of(images))
        loss = outcome.numerator / outcome.weight
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("name", ["arm", "roma"])
def test_the_loss_falls(name: str) -> None:
    ramps = torch.linspace(-1, 1, 32)[:, None] * 2 + torch.linspace(-1, 1, 48)
    losses = train(model(name), (ramps + 0.05 * pictures(2)).contiguous(), 15, 1e-2)
    assert losses[-3:].mean() < 0.6 * losses[:2].mean()


SCANS = [("roma", "mamba_tiny"), ("arm", "mamba_tiny"), ("mae", "vim_tiny")]


def scanned(name: str, backbone: str) -> Objective:
    torch.manual_seed(0)
    options = {} if name == "mae" else {"cluster": 2}
    made = create(backbone, bands=3, image_size=32, patch=8, width=24, depth=2, **options)
    return build(name, made, (32, 32), {"image": 3}, decoder_width=32, decoder_depth=2, decoder_heads=2)


@pytest.mark.parametrize(("name", "backbone"), SCANS)
def test_fast_operators_follow_the_reference(name: str, backbone: str) -> None:
    fast = train(scanned(name, backbone), pictures(2, 32, 32), 20, 1e-3)
    with use(selective_scan="reference", causal_conv1d="reference"):
        slow = train(scanned(name, backbone), pictures(2, 32, 32), 20, 1e-3)
    assert (fast - slow).abs().max() < 1e-5 and (fast[0] - fast[-1]).abs() > 1e-2


@pytest.mark.parametrize(("name", "backbone"), SCANS)
def test_a_step_takes_our_operators(name: str, backbone: str) -> None:
    """Forward and backward, in a trace; whatever falls back warns."""
    objective = scanned(name, backbone)
    with warnings.catch_warnings(), profile(activities=[ProfilerActivity.CPU]) as record:
        warnings.simplefilter("error")
        train(objective, pictures(2, 32, 32), 1, 1e-3)
    names = {event.key for event in record.key_averages()}
    for operator in ("selective_scan", "causal_conv1d"):
        assert {f"swath::{operator}", f"swath::{operator}_backward"} <= names


# What cannot be, and what is published.


@pytest.mark.parametrize("family", sorted(registry.families().values()))
def test_only_a_causal_backbone_is_taken(family: str) -> None:
    with torch.device("meta"):
        backbone = create(family, **registry.entry(family).build.tiny)
        for name in ("roma", "arm"):
            if family.startswith("mamba"):
                build(name, backbone, (32, 32), {"image": 4})
                continue
            with pytest.raises(ValueError, match=rf"{name} cannot train .*: .*sees later ones"):
                build(name, backbone, (32, 32), {"image": 4})
        with pytest.raises(ValueError, match="sees later ones"):
            build("roma", create("mamba_tiny_transfer", bands=3), (224, 224), {"image": 3})


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ((40, 48), {}, r"40×48 .* clusters of 16×16 pixels \(cluster 2\); 32×48 would be"),
        ((16, 16), {}, r"16×16 .* 32×32 would be"),
        ((8, 8), {}, r"32×32 would be"),
        ((33, 48), {}, r"not divisible by patch 8"),
        ((32, 48), {"block": 3, "compat": "released"}, r"block 3 divides, not 4×6"),
        ((32, 48), {"windows": ()}, "windows"),
        ((32, 48), {"windows": (0,)}, "windows"),
        ((32, 48), {"decoder_heads": 3}, "decoder_width 32 must be divisible by decoder_heads 3"),
        ((32, 48), {"decoder_depth": 0}, "decoder_depth 0 at least 1"),
    ],
)
def test_what_cannot_be_is_refused(size: tuple[int, int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(size=size, **options)


def test_other_sizes_are_refused_in_a_run_too() -> None:
    with pytest.raises(ValueError, match="32×48 would be"):
        model()(*batch_of(pictures(1, 40, 48)))


@pytest.mark.parametrize(("size", "millions"), [("tiny", 5.2 + 14.6), ("base", 99.4), ("large", 282.3 + 21.4)])
def test_published_parameter_counts(size: str, millions: float) -> None:
    """With the tables that the published model keeps as parameters, of 144 places."""
    with torch.device("meta"):
        backbone = create(f"mamba_{size}", bands=3)
        objective = build("roma", backbone, (192, 192), {"rgb": 3}, compat="released")
    tables = 144 * (backbone.width + 512)
    assert math.isclose((sum(p.numel() for p in objective.parameters()) + tables) / 1e6, millions, rel_tol=0.01)


@pytest.mark.skipif(not (ROOT / "roma_pretrain").is_dir(), reason="no golden fixtures; set SWATH_GOLDEN")
def test_published_weights_are_read_strictly() -> None:
    fixture = read(ROOT / "roma_pretrain")
    state = fixture.part("state")
    backbone = create("mamba_base", bands=3, width=fixture.config["embed_dim"])
    options: dict[str, Any] = {"decoder_width": fixture.config["dec_embed_dim"], "decoder_heads": 1}
    objective = build("roma", backbone, (192, 192), {"rgb": 3}, compat="released", **options)
    assert isinstance(objective, RoMA)
    load_published(objective, backbone.config, state)
    arm = build("arm", backbone, (192, 192), {"rgb": 3}, **options)
    assert isinstance(arm, RoMA)
    load_published(arm, backbone.config, {n: t for n, t in state.items() if n != "angle_embed"})
    with pytest.raises(RuntimeError, match="angle_embed"):
        load_published(arm, backbone.config, state)
    with pytest.raises(RuntimeError, match=r"decoder\.query"):
        load_published(objective, backbone.config, {n: t for n, t in state.items() if n != "ar_token"})
    with pytest.raises(ValueError, match="not lower-triangular"):
        load_published(objective, backbone.config, state | {"mask": state["mask"].T})
    with pytest.raises(ValueError, match="fixed sin-cos table"):
        load_published(objective, backbone.config, state | {"dec_pos_embed": state["dec_pos_embed"].flip(1)})


def test_every_weight_is_trained() -> None:
    for compat in (None, "released"):
        _, got = gradients(model(compat=compat), pictures(), None)
        assert {n for n, _ in model(compat=compat).named_parameters()} == {n for n, g in got.items() if g.abs().max() > 0}
