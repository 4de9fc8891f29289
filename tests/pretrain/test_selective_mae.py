"""SelectiveMAE as described: what is drawn, added and predicted, at which point of a run; invalid pixels; what it costs."""

from importlib import resources
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from swath.backbones.base import create, registry
from swath.pretrain.config import read_recipe
from swath.pretrain.objective import build
from swath.pretrain.objectives.selective_mae import SelectiveMAE, load_published
from swath.shards.draw import Draw
from swath.shards.prepare import Batch
from tests.parity.fixtures import ROOT, Replay, read


def model(
    size: tuple[int, int] = (64, 64), bands: int = 3, backbone: str = "vit_tiny_patch8", like: dict[str, Any] | None = None,
    **options: Any,
) -> SelectiveMAE:  # fmt: skip
    torch.manual_seed(0)
    small = {"bands": bands, "image_size": 32, "width": 48, "depth": 1, "heads": 3} if like is None else like
    task = {"decoder_width": 32, "decoder_depth": 2, "decoder_heads": 2, **options}
    objective = build("selective_mae", create(backbone, **small), size, {"image": bands}, **task)
    assert isinstance(objective, SelectiveMAE)
    return objective


def batch_of(images: Tensor, valid: Tensor | None = None, first: int = 0) -> tuple[Batch, Draw]:
    ids = torch.arange(first, first + len(images))
    masks = {} if valid is None else {"image": valid}
    return Batch({"image": images}, masks, ids, torch.zeros_like(ids), torch.ones(len(images))), Draw(
        3, ids, torch.zeros_like(ids)
    )


def some_valid(count: int) -> Tensor:
    valid = torch.ones(count, 1, 64, 64, dtype=torch.bool)
    valid[0, :, :11, :19] = False
    valid[-1, :, 40:] = False
    return valid


def picked(objective: SelectiveMAE, images: Tensor, valid: Tensor | None = None) -> Any:
    """What is selected of a batch."""
    _, draw = batch_of(images)
    tokens = objective.backbone.tokenize(images if valid is None else torch.where(valid, images, 0.0))
    groups = tuple(range(images.shape[1]))
    return objective.select(tokens.x, objective.odds(images, valid, (groups,)), valid, tokens.grid, draw)


@pytest.mark.parametrize(("compat", "textured"), [(None, 1.0), ("uniform", 0.5)])
def test_textured_patches_are_drawn_and_the_released_score_cannot_tell(compat: str | None, textured: float) -> None:
    """The left half is flat. By energy all first tokens are right of it; by the released score they are anywhere."""
    objective = model(compat=compat, first_ratio=1.0)
    images = torch.zeros(64, 3, 64, 64)
    images[..., 32:] = torch.randn(64, 3, 64, 32)
    chosen = picked(objective, images)
    assert chosen.encoded.shape == (64, 9) and chosen.predicted.shape == (64, 16)
    for places in (chosen.encoded, chosen.predicted):
        right = (places % 8 >= 4).float().mean().item()
        # 1024 and 576 draws: three standard deviations of a fair coin are below 0.07
        assert abs(right - textured) < 0.07, right


def test_odds_follow_contrast_and_are_even_on_a_flat_image() -> None:
    objective = model()
    images = torch.zeros(2, 3, 64, 64)
    images[0, :, :32] = noise = torch.randn(3, 32, 64)
    images[0, :, 32:] = 4 * noise
    odds = objective.odds(images, None, ((0, 1, 2),))
    ratio = odds[0, 40:64].mean() / odds[0, :24].mean()  # not where one half meets the other
    assert 3.5 < ratio < 4.5
    assert torch.equal(odds[1], odds[1, :1].expand(64)) and odds[1, 0] > 0
    released = model(compat="uniform").odds(images, None, ((0, 1, 2),))
    assert (64 * released - 1).abs().max() < 1e-5


def test_the_edge_of_what_is_valid_is_no_texture() -> None:
    """At the date at which it is, the last of three."""
    name = "temporal_vit_large_patch16"
    objective = model((32, 32), 6, name, registry.entry(name).build.tiny)
    images, valid = torch.full((1, 6, 32, 32), 7.0), torch.ones(1, 3, 32, 32, dtype=torch.bool)
    images[:, 4:, :, 12:], valid[:, 2, :, 12:] = 0.0, False
    odds = objective.odds(images, valid, objective.backbone.channels)
    assert odds.shape == (1, 48) and torch.equal(odds, odds[:, :1].expand_as(odds))
    assert not torch.equal(objective.odds(images, valid.flip(1), objective.backbone.channels), odds)


