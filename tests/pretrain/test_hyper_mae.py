"""Hyperspectral MAE beyond parity: what is dropped, what is a target, what a sample without a modality does."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from swath.backbones.base import create
from swath.backbones.less import lattice
from swath.kernels.dispatch import use
from swath.pretrain.objective import Draws, Outcome, build
from swath.pretrain.objectives.hyper_mae import HyperMAE
from swath.shards.draw import Draw
from swath.shards.prepare import Batch

PAIR = {"s2": 5, "s1": 2}
CUBE = {"cube": 12}
Images = dict[str, Tensor]


def model(
    bands: dict[str, int] = PAIR, size: tuple[int, int] = (16, 16), less: dict[str, Any] | None = None, **task: Any
) -> HyperMAE:
    torch.manual_seed(0)
    options = {
        "patch": 4,
        "width": 24,
        "depth": 1,
        "heads": 2,
        "channel_width": 3,
        "rank": 2,
        "perception_m": 120.0,
        **(less or {}),
    }
    radar = bands.get("s1", 0)
    backbone = create("less_small_patch16", bands=sum(bands.values()), radar=radar, image_size=16, **options)
    decoder = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "decoder_channel_width": 2, "decoder_rank": 2}
    objective = build("hyper_mae", backbone, size, bands, **{**decoder, **task})
    assert isinstance(objective, HyperMAE)
    return objective


def images_of(bands: dict[str, int], count: int = 3, size: tuple[int, int] = (16, 16)) -> Images:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(count, channels, *size, generator=generator) for name, channels in bands.items()}


def given(images: Images, valid: Images | None = None, ids: Tensor | None = None) -> tuple[Batch, Draws]:
    count = len(next(iter(images.values())))
    ids = torch.arange(count) if ids is None else ids
    return Batch(images, valid or {}, ids, torch.zeros_like(ids), torch.ones(count)), Draw(3, ids, torch.zeros_like(ids))


def loss_and_gradients(objective: HyperMAE, images: Images, valid: Images | None = None) -> tuple[Outcome, dict[str, Tensor]]:
    objective.zero_grad()
    outcome = objective(*given(images, valid))
    outcome.numerator.backward()
    return outcome, {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def errors_by_hand(objective: HyperMAE, images: Images, name: str) -> tuple[Tensor, Any]:
    """(B, C, N) squared error of every patch against its own standardised pixels, with loops; and what was dropped."""
    view = objective.view(*given(images))
    dropped = objective.drop(name, view, given(images)[1])
    made = torch.cat([layers[0] for layers in objective.predict(view, dropped).values()], dim=1)
    whole, side = torch.cat(list(images.values()), dim=1), objective.backbone.mask_unit
    batch, channels, height, width = whole.shape
    count = height * width // side**2
    errors = torch.zeros(batch, channels, count)
    for b in range(batch):
        for c in range(channels):
            for n in range(count):
                top, left = n // (width // side) * side, n % (width // side) * side
                patch = whole[b, c, top : top + side, left : left + side].flatten()
                target = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
                errors[b, c, n] = (made[b, c * count + n] - target).square().mean().detach()
    return errors, dropped


def test_each_pass_by_hand() -> None:
    """Dropped places over all bands, dropped bands over all places; each the mean of what optical and radar come to."""
    objective, images = model(mask_ratio=0.6, channel_mask_ratio=0.6), images_of(PAIR, 2, (8, 12))
    outcome = objective(*given(images))
    total = torch.zeros(2)
    assert objective.passes == ("optical", "radar", "multi")
    for name in objective.passes:
        errors, dropped = errors_by_hand(objective, images, name)
        parts: dict[str, list[float]] = {"places": [], "groups": []}
        for b in range(2):
            of_places, of_groups = [], []
            for kind in (range(5), range(5, 7)):
                of_places.append([errors[b, c, n] for c in kind for n in range(6) if dropped.places_bn[b, n]])
                of_groups.append([errors[b, c, n] for c in kind if dropped.groups_bg[b, c] for n in range(6)])
            for term, found in (("places", of_places), ("groups", of_groups)):
                parts[term].append(float(sum(sum(part) / len(part) for part in found if part) / sum(map(bool, found))))
        for term, per_sample in parts.items():
            amount, weight = outcome.terms[f"{term}/{name}"]
            assert weight == 2 and torch.allclose(amount, torch.tensor(per_sample).sum(), rtol=1e-5)
            total += torch.tensor(per_sample)
    assert outcome.weight == 2
    assert torch.allclose(outcome.numerator, total.sum(), rtol=1e-5)


def test_the_lattice_by_hand() -> None:
    """Without blocks a decoder shows what enters it: what was kept in its place, mask tokens elsewhere, both with positions."""
    objective, images = model(decoder_depth=0), images_of(PAIR, 2, (8, 12))
    decoder, backbone = objective.decoder, objective.backbone
    batch, draw = given(images)
    view = objective.view(batch, draw)
    dropped = objective.drop("multi", view, draw)
    features = backbone.encode(backbone.tokenize(view.images_bchw, view.ctx, dropped.keep))
    positions_bnd, bands_1gd = backbone.encodings((1, 7, 2, 3), view.ctx, torch.device("cpu"), 16)
    made = objective.predict(view, dropped)
    for b in range(2):
        seen = [(int(g), int(n)) for g in dropped.keep.groups[b] for n in dropped.keep.positions[b]]
        for g in range(7):
            for n in range(6):
                entered = decoder.mask_token.flatten()
                if (g, n) in seen:
                    entered = decoder.embed(features.tokens[b, seen.index((g, n))])
                entered = decoder.norm(entered + positions_bnd[0, n] + bands_1gd[0, g])
                head, got = (
                    ("optical", made["optical"][0][b, g * 6 + n]) if g < 5 else ("radar", made["radar"][0][b, (g - 5) * 6 + n])
                )
                assert torch.allclose(objective.head(head)(entered)[0], got, atol=1e-5)


def test_the_class_row_and_column_are_where_they_belong() -> None:
    """What the encoder has for a kept place or band stands at its place or band; a learned token at the others."""
    objective, images = model(), images_of(PAIR, 1)
    decoder, (batch, draw) = objective.decoder, given(images)
    view = objective.view(batch, draw)
    dropped = objective.drop("multi", view, draw)
    entered: list[Tensor] = []
    decoder.blocks[0].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0][0]))
    objective.predict(view, dropped)
    features = objective.backbone.encode(objective.backbone.tokenize(view.images_bchw, view.ctx, dropped.keep))
    seen_ijd = decoder.embed(lattice(features, dropped.keep.groups.shape[1]))[0]
    positions_bnd, bands_1gd = objective.backbone.encodings((1, 7, 4, 4), view.ctx, torch.device("cpu"), 16)
    row_jd, column_id = entered[0][0], entered[0][:, 0]
    assert torch.allclose(row_jd[0], seen_ijd[0, 0], atol=1e-6)
    places, groups = dropped.keep.positions[0].tolist(), dropped.keep.groups[0].tolist()
    for n in range(16):
        expected = seen_ijd[0, 1 + places.index(n)] if n in places else decoder.channel_mask_token.flatten()
        assert torch.allclose(row_jd[1 + n], expected + positions_bnd[0, n], atol=1e-6)
    for g in range(7):
        expected = seen_ijd[1 + groups.index(g), 0] if g in groups else decoder.spatial_mask_token.flatten()
        assert torch.allclose(column_id[1 + g], expected + bands_1gd[0, g], atol=1e-6)


def test_a_pass_of_one_sensor_predicts_the_other() -> None:
    objective, images = model(), images_of(PAIR)
    view, draw = objective.view(*given(images)), given(images)[1]
    optical, radar = objective.drop("optical", view, draw), objective.drop("radar", view, draw)
    assert (optical.keep.groups < 5).all() and optical.groups_bg[:, 5:].all()
    assert (radar.keep.groups >= 5).all() and radar.groups_bg[:, :5].all() and not radar.groups_bg[:, 5:].any()
    moved = {**images, "s1": images["s1"] + torch.randn_like(images["s1"])}
    before, after = objective(*given(images)), objective(*given(moved))
    assert before.terms["places/optical"][0] != after.terms["places/optical"][0]


@pytest.mark.parametrize("bands", [PAIR, CUBE])
def test_what_is_dropped_is_never_read(bands: dict[str, int]) -> None:
    """NaN in each dropped band and place: the encoder's and decoder's numbers stay the same, bit for bit."""
    objective, images = model(bands), images_of(bands, 3, (12, 16))
    for name in objective.passes:
        batch, draw = given(images)
        view = objective.view(batch, draw)
        dropped = objective.drop(name, view, draw)
        unseen = (dropped.groups_bg[:, :, None] | dropped.places_bn[:, None]).unflatten(2, (3, 4))
        pixels = unseen.repeat_interleave(4, 2).repeat_interleave(4, 3)
        holes = torch.where(pixels, torch.nan, view.images_bchw)
        expected = objective.predict(view, dropped)
        view.images_bchw = holes
        got = objective.predict(view, dropped)
        assert all(torch.equal(got[kind][0], expected[kind][0]) for kind in expected)


@pytest.mark.parametrize(("ratio", "bands", "kept"), [(0.5, 12, 6), (0.75, 12, 3), (0.95, 12, 2), (0.0, 12, 12), (0.9, 1, 1)])
def test_at_least_two_bands_are_kept_of_each_sample(ratio: float, bands: int, kept: int) -> None:
    objective, images = model({"cube": bands}, channel_mask_ratio=ratio), images_of({"cube": bands}, 8)
    batch, draw = given(images)
    dropped = objective.drop("optical", objective.view(batch, draw), draw)
    assert dropped.keep.groups.shape == (8, kept) and (dropped.keep.groups.diff(dim=1) > 0).all()
    assert dropped.keep.positions.shape == (8, 4) and (dropped.groups_bg.sum(dim=1) == bands - kept).all()
    if 1 < kept < bands:
        assert len(dropped.keep.groups.unique(dim=0)) > 1
    assert len(dropped.keep.positions.unique(dim=0)) > 1
    loss_and_gradients(objective, images)


@pytest.mark.parametrize("filler", [1e6, float("nan"), float("inf")])
def test_invalid_pixels_change_nothing(filler: float) -> None:
    objective, images = model(), images_of(PAIR)
    valid = {name: torch.ones(3, 1, 16, 16, dtype=torch.bool) for name in PAIR}
    valid["s2"][0, :, :7, :9] = False
    valid["s1"][1, :, 5:] = False
    expected = loss_and_gradients(objective, {n: torch.where(valid[n], x, 0.0) for n, x in images.items()}, valid)
    got = loss_and_gradients(objective, {n: torch.where(valid[n], x, filler) for n, x in images.items()}, valid)
    assert torch.equal(got[0].numerator, expected[0].numerator) and torch.equal(got[0].weight, expected[0].weight)
    assert got[1].keys() == expected[1].keys()
    assert all(torch.equal(got[1][name], gradient) for name, gradient in expected[1].items())


def test_all_valid_equals_no_mask() -> None:
    objective, images = model(), images_of(PAIR)
    plain, masked = objective(*given(images)), objective(*given(images, {n: torch.ones(3, 1, 16, 16) > 0 for n in PAIR}))
    assert torch.allclose(plain.numerator, masked.numerator, rtol=1e-6) and plain.weight == masked.weight


def test_places_invalid_in_a_kept_band_are_not_kept() -> None:
    """Eight places of the radar are invalid: radar and multi passes keep others, the optical one does not mind."""
    objective, images = model(channel_mask_ratio=0.0), images_of(PAIR, 4)
    radar = torch.ones(4, 1, 16, 16, dtype=torch.bool)
    radar[:, :, 4:12] = False
    batch, draw = given(images, {"s1": radar})
    view = objective.view(batch, draw)
    assert view.valid_bgn is not None and view.valid_bgn[:, :5].all() and view.valid_bgn[:, 5:].sum() == 4 * 2 * 8
    for name in ("radar", "multi"):
        positions = objective.drop(name, view, draw).keep.positions
        assert ((positions < 4) | (positions >= 12)).all()
    positions = objective.drop("optical", view, draw).keep.positions
    assert ((positions >= 4) & (positions < 12)).any()


def test_sample_without_a_modality_counts_where_it_can() -> None:
    """Radar of sample 1 is missing: it is neither encoded nor a target, and its optical bands are still learned from."""
    objective, images = model(), images_of(PAIR, 2)
    there = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    there[1] = False
    outcome = objective(*given(images, {"s1": there}))
    assert outcome.weight == 2 and outcome.terms["places/optical"][1] == 2 and outcome.terms["places/radar"][1] == 1
    alone = {name: image[1:] for name, image in images.items()}
    ids = torch.tensor([1])
    without = objective(*given({"s2": alone["s2"]}, ids=ids))
    masked = objective(*given(alone, {"s1": there[1:]}, ids=ids))
    assert torch.equal(without.numerator, masked.numerator) and without.weight == 1
    assert without.terms["places/radar"] == (0, 0)
    whole = objective(*given({name: image[:1] for name, image in images.items()}))
    assert torch.allclose(whole.numerator + without.numerator, outcome.numerator, rtol=1e-5)
    only_radar = objective(*given({"s1": alone["s1"]}, ids=ids))
    assert only_radar.weight == 1 and only_radar.terms["places/optical"] == (0, 0) and only_radar.numerator > 0


def test_missing_targets_are_not_predicted() -> None:
    """By hand: the optical pass of a sample without radar is its optical part alone."""
    objective, images = model(passes=("optical",)), images_of(PAIR, 1)
    missing = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    outcome = objective(*given(images, {"s1": missing}))
    errors, dropped = errors_by_hand(objective, images, "optical")
    places = errors[0, :5][:, dropped.places_bn[0]].mean()
    groups = errors[0, :5][dropped.groups_bg[0, :5]].mean()
    assert torch.allclose(outcome.numerator, places + groups, rtol=1e-5)


@pytest.mark.parametrize("bands", [PAIR, CUBE])
def test_loss_does_not_depend_on_how_the_batch_is_cut(bands: dict[str, int]) -> None:
    objective, images = model(bands, channel_dropout=0.5 if bands is CUBE else 0.0), images_of(bands, 5)
    valid = {name: torch.rand(5, 1, 16, 16) > 0.3 for name in bands}
    whole = objective(*given(images, valid))
    parts = []
    for chosen in ([4, 1], [0], [3, 2]):
        index = torch.tensor(chosen)
        parts.append(objective(*given({n: x[index] for n, x in images.items()}, {n: x[index] for n, x in valid.items()}, index)))
    assert sum(part.weight for part in parts) == whole.weight
    assert torch.allclose(torch.stack([part.numerator for part in parts]).sum(), whole.numerator, rtol=1e-5)
    for term, (amount, weight) in whole.terms.items():
        assert sum(part.terms[term][1] for part in parts) == weight
        assert torch.allclose(torch.stack([part.terms[term][0] for part in parts]).sum(), amount, rtol=1e-5)


@pytest.mark.parametrize("bands", [PAIR, CUBE, {"cube": 2}, {"cube": 1}])
@pytest.mark.parametrize("kind", ["noise", "constant", "nothing valid"])
def test_one_sample_of_any_kind_is_finite(bands: dict[str, int], kind: str) -> None:
    size = (8, 20)
    objective = model(bands, size, normalise_patches=kind != "noise")
    images = images_of(bands, 1, size) if kind == "noise" else {n: torch.full((1, c, *size), 7.0) for n, c in bands.items()}
    valid = {name: torch.zeros(1, 1, *size, dtype=torch.bool) for name in bands} if kind == "nothing valid" else None
    outcome, gradients = loss_and_gradients(objective, images, valid)
    assert torch.isfinite(outcome.numerator) and all(torch.isfinite(g).all() for g in gradients.values())
    assert outcome.weight == (kind != "nothing valid")
    assert kind != "nothing valid" or outcome.numerator == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"mask_ratio": 0.0}, {"mask_ratio": 1.0}, {"mask_ratio": 0.97}, {"channel_mask_ratio": 1.0}, {"channel_mask_ratio": -0.1},
        {"passes": ("multi", "thermal")}, {"channel_dropout": 0.5}, {"decoder_width": 20, "decoder_heads": 3},
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="|".join(("mask_ratio", "thermal", "channel_dropout is", "decoder_width"))):
        model(**wrong)


def test_bands_that_are_not_the_backbones_are_refused() -> None:
    less = create("less_small_patch16", bands=7, radar=2, image_size=16, patch=4, width=24, depth=1, heads=2, channel_width=3)
    for bands, message in (({"s2": 5}, "7 bands"), ({"s1": 2, "s2": 5}, "list those of radar last"), ({"all": 7}, "radar 2")):
        with pytest.raises(ValueError, match=message):
            build("hyper_mae", less, (16, 16), bands)
    assert list(model({"one": 3, "two": 2, "s1": 2}).kinds.values()) == [slice(0, 5), slice(5, 7)]
    with pytest.raises(ValueError, match="passes cannot be radar"):
        model(CUBE, passes=("radar",))


def test_the_image_is_in_the_order_of_the_modalities() -> None:
    """Whatever order a batch has them in; and so are the wavelengths, of which a missing one leaves the backbone's own."""
    objective, images = model(), images_of(PAIR)
    batch, draw = given({name: images[name] for name in ("s1", "s2")})
    batch.wavelength_nm = {"s1": torch.full((2,), torch.nan), "s2": torch.arange(1.0, 6)}
    whole, ctx = objective.look(batch, draw)
    assert torch.equal(whole, torch.cat([images["s2"], images["s1"]], dim=1))
    assert (
        ctx.wavelength_nm is not None
        and ctx.wavelength_nm[:5].tolist() == [1, 2, 3, 4, 5]
        and ctx.wavelength_nm[5:].isnan().all()
    )
    del batch.wavelength_nm["s1"]
    assert objective.told(batch, draw).wavelength_nm is None


