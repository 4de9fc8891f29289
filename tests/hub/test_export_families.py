"""Every backbone family's code is carried by an export; test_clean.py loads each one."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from swath.backbones.base import create, registry
from swath.hub.code import exported_code
from swath.hub.export import _expected, write_export
from tests.hub.made import contract, loaded

FAMILIES = {name: build for build, name in registry.families().items()}
FAMILIES_BY_TRAIT = {trait: name for name, build in FAMILIES.items() for trait in build.traits}


@pytest.mark.parametrize("name", FAMILIES)
def test_code_is_carried(name: str) -> None:
    files = exported_code(FAMILIES[name])
    for file, text in files.items():
        compile(text, file, "exec")
        assert not re.search(r"^\s*(from|import) swath\b", text, re.MULTILINE), file
    named = set(re.findall(r"^from \.(\w+) import", files["modeling_swath.py"], re.MULTILINE))
    assert {f"{name}.py" for name in named} >= {file for file in files if file.startswith("swath_")}, "for transformers 4"


@pytest.mark.slow
def test_bands_are_known_by_their_wavelengths(tmp_path: Path) -> None:
    """As in training: `write_export` ends by comparing what the folder makes of pixels alone with what the source does."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    name = FAMILIES_BY_TRAIT["any_bands"]
    options: dict[str, Any] = FAMILIES[name].tiny | {"bands": 4}
    backbone: Any = create(name, **options).eval()
    side, bands = backbone.config.image_size, contract()
    source = dataclasses.replace(
        loaded(), backbone=backbone, contracts={bands.modality: bands}, size=(side, side), name=name,
        options=dataclasses.asdict(backbone.config),
    )  # fmt: skip
    write_export(source, tmp_path / "to")
    expected = _expected(source)[1]
    with torch.inference_mode():
        assert not torch.equal(backbone(expected["pixel_values"]).pooled, expected["pooler_output"])
