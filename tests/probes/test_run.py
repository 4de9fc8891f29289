"""`swath probe` from shards to JSON: features, contract, classes, and where the result is written."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from swath.probes.features import extract
from swath.probes.run import probe, table
from swath.shards.errors import InputError
from swath.shards.prepare import prepare
from swath.shards.reader import ShardReader
from tests.hub.made import contract, loaded, save_run, write_shards

Make = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_run(loaded(), tmp_path / "run")


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Shards of two classes that differ in their near infrared."""

    def shards(name: str, count: int = 60, **options) -> Path:  # type: ignore[no-untyped-def]
        random = np.random.default_rng(len(name))
        labels = options.pop("labels", random.integers(0, 2, count))
        pixels = random.integers(1000, 3000, (count, 4, 16, 16))
        pixels[:, 3] += 400 * np.maximum(labels, 0)[:, None, None]
        return write_shards(tmp_path / name, pixels.astype(np.uint16), labels, **options)

    return shards


def test_features_are_those_of_a_plain_loop(make: Make) -> None:
    source, reader = loaded(), ShardReader(make("train", labels=np.arange(60) % 3 - 1, blocks=range(60)))
    made = extract(source, reader, batch=16, progress=False)
    assert made.unlabelled == 20 and made.classes == ("field", "water") and made.x.dtype == np.float32
    assert (made.block == np.flatnonzero(reader.labels >= 0)).all()
    for row, number in enumerate(made.block[:5]):
        images = prepare(reader.chips([number]), {"optical": source.contract}, (16, 16)).images["optical"]
        with torch.inference_mode():
            expected = source.backbone(images).pooled[0].numpy()
        assert made.x[row] == pytest.approx(expected, abs=1e-5)
    assert (extract(source, reader, batch=16, progress=False).x == made.x).all()
    assert extract(source, reader, size=(32, 32), progress=False).x.shape == (40, 24)


def test_the_backbone_normalises_not_the_data(make: Make) -> None:
    bands = contract()
    other = bands.model_copy(update={"normalisation": bands.normalisation.model_copy(update={"mean": (0.9,) * 4})})
    one, two = (ShardReader(make(name, bands=b)) for name, b in (("a", bands), ("b", other)))
    assert (extract(loaded(), one, progress=False).x == extract(loaded(), two, progress=False).x).all()


@pytest.mark.parametrize("task", ["knn", "linear"])
def test_a_probe_of_a_run(run: Path, make: Make, tmp_path: Path, task: str) -> None:
    train, test = make("train", 80, blocks=[i // 8 for i in range(80)]), make("test!", 60)
    file = tmp_path / "out" / "result.json"
    result = probe(task, run, train, test, val=make("validation"), json_path=file, from_scratch=0, progress=False)  # type: ignore[arg-type]
    assert json.loads(file.read_text()) == result == json.loads((run / "probes" / f"{task}.json").read_text())
    assert result["accuracy"] > 0.8 and result["interval"][0] <= result["accuracy"] <= result["interval"][1]
    assert (result["n_train"], result["n_test"], result["feature_width"]) == (80, 60, 24)
    assert result["backbone"]["step"] == 7 and list(result["recall"]) == ["field", "water"]
    assert str(tmp_path) not in file.read_text() and "secret" not in file.read_text()
    text = table(result)
    assert text.startswith(task) and f"{result['accuracy']:.3f}" in text and "water" in text
    again = probe(task, run, train, test, val=tmp_path / "validation", from_scratch=0, progress=False)  # type: ignore[arg-type]
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in result.items() if k != "seconds"}


def test_what_cannot_be_probed_is_refused(run: Path, make: Make) -> None:
    train, test = make("train"), make("test!")
    with pytest.raises(InputError, match="no training sample is of class glacier"):
        probe("knn", run, train, make("other", classes=("field", "glacier")), progress=False)
    with pytest.raises(InputError, match="has no labels"):
        probe("knn", run, train, make("bare", labels=np.full(60, -1)), progress=False)
    with pytest.raises(InputError, match="all training samples are of class field"):
        probe("knn", run, make("flat", labels=np.zeros(60, np.int64)), test, progress=False)
    with pytest.raises(InputError, match="is not a folder of shards"):
        probe("knn", run, run, test, progress=False)
    assert not (run / "probes").exists()


def test_other_bands_are_refused_with_both_sides(run: Path, make: Make) -> None:
    swapped = make("swapped", bands=contract("B04", "B03", "B02", "B08"))
    with pytest.raises(InputError) as caught:
        probe("knn", run, make("train"), swapped, progress=False)
    text = str(caught.value)
    assert "backbone vit_tiny_patch8 | data set swapped" in text
    assert f"what would do: swath adapt {run} --bands B04,B03,B02,B08 --to DIR" in text
    assert "!= band 1: B02 490 nm | B04 665 nm" in text and "    band 2: B03 560 nm | B03 560 nm" in text
