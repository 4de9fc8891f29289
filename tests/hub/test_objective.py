"""An export with its decoder is the objective that the run left: the same loss, to the bit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swath.backbones.base import registry as backbones
from swath.hub.export import export
from swath.hub.load import load_backbone, load_objective
from swath.launch.cli import main
from swath.pretrain import checkpoint
from swath.pretrain.objective import Objective, pairs
from swath.shards.errors import InputError
from tests.hub.made import contract
from tests.small_objectives import SMALL, batch_of, side, small, smooth_images

PAIRS = [(objective, next(b for b, why in row.items() if why is None)) for objective, row in pairs().items()]


@pytest.fixture(autouse=True)
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests are about what transformers makes of the folder."""
    monkeypatch.setattr("swath.hub.export._verify", lambda folder, scratch: None)


def train(objective: Objective, steps: int = 2) -> None:
    batch, draw = batch_of(smooth_images(objective, 2))
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        outcome = objective(batch, draw)
        (outcome.numerator / outcome.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(torch.tensor(False))


def options_of(objective: Any) -> dict[str, Any]:
    """As JSON holds them."""
    return json.loads(json.dumps(dataclasses.asdict(objective.config)))


def run_of(objective: Objective, name: str, backbone: str, run: Path) -> Path:
    """A run folder as `swath pretrain` leaves it."""
    made, known = objective.backbone, options_of(objective)
    bands = contract(*(f"B{n:02d}" for n in range(made.config.bands)), side=side(made)).model_copy(update={"modality": "image"})
    state = {
        "step": 2,
        "config": {
            "data": {"size": [side(made), side(made)]},
            "objective": {"name": name, **{key: value for key, value in SMALL.items() if key in known}},
        },
        "backbone": {"name": backbone, "options": dataclasses.asdict(made.config)},
        "contracts": {"image": bands.model_dump(mode="json")},
    }
    tensors = {f"model.{key}": tensor.detach() for key, tensor in objective.state_dict().items()}
    run.mkdir()
    checkpoint.save(run, 2, tensors, state, keep=1, permanent_every=None)
    return run


@pytest.mark.parametrize(("name", "backbone"), PAIRS)
def test_every_objective_has_the_loss_that_it_had(name: str, backbone: str, tmp_path: Path) -> None:
    source = small(name, backbone).train()
    train(source)
    run = run_of(source, name, backbone, tmp_path / "run")
    folder = export(run, tmp_path / "exported", with_decoder=True)
    batch, draw = batch_of(smooth_images(source, 2), seed=5)
    with torch.no_grad():
        expected = source.eval()(batch, draw)
        for path in (run, folder, export(folder, tmp_path / "again", with_decoder=True)):
            again = load_objective(path)
            outcome = again(batch, draw)
            assert torch.equal(outcome.numerator, expected.numerator) and torch.equal(outcome.weight, expected.weight)
            assert type(again) is type(source) and options_of(again) == options_of(source) and not again.training
    own = {key for key in source.state_dict() if not key.startswith("backbone.")}
    assert set(load_file(folder / "objective.safetensors")) == own
    written = json.loads((folder / "config.json").read_text())["objective"]
    assert written["name"] == name and written["options"] == options_of(source)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As the command writes it."""
    name, backbone = "mae", backbones.families()[backbones.entry("vit_tiny_patch8").build]
    run = run_of(small(name, backbone), name, backbone, tmp_path / "run")
    assert main(["export", str(run), "--to", str(tmp_path / "exported"), "--with-decoder"]) == 0
    return tmp_path / "exported"


def test_without_the_decoder_it_is_not_there(folder: Path, tmp_path: Path) -> None:
    bare = export(folder, tmp_path / "bare")
    assert not (bare / "objective.safetensors").exists() and "objective" not in json.loads((bare / "config.json").read_text())
    for attempt in (load_objective, lambda path: export(path, tmp_path / "more", with_decoder=True)):
        with pytest.raises(InputError, match="without its objective; export its run with --with-decoder"):
            attempt(bare)
    assert not (tmp_path / "more").exists()


def test_a_head_of_another_shape_is_refused_in_one_line(folder: Path) -> None:
    tensors = load_file(folder / "objective.safetensors")
    tensors["decoder.mask_token"] = tensors["decoder.mask_token"][..., :-1].contiguous()
    save_file(tensors, folder / "objective.safetensors")
    with pytest.raises(InputError, match=r"not those of its objective: decoder.mask_token is of shape \(1, 1, \d+\)"):
        load_objective(folder)
    (folder / "objective.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="is damaged") as caught:
        load_objective(folder)
    assert "\n" not in str(caught.value)
    assert load_backbone(folder).backbone, "the backbone alone is whole"
