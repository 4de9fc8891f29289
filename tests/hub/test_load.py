"""A run folder, a checkpoint in it, and an export of it are the same backbone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from swath.hub.export import export
from swath.hub.load import load_backbone
from swath.shards.errors import InputError
from tests.hub.made import loaded, save_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_run(loaded(), tmp_path / "run")


def test_a_run_its_checkpoint_and_its_export_load_alike(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    images = torch.randn(2, 4, 16, 16)
    with torch.inference_mode():
        expected = loaded().backbone(images).pooled
        for path in (run, run / "checkpoints" / "step-00000007", export(run, tmp_path / "exported")):
            again = load_backbone(path)
            assert torch.equal(again.backbone(images).pooled, expected)
            assert again.origin["step"] == 7 and again.size == (16, 16) and not again.backbone.training


def test_a_damaged_run_is_refused_in_one_line(run: Path) -> None:
    state = run / "checkpoints" / "step-00000007" / "state.json"
    state.write_text(state.read_text().replace("vit_tiny", "vit_tine"))
    for path in (run, state.parent):
        with pytest.raises(InputError) as caught:
            load_backbone(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"backbone_options": {"width": 65_532, "depth": 12}}, "is missing"),  # 600 GB, were it built
        ({"backbone_options": {"width": 1 << 40}}, "no backbone has more than"),
        ({"backbone_options": {"depth": 60_000}}, "more than 20,000 parameters"),
        ({"backbone_options": {"width": "wide"}}, "backbone.width"),
        ({"backbone_name": 3}, "backbone_name"),
        ({"image_size": [16, "16"]}, "image_size"),
        ({"image_size": 10**9}, "image_size"),
        ({"input_contract": None}, "input_contract is missing"),
        ({"input_contract": {"bands": 3}}, "input_contract"),
        ({"model_type": "vit"}, "a vit model"),
    ],
)
def test_what_a_folder_claims_is_refused_before_it_is_built(
    run: Path, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    pytest.importorskip("transformers")
    file = export(run, tmp_path / "exported") / "config.json"
    config = json.loads(file.read_text())
    options = config["backbone_options"] | changed.get("backbone_options", {})
    file.write_text(json.dumps(config | changed | {"backbone_options": options}))
    with pytest.raises(InputError) as caught:
        load_backbone(file.parent)
    assert said in str(caught.value) and "\n" not in str(caught.value)
