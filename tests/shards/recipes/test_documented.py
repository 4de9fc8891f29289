"""The example in docs/adding-a-dataset.md is run as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest

from swath.shards.recipes import registry

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
PAGE = Path(__file__).resolve().parents[3] / "docs" / "adding-a-dataset.md"


def test_the_page_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe, test = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    monkeypatch.setattr(registry, "_recipes", dict(registry.recipes()))
    names: dict[str, Any] = {}
    try:
        exec(recipe, {})
        registry.recipes.cache_clear()
        exec(test, names)
        names["test_fields"](tmp_path)
    finally:
        registry.recipes.cache_clear()
