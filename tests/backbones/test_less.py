"""LESS: a product of bands and positions encodes as if the rest did not exist; positions are metres; errors say what would do."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from swath.backbones.base import Context, ProductKeep, Recomputed, create
from swath.backbones.less import LESS, LESSConfig, from_published, lattice, perception_field
from tests.parity.fixtures import ROOT


def small(**options: object) -> LESS:
    torch.manual_seed(0)
    sizes = {"bands": 4, "image_size": 32, "patch": 8, "width": 48, "depth": 2, "heads": 3, "rank": 2, "perception_m": 120}
    backbone = create("less_small_patch16", **{**sizes, **options})
    assert isinstance(backbone, LESS)
    for weight in backbone.parameters():
        torch.nn.init.normal_(weight, std=0.1) if weight.ndim == 1 else None
    return backbone.eval()


def product(groups: list[int], positions: list[int], batch: int = 2) -> ProductKeep:
    return ProductKeep(torch.tensor([groups] * batch), torch.tensor([positions] * batch))


@pytest.mark.parametrize("radar", [0, 1, 4])
@pytest.mark.parametrize("gsd_m", [None, torch.tensor([10.0, 4.0])])
def test_embedding_only_what_is_kept_changes_nothing(radar: int, gsd_m: torch.Tensor | None) -> None:
    backbone, images, ctx = small(radar=radar), torch.randn(2, 4, 32, 40), Context(gsd_m=gsd_m)
    keep = ProductKeep(torch.tensor([[0, 2], [1, 3]]), torch.tensor([[0, 3, 19], [7, 8, 11]]))
    late = backbone.encode(backbone.tokenize(images, ctx), keep)
    early = backbone.encode(backbone.tokenize(images, ctx, keep))
    assert torch.allclose(late.tokens, early.tokens, atol=1e-5) and torch.allclose(late.prefix, early.prefix, atol=1e-5)
    assert early.tokens.shape == (2, 6, 48) and early.prefix.shape == (2, 1 + 3 + 2, 48) and not early.maps
    assert lattice(early, 2).shape == (2, 3, 4, 48) and torch.equal(lattice(early, 2)[:, 1:, 1:].flatten(1, 2), early.tokens)


def test_what_is_dropped_is_as_if_it_did_not_exist() -> None:
    """Kept bands alone, and a kept corner of the image, are what a smaller model sees of a smaller image."""
    backbone, images = small(), torch.randn(2, 4, 32, 40)
    wavelengths = torch.tensor([450.0, 560.0, 850.0, 1600.0])
    two = small(bands=2)
    two.load_state_dict(backbone.state_dict())
    keep = product([1, 3], [row * 5 + column for row in range(3) for column in range(2)])
    kept = backbone.encode(backbone.tokenize(images, Context(wavelengths), keep))
    alone = two(images[:, [1, 3], :24, :16], Context(wavelengths[[1, 3]]))
    assert torch.allclose(kept.tokens, alone.tokens, atol=1e-5) and torch.allclose(kept.prefix, alone.prefix, atol=1e-5)


def test_features() -> None:
    backbone, images = small(), torch.randn(2, 4, 32, 48)
    tokens = backbone.tokenize(images)
    features = backbone.encode(tokens, taps=[-1, 1])
    assert tokens.grid == (1, 4, 4, 6) and tokens.box.shape == (96, 4) and tokens.box[24 + 7].tolist() == [8, 8, 8, 8]
    assert features.pooled.shape == (2, 48) and features.tokens.shape == (2, 96, 48) and features.maps[8].shape == (2, 48, 4, 6)
    assert features.taps[1].shape == features.taps[-1].shape == (2, 1 + 24 + 4 + 96, 48)
    assert torch.equal(backbone.norm(features.taps[1])[:, 29:], features.tokens)
    assert torch.allclose(features.maps[8][:, :, 1, 2], features.tokens.unflatten(1, (4, 24))[:, :, 8].mean(1), atol=1e-6)
    assert torch.equal(backbone(images).pooled, features.pooled)
    assert torch.equal(small(pool="class")(images).pooled, features.prefix[:, 0])


@pytest.mark.parametrize("perception_m", [0, 120])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_what_is_absent_is_as_if_it_did_not_exist(perception_m: int, qk_norm: bool) -> None:
    """Bands and positions of each sample's own; whatever stands in the others, and no gradient comes of them."""
    backbone, images = small(perception_m=perception_m, qk_norm=qk_norm), torch.randn(2, 4, 32, 40)
    for name, weight in backbone.named_parameters():
        if "_branch.q" in name or "_branch.k" in name:
            weight.data *= 10  # scores that make a difference
    keeps = [product([1, 3], [0, 1, 7, 19], 1), product([0], list(range(15)), 1)]
    tokens, present = backbone.tokenize(images), torch.zeros(2, 4, 20, dtype=torch.bool)
    for sample, keep in enumerate(keeps):
        present[sample, keep.groups[0, :, None], keep.positions[0]] = True
    tokens.present = present.flatten(1)
    tokens.x = torch.where(tokens.present[..., None], tokens.x, float("nan")).detach().requires_grad_()
    masked = backbone.encode(tokens, taps=[1])
    map_bhw = masked.maps[8].flatten(2)
    for sample, keep in enumerate(keeps):
        groups, positions = keep.groups.shape[1], keep.positions[0]
        kept = backbone.encode(backbone.tokenize(images[[sample]], keep=keep), taps=[1])
        there = torch.cat([torch.tensor([0]), 1 + positions, 21 + keep.groups[0]])
        assert torch.allclose(masked.prefix[sample, there], kept.prefix[0], atol=1e-5)
        assert torch.allclose(masked.tokens[sample, tokens.present[sample]], kept.tokens[0], atol=1e-5)
        assert torch.allclose(masked.pooled[sample], kept.pooled[0], atol=1e-5)
        of_position = kept.tokens[0].unflatten(0, (groups, -1)).mean(dim=0).T
        assert torch.allclose(map_bhw[sample][:, positions], of_position, atol=1e-5)
        assert map_bhw[sample].ne(0).any(dim=0).nonzero()[:, 0].tolist() == positions.tolist()
    (masked.pooled.sum() + masked.prefix.sum()).backward()
    assert tokens.x.grad is not None and torch.equal(tokens.x.grad.ne(0).any(dim=2), tokens.present)
    assert all(p.grad is None or p.grad.isfinite().all() for p in backbone.parameters())