def test_compat_shares_places_and_weighs_over_the_batch() -> None:
    """As the released code does where a perception field is on; without one each sample has its own places."""
    images = images_of(PAIR, 4)
    for field, compat, different in ((120.0, True, 1), (0.0, True, 4), (120.0, False, 4)):
        objective = model(less={"perception_m": field}, compat=compat)
        batch, draw = given(images)
        dropped = objective.drop("multi", objective.view(batch, draw), draw)
        assert len(dropped.keep.positions.unique(dim=0)) == different
    objective = model(passes=("multi",), compat=True)
    outcome = objective(*given(images))
    errors, dropped = errors_by_hand(objective, images, "multi")
    terms = []
    for kind in (slice(0, 5), slice(5, 7)):
        hidden = dropped.groups_bg[:, kind]
        assert hidden.sum(dim=1).unique().numel() > 1  # else a mean per sample would be the same
        terms.append(errors[:, kind].mean(dim=2)[hidden].mean())
    amount, weight = outcome.terms["groups/multi"]
    assert torch.allclose(amount / weight, torch.stack(terms).mean(), rtol=1e-5)


def test_channel_dropout_leaves_bands_out_of_all() -> None:
    """Of twelve bands three are in a sample's lattice, other ones in each; what the rest holds changes nothing."""
    objective, images = model(CUBE, channel_dropout=0.75, channel_mask_ratio=0.3), images_of(CUBE, 6)
    batch, draw = given(images)
    view = objective.view(batch, draw)
    dropped = objective.drop("optical", view, draw)
    assert view.ids_bg.shape == (6, 3) and dropped.keep.groups.shape == (6, 2) and len(view.ids_bg.unique(dim=0)) > 1
    assert objective.predict(view, dropped)["optical"][0].shape == (6, 3 * 16, 16)
    picked = torch.zeros(6, 12, dtype=torch.bool).scatter(1, view.ids_bg, True)
    holes = torch.where(picked[:, :, None, None], images["cube"], torch.nan)
    outcome, holed = objective(*given(images)), objective(*given({"cube": holes}))
    assert torch.equal(outcome.numerator, holed.numerator)
    picture = outcome.picture()
    assert torch.equal(picture["reconstruction"][~picked], images["cube"][~picked])
    hidden = picture["seen"].isnan().unflatten(2, (4, 4)).unflatten(4, (4, 4))[:, :, :, 0, :, 0].flatten(2)
    assert torch.equal(hidden[picked].view(6, 3, 16), dropped.groups_bg[:, :, None] | dropped.places_bn[:, None])


