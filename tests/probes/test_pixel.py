"""`swath probe pixel`: scenes put together from chips, splits by blocks with a guard, few labels, abundances."""

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat

from swath.probes.abundances import whole
from swath.probes.scene import BLOCK, patches, read_scene, splits
from swath.probes.task import Bench
from swath.probes.tasks import pixel
from swath.shards.errors import InputError
from swath.shards.ingest import shard
from swath.shards.reader import ShardReader
from swath.shards.sources.source import Options
from tests.probes.dense_shards import backbone, hyperspectral

torch.set_num_threads(1)
SMALL: dict[str, Any] = {"patch": 4, "width": 24, "depth": 1, "heads": 3}
DATA = Path(os.environ.get("SWATH_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data") / "hsi"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pixel")
    return hyperspectral(folder / "given", folder / "shards")


def given(train: Path, test: Path | None = None, size: int = 4) -> Bench:
    readers = {"train": ShardReader(train), "test": ShardReader(test or train)}
    return Bench(backbone(readers["train"], size, **SMALL), readers, progress=False)


def test_a_scene_is_the_same_from_any_chips(scene: Path, tmp_path: Path) -> None:
    small = hyperspectral(scene.with_name("given"), tmp_path / "small", chip=4)
    loaded = given(scene).loaded  # normalised by the backbone, so the same statistics for both
    one, many = (read_scene(loaded, ShardReader(folder)) for folder in (scene, small))
    assert (one.pixels == many.pixels).all() and (one.labels == many.labels).all() and one.labels.shape == (64, 52)
    assert one.labels.min() == -1 and len(one.classes) == 9


def test_patches_have_their_pixel_in_the_middle(scene: Path) -> None:
    made = read_scene(given(scene).loaded, ShardReader(scene))
    rows, columns = np.array([0, 63, 20, 31]), np.array([0, 51, 51, 7])
    for size in ((4, 4), (5, 3), (1, 1)):
        found = patches(made, rows, columns, size)(slice(None))
        assert found.shape == (4, 103, *size)
        assert (found[:, :, size[0] // 2, size[1] // 2] == made.pixels[:, rows, columns].T).all()
    with pytest.raises(InputError, match="too large"):
        patches(made, rows, columns, (128, 128))


@pytest.mark.parametrize("guard", [0, 1, 4])
def test_no_patch_of_test_sees_a_train_pixel(scene: Path, guard: int) -> None:
    labels = read_scene(given(scene).loaded, ShardReader(scene)).labels
    made = splits(labels, guard, 4, 0)
    for split in made:
        rows, columns = np.nonzero(split.test)
        for y, x in zip(rows[::7], columns[::7], strict=True):
            assert not split.train[max(0, y - guard) : y + guard + 1, max(0, x - guard) : x + guard + 1].any()
        blocks = split.train[::BLOCK, ::BLOCK].repeat(BLOCK, 0).repeat(BLOCK, 1)[:64, :52]
        assert (split.train == blocks).all()  # whole blocks
        for k in np.unique(labels[labels >= 0]):
            assert (labels[split.train] == k).sum() >= 50 and (labels[split.test] == k).sum() >= 20
    assert any((a.train != b.train).any() for a, b in pairwise(made))
    later = splits(labels, guard, 2, 0, first=2)
    assert all((a.train == b.train).all() for a, b in zip(made[2:], later, strict=True))
    if guard == 0:
        assert all((split.train ^ split.test).all() for split in made)


def test_a_split_without_enough_pixels_does_not_count(scene: Path) -> None:
    labels = read_scene(given(scene).loaded, ShardReader(scene)).labels.copy()
    labels[labels == 0] = -1
    labels[:4, :15] = 0  # 60 pixels in one block: in train or in test, never in both
    with pytest.raises(InputError, match="leave 50 train and 20 test pixels"):
        splits(labels, 0, 1, 0)


def test_pixel_within_a_scene(scene: Path) -> None:
    options = pixel.Options(per_class=(5, 1), splits=2, draws=2, scratch_steps=2)
    made = pixel.run(given(scene), options)
    rows = {row.name: row for row in made.rows}
    assert next(iter(rows)) == "backbone" and set(rows) >= {
        "random initialisation", "raw spectrum SVM", "raw spectrum 1-NN", "PCA-30 SVM", "from scratch", "statistics",
    }  # fmt: skip
    assert list(rows["backbone"].metrics) == ["oa_5", "aa_5", "kappa_5", "oa_1", "aa_1", "kappa_1"]
    # spectra tell these classes apart, more labels tell more
    assert rows["raw spectrum SVM"].metrics["oa_5"] > max(0.7, rows["raw spectrum SVM"].metrics["oa_1"])  # type: ignore[operator, type-var]
    assert rows["from scratch"].metrics["oa_1"] is None and len(made.details["by_split"]["backbone"]["oa_5"]) == 2
    by_split = made.details["by_split"]
    difference = np.mean(np.subtract(by_split["backbone"]["oa_5"], by_split["raw spectrum SVM"]["oa_5"]))
    assert made.details["paired"]["raw spectrum SVM"]["oa_5"][0] == pytest.approx(difference)
    # a split by itself is what it was among others, bit for bit
    shared = pixel.run(given(scene), pixel.Options(per_class=(5,), splits=1, first=1, draws=2, scratch_steps=2))
    for name, found in shared.details["by_split"].items():
        assert found["oa_5"] == by_split[name]["oa_5"][1:]


def test_labels_are_as_many_as_said_and_from_train() -> None:
    label, among = np.arange(90) % 3, np.arange(0, 60)
    few = pixel.few_of(label, among, 5, 0, "a")
    assert np.bincount(label[few]).tolist() == [5, 5, 5] and set(few) <= set(among)
    assert (few == pixel.few_of(label, among, 5, 0, "a")).all() and (few != pixel.few_of(label, among, 5, 0, "b")).any()


def test_pixel_from_scene_to_scene(scene: Path, tmp_path: Path) -> None:
    other = hyperspectral(tmp_path / "given", tmp_path / "shards", size=(21, 30), seed=3)
    made = pixel.run(given(scene, other), pixel.Options(per_class=(5,), splits=1, draws=1, scratch_steps=0))
    target = read_scene(given(scene).loaded, ShardReader(other))
    assert made.settings["n_test"] == (target.labels >= 0).sum() == np.sum(made.details["confusion"])
    assert made.rows[2].name == "statistics" and made.settings["protocol"].startswith("labels of train")
    assert {row.name: row.metrics["oa_5"] for row in made.rows}["raw spectrum SVM"] > 0.7  # type: ignore[operator]


def test_abundances(tmp_path: Path) -> None:
    random, rows, columns = np.random.default_rng(0), 48, 40
    coarse = random.dirichlet((0.5, 0.5, 0.5), (6, 5)).repeat(8, 0).repeat(8, 1)
    shares = coarse.reshape(rows * columns, 3, order="F").T
    flat = random.uniform(500, 3000, (198, 3)) @ shares + random.normal(0, 40, (198, rows * columns))
    kept = [n for n in range(1, 225) if not (n < 4 or 108 <= n < 113 or 154 <= n < 167 or n >= 220)]
    (tmp_path / "given").mkdir()
    savemat(tmp_path / "given" / "jasperRidge2_R198.mat", {
        "Y": flat.clip(0).astype(np.uint16), "nRow": rows, "nCol": columns, "SlectBands": np.array(kept)[:, None],
    })  # fmt: skip
    names = np.array([["1-tree"], ["2-water"], ["3-dirt"]], dtype=object)
    savemat(tmp_path / "given" / "end4.mat", {"A": shares, "cood": names})
    shard(tmp_path / "given", tmp_path / "shards", recipe="jasper_ridge", options=Options(chip=20), progress=False)
    reader = ShardReader(tmp_path / "shards")
    assert reader.manifest.maps["abundances"].shares == ("tree", "water", "dirt")
    scene = read_scene(given(tmp_path / "shards").loaded, reader)
    assert scene.shares is not None and np.abs(scene.shares[:, 7, 30] - coarse[7, 30]).max() < 1e-6
    made = pixel.run(given(tmp_path / "shards"), pixel.Options(splits=2, scratch_steps=2))
    error = {row.name: row.metrics["rmse"] for row in made.rows}
    assert list(error) == ["backbone", "random initialisation", "statistics", "raw spectrum", "PCA-30", "from scratch"]
    assert error["raw spectrum"] < 0.1 < coarse.std()  # type: ignore[operator]
    assert made.details["materials"] == ["tree", "water", "dirt"] and made.settings["better"] == "less"
    shared = pixel.run(given(tmp_path / "shards"), pixel.Options(splits=1, first=1, scratch_steps=2))
    assert all(found == made.details["by_split"][name][1:] for name, found in shared.details["by_split"].items())


def test_shares_sum_to_one() -> None:
    made = whole(np.array([[0.5, -1.0, 1.5], [-1.0, -2.0, 0.0]]))
    assert made[0].tolist() == [0.25, 0.0, 0.75] and made[1] == pytest.approx(np.full(3, 1 / 3))


def test_what_cannot_be_probed(scene: Path) -> None:
    for counts in ((0,), (5, 1000), ()):
        with pytest.raises(InputError, match="--per-class"):
            pixel.run(given(scene), pixel.Options(per_class=counts))
    with pytest.raises(InputError, match="smaller one"):
        pixel.run(given(scene, size=48), pixel.Options())


@pytest.mark.slow
def test_salinas(tmp_path: Path) -> None:
    """Real pixels by the whole protocol, few splits; no backbone has been trained, so only the spectra must tell."""
    folder = DATA / "SalinasA"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    shard(folder, tmp_path / "shards", recipe="salinas_a", options=Options(chip=128), progress=False)
    made = pixel.run(given(tmp_path / "shards", size=8), pixel.Options(per_class=(5,), splits=2, draws=2, scratch_steps=0))
    assert {row.name: row.metrics["oa_5"] for row in made.rows}["raw spectrum SVM"] > 0.9  # type: ignore[operator]
    assert all(min(pixels) > 500 for pixels in made.details["split_pixels"])
