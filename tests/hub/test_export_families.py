"""Every backbone family's code is carried by an export; test_clean.py loads each one."""

import re

import pytest

from swath.backbones.base import registry
from swath.hub.code import exported_code

FAMILIES = {name: build for build, name in registry.families().items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_code_is_carried(name: str) -> None:
    files = exported_code(FAMILIES[name])
    for file, text in files.items():
        compile(text, file, "exec")
        assert not re.search(r"^\s*(from|import) swath\b", text, re.MULTILINE), file
    named = set(re.findall(r"^from \.(\w+) import", files["modeling_swath.py"], re.MULTILINE))
    assert {f"{name}.py" for name in named} >= {file for file in files if file.startswith("swath_")}, "for transformers 4"
