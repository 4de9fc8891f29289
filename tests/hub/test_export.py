"""An export loads anywhere and gives the source's features; what cannot be exported or loaded says so in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from swath.backbones.base import Backbone
from swath.hub.card import without_paths
from swath.hub.code import exported_code
from swath.hub.export import export, write_export
from swath.hub.load import load_backbone
from swath.shards.errors import InputError
from tests.hub.elsewhere import run_elsewhere
from tests.hub.made import contract, loaded

pytest.importorskip("transformers")

# What a colleague without swath runs; the folder is its argument.
ELSEWHERE = """
import sys, numpy as np, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
model, report = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"]
processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
image = np.arange(4 * 24 * 40, dtype=np.uint16).reshape(4, 24, 40)
first = processor(image, scale=1e-4, do_resize=False)["pixel_values"]
assert torch.equal(first, processor([np.moveaxis(image, 0, 2)], scale=1e-4, do_resize=False)["pixel_values"])
assert processor(image, scale=1e-4)["pixel_values"].shape == (1, 4, 16, 16)
output = model(first, output_hidden_states=True)
assert output.last_hidden_state.shape == (1, 1 + 15, 24) and output.pooler_output.shape == (1, 24)
assert len(output.hidden_states) == 3
assert torch.equal(model.backbone.norm(output.hidden_states[-1]), output.last_hidden_state)
output.hidden_states[-2].sum().backward()
assert model.backbone.patch_embed.proj.weight.grad.abs().sum() > 0
assert model.to(torch.bfloat16)(first).last_hidden_state.dtype == torch.bfloat16
for bad, reason in ((image[:3].astype(np.float32), "B02, B03, B04, B08"), (image, "scale"),
                    (Image.new("RGB", (16, 16)), "B02, B03, B04, B08")):
    try:
        processor(bad)
    except ValueError as error:
        assert reason in str(error), error
    else:
        raise AssertionError(f"accepted {reason}")
assert "swath" not in sys.modules
"""

# Another colleague hands it on, and what a third one then gets.
SAVE = """
import sys, torch
from transformers import AutoImageProcessor, AutoModel
from safetensors.torch import save_file
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    model.backbone.norm.bias.add_(0.5)  # fine-tuned
model.save_pretrained(sys.argv[2])
AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True).save_pretrained(sys.argv[2])
x = torch.randn(2, 4, 24, 32)
save_file({"x": x, "y": model(x).last_hidden_state.detach()}, "features.safetensors")
"""
LOAD_SAVED = """
import sys, torch
from transformers import AutoImageProcessor, AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from safetensors.torch import load_file
kept = load_file(sys.argv[2])
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
assert torch.equal(model(kept["x"]).last_hidden_state, kept["y"])
maps = get_class_from_dynamic_module("modeling_swath.SwathBackbone", sys.argv[1]).from_pretrained(sys.argv[1])
assert len(maps(kept["x"]).feature_maps) == 4
processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert processor(torch.ones(4, 24, 40))["pixel_values"].shape == (1, 4, 16, 16)
assert "swath" not in sys.modules
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(loaded(), tmp_path_factory.mktemp("hub") / "exported")


def test_an_export_loads_back_equal(folder: Path) -> None:
    source, again = loaded(), load_backbone(folder)
    images = torch.randn(2, 4, 16, 16)
    with torch.inference_mode():
        assert torch.equal(source.backbone(images).tokens, again.backbone(images).tokens)
    assert again.contract == source.contract and again.size == source.size and not again.backbone.training
    assert (again.name, again.options, again.origin["step"]) == (source.name, source.options, 1200)


def test_an_export_works_without_swath(folder: Path, tmp_path: Path) -> None:
    run_elsewhere(ELSEWHERE, folder, at=tmp_path)