def test_all_present_none_present_and_a_kept_product_of_what_is_present() -> None:
    backbone, images = small(), torch.randn(2, 4, 32, 40)
    tokens, whole = backbone.tokenize(images), backbone(images)
    tokens.present = torch.ones(2, 80, dtype=torch.bool)
    tokens.present[1] = False
    features = backbone.encode(tokens)
    assert torch.allclose(features.tokens[0], whole.tokens[0], atol=1e-5)
    assert torch.allclose(features.maps[8][0], whole.maps[8][0], atol=1e-5)
    assert features.tokens.isfinite().all() and features.pooled[1].eq(0).all() and features.maps[8][1].eq(0).all()
    tokens.present = torch.tensor([True, True, False, True]).repeat_interleave(20).expand(2, -1)
    late = backbone.encode(tokens, product([0, 2, 3], [4, 5]))
    early = backbone.tokenize(images, keep=product([0, 2, 3], [4, 5]))
    early.present = torch.tensor([True, False, True]).repeat_interleave(2).expand(2, -1)
    alone = backbone.encode(backbone.tokenize(images, keep=product([0, 3], [4, 5])))
    assert torch.allclose(late.pooled, alone.pooled, atol=1e-5)
    assert torch.allclose(backbone.encode(early).pooled, alone.pooled, atol=1e-5)


def test_scattered_tokens_cannot_be_the_present_ones() -> None:
    backbone = small()
    tokens = backbone.tokenize(torch.randn(2, 4, 16, 16))
    tokens.present = torch.ones(2, 16, dtype=torch.bool)
    tokens.present[1, 6] = False
    with pytest.raises(ValueError, match="of sample 1 are scattered; LESS takes those of some bands × some positions"):
        backbone.encode(tokens)


