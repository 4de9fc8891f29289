"""Published checkpoints: weights only, every key accounted for, one line for what does not fit."""

import argparse
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from swath.backbones.base import create
from swath.hub.published import load_published
from swath.shards.errors import InputError

TINY: dict[str, Any] = {"bands": 3, "image_size": 32, "width": 48, "depth": 1, "heads": 3}


def published(**options: Any) -> dict[str, Tensor]:
    """A small ViT's weights as the published code stores them: with its fixed position table."""
    torch.manual_seed(0)
    backbone: Any = create("vit_tiny_patch8", **TINY | options)
    table = torch.cat([torch.zeros(1, 48), backbone.positions(4, 4, torch.device("cpu"))])[None]
    return {name: tensor.clone() for name, tensor in backbone.state_dict().items()} | {"pos_embed": table}


@pytest.mark.parametrize("wrap", ["bare", "model", "module", "safetensors"])
def test_weights_as_scripts_store_them(wrap: str, tmp_path: Path) -> None:
    state = published()
    path = tmp_path / "weights.pth"
    if wrap == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    else:
        held = {f"module.{k}": v for k, v in state.items()} if wrap == "module" else state
        args = argparse.Namespace(lr=1e-3)
        torch.save({"model": held, "args": args, "epoch": 3} if wrap == "model" else held, path)
    backbone = load_published("vit_tiny_patch8", path, **TINY)
    assert not backbone.training
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_a_prefix_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({f"student.{k}": v for k, v in published().items()} | {"head.weight": torch.zeros(1)}, path)
    assert load_published("vit_tiny_patch8", path, prefix="student.", **TINY)
    with pytest.raises(InputError, match="no key begins with 'teacher"):
        load_published("vit_tiny_patch8", path, prefix="teacher.", **TINY)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_code_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"model": published(), "args": Evil()}, path)
    with pytest.raises(InputError, match="cannot be read as weights only"):
        load_published("vit_tiny_patch8", path, **TINY)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match="cannot be read as weights only"):
        load_published("vit_tiny_patch8", path, **TINY)
    assert "executed" not in capsys.readouterr().out


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(published() | {"head.weight": torch.zeros(2)}, path)
    with pytest.raises(InputError, match=r"does not fit vit_tiny_patch8.*head.weight"):
        load_published("vit_tiny_patch8", path, **TINY)
    torch.save({"epoch": 3}, path)
    with pytest.raises(InputError, match="holds no dictionary of tensors"):
        load_published("vit_tiny_patch8", path, **TINY)
    with pytest.raises(InputError, match="is not a file"):
        load_published("vit_tiny_patch8", tmp_path / "none.pth", **TINY)
    with pytest.raises(InputError, match="did you mean vit_tiny_patch8"):
        load_published("vit_tiny_patch_8", path, **TINY)
    (tmp_path / "cut.safetensors").write_bytes(b"1234")
    with pytest.raises(InputError, match="cannot be read"):
        load_published("vit_tiny_patch8", tmp_path / "cut.safetensors", **TINY)
