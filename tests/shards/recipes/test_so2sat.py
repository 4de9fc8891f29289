import numpy as np
import pytest

from swath.shards.errors import InputError
from swath.shards.recipes.registry import find
from swath.shards.sources.source import Options

h5py = pytest.importorskip("h5py")
OPEN = find("so2sat").open


def write(path, count, first=0, dtype="f8", bands=10, label=None):
    n = np.arange(first, first + count)
    sen1 = np.broadcast_to((n[:, None] + 100 * np.arange(8))[:, None, None], (count, 32, 32, 8))
    sen2 = np.broadcast_to((n[:, None] / 1024 + np.arange(bands) / 8)[:, None, None], (count, 32, 32, bands))
    onehot = np.eye(17)[n % 17] if label is None else label
    with h5py.File(path, "w") as file:
        file.create_dataset("sen1", data=sen1.astype(dtype), chunks=(1, 32, 32, 8), compression="gzip")
        file["sen2"], file["label"] = sen2.astype(dtype), onehot


@pytest.fixture
def root(tmp_path):
    for stem, count, first in (("training", 5, 0), ("validation", 2, 5), ("testing", 3, 7)):
        write(tmp_path / f"{stem}.h5", count, first)
    return tmp_path


def test_every_band_stands_where_the_contract_says(root):
    source = OPEN(root, Options())
    assert [i.split for i in source.items] == ["train"] * 5 + ["val"] * 2 + ["test"] * 3
    sample = source.read(source.items[8])
    for k, name in enumerate(source.contracts["sentinel1"].names):
        assert (sample.parts["sentinel1"].pixels[k] == 8 + 100 * k).all(), name
    for k, name in enumerate(("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")):
        assert source.contracts["sentinel2"].names[k] == name
        assert (sample.parts["sentinel2"].pixels[k] == 8 / 1024 + k / 8).all()
    assert sample.parts["sentinel2"].pixels.shape == (10, 32, 32) and source.contracts["sentinel2"].dtype == "float64"
    assert source.contracts["sentinel2"].unit == "reflectance" and source.contracts["sentinel1"].unit == "linear power"
    assert (sample.parts["sentinel2"].scale, sample.parts["sentinel2"].add) == (1.0, 0.0)


def test_classes_keep_their_numbers(root):
    source = OPEN(root, Options())
    assert [source.classes.index(i.label) for i in source.items] == list(range(10))
    assert source.classes[16] == "water" and source.read(source.items[3]).label == "open high-rise"


def test_labels_that_are_not_one_hot_are_refused(root):
    label = np.eye(17)[:3]
    label[1, 5] = 1
    write(root / "testing.h5", 3, label=label)
    with pytest.raises(InputError, match="label 1 "):
        OPEN(root, Options())


def test_channels_first_and_other_versions_are_refused(root):
    write(root / "testing.h5", 3, bands=13)
    with pytest.raises(InputError, match="sen2"):
        OPEN(root, Options())
    write(root / "testing.h5", 3, dtype="f4")
    with pytest.raises(InputError, match="float32 and float64"):
        OPEN(root, Options())


def test_schemes_of_version_3_are_named(root, tmp_path):
    (tmp_path / "v3" / "block").mkdir(parents=True)
    write(tmp_path / "v3" / "block" / "training.h5", 2)
    with pytest.raises(InputError, match="block"):
        OPEN(tmp_path / "v3", Options())
    assert len(OPEN(tmp_path / "v3" / "block", Options()).items) == 2


def test_nan_is_nodata(root):
    with h5py.File(root / "training.h5", "a") as file:
        file["sen2"][0, 3, 4, 5] = np.nan
    source = OPEN(root, Options())
    valid = source.read(source.items[0]).parts["sentinel2"].valid
    assert valid is not None and valid[3, 4] == 0 and valid.sum() == 32 * 32 - 1
    assert source.read(source.items[1]).parts["sentinel2"].valid is None
