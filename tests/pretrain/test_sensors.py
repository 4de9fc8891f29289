"""One run on several sensors: each keeps its own contract, and the mixture is exact."""

from collections import Counter
from pathlib import Path

import pytest
import yaml

from swath.hub.export import export
from swath.hub.load import load_backbone
from swath.pretrain.config import read_recipe
from swath.pretrain.record import read_lines
from swath.pretrain.trainer import pretrain
from swath.probes.features import extract
from swath.shards.errors import InputError
from swath.shards.reader import ShardReader
from tests.shard_folders import make_sensor_shards, sensor
from tests.shards.test_modalities import damage

RECIPE = """
backbone: {name: wave_vit_small_patch16, width: 32, depth: 1, heads: 2, patch: 8, hidden: 16, mixture: 4}
objective: {name: mae, decoder_width: 16, decoder_depth: 1, decoder_heads: 2, mask_ratio: 0.5}
train: {global_batch: 4, micro_batch: 2, precision: fp32, device: cpu, threads: 1, lr_per_256: 1e-2, min_lr_per_256: 1e-2}
health: {samples: 4, every: 100}
"""


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sensors")
    return {
        "sentinel2": make_sensor_shards(root / "a", sensor("sentinel2", 13), samples=24),
        "landsat7": make_sensor_shards(root / "b", sensor("landsat7", 7), samples=16),
        "sentinel1": make_sensor_shards(root / "c", sensor("sentinel1", 2, wavelengths=False), samples=8),
    }


def go(run: Path, train: object, *overrides: str) -> list[dict]:
    text = yaml.safe_dump({**yaml.safe_load(RECIPE), "run": {"dir": str(run)}, "data": {"train": train}})
    pretrain(read_recipe(text, list(overrides), name="test"))
    return read_lines(run / "metrics.jsonl")


def test_three_sensors_in_one_run(sets: dict[str, Path], tmp_path: Path):
    """12 batches are an epoch of 48 samples: 6, 4 and 2 of them by the numbers of samples."""
    train = [{"path": str(folder)} for folder in sets.values()]
    lines = go(tmp_path / "run", train, "train.max_steps=12")
    seen = Counter(next(iter(line["terms"])).removeprefix("pixels/") for line in lines)
    assert seen == {"sentinel2": 6, "landsat7": 4, "sentinel1": 2}
    assert all(line["loss"] == pytest.approx(next(iter(line["terms"].values()))) for line in lines)
    look = read_lines(tmp_path / "run" / "health.jsonl")[-1]
    assert set(look["losses"]) == set(sets)
    assert len(list((tmp_path / "run" / "pictures").glob("step-00000012-*.png"))) == 3
    # stopped and continued, the run is the same
    go(tmp_path / "cut", train, "train.max_steps=12", "checkpoint.every=5", "train.epochs=0.5")
    continued = go(tmp_path / "cut", train, "train.max_steps=12", "checkpoint.every=5")
    assert [line["loss"] for line in continued] == [line["loss"] for line in lines]


def test_weights_are_shares_of_the_batches(sets: dict[str, Path], tmp_path: Path):
    train = [{"path": str(sets["sentinel2"]), "weight": 1}, {"path": str(sets["sentinel1"]), "weight": 3}]
    lines = go(tmp_path / "run", train, "train.max_steps=8")
    assert Counter(next(iter(line["terms"])) for line in lines) == {"pixels/sentinel2": 2, "pixels/sentinel1": 6}


def test_what_comes_of_it_is_used_with_the_contract_of_the_data(sets: dict[str, Path], tmp_path: Path):
    go(tmp_path / "run", [{"path": str(folder)} for folder in sets.values()], "train.max_steps=1")
    loaded = load_backbone(tmp_path / "run")
    assert list(loaded.contracts) == list(sets)
    for folder in sets.values():
        assert extract(loaded, ShardReader(folder), progress=False).x.shape[1] == 32
    with pytest.raises(InputError, match="trained on sentinel2, landsat7, sentinel1; name one modality"):
        export(tmp_path / "run", tmp_path / "out")


def test_what_cannot_be_is_refused(sets: dict[str, Path], tmp_path: Path):
    both = [{"path": str(sets["sentinel2"])}, {"path": str(sets["landsat7"])}]
    with pytest.raises(InputError, match="sentinel2, landsat7 need a backbone that takes any bands"):
        go(tmp_path / "a", both, "backbone={name: vit_tiny_patch8, width: 32, depth: 1, heads: 2}", "train.max_steps=1")
    other = make_sensor_shards(tmp_path / "other", sensor("sentinel2", 12))
    with pytest.raises(InputError, match="input contracts differ"):
        go(tmp_path / "b", [{"path": str(sets["sentinel2"])}, {"path": str(other)}], "train.max_steps=1")
    with pytest.raises(InputError, match="either all data sets have a weight, or none"):
        go(tmp_path / "c", [{**both[0], "weight": 2}, both[1]], "train.max_steps=1")
    pairs = make_sensor_shards(tmp_path / "pairs", sensor("sentinel2", 13), sensor("sentinel1", 2))
    with pytest.raises(InputError, match="have sentinel2, sentinel1, and mae takes one of them"):
        go(tmp_path / "d", str(pairs), "train.max_steps=1")
    assert go(tmp_path / "e", str(pairs), "train.max_steps=1", "data.modalities=[sentinel1]")


def test_damaged_samples_are_counted(tmp_path: Path):
    folder = make_sensor_shards(tmp_path / "set", sensor("sentinel2", 13), samples=12)
    damage(folder, 4, 7)
    with pytest.raises(InputError, match=r"sample s000\d in shard .* is damaged"):
        go(tmp_path / "strict", str(folder), "train.max_steps=3")
    lines = go(tmp_path / "lenient", str(folder), "train.max_steps=3", "data.skip_damaged=2")
    assert [line["damaged_samples"] for line in lines][-1] == 2
    assert all(line["loss"] is not None for line in lines)


def test_pairs_are_one_image_where_the_objective_takes_them(tmp_path: Path):
    """Radar comes last whichever modality the shards name first, samples that lack one are trained on, and resuming is exact."""
    radar = sensor("sentinel1", 2, wavelengths=False).model_copy(update={"unit": "dB"})
    missing = {3: "sentinel1", 5: "sentinel2"}
    pairs = make_sensor_shards(tmp_path / "pairs", radar, sensor("sentinel2", 5), missing=missing)
    less = {"name": "less_small_patch16", "width": 24, "depth": 1, "heads": 2, "patch": 4, "channel_width": 3, "rank": 2}
    task = {"name": "hyper_mae", "decoder_width": 12, "decoder_depth": 1, "decoder_heads": 2, "decoder_channel_width": 3}
    given = [f"backbone={less}", f"objective={task}", "health.every=4"]
    lines = go(tmp_path / "run", str(pairs), "train.max_steps=8", *given)
    assert set(lines[0]["terms"]) == {f"{kind}/{one}" for kind in ("places", "groups") for one in ("optical", "radar", "multi")}
    loaded = load_backbone(tmp_path / "run")
    assert loaded.options["bands"] == 7 and loaded.options["radar"] == 2
    assert list(loaded.contracts) == ["sentinel2", "sentinel1"]
    go(tmp_path / "cut", str(pairs), "train.max_steps=4", "checkpoint.every=2", *given)
    again = go(tmp_path / "cut", str(pairs), "train.max_steps=8", "checkpoint.every=2", *given)
    assert [line["terms"] for line in again] == [line["terms"] for line in lines]
