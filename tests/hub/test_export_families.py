"""Every backbone family exports: its code is carried, and the folder gives the source's features in a process without swath."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from swath.backbones.base import create, registry
from swath.hub.code import exported_code
from swath.hub.export import write_export
from tests.hub.made import contract, loaded

FAMILIES = {name: build for build, name in registry.families().items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_code_is_carried(name: str) -> None:
    files = exported_code(FAMILIES[name])
    for file, text in files.items():
        compile(text, file, "exec")
        assert not re.search(r"^\s*(from|import) swath\b", text, re.MULTILINE), file


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_gives_the_features_of_the_source(name: str, tmp_path: Path) -> None:
    tiny = FAMILIES[name].tiny
    side = tiny["image_size"]
    torch.manual_seed(0)
    backbone = create(name, **tiny).eval()
    bands = contract(*(f"B{n:02d}" for n in range(tiny["bands"])), side=side)
    source = dataclasses.replace(
        loaded(),
        backbone=backbone,
        contracts={bands.modality: bands},
        size=(side, side),
        name=name,
        options=dataclasses.asdict(backbone.config),
    )
    write_export(source, tmp_path / "export")  # verifies in a fresh process
    assert (tmp_path / "export" / "model.safetensors").is_file()