def test_presence_under_compile_and_autocast() -> None:
    backbone, images = small(depth=1), torch.randn(2, 4, 16, 24)
    present = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0]]).bool().repeat_interleave(6, dim=1)

    def encode(x: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        tokens = backbone.tokenize(x)
        tokens.present = present
        return backbone.encode(tokens).pooled

    with torch.no_grad():
        plain = encode(images, present)
        assert torch.allclose(torch.compile(encode, fullgraph=True, backend="aot_eager")(images, present), plain, atol=1e-5)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                assert torch.allclose(encode(images, present).float(), plain, atol=0.1)


def test_context_is_added_to_every_token_and_dropped() -> None:
    plain, informed, images = small(), small(context=True), torch.randn(2, 4, 32, 40)
    missing, unexpected = informed.load_state_dict(plain.state_dict(), strict=False)
    assert missing and all(name.startswith("context.") for name in missing) and not unexpected
    here, gsd_m = torch.tensor([46.9, -3.0]), torch.tensor([10.0, 4.0])
    drawn = Context(lat=here, lon=here, time=1e9 + here, gsd_m=gsd_m, drop=torch.tensor([0.2, 0.7]))
    known, nowhere = informed.tokenize(images, drawn).x, informed.tokenize(images, Context(gsd_m=torch.full((2,), torch.nan))).x
    offset = known - plain.tokenize(images, drawn).x
    assert torch.allclose(offset, offset[:, :1].expand_as(offset), atol=1e-5), "one vector per sample"
    assert not torch.allclose(offset[0], offset[1], atol=1e-2), "another place, another vector"
    nothing = informed.tokenize(images).x
    assert torch.equal(nowhere, nothing), "NaN is absent, for the encoding and for the positions"
    trained = informed.train().tokenize(images, drawn).x - plain.tokenize(images, drawn).x
    assert torch.allclose(trained[0], (nothing - plain.tokenize(images).x)[0], atol=1e-5) and torch.equal(trained[1], offset[1])
    keep = ProductKeep(torch.tensor([[0, 2], [1, 3]]), torch.tensor([[0, 3, 19], [7, 8, 11]]))
    late = informed.eval().encode(informed.tokenize(images, drawn), keep)
    assert torch.allclose(late.tokens, informed.encode(informed.tokenize(images, drawn, keep)).tokens, atol=1e-5)
    with pytest.raises(ValueError, match=r"ctx.lat must be \(2,\)"):
        informed(images, Context(lat=torch.zeros(3), lon=torch.zeros(3)))


def test_encodings_of_another_width_are_those_of_a_wider_backbone() -> None:
    """Half of each, so that a token is told the mean; in the weights' dtype."""
    narrow, grid = small(radar=1), (1, 4, 2, 3)
    ctx = Context(gsd_m=torch.tensor([5.0, 10.0]), wavelength_nm=torch.tensor([500.0, 600.0, 700.0, float("nan")]))
    position_bnd, band_1cd = narrow.encodings(grid, ctx, torch.device("cpu"), 96)
    wide = small(radar=1, width=96)
    assert position_bnd.shape == (2, 6, 96) and band_1cd.shape == (1, 4, 96) and band_1cd.dtype == torch.float32
    assert torch.equal(position_bnd, (wide.positions(grid, ctx.gsd_m, torch.device("cpu")) / 2).float())
    assert torch.equal(band_1cd[0], (wide.wavelengths(ctx.wavelength_nm) / 2).float()) and not band_1cd[0, 3].any()


def test_positions_are_metres_and_wavelengths_nanometres() -> None:
    backbone = small()
    cpu = torch.device("cpu")
    fine = backbone.positions((1, 4, 3, 5), torch.tensor([5.0]), cpu)[0].view(3, 5, 48)
    coarse = backbone.positions((1, 4, 2, 3), torch.tensor([10.0]), cpu)[0].view(2, 3, 48)
    assert torch.allclose(fine[::2, ::2], coarse) and not torch.allclose(fine[:2, :3], coarse)
    lowest = fine[1, 2, [11, 35]]  # the slowest sines, of 24 channels for each axis: 10000^(-11/12) a metre
    assert torch.allclose(lowest, (torch.tensor([80.0, 40.0]).double() * 10000 ** (-11 / 12)).sin())
    encoded = backbone.wavelengths(torch.tensor([500.0, 600.0, float("nan"), 0.0]))
    assert encoded[2:].eq(0).all() and torch.allclose(encoded[1, 23], (600 * torch.tensor(1e4).double() ** (-23 / 24)).sin())
    assert small(radar=2).wavelengths()[2:].eq(0).all() and small(radar=2).wavelengths()[:2].ne(0).any(dim=1).all()


def test_perception_field_by_hand() -> None:
    seen = perception_field(torch.tensor([[0, 1, 2, 4]]), 3, torch.tensor([1.0]))  # of a 3-column raster, 4 is below 1
    assert seen.int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [1, 0, 1, 0, 1]]


def test_perception_field_limits_what_is_seen() -> None:
    """The spatial branch of one block; the class column reaches everything, through the pooled vectors."""
    near, far, images = small(depth=1), small(depth=1, perception_m=0), torch.randn(1, 4, 32, 32)
    assert not torch.allclose(near(images).tokens, far(images).tokens, atol=1e-4)
    assert torch.equal(small(perception_m=1e6)(images).tokens, small(perception_m=0)(images).tokens)


def test_recomputation_gives_the_same_finite_gradients() -> None:
    backbone, images = small(radar=1).train(), torch.randn(2, 4, 32, 24)
    weights = list(backbone.parameters())
    keep = product([1, 3], [0, 2, 5])

    def loss() -> torch.Tensor:
        features = backbone.encode(backbone.tokenize(images, keep=keep))
        return features.tokens.square().sum() + features.prefix.sum()

    kept = torch.autograd.grad(loss(), weights)
    for block in backbone.blocks:
        assert isinstance(block, Recomputed)
        block.recompute = True
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(kept, torch.autograd.grad(loss(), weights), strict=True))