def cosines(x_nd: Tensor, chosen: list[int]) -> dict[int, float]:
    """Of every other token, the largest cosine with any chosen one, one pair after the other."""
    left = [n for n in range(len(x_nd)) if n not in chosen]
    return {n: max(F.cosine_similarity(x_nd[n], x_nd[c], dim=0).item() for c in chosen) for n in left}


@pytest.mark.parametrize("stage", ["near", "far"])
def test_the_most_and_the_least_similar_are_added(stage: str) -> None:
    """In two rounds, the second one as the first has changed who is similar."""
    objective = model(mask_ratio=0.6)
    objective.progress = {"near": 0.1, "far": 0.5}[stage]
    x_bnd = torch.randn(3, 40, 6)
    first_bk = torch.stack([torch.randperm(40)[:4] for _ in range(3)])
    got_bk = objective.expand(x_bnd, first_bk, torch.ones(3, 40, dtype=torch.bool), 11, Replay())
    for x_nd, first, got in zip(x_bnd, first_bk.tolist(), got_bk.tolist(), strict=True):
        assert got[:4] == first and len(set(got)) == 11
        for begin, end in ((4, 7), (7, 11)):
            by_cosine = cosines(x_nd, got[:begin])
            ranked = sorted(by_cosine, key=lambda n: by_cosine[n], reverse=stage == "near")
            assert set(got[begin:end]) == set(ranked[: end - begin])


def test_stages_switch_at_shares_of_the_run() -> None:
    objective = model()
    boundaries = {
        0.0: (8, 0, 0), 280 / 800: (8, 0, 0), 300 / 800: (0, 8, 0), 0.6: (0, 8, 0), 580 / 800: (0, 8, 0), 600 / 800: (0, 0, 8),
        1.0: (0, 0, 8),
    }  # fmt: skip
    for progress, counts in boundaries.items():
        objective.progress = progress
        assert objective.mixture(8) == counts, progress
    mixing = model(stages=(0.25, 0.5, 0.625, 0.875))
    for progress, counts in {0.3125: (5, 2, 0), 0.375: (3, 4, 0), 0.75: (0, 3, 4)}.items():
        mixing.progress = progress
        assert mixing.mixture(7) == counts, progress
    at_once = model(stages=(0.5, 0.5, 0.5, 0.5))
    for progress, counts in {0.49: (3, 0, 0), 0.5: (0, 0, 3)}.items():
        at_once.progress = progress
        assert at_once.mixture(3) == counts


@pytest.mark.parametrize("progress", [0.1, 0.36, 0.5, 0.74, 0.9])
def test_every_stage_picks_tokens_once(progress: float) -> None:
    objective = model()
    objective.progress = progress
    valid = some_valid(3)
    chosen = picked(objective, torch.randn(3, 3, 64, 64), valid)
    both = torch.cat([chosen.encoded, chosen.predicted], dim=1)
    assert all(len(set(row.tolist())) == 9 + 16 for row in both)
    assert chosen.enough.all() and chosen.counted.all()
    of_token = F.avg_pool2d(valid.float(), 8).flatten(1) >= 0.5
    assert of_token.gather(1, both).all(), "no invalid token is encoded or predicted"


def test_random_tokens_follow_the_draw_alone() -> None:
    """Not the other samples, and not the embedding."""
    objective = model()
    objective.progress = 0.9
    _, draw = batch_of(torch.zeros(4, 3, 8, 8))
    first_bk = torch.arange(4)[None].expand(4, -1)
    able = torch.ones(4, 64, dtype=torch.bool)
    one, other = (objective.expand(torch.randn(4, 64, 6), first_bk, able, 9, draw) for _ in range(2))
    assert torch.equal(one, other)
    assert len({tuple(row) for row in one.tolist()}) == 4, "every sample has its own"


def test_the_published_numbers_of_tokens() -> None:
    """14 drawn first, 29 encoded, 49 predicted of 196, added as 7 and 8."""
    objective = model((224, 224), backbone="vit_tiny_patch16", like={"bands": 3, "width": 48, "depth": 1, "heads": 3})
    assert objective.counts((1, 1, 14, 14)) == (14, 29, 49)
    asked: list[int] = []
    objective.mixture = lambda count: (asked.append(count), (count, 0, 0))[1]  # pyright: ignore[reportAttributeAccessIssue]
    chosen = picked(objective, torch.randn(1, 3, 224, 224))
    assert asked == [7, 8]
    assert chosen.encoded.shape == (1, 29) and chosen.predicted.shape == (1, 49)


