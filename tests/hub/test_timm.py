"""A plain ViT's weights under timm's names are what timm's model takes, and give the same tokens there."""

import dataclasses
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from swath.backbones.base import create
from swath.hub.export import write_export
from swath.hub.load import Loaded
from swath.hub.timm import FILE, timm_weights
from tests.hub.made import loaded

# timm's VisionTransformer of two blocks without a classifier, as it is published: name → shape for width d, bands c, patch p
# and n patches.
BLOCK = {
    "norm1.weight": "d", "norm1.bias": "d", "attn.qkv.weight": "3d d", "attn.qkv.bias": "3d", "attn.proj.weight": "d d",
    "attn.proj.bias": "d", "norm2.weight": "d", "norm2.bias": "d", "mlp.fc1.weight": "4d d", "mlp.fc1.bias": "4d",
    "mlp.fc2.weight": "d 4d", "mlp.fc2.bias": "d",
}  # fmt: skip
NAMES = {
    "cls_token": "1 1 d", "pos_embed": "1 n+1 d", "patch_embed.proj.weight": "d c p p", "patch_embed.proj.bias": "d",
    "norm.weight": "d", "norm.bias": "d",
    **{f"blocks.{number}.{name}": shape for number in range(2) for name, shape in BLOCK.items()},
}  # fmt: skip


def vit(size: tuple[int, int] = (16, 24), **options: Any) -> Loaded:
    torch.manual_seed(0)
    source = loaded()
    backbone = create(source.name, **source.options | {"image_size": max(size)} | options)
    for parameter in backbone.parameters():  # nothing stays at its initial zero
        torch.nn.init.normal_(parameter, std=0.1)
    options = dataclasses.asdict(backbone.config)
    return dataclasses.replace(source, backbone=backbone.eval(), size=size, options=options)


@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_names_and_shapes(positions: str) -> None:
    made = timm_weights(vit(positions=positions))
    assert made is not None
    lengths = {"1": 1, "d": 24, "3d": 72, "4d": 96, "c": 4, "p": 8, "n+1": 2 * 3 + 1}
    expected = {name: tuple(lengths[word] for word in shape.split()) for name, shape in NAMES.items()}
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == expected


def test_only_of_a_plain_vit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swath.hub.export._verify", lambda folder, scratch: None)
    assert timm_weights(vit(context=True)) is None
    other = create("vim_tiny", bands=4, image_size=32, patch=8, width=24, depth=1)
    source = dataclasses.replace(loaded(), backbone=other, name="vim_tiny", options=dataclasses.asdict(other.config))
    folder = write_export(source, tmp_path / "vim")
    assert not (folder / FILE).exists() and "timm" not in (folder / "README.md").read_text()


# of torchvision, which timm imports: where its own are not for this torch, their names are enough
OPERATORS = (
    "nms", "qnms", "roi_align", "qroi_align", "_roi_align_backward", "roi_pool", "_roi_pool_backward", "ps_roi_align",
    "_ps_roi_align_backward", "ps_roi_pool", "_ps_roi_pool_backward", "deform_conv2d", "_deform_conv2d_backward",
)  # fmt: skip


@pytest.fixture(scope="module")
def timm() -> Iterator[Any]:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in OPERATORS:
            library.define(f"{name}(Tensor x) -> Tensor")
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
    yield importlib.import_module("timm")


@pytest.mark.parametrize("options", [{"pool": "mean"}, {"pool": "class", "positions": "learned"}, {"pool": "texture"}])
def test_timm_gives_the_same_tokens(timm: Any, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the lines that the card prints. To 1e-5: timm scales queries before the product."""
    monkeypatch.setattr("swath.hub.export._verify", lambda folder, scratch: None)
    source = vit((24, 24), **options)
    folder = write_export(source, tmp_path / "exported")
    code = re.findall(r"```python\n(import timm.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]
    space: dict[str, Any] = {"timm": timm}
    monkeypatch.chdir(folder)
    exec(code.replace("import timm\n", ""), space)
    model, images = space["model"].eval(), torch.randn(2, 4, 24, 24)
    with torch.inference_mode():
        features = source.backbone(images)
        tokens = model.forward_features(images)
        assert torch.allclose(tokens, torch.cat([features.prefix, features.tokens], dim=1), atol=1e-5)
        if options["pool"] != "texture":
            assert torch.allclose(model(images), features.pooled, atol=1e-5)
    assert set(model.state_dict()) == set(load_file(folder / FILE))
