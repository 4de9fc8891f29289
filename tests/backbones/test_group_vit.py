"""Band-group ViT: published weights reproduce published features, sizes have the published number of parameters."""

from typing import Any

import pytest
import torch
from torch import Tensor

from swath.backbones.base import ProductKeep, create, gather
from swath.backbones.group_vit import GroupViT, GroupViTConfig, from_published
from swath.backbones.vit import Block
from tests.parity.fixtures import Fixture, folders, read

FIXTURES = [folder for folder in folders() if folder.name.startswith(("satmae_groupc", "satmae_pp_groupc"))]


def encoder_state(fixture: Fixture) -> dict[str, Tensor]:
    theirs = ("decoder_", "mask_token", "proj_up_", "up_block")
    return {name: tensor for name, tensor in fixture.part("state").items() if not name.startswith(theirs)}


def published(c: dict[str, Any], **options: Any) -> GroupViTConfig:
    return GroupViTConfig(
        bands=c["in_chans"], image_size=c["img_size"], patch=c["patch_size"], width=c["embed_dim"], depth=c["depth"],
        heads=c["num_heads"], mlp_ratio=c["mlp_ratio"], groups=tuple(tuple(g) for g in c["channel_groups"]),
        group_width=c["channel_embed"], **options,
    )  # fmt: skip


def decoder_parameters(width: int, into: int, depth: int, outputs: int, heads: int = 16) -> int:
    """Of a masked autoencoder's decoder, without position tables."""
    with torch.device("meta"):
        block = sum(p.numel() for p in Block(into, heads).parameters())
    return into * width + into + into + depth * block + 2 * into + into * outputs + outputs


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_published_weights_give_published_features(folder: Any) -> None:
    fixture = read(folder)
    config = published(fixture.config)
    backbone = GroupViT(config).eval()
    backbone.load_state_dict(from_published(encoder_state(fixture), config))
    images, order = fixture.tensors["in.x"], fixture.tensors["draw.noise"].argsort(dim=1)
    shuffled = order[:, : int(order.shape[1] * (1 - fixture.config["mask_ratio"]))]
    ascending = shuffled.sort(dim=1).values
    keep: Any = ascending
    groups = len(config.groups)
    if fixture.config["spatial_mask"]:
        keep = ProductKeep(torch.arange(groups).expand(len(images), -1), ascending)
    with torch.no_grad():
        features = backbone.encode(backbone.tokenize(images, keep=keep))
    rank = shuffled.argsort(dim=1).argsort(dim=1)
    if fixture.config["spatial_mask"]:
        rank = torch.cat([rank + group * rank.shape[1] for group in range(groups)], dim=1)
    latent = torch.cat([features.prefix, gather(features.tokens, rank)], dim=1)
    expected = fixture.tensors["out.latent"]
    assert (latent - expected).abs().max() <= fixture.meta["tensors"]["out.latent"]["atol"]


@pytest.mark.skipif(not FIXTURES, reason="no fixtures here")
def test_other_weights_are_refused() -> None:
    fixture = read(FIXTURES[0])
    config, state = published(fixture.config), encoder_state(fixture)
    with pytest.raises(ValueError, match="no weights of this encoder: head"):
        from_published({**state, "head": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match=r"no norm.bias"):
        from_published({n: t for n, t in state.items() if n != "norm.bias"}, config)
    with pytest.raises(ValueError, match="not the fixed sin-cos table"):
        from_published({**state, "channel_embed": state["channel_embed"].flip(1)}, config)
    with pytest.raises(ValueError, match="would have to be"):
        from_published({**state, "cls_token": torch.zeros(1, 1, 4)}, config)


@pytest.mark.parametrize(("name", "total"), [("base", 111_624_448), ("large", 329_212_928)])
def test_parameters_are_as_many_as_published(name: str, total: int) -> None:
    with torch.device("meta"):
        backbone = create(f"group_vit_{name}_patch8")
    width, tokens = backbone.width, 12 * 12 + 1
    tables = tokens * (width - 256) + 3 * 256 + tokens * 384 + 4 * 128  # fixed, and counted in the published total
    outputs = [len(group) * 64 for group in ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9))]
    # one prediction per group in place of one for all
    decoder = decoder_parameters(width, 512, 8, sum(outputs))
    assert sum(p.numel() for p in backbone.parameters()) + decoder + tables == total


def test_huge_exists() -> None:
    with torch.device("meta"):
        assert create("group_vit_huge_patch8")(torch.zeros(1, 10, 96, 64)).maps[8].shape == (1, 1280, 12, 8)


@pytest.mark.parametrize(("bands", "groups"), [(10, 3), (4, 1), (13, 4)])
def test_default_groups(bands: int, groups: int) -> None:
    with torch.device("meta"):
        backbone = create("group_vit_base_patch8", bands=bands, depth=1)
        assert (
            backbone.grid(16, 16) == (1, groups, 2, 2) and backbone(torch.zeros(1, bands, 16, 16)).tokens.shape[1] == 4 * groups
        )


@pytest.mark.parametrize("groups", [((0, 1), (2,)), ((0, 1), (1, 2, 3)), ((0, 1, 2, 3), ())])
def test_groups_that_do_not_part_the_bands_are_refused(groups: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"each of the bands 0 … 3 once"):
        GroupViT(GroupViTConfig(bands=4, width=32, heads=2, depth=1, group_width=8, groups=groups))


def test_group_width_must_fit() -> None:
    with pytest.raises(ValueError, match="multiple of 4 of width 96"):
        GroupViT(GroupViTConfig(bands=4, width=96, heads=2, depth=1))