def test_how_many_are_drawn_first_is_a_share_of_all_tokens() -> None:
    """As released, 39 of 196 at 0.3 · 2/3; of the 58 that are encoded, already rounded, two thirds would be 38."""
    assert model(mask_ratio=0.7, first_ratio=2 / 3).counts((1, 1, 14, 14)) == (39, 58, 49)


def test_the_decoder_asks_what_was_encoded_and_not_its_neighbours() -> None:
    """What is predicted at a place does not hang on which other places are predicted; it does on what was encoded."""
    objective = model().eval()
    memory = torch.randn(2, 5, 48)
    places = torch.tensor([[1, 5, 9, 60], [2, 3, 4, 63]])
    whole = objective.decode(memory, places, (1, 1, 8, 8))
    alone = objective.decode(memory, places[:, 2:3], (1, 1, 8, 8))
    assert torch.allclose(whole[:, 2:3], alone, atol=1e-6)
    assert not torch.allclose(objective.decode(memory.flip(2), places, (1, 1, 8, 8)), whole, atol=1e-3)


def gradients(objective: SelectiveMAE, images: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    objective.zero_grad()
    outcome = objective(*batch_of(images, valid))
    outcome.numerator.backward()
    return outcome.numerator.detach(), outcome.weight, {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("filler", [0.0, 1e6, float("nan"), float("inf")])
@pytest.mark.parametrize("compat", [None, "uniform"])
def test_invalid_pixels_change_nothing(filler: float, compat: str | None) -> None:
    objective, images, valid = model(compat=compat), torch.randn(4, 3, 64, 64), some_valid(4)
    expected = gradients(objective, torch.where(valid, images, 0.5), valid)
    got = gradients(objective, torch.where(valid, images, filler), valid)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert got[2].keys() == expected[2].keys()
    assert all(torch.equal(got[2][name], expected[2][name]) for name in expected[2])


def test_all_valid_equals_no_mask() -> None:
    objective, images = model(), torch.randn(3, 3, 64, 64)
    plain = gradients(objective, images, None)
    masked = gradients(objective, images, torch.ones(3, 1, 64, 64, dtype=torch.bool))
    assert torch.allclose(plain[0], masked[0], rtol=1e-6) and torch.equal(plain[1], masked[1])
    for name, gradient in plain[2].items():
        assert torch.allclose(masked[2][name], gradient, rtol=1e-4, atol=1e-6), name


def test_few_valid_tokens() -> None:
    """Nine are encoded: with nine valid ones a sample does not count; of eleven, two are predicted."""
    objective, images = model(), torch.randn(2, 3, 64, 64)
    valid = torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    valid[0, :, :8] = valid[1, :, :8] = True
    valid[0, :, 8:16, :8] = True
    nothing = objective(*batch_of(images, valid))
    assert nothing.weight == 0, "nine of the first, eight of the other"
    valid[0, :, 8:16, :24] = True
    chosen = picked(objective, images, valid)
    assert chosen.enough.tolist() == [True, False] and chosen.counted[0].sum() == 2
    outcome = objective(*batch_of(images, valid))
    alone = objective(*batch_of(images[:1], valid[:1]))
    assert outcome.weight == alone.weight == 1
    assert torch.allclose(outcome.numerator, alone.numerator, rtol=1e-6)


def test_loss_is_a_mean_within_each_sample() -> None:
    """A head that makes 0 errs by a standardised patch's mean square, whether 16 tokens are predicted or 2."""
    objective = model()
    for parameter in objective.heads.parameters():
        torch.nn.init.zeros_(parameter)
    valid = torch.ones(2, 1, 64, 64, dtype=torch.bool)
    valid[0, :, 8:] = False
    valid[0, :, 8:16, :24] = True
    outcome = objective(*batch_of(torch.randn(2, 3, 64, 64), valid))
    assert outcome.weight == 2
    assert torch.allclose(outcome.numerator, torch.tensor(2 * 191 / 192), atol=1e-5)  # unbiased variances of 192 values


def test_nothing_valid_constant_and_alone() -> None:
    objective = model()
    for images, valid, weight in (
        (torch.full((1, 3, 64, 64), float("nan")), torch.zeros(1, 1, 64, 64, dtype=torch.bool), 0),
        (torch.full((1, 3, 64, 64), 7.0), None, 1),
        (torch.randn(1, 3, 64, 64), None, 1),
    ):
        numerator, got, grads = gradients(objective, images, valid)
        assert got == weight and torch.isfinite(numerator) and all(torch.isfinite(g).all() for g in grads.values())
        assert weight or (numerator == 0 and not any(g.any() for g in grads.values()))


@pytest.mark.parametrize("progress", [0.0, 0.5, 0.9])
def test_loss_does_not_depend_on_how_the_batch_is_cut_or_ordered(progress: float) -> None:
    objective, images, valid = model(), torch.randn(6, 3, 64, 64), some_valid(6)
    objective.progress = progress
    whole = objective(*batch_of(images, valid))
    parts = [objective(*batch_of(images[i : i + 2], valid[i : i + 2], i)) for i in (0, 2, 4)]
    assert sum(p.weight for p in parts) == whole.weight == 6
    assert torch.allclose(torch.stack([p.numerator for p in parts]).sum(), whole.numerator, rtol=1e-5)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    zero = torch.zeros_like(order)
    turned = objective(Batch({"image": images[order]}, {"image": valid[order]}, order, zero, torch.ones(6)), Draw(3, order, zero))
    assert torch.allclose(turned.numerator, whole.numerator, rtol=1e-5)


def test_a_sample_weighs_as_it_is_told() -> None:
    objective, images = model(), torch.randn(2, 3, 64, 64)
    batch, draw = batch_of(images)
    batch.weight = torch.tensor([0.0, 1.0])
    assert torch.allclose(objective(batch, draw).numerator, objective(*batch_of(images[1:], first=1)).numerator, rtol=1e-5)


@pytest.mark.parametrize(("mask_ratio", "predicted_ratio"), [(0.9999, 0.25), (0.2, 0.9), (0.85, 0.0), (1.0, 0.25)])
def test_ratios_that_leave_nothing_are_refused(mask_ratio: float, predicted_ratio: float) -> None:
    with pytest.raises(ValueError, match=r"mask_ratio .* of 64 tokens"):
        model(mask_ratio=mask_ratio, predicted_ratio=predicted_ratio)


@pytest.mark.parametrize(
    "options",
    [
        {"rounds": 0}, {"first_ratio": 1.5}, {"stages": (0.5, 0.4, 0.6, 0.7)}, {"stages": ()}, {"stages": (0.5,)},
        {"predicted_ratio": float("inf")}, {"predicted_ratio": -0.1}, {"decoder_width": 30, "decoder_heads": 4},
    ],
)  # fmt: skip
def test_options_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be") as refused:
        model(**options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("vit_tiny_patch14", (42, 70), {"patch": 14, "image_size": 56, "bands": 2}),
        ("vit_tiny_patch4", (12, 20), {"patch": 4, "bands": 13}),
        ("mamba_tiny", (24, 40), {"bands": 1}),
        ("vim_tiny", (40, 24), {}),
        ("wave_vit_small_patch16", (24, 40), {}),
        ("group_vit_base_patch8", (24, 16), {}),
        ("temporal_vit_large_patch16", (32, 16), {}),
        ("spectral_vit_base_patch8", (16, 24), {}),
    ],
)
def test_backbones_sizes_and_bands(name: str, size: tuple[int, int], options: dict[str, Any]) -> None:
    """Every patch, odd numbers of tokens, groups of unequal bands, dates of which one is missing in part, other image sizes."""
    small = {**registry.entry(name).build.tiny, **options}
    bands = small["bands"]
    objective = model(size, bands, name, small)
    dates = objective.backbone.grid(*size)[0]
    valid = torch.ones(2, dates, *size, dtype=torch.bool)
    valid[0, 0, : objective.backbone.mask_unit] = False
    for progress in (0.0, 0.74):
        objective.progress = progress
        outcome = objective(*batch_of(torch.randn(2, bands, *size), valid))
        objective.zero_grad()
        outcome.numerator.backward()
        assert torch.isfinite(outcome.numerator) and outcome.weight == 2
        reached = [p.grad for p in objective.parameters() if p.grad is not None]
        assert all(torch.isfinite(g).all() for g in reached) and any(p.grad is not None for p in objective.backbone.parameters())
    larger = (size[0] * 2, size[1])
    assert torch.isfinite(objective(*batch_of(torch.randn(1, bands, *larger))).numerator)


@pytest.mark.parametrize(("name", "why"), [("less_small_patch16", "products"), ("vmamba_tiny", "sparse")])
def test_backbones_that_cannot_pick_tokens_are_refused(name: str, why: str) -> None:
    small = registry.entry(name).build.tiny
    with torch.device("meta"), pytest.raises(ValueError, match=rf"cannot train .*{why}"):
        build("selective_mae", create(name, **small), (64, 64), {"image": small["bands"]})


def test_loss_falls() -> None:
    objective = model()
    images = F.interpolate(torch.randn(4, 3, 8, 8), (64, 64), mode="bilinear")
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for step in range(16):
        objective.progress = step / 16  # through all stages
        outcome = objective(*batch_of(images))
        losses.append((outcome.numerator / outcome.weight).item())
        optimizer.zero_grad()
        outcome.numerator.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0], losses


