"""What a user sees when shards are damaged: one line that names shard, sample and remedy, or a run that goes on."""

from pathlib import Path

import pytest

from swath.launch.cli import main
from swath.pretrain.record import read_lines
from swath.shards.index import SAMPLE
from swath.shards.reader import ShardReader
from tests.shard_folders import make_sensor_shards, sensor

RECIPE = """
run: {{dir: {run}}}
data: {{train: {shards}, workers: {workers}}}
backbone: {{name: vit_tiny_patch8, width: 16, depth: 1, heads: 1}}
objective: {{name: mae, decoder_width: 16, decoder_depth: 1, decoder_heads: 1}}
train: {{global_batch: 8, epochs: 1, precision: fp32, device: cpu, threads: 1}}
health: {{samples: 2, every: 100}}
"""


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def flipped_sample(folder: Path) -> None:
    flip(folder / "shard-000001.tar", int(ShardReader(folder).index.members[13, 0]["offset"]) + 300)


def flipped_index(folder: Path) -> None:
    flip(folder / "index.bin", 64 + 13 * SAMPLE.itemsize)


def truncated(folder: Path) -> None:
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-2048])


def missing(folder: Path) -> None:
    (folder / "shard-000001.tar").unlink()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flipped_sample, ("sample s0013", "shard-000001.tar", "copy the shard again or make it again")),
        (flipped_index, ("sample s0013", "the index row", "swath index")),
        (truncated, ("shard-000001.tar", "bytes instead of", "copy it again")),
        (missing, ("shard-000001.tar", "cannot be opened", "copy it again or make the shards again")),
    ],
)
def test_damage_ends_in_one_line(damage, words: tuple[str, ...], workers: int, tmp_path: Path, capsys):
    folder = make_sensor_shards(tmp_path / "shards", sensor("sentinel2", 4))
    damage(folder)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(run=tmp_path / "run", shards=folder, workers=workers))
    assert main(["pretrain", str(recipe)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("swath pretrain: ")]
    assert len(lines) == 1
    assert all(word in lines[0] for word in words)


def test_a_damaged_sample_can_be_gone_past(tmp_path: Path):
    folder = make_sensor_shards(tmp_path / "shards", sensor("sentinel2", 4))
    flipped_sample(folder)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(run=tmp_path / "run", shards=folder, workers=1))
    assert main(["pretrain", str(recipe), "data.skip_damaged=1"]) == 0
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["damaged_samples"] == 1
    assert "damaged samples gone past" in (tmp_path / "run" / "report.html").read_text()