def test_compile_export_autocast() -> None:
    backbone, images = small(depth=1), torch.randn(2, 4, 16, 24)
    keep = product([0, 2], [0, 1, 5])
    with torch.no_grad():
        plain, kept = backbone(images).tokens, backbone.encode(backbone.tokenize(images, keep=keep)).tokens
        compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(images).tokens, plain, atol=1e-5)
        encode = torch.compile(
            lambda x, k: backbone.encode(backbone.tokenize(x, keep=k)).tokens, fullgraph=True, backend="aot_eager"
        )
        assert torch.allclose(encode(images, keep), kept, atol=1e-5)

        class Pooled(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.backbone = backbone

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.backbone(x).tokens

        assert torch.allclose(torch.export.export(Pooled(), (images,)).module()(images), plain, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(backbone(images).tokens.float(), plain, atol=0.1)
        whole = small(depth=1).bfloat16()(images.bfloat16())
        assert whole.tokens.dtype == torch.bfloat16 and torch.allclose(whole.tokens.float(), plain, atol=0.2)


@pytest.mark.parametrize(("rank", "count"), [(1, 72_483_840), (4, 75_321_216)])
def test_parameters_of_base(rank: int, count: int) -> None:
    """72.5 M and 75.3 M were counted of the published encoder."""
    with torch.device("meta"):
        assert sum(p.numel() for p in create("less_base_patch16", bands=14, radar=2, rank=rank).parameters()) == count


def test_what_cannot_be_is_refused() -> None:
    backbone, images = small(), torch.zeros(2, 4, 32, 32)
    with pytest.raises(ValueError, match=r"scattered tokens; pass ProductKeep\(groups \(B, g\), positions"):
        backbone.tokenize(images, keep=torch.tensor([[0, 1], [2, 3]]))
    with pytest.raises(ValueError, match="scattered tokens"):
        backbone.encode(backbone.tokenize(images), torch.tensor([[0, 1], [2, 3]]))
    with pytest.raises(ValueError, match=r"\(B, 4, H, W\)"):
        backbone(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="patch 8; 32×40"):
        backbone(torch.zeros(1, 4, 33, 38))
    with pytest.raises(ValueError, match=r"wavelength_nm must be \(4,\)"):
        backbone(images, Context(wavelength_nm=torch.ones(3)))
    for options, message in (
        ({"image_size": 30}, "patch 8; 32"), ({"width": 50}, "divisible by 4 and by heads × channel_width, 12"),
        ({"radar": 5}, "0 … 4"), ({"wavelength_nm": (500.0,)}, "4 numbers"), ({"rank": 0}, "at least 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            small(**options)


@pytest.mark.skipif(not (Path(ROOT) / "less_mae").is_dir(), reason="no golden fixtures; set SWATH_GOLDEN")
def test_published_encoder_gives_the_published_latent() -> None:
    """Of the whole hyperspectral MAE: three passes, each with its kept bands and positions."""
    t = load_file(Path(ROOT) / "less_mae" / "tensors.safetensors")
    config = LESSConfig(
        bands=7, radar=2, image_size=24, patch=8, width=48, depth=2, heads=2, channel_width=2, rank=2, mlp_ratio=2.0,
        perception_m=120, gsd_m=10, compat=True,
    )  # fmt: skip
    backbone = LESS(config)
    encoder = {name[6:]: tensor for name, tensor in t.items() if name.startswith("state.encoder.")}
    backbone.load_state_dict(from_published(encoder, config))
    images = torch.cat([t["in.optical"], t["in.radar"]], 1)
    ctx = Context(wavelength_nm=1000 * torch.cat([t["in.optical_wv"], t["in.radar_wv"]], 1)[0])
    for number, (name, first, kept) in enumerate((("optical", 0, 2), ("radar", 5, 2), ("multi", 0, 3))):
        groups = t[f"draw.{2 * number}.{name}.channel"].argsort(1)[:, :kept] + first
        positions = t[f"draw.{2 * number + 1}.{name}.pos"].argsort(1)[:, :3].expand(2, -1)
        features = backbone.encode(backbone.tokenize(images, ctx, ProductKeep(groups, positions)))
        assert torch.allclose(lattice(features, kept), t[f"out.{name}.latent"], atol=1.5e-5)
    with pytest.raises(ValueError, match="radar bands"):
        from_published(encoder, LESSConfig(bands=5, image_size=24, patch=8))