def test_picture_shows_what_was_encoded_and_made() -> None:
    objective, images = model(), torch.randn(2, 3, 64, 64)
    outcome = objective(*batch_of(images))
    assert outcome.picture is not None and set(outcome.terms) == {"pixels/image"}
    picture = outcome.picture()
    assert {k: v.shape for k, v in picture.items()} == dict.fromkeys(("input", "seen", "reconstruction"), images.shape)
    seen, made = ~picture["seen"].isnan(), ~picture["reconstruction"].isnan()
    assert torch.equal(picture["seen"][seen], images[seen]) and torch.equal(picture["reconstruction"][seen], images[seen])
    assert seen.float().mean() == 9 / 64 and made.float().mean() == 25 / 64 and made[seen].all()


def test_bf16_autocast_is_close() -> None:
    """With the same tokens: random ones, since how similar tokens are is rounded."""
    objective, images = model(), torch.randn(4, 3, 64, 64)
    objective.progress = 0.9
    exact = objective(*batch_of(images)).numerator
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = objective(*batch_of(images)).numerator
    assert rough.dtype == torch.float32
    assert torch.allclose(exact, rough, rtol=0.02)  # bf16 keeps 8 bits; the loss averages many of them


def test_cost_is_the_published_one_and_at_most_half_of_mae() -> None:
    """Base size, forward and backward, one image, in GFLOP. The published 26.8 leave attention out; the ratio does not."""
    total, linear = {}, {}
    for name in ("selective_mae", "mae"):
        with torch.device("meta"):  # counts, and computes nothing
            objective = build(name, create("vit_base_patch16", bands=3), (224, 224), {"image": 3})
            batch, draw = batch_of(torch.randn(1, 3, 224, 224))
        with FlopCounterMode(display=False) as counter:
            objective(batch, draw).numerator.backward()
        kinds = {str(kind): count / 1e9 for kind, count in counter.get_flop_counts()["Global"].items()}
        total[name], linear[name] = sum(kinds.values()), kinds["aten.addmm"] + kinds["aten.mm"]
    assert round(linear["selective_mae"], 1) <= 26.8
    assert linear["selective_mae"] < total["selective_mae"] <= 0.5 * total["mae"]


