"""A run folder, a checkpoint in it, and an export of it are the same backbone."""

from pathlib import Path

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
