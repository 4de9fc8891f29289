"""docs/export.md does what it says: an export as a vision tower and as what a detector stands on."""

import re
from pathlib import Path

import pytest

import swath
from swath.hub.export import write_export
from tests.hub.elsewhere import run_elsewhere
from tests.hub.made import contract, loaded

pytest.importorskip("transformers")
PAGE = Path(swath.__file__).resolve().parents[1] / "docs" / "export.md"

TOWER = """
for height, width in ((224, 224), (336, 336), (224, 336)):
    tower.zero_grad()
    tokens = tower(torch.randn(1, bands, height, width))
    patch = tower.vision.config.patch_size
    assert tokens.shape == (1, (height // patch) * (width // patch), 256)
    tokens.square().mean().backward()
    reached = tower.vision.backbone
    for part in (reached.patch_embed.proj, reached.cls_token, reached.blocks[0].attn.qkv):
        assert getattr(part, "weight", part).grad.abs().sum() > 0
    assert all(p.grad is None for p in reached.blocks[1].parameters()), "the layer before the last was asked for"
config = model.config
wanted = dict(hidden_size=24, num_hidden_layers=2, image_size=16, patch_size=8, num_channels=3, num_prefix_tokens=1)
assert {name: getattr(config, name) for name in wanted} == wanted
"""
MAPS = """
import sys
from transformers.dynamic_module_utils import get_class_from_dynamic_module
SwathBackbone = get_class_from_dynamic_module("modeling_swath.SwathBackbone", sys.argv[1])
images = torch.randn(2, bands, 64, 96)
backbone = SwathBackbone.from_pretrained(sys.argv[1])
maps = backbone(images).feature_maps
assert [tuple(m.shape) for m in maps] == [(2, 24, 64 // s, 96 // s) for s in (4, 8, 16, 32)]
assert backbone.channels == [24] * 4 and backbone.out_features == ["stage1", "stage2", "stage3", "stage4"]
own = model(images).last_hidden_state[:, 1:].mT.unflatten(2, (8, 12))
assert torch.equal(maps[1], own) and torch.allclose(maps[3].mean((2, 3)), own.mean((2, 3)), atol=1e-5)
maps[0].sum().backward()
assert backbone.backbone.patch_embed.proj.weight.grad.abs().sum() > 0
assert [tuple(m.shape[2:]) for m in backbone(torch.randn(1, bands, 40, 24)).feature_maps] == [(10, 6), (5, 3), (3, 2), (2, 1)]
fewer = SwathBackbone.from_pretrained(sys.argv[1], out_indices=(1, 3))
assert fewer.out_features == ["stage2", "stage4"] and len(fewer(images).feature_maps) == len(fewer.channels) == 2
fewer.save_pretrained("kept")
assert SwathBackbone.from_pretrained("kept").out_indices == [1, 3]
try:
    SwathBackbone.from_pretrained(sys.argv[1], out_features=["stage5"])
except ValueError as error:
    assert "stage5" in str(error) and "stage1" in str(error)
else:
    raise AssertionError
"""
DETECTOR = """
losses = []
optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
before = inside.backbone.patch_embed.proj.weight.detach().clone()
for _ in range(12):
    loss = detector(**inputs, labels=labels).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.9 * losses[0], losses
assert not torch.equal(before, inside.backbone.patch_embed.proj.weight)
"""


def blocks(folder: Path) -> list[str]:
    """The Python of the page, about an export in `folder`."""
    return [code.replace("FOLDER", str(folder)) for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("swath.hub.export._verify", lambda folder, scratch: None)  # which test_export.py does
        return write_export(loaded(contract("B02", "B03", "B04")), tmp_path_factory.mktemp("docs") / "exported")


def test_a_vision_tower_and_maps(folder: Path, tmp_path: Path) -> None:
    load, tower = blocks(folder)[:2]
    run_elsewhere("\n".join([load, tower, TOWER, MAPS]), folder, at=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stages", ['"stage2", "stage3", "stage4"', '"stage1", "stage2", "stage3", "stage4"'])
def test_a_detector_trains(folder: Path, tmp_path: Path, stages: str) -> None:
    pytest.importorskip("scipy")  # of the detector's matching
    load, _, detector = blocks(folder)[:3]
    assert '"stage2", "stage3", "stage4"' in detector
    run_elsewhere("\n".join([load, detector.replace('"stage2", "stage3", "stage4"', stages), DETECTOR]), folder, at=tmp_path)