def test_published_parameter_counts() -> None:
    """All of the published models, less what nothing uses and the fixed tables of positions."""
    for name, (published, dead) in {
        "vit_base_patch16": (134_900_738, 7_631_362 + 197 * (768 + 512)),
        "vit_large_patch16": (361_238_786, 13_320_706 + 197 * (1024 + 512)),
    }.items():
        with torch.device("meta"):
            objective = build("selective_mae", create(name, bands=3), (224, 224), {"image": 3})
        assert sum(p.numel() for p in objective.parameters()) == published - dead


@pytest.mark.skipif(not (ROOT / "selectivemae" / "meta.json").exists(), reason="no golden fixtures here")
def test_published_weights_are_loaded_strictly() -> None:
    from tests.parity.kinds_selective import model_of

    fixture = read(ROOT / "selectivemae")
    state = fixture.part("state")
    objective, backbone = model_of(fixture)
    live = {
        name: t
        for name, t in state.items()
        if not name.startswith(("hog.", "get_token_probs", "pos_embed_probs", "decoder_embed1"))
    }
    load_published(objective, backbone.config, live)
    for wrong in (
        {**state, "decoder_embed.weight": torch.zeros(1)},
        {**state, "pos_embed_probs2": torch.zeros(1)},
        {name: t for name, t in state.items() if name != "mask_token"},
    ):
        with pytest.raises(RuntimeError, match=r"decoder|pos_embed_probs2"):
            load_published(objective, backbone.config, wrong)
    with pytest.raises(ValueError, match="sin-cos"):
        load_published(objective, backbone.config, {**state, "decoder_pos_embed": state["decoder_pos_embed"].flip(2)})


@pytest.mark.parametrize("size", ["base", "large"])
def test_recipes(size: str) -> None:
    text = resources.files("swath.launch.recipes").joinpath(f"selective_mae_vit_{size}.yaml").read_text()
    recipe = read_recipe(text, ["data.train=somewhere"], name=size)
    lr = recipe.train.lr_per_256 * recipe.train.global_batch / 256
    assert abs(lr - 3.53e-4) < 1e-6
