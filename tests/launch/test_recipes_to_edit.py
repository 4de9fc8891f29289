"""The recipes for one GPU, one node and sixteen: each is planned at the size that it is for."""

from pathlib import Path

import pytest

from swath.launch.cli import main
from swath.launch.recipes import find
from swath.pretrain.config import read_recipe
from tests.shard_folders import make_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("recipes") / "shards", samples=48)


@pytest.mark.parametrize(
    ("name", "ranks", "each", "weights"),
    [
        ("mae_vit_base_one_gpu", 1, "1, each 256 × 4 samples a step", "111.7 M"),
        ("mae_vit_large_one_node", 8, "8, each 256 × 2 samples a step", "329.2 M"),
        ("mae_vit_huge_16_nodes", 128, "128, each 64 samples a step", "656.6 M"),
    ],
)
def test_each_is_planned(
    name: str,
    ranks: int,
    each: str,
    weights: str,
    shards: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = ["pretrain", name, f"data.train={shards}", "--plan", "--ranks-per-node", str(min(8, ranks))]
    assert main([*given, "--world-size", str(ranks)]) == 0
    said = capsys.readouterr().out
    assert each in said and weights in said
    memory = next(line for line in said.splitlines() if line.startswith("memory"))
    assert float(memory.split()[1]) < 70 and memory.split()[2] == "GiB", "of 80, in fp32; bf16 takes about half"
    assert main([*given, "--world-size", str(3 * ranks)]) == 2
    assert "does not divide" in capsys.readouterr().err


def test_each_node_has_its_lanes_and_a_copy() -> None:
    text, name = find("mae_vit_huge_16_nodes")
    recipe = read_recipe(text, ["data.train=shards"], name=name)
    assert recipe.data.lanes == 16 and recipe.data.stage and recipe.data.cache_dir and recipe.train.strategy == "fsdp"