@pytest.mark.parametrize("first", ["s2", "s1"])
def test_picture_shows_the_first_modality(first: str) -> None:
    objective, images = model(), images_of(PAIR, 2, (12, 16))
    images = {name: images[name] for name in (first, *(set(PAIR) - {first}))}
    batch, draw = given(images)
    picture = objective(batch, draw).picture()
    dropped = objective.drop("multi", objective.view(batch, draw), draw)
    span = slice(0, 5) if first == "s2" else slice(5, 7)
    unseen = (dropped.groups_bg[:, span, None] | dropped.places_bn[:, None]).unflatten(2, (3, 4))
    unseen = unseen.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.equal(picture["input"], images[first])
    assert torch.equal(picture["seen"].isnan(), unseen)
    assert torch.equal(picture["reconstruction"][~unseen], images[first][~unseen])
    assert not torch.isclose(picture["reconstruction"][unseen], images[first][unseen]).all()


def steps(objective: HyperMAE, images: Images, count: int, rate: float = 3e-3) -> list[float]:
    optimizer = torch.optim.AdamW(objective.parameters(), lr=rate)
    losses = []
    for _ in range(count):
        outcome = objective(*given(images))
        optimizer.zero_grad()
        (outcome.numerator / outcome.weight).backward()
        optimizer.step()
        losses.append(float(outcome.numerator.detach() / outcome.weight))
    return losses