def test_what_transformers_saves_loads_where_the_export_is_not(folder: Path, tmp_path: Path) -> None:
    saved, mine, theirs = (tmp_path / name for name in ("saved", "mine", "theirs"))
    mine.mkdir()
    theirs.mkdir()
    source = shutil.copytree(folder, tmp_path / "source")
    run_elsewhere(SAVE, source, saved, at=mine)
    shutil.rmtree(source)
    run_elsewhere(LOAD_SAVED, saved, mine / "features.safetensors", at=theirs)
    kept = load_file(mine / "features.safetensors")
    with torch.inference_mode():
        assert torch.equal(load_backbone(saved).backbone(kept["x"]).tokens, kept["y"][:, 1:])


def test_nothing_tells_where_it_was_made(folder: Path) -> None:
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            text = path.read_text()
            assert not any(word in text for word in ("/home", "somebody", "/data", "secret", str(folder.parent))), path
    assert without_paths({"host": "x", "a": ["/b/c/d.txt", "~/e", "C:\\f\\g", "h"]}) == {"a": ["d.txt", "e", "g", "h"]}
    assert yaml.safe_load((folder / "recipe.yaml").read_text()) == {"run": {"seed": 3}, "data": {"train": "train", "size": 16}}


def test_the_card_has_metadata_and_the_contract(folder: Path) -> None:
    _, block, text = (folder / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(block)
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "image-feature-extraction"
    assert "| 4 | B08 | 842 | 0.2 | 0.07 |" in text


def test_a_taken_target_is_refused_and_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty; choose another"):
        export(folder, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(InputError, match="holds an export already; choose another"):
        export(folder, folder)


def test_a_failed_check_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(backbone: type[Backbone]) -> dict[str, str]:
        files = exported_code(backbone)
        return files | {"swath_vit.py": files["swath_vit.py"].replace("F.gelu", "F.relu")}

    monkeypatch.setattr("swath.hub.export.exported_code", broken)
    with pytest.raises(InputError, match="last_hidden_state is not what the source gives"):
        write_export(loaded(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_without_transformers_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'swath\[hub\]'"):
        write_export(loaded(), tmp_path / "out")


def test_code_that_imports_more_of_swath_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from swath.backbones.base import Backbone\nfrom swath.shards.bands import Band\n"
    monkeypatch.setattr("swath.hub.code._source", lambda module: source)
    with pytest.raises(InputError, match=r"cannot be exported: its code imports swath\.shards\.bands"):
        exported_code(type(loaded().backbone))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone_name": "vit_tinny_patch8"}, "did you mean vit_tiny_patch8"),
        ({"model_type": "bert"}, "not one that `swath export` wrote"),
        ({"input_contract": {}}, r"damaged \(input_contract\.\w+: Field required"),
        (
            {"backbone_options": {"bands": 4, "image_size": 16, "width": 24, "depth": 1, "heads": 3}},
            "blocks.1.attn.proj.bias is not known",
        ),
        (
            {"backbone_options": {"bands": 3, "image_size": 16, "width": 24, "depth": 2, "heads": 3}},
            r"is of shape \(24, 4, 8, 8\), and would have to be \(24, 3, 8, 8\)",
        ),
        ({"backbone_options": {"bands": 4, "image_size": 16, "width": 24, "depth": 3, "heads": 3}}, "missing"),
    ],
)
def test_a_changed_export_is_refused(folder: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=message) as caught:
        load_backbone(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_no_backbone_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        load_backbone(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not a run folder"):
        load_backbone(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-50])
    with pytest.raises(InputError, match="damaged"):
        load_backbone(tmp_path)


@pytest.mark.slow
def test_an_export_can_be_exported_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swath.hub.export._verify", lambda folder, scratch: None)  # files are the same, to the byte
    again = export(folder, tmp_path / "again")
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_a_class_pooled_backbone_of_digital_numbers_exports(tmp_path: Path) -> None:
    names = (np.array(["B04", "B03", "B02"])).tolist()
    to = write_export(loaded(contract(*names, unit="digital number", nodata=None), pool="class"), tmp_path / "rgb")
    assert load_backbone(to).contract.names == ("B04", "B03", "B02")
