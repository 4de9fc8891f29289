"""The licence of the imagery goes from a recipe, or from who shards it, into the manifest."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swath.launch.cli import main
from swath.shards.errors import InputError
from swath.shards.ingest import _licence, shard
from swath.shards.manifest import read_manifest


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for number in range(4):
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)).save(buffer, "PNG")
        path = folder / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    return folder


def test_it_is_in_the_manifest_as_it_was_said(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["shard", str(images), "--out", str(out), "--licence", "CC-BY-NC-4.0", "--workers", "0"]) == 0
    assert read_manifest(out).licence == "CC-BY-NC-4.0"
    shard(images, out, licence="CC-BY-NC-4.0", progress=False)  # the same command again
    with pytest.raises(InputError, match="was not made by this command"):
        shard(images, out, licence="MIT", progress=False)
    assert shard(images, tmp_path / "own", progress=False)[""].licence == "", "nobody has stated one"


def test_a_manifest_from_before_there_were_licences_loads(images: Path, tmp_path: Path) -> None:
    shard(images, tmp_path / "out", progress=False)
    path = tmp_path / "out" / "manifest.json"
    value = json.loads(path.read_text())
    assert value.pop("licence") == ""
    path.write_text(json.dumps(value))
    assert read_manifest(tmp_path / "out").licence == ""


def test_of_published_data_the_recipe_knows_it() -> None:
    def of(recipe: str | None, join: dict[str, object] | None = None) -> str:
        return _licence({"recipe": recipe, "join": join})

    assert of("firerisk") == "CC-BY-NC-4.0" and of(None) == ""
    assert of("aligned_pairs") == "", "it is that of the user's own data"
    assert of("firerisk", {"dates": 3}) == "CC-BY-NC-4.0"
    assert of("firerisk", {"other": "radar"}) == "CC-BY-NC-4.0; of its partner not stated"