@pytest.mark.parametrize("bands", [PAIR, CUBE])
def test_loss_falls_on_a_fixed_batch(bands: dict[str, int]) -> None:
    torch.manual_seed(1)
    wave = torch.linspace(0, 6, 16)
    smooth = (wave[:, None] + wave).sin()[None, None] * torch.rand(3, sum(bands.values()), 1, 1)
    images = dict(zip(bands, smooth.split(list(bands.values()), dim=1), strict=True))
    losses = steps(model(bands), images, 15, 1e-2)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["satmae_vit", "spectral_vit"])
def test_other_backbones_of_products(name: str) -> None:
    """Groups of several bands, with and without a class token; joint attention, which takes scattered tokens, is refused."""
    from swath.backbones.base import registry

    family = next(
        one for one in registry.names() if one.startswith(name) or (name == "satmae_vit" and one.startswith("group_vit"))
    )
    tiny = {**registry.entry(family).build.tiny, "image_size": 32}
    with pytest.raises(ValueError, match=r"product.*attention: kronecker would"):
        build("hyper_mae", create(family, **tiny), (32, 32), {"image": tiny["bands"]})
    backbone = create(family, **tiny, attention="kronecker")
    decoder = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "decoder_channel_width": 2}
    objective = build("hyper_mae", backbone, (32, 32), {"image": tiny["bands"]}, **decoder)
    images = {"image": torch.randn(2, tiny["bands"], 32, 32)}
    assert isinstance(objective, HyperMAE)
    outcome, gradients = loss_and_gradients(objective, images)
    assert torch.isfinite(outcome.numerator) and any(name.startswith("backbone.patch_embed") for name in gradients)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    losses = steps(objective, images, 8, 1e-2)
    assert losses[-1] < 0.97 * losses[0]
    assert outcome.picture is not None and outcome.picture()["reconstruction"].shape == images["image"].shape


