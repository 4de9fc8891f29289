"""What a run will be, said before it: held against what it then is."""

from pathlib import Path

import pytest

from swath.launch.cli import main
from swath.pretrain.config import read_recipe
from swath.pretrain.forecast import Forecast, forecast
from swath.pretrain.record import read_lines
from swath.pretrain.trainer import pretrain
from swath.shards.errors import InputError
from tests.shard_folders import make_shards

RECIPE = """
backbone: {name: vit_tiny_patch8, width: 48, depth: 3, heads: 3}
objective: {name: mae, decoder_width: 24, decoder_depth: 1, decoder_heads: 3}
train: {global_batch: 8, epochs: 3, precision: fp32, device: cpu, threads: 1}
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("forecast") / "shards", samples=20)


def given(shards: Path, run: Path, *more: str) -> list[str]:
    return [f"run.dir={run}", f"data.train={shards}", *more]


def test_it_is_what_the_run_is(shards: Path, tmp_path: Path) -> None:
    recipe = read_recipe(RECIPE, given(shards, tmp_path / "run"), name="test")
    said = forecast(recipe, 1)
    assert not (tmp_path / "run").exists()
    result = pretrain(recipe)
    assert said.stages[-1].last == result.total == 7 and said.epochs == pytest.approx(7 * 8 / 20)
    assert (said.micro_batch, said.accumulate) == (8, 1)
    tensors = result.run / "checkpoints" / "step-00000007" / "tensors"
    written = sum(file.stat().st_size for file in tensors.iterdir() if file.suffix == ".distcp")
    assert written == pytest.approx(said.checkpoint, rel=0.3), "headers weigh much in a small one"
    assert read_lines(result.run / "metrics.jsonl")[0]["lr"] <= said.stages[0].schedule.peak


def test_sharding_divides_weights_and_recomputation_saves_activations(shards: Path, tmp_path: Path) -> None:
    def of(ranks: int, *more: str) -> Forecast:
        return forecast(read_recipe(RECIPE, given(shards, tmp_path / "run", *more), name="test"), ranks)

    plain, copies = of(1), of(8)
    assert copies.weights == plain.weights == plain.parameters * 16 and copies.gathered == 0
    sharded = of(8, "train.strategy=fsdp")
    assert plain.weights / 8 <= sharded.weights < plain.weights / 6 and 0 < sharded.gathered < plain.weights
    assert copies.activations == pytest.approx(plain.activations / 8, rel=0.2), "an eighth of the samples, positions aside"
    parts = [of(8, "train.strategy=deepspeed", f"train.zero={stage}") for stage in (1, 2, 3)]
    held = [said.weights / said.parameters for said in parts]
    assert held == pytest.approx([8 + 12 / 8, 4 + 16 / 8, 20 / 8], rel=1e-3)
    assert parts[2].gathered < parts[0].gathered == 4 * plain.parameters, "blocks and what is in none; all of a small model"
    assert of(1, "train.activation_checkpointing=true").activations < 0.6 * plain.activations
    assert sharded.checkpoint == plain.checkpoint and sharded.gflop_per_sample == pytest.approx(plain.gflop_per_sample)


def test_frozen_weights_are_told_apart(shards: Path, tmp_path: Path) -> None:
    task = "objective={name: latent, predictor_width: 24, predictor_depth: 1, predictor_heads: 3}"
    said = forecast(read_recipe(RECIPE, given(shards, tmp_path / "run", task), name="test"), 1)
    assert said.frozen and said.weights == 16 * said.parameters + 4 * said.frozen


def test_what_does_not_divide_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not divide by world size 3; 6 or 9 would"):
        forecast(read_recipe(RECIPE, given(shards, tmp_path / "run"), name="test"), 3)
    lanes = given(shards, tmp_path / "run", "data.lanes=3")
    with pytest.raises(InputError, match=r"data.lanes 3 does not divide by 2 nodes"):
        forecast(read_recipe(RECIPE, lanes, name="test"), 8, 4)


def test_the_command(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "recipe.yaml"
    place.write_text(RECIPE)
    words = [
        "pretrain",
        str(place),
        *given(shards, tmp_path / "run"),
        "--plan",
        "--world-size",
        "4",
        "--samples-per-second",
        "10",
    ]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "4, each 2 samples a step" in said and "7 steps, 2.80 epochs" in said and "at 10 samples/s" in said
    assert not (tmp_path / "run").exists()
