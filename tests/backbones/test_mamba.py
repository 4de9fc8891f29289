"""Mamba mixers, and what scanned columns share, Vim among them: a kept subset is a masked sequence; orders, sizes, spreading."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swath.backbones.base import Features, ProductKeep, Recomputed, Tokens, create
from swath.backbones.column import Column, by_cluster, visits
from swath.backbones.mamba import NOT_OURS, SUFFIXES, Mamba, MambaConfig, Mixer, from_published, mixer_from_published, spread
from tests.parity.fixtures import ROOT, read

COLUMNS = ["mamba_tiny", "mamba_tiny_transfer", "vim_tiny"]
CPU = torch.device("cpu")


def small(name: str, **options: object) -> Column:
    torch.manual_seed(0)
    tiny = {"bands": 3, "image_size": 32, "patch": 8, "width": 24, "depth": 2}
    backbone = create(name, **{**tiny, **({"cluster": 2} if name.startswith("mamba") else {}), **options})
    assert isinstance(backbone, Column)
    with torch.no_grad():  # away from what initialisation makes equal or zero
        for parameter in backbone.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return backbone.eval()


def same(a: Features, b: Features) -> bool:
    return torch.allclose(a.tokens, b.tokens, atol=2e-6) and torch.allclose(a.pooled, b.pooled, atol=2e-6)


def test_mixer_from_its_equations() -> None:
    """Two directions by loops over steps: convolution over what was visited, discretised state, gate, mean."""
    torch.manual_seed(0)
    mixer, order = Mixer(6, 10, 2, states=3, taps=3).double(), torch.tensor([[3, 0, 2, 1], [1, 2, 0, 3]])
    x_ld = torch.randn(4, 6, dtype=torch.float64)
    x_le, z_le = (x_ld @ mixer.in_proj.weight.T).chunk(2, dim=1)
    total_le = torch.zeros(4, 10, dtype=torch.float64)
    each = {name: getattr(mixer, name).view(2, 10, -1) for name in ("conv_bias", "dt_bias", "A_log", "D")}
    for k in range(2):
        state_es = torch.zeros(10, 3, dtype=torch.float64)
        for t, place in enumerate(order[k]):
            window = [x_le[order[k, t - back]] if t >= back else torch.zeros(10).double() for back in (2, 1, 0)]
            u_e = sum((w * mixer.conv_weight[k, :, tap] for tap, w in enumerate(window)), each["conv_bias"][k, :, 0])
            u_e = F.silu(torch.as_tensor(u_e))
            r, b_s, c_s = (mixer.x_weight[k] @ u_e).split([1, 3, 3])
            step_e = F.softplus(mixer.dt_weight[k] @ r + each["dt_bias"][k, :, 0])
            state_es = torch.exp(-step_e[:, None] * each["A_log"][k].exp()) * state_es + (step_e * u_e)[:, None] * b_s
            total_le[place] += state_es @ c_s + each["D"][k, :, 0] * u_e
    expected = (total_le * F.silu(z_le) / 2) @ mixer.out_proj.weight.T
    assert torch.allclose(mixer(x_ld[None], order)[0], expected, atol=1e-9)


def test_steps_equal_the_sequence() -> None:
    torch.manual_seed(0)
    mixer, x_bld = Mixer(8, 16), torch.randn(2, 7, 8)
    cache, rows = mixer.empty_cache(2), []
    for x_bd in x_bld.unbind(1):
        y_bd, cache = mixer.step(x_bd, cache)
        rows.append(y_bd)
    assert torch.allclose(torch.stack(rows, 1), mixer(x_bld), atol=1e-6)
    with pytest.raises(ValueError, match="one direction, not 2"):
        Mixer(8, 16, 2).step(x_bld[:, 0], cache)


def test_steps_start_in_the_published_range() -> None:
    step = F.softplus(Mixer(16, 64, 2).dt_bias)
    assert 9e-4 < step.min() < 5e-3 and 0.03 < step.max() < 0.101


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("keep", [[[5], [19]], [[0, 3, 4, 11], [7, 8, 11, 18]], [list(range(20))] * 2])
def test_a_kept_subset_is_the_sequence_with_the_others_masked(name: str, keep: list[list[int]]) -> None:
    backbone, images, index = small(name), torch.randn(2, 3, 32, 40), torch.tensor(keep)
    with torch.no_grad():
        tokens = backbone.tokenize(images)
        late, early = backbone.encode(tokens, index), backbone.encode(backbone.tokenize(images, keep=index))
        assert same(late, early) and not late.maps and not early.maps
        present = torch.zeros(2, 20, dtype=torch.bool).scatter(1, index, True)
        masked = backbone.encode(Tokens(tokens.x, tokens.grid, tokens.box, present=present))
        kept = Features(masked.pooled, masked.tokens.gather(1, index[..., None].expand(-1, -1, 24)), masked.prefix)
        assert same(late, kept) and torch.allclose(late.prefix, masked.prefix, atol=2e-6)
        if index.shape[1] == 20:
            assert same(late, backbone(images))
        product = ProductKeep(torch.zeros(2, 1, dtype=torch.int64), index)
        assert same(late, backbone.encode(tokens, product))


@pytest.mark.parametrize("name", COLUMNS)
def test_what_is_absent_is_not_seen(name: str) -> None:
    backbone, present = small(name, pool="mean"), torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) > 0.4
    first, second = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    seen = present.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():
        features = []
        for images in (first, torch.where(seen, first, second)):
            tokens = backbone.tokenize(images)
            tokens.present = present
            features.append(backbone.encode(tokens, taps=[-1, 0, 1]))
    assert torch.equal(features[0].tokens, features[1].tokens) and torch.equal(features[0].pooled, features[1].pooled)
    assert all(torch.equal(features[0].taps[n], features[1].taps[n]) for n in (-1, 0, 1))


@pytest.mark.parametrize("name", COLUMNS)
def test_features_and_gradients(name: str) -> None:
    backbone, images = small(name).train(), torch.randn(2, 3, 32, 48)
    prefix = int(name != "mamba_tiny")
    features = backbone.encode(backbone.tokenize(images), taps=[-1, 1])
    assert features.pooled.shape == (2, 24) == (2, backbone.pooled_width) and features.tokens.shape == (2, 24, 24)
    assert features.maps[8].shape == (2, 24, 4, 6) and features.prefix.shape == (2, prefix, 24)
    assert features.taps[1].shape == (2, prefix + 24, 24) == features.taps[-1].shape
    assert torch.equal(features.maps[8].flatten(2).transpose(1, 2), features.tokens)
    (features.pooled.square().sum() + features.tokens.square().sum()).backward()
    for label, parameter in backbone.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, label


@pytest.mark.parametrize("name", COLUMNS)
def test_recomputation_compilation_export_and_autocast(name: str) -> None:
    backbone, images = small(name, depth=1).train(), torch.randn(2, 3, 16, 24)
    plain = backbone(images).pooled
    weights = [p for p in backbone.parameters() if p.requires_grad]
    kept = torch.autograd.grad(plain.square().sum(), weights, allow_unused=True)
    for block in backbone.blocks:
        assert isinstance(block, Recomputed)
        block.recompute = True
    again = torch.autograd.grad(backbone(images).pooled.square().sum(), weights, allow_unused=True)
    assert all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(kept, again, strict=True)
    )
    backbone.eval().requires_grad_(False)
    wrapped = Pooled(backbone)
    compiled = torch.compile(wrapped, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(images), plain, atol=1e-5)
    exported = torch.export.export(wrapped, (images,))
    assert torch.allclose(exported.module()(images), plain, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = wrapped(images)
    assert torch.isfinite(half).all() and F.cosine_similarity(half.float(), plain).min() > 0.99
    in_bf16 = backbone.bfloat16()(images.bfloat16())
    assert in_bf16.pooled.dtype == torch.bfloat16 and torch.isfinite(in_bf16.pooled).all()


class Pooled(nn.Module):
    """Only tensors leave a compiled or exported program."""

    def __init__(self, backbone: Column) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images_bchw: Tensor) -> Tensor:
        return self.backbone(images_bchw).pooled


def test_orders() -> None:
    assert by_cluster(3, 5, 2, CPU).tolist() == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]
    transfer, column = small("mamba_tiny_transfer"), small("mamba_tiny")
    ways = transfer.ways(2, 3, CPU)
    assert ways is not None and [way.tolist() for way in ways] == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5]]
    assert visits(torch.stack(ways), True, True).tolist() == [
        [1, 2, 3, 0, 4, 5, 6], [6, 5, 4, 0, 3, 2, 1], [1, 4, 2, 0, 5, 3, 6], [6, 3, 5, 0, 2, 4, 1],
    ]  # fmt: skip
    assert visits(torch.tensor([[1, 0, 2]]), True, False).tolist() == [[2, 0, 1, 3]]
    assert small("mamba_tiny", cluster=1).ways(2, 3, CPU) is None
    # later clusters do not reach earlier ones: the column is causal in the order of clusters
    assert "causal" in column.traits and "causal" not in transfer.traits | small("vim_tiny").traits
    images = torch.randn(1, 3, 32, 32)
    changed = images.clone()
    changed[:, :, 16:, :16] += 1.0
    before, after = column(images).tokens[0], column(changed).tokens[0]
    moved = (before != after).any(dim=1).view(4, 4)
    assert not moved[:2].any() and moved[2:].all()


@pytest.mark.parametrize("name", COLUMNS)
def test_positions_interpolate(name: str) -> None:
    backbone = small(name)
    own, other = backbone.positions(4, 4, CPU), backbone.positions(8, 6, CPU)
    assert own.shape == (16, 24) and other.shape == (48, 24)
    if backbone.config.positions == "learned":
        assert torch.equal(own, backbone.pos_embed[0, 1:])
    assert torch.isfinite(backbone(torch.randn(1, 3, 64, 48)).pooled).all()


@pytest.mark.parametrize("pool", ["mean", "halves", "class"])
def test_pooling(pool: str) -> None:
    features = small("vim_tiny", pool=pool)(torch.randn(2, 3, 24, 24))  # 9 tokens: halves of 4 and 5
    x = features.tokens
    halves = (x[:, :4].mean(1) + x[:, 4:].mean(1)) / 2
    expected = {"mean": x.mean(1), "halves": halves, "class": features.prefix[:, 0]}[pool]
    assert torch.allclose(features.pooled, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mamba_tiny", 5.2), ("mamba_small", 20.3), ("mamba_base", 79.9), ("mamba_large", 282.3),
        ("mamba_base_transfer", 84.3), ("mamba_large_transfer", 296.0),
    ],
)  # fmt: skip
def test_published_parameter_counts(name: str, count: float) -> None:
    with torch.device("meta"):
        backbone = create(name, bands=3)
    assert round(sum(p.numel() for p in backbone.parameters()) / 1e6, 1) == count


def test_spreading_gives_every_direction_the_pretrained_weights() -> None:
    one = small("mamba_tiny", image_size=48)
    four = small("mamba_tiny_transfer", image_size=64)
    four.load_state_dict(spread(one.state_dict(), four.config, image_size=48))
    mixer, source = four.blocks[1].mixer, one.blocks[1].mixer
    assert isinstance(mixer, Mixer) and isinstance(source, Mixer)
    assert all(torch.equal(mixer.conv_weight[k], source.conv_weight[0]) for k in range(4))
    assert torch.equal(mixer.A_log.view(4, -1)[3], source.A_log)
    # four equal directions over one order are one direction
    x_bld = torch.randn(1, 9, 24)
    assert torch.allclose(mixer(x_bld, torch.arange(9).expand(4, -1)), source(x_bld), atol=1e-6)
    # positions are those of the pretrained grid, stretched
    assert torch.allclose(four.positions(6, 6, CPU).mean(0), one.positions(6, 6, CPU).mean(0), atol=0.05)
    assert torch.equal(four.positions(8, 8, CPU), four.pos_embed[0, 1:]) and not four.cls_token.any()


def published(backbone: Mamba) -> dict[str, Tensor]:
    """Our parameters under the names of the fine-tuning code."""
    forms = {"conv_weight": "conv1d{}.weight", "conv_bias": "conv1d{}.bias", "x_weight": "x_proj{}.weight", "D": "D{}",
             "dt_weight": "dt_proj{}.weight", "dt_bias": "dt_proj{}.bias", "A_log": "A{}_log"}  # fmt: skip
    state: dict[str, Tensor] = {}
    for name, tensor in backbone.state_dict().items():
        head, _, last = name.replace("blocks.", "layers.").replace("norm.weight", "norm_f.weight").rpartition(".")
        if last in forms:
            split = tensor.view(4, -1, 16) if last == "A_log" else tensor.view(4, -1, *tensor.shape[2:])
            split = split[:, :, None] if last == "conv_weight" else split
            state |= {f"{head}.{forms[last].format(s)}": part for s, part in zip(SUFFIXES, split, strict=True)}
        elif name == "pos_embed":
            state[name] = torch.cat([tensor[:, 1:9], tensor[:, :1], tensor[:, 9:]], dim=1)
        else:
            state[
                name.replace("blocks.", "layers.").replace("norm.bias", "norm_f.bias").replace("norm.weight", "norm_f.weight")
            ] = tensor
    return state


def test_published_names_are_read_strictly() -> None:
    backbone = small("mamba_tiny_transfer")
    assert isinstance(backbone, Mamba)
    state = published(backbone)
    again = from_published(state | {"head.weight": torch.zeros(2, 24)}, backbone.config)
    assert all(torch.equal(tensor, again[name]) for name, tensor in backbone.state_dict().items())
    with pytest.raises(ValueError, match=r"no norm\.bias"):
        from_published({name: t for name, t in state.items() if name != "norm_f.bias"}, backbone.config)
    with pytest.raises(ValueError, match="unheard"):
        from_published(state | {"unheard": torch.zeros(1)}, backbone.config)
    with pytest.raises(ValueError, match=r"dt_proj_d\.bias"):
        mixer_from_published({"in_proj.weight": torch.zeros(1), "dt_proj_d.bias": torch.zeros(1)})
    with pytest.raises(ValueError, match="fixed sin-cos table"):
        from_published({"pos_embed": torch.zeros(1, 16, 24)}, MambaConfig(bands=3, image_size=32, patch=8, width=24, depth=0))


@pytest.mark.skipif(not (ROOT / "roma_pretrain").is_dir(), reason="no golden fixtures; set SWATH_GOLDEN")
def test_the_pretraining_encoder_is_the_published_one() -> None:
    """Tokens and tapped layers of ARM's encoder, whose last cluster is dropped and whose tokens come cluster by cluster."""
    fixture = read(ROOT / "roma_pretrain")
    config = MambaConfig(bands=3, width=fixture.config["embed_dim"], depth=fixture.config["depth"])
    state = fixture.part("state")
    assert any(name.startswith(NOT_OURS) for name in state)
    backbone = Mamba(config)
    backbone.load_state_dict(from_published(state, config))
    visited = by_cluster(12, 12, 4, CPU)[:128]
    rank, entering = visited.argsort(), fixture.tensors["out.block1_input"]
    with torch.no_grad():
        tokens = backbone.tokenize(fixture.tensors["in.x_u8"].float() / 64 - 2, keep=visited[rank].expand(2, -1))
        plain = fixture.tensors["out.angle_tokens"][:, rank] == 0
        assert (tokens.x - entering[:, rank])[plain].abs().max() < fixture.meta["tensors"]["out.block1_input"]["atol"]
        tokens.x = entering[:, rank]
        taps = backbone.encode(tokens, taps=[5, 7, 9, 11]).taps
        for number, tap in taps.items():
            name = f"out.enc_layer{number + 1}"
            assert (tap - fixture.tensors[name][:, rank]).abs().max() < fixture.meta["tensors"][name]["atol"]
    transfer = create("mamba_tiny_transfer", bands=3, width=config.width, depth=12)
    assert isinstance(transfer, Mamba)
    transfer.load_state_dict(from_published(state, transfer.config))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not divisible by patch 8; 32×32"):
        small("mamba_tiny")(torch.zeros(1, 3, 33, 32))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        small("vim_tiny")(torch.zeros(1, 4, 32, 32))
    some, backbone = torch.tensor([[1]]), small("mamba_tiny")
    with pytest.raises(ValueError, match="among all tokens"):
        backbone.encode(backbone.tokenize(torch.zeros(1, 3, 32, 32), keep=some), some)
    for options, message in (
        ({"directions": 2}, "1 or 4"), ({"bands": 0}, "at least 1"), ({"pool": "class"}, "needs class_token"),
        ({"width": 26}, "divisible by 4"), ({"image_size": 30}, "not divisible by patch 8; 32"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            small("mamba_tiny", **options)