def test_twenty_steps_follow_the_reference() -> None:
    images = images_of(PAIR, 2, (8, 12))
    fast, plain = model(passes=("multi",)), model(passes=("multi",))
    quick = steps(fast, images, 20, 1e-3)
    with use(kronecker_attention="reference"):
        slow = steps(plain, images, 20, 1e-3)
    assert max(abs(a - b) / b for a, b in zip(quick, slow, strict=True)) < 1e-5
    for (name, a), b in zip(fast.named_parameters(), plain.parameters(), strict=True):
        if not name.endswith(
            ("qk.bias", "kv.bias")
        ):  # a softmax does not see a key's bias: its gradient is rounding, which AdamW scales up
            assert (a - b).abs().max() < 1e-5, name


@pytest.mark.filterwarnings("error")
def test_a_step_is_made_of_our_operators() -> None:
    objective, images = model(CUBE), images_of(CUBE)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        loss_and_gradients(objective, images)
    names = {event.key for event in trace.key_averages()}
    assert {"swath::kronecker_projection", "swath::kronecker_projection_backward"} <= names


def test_bf16_autocast_is_close() -> None:
    objective, images = model(), images_of(PAIR, 4)
    exact = objective(*given(images)).numerator
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = objective(*given(images)).numerator
    assert rough.dtype == torch.float32
    assert torch.allclose(exact, rough, rtol=0.02)  # bf16 keeps 8 bits; the loss averages many of them
