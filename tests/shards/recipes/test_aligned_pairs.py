"""Folders of aligned images joined by name; what has no partner, or has two, is counted."""

from pathlib import Path

import numpy as np
import pytest

from swath.shards.errors import InputError
from tests.shards.recipes.published import opened, picture, samples, tiff, zipped

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")


@pytest.mark.parametrize("zip_it", [False, True])
def test_pairs(tmp_path: Path, zip_it: bool):
    root = tmp_path / "set"
    for number in range(4):
        picture(root / "pairs" / "visible" / f"{number}.png", (12, 9), colour=(10 + number, 20 + number, 30 + number))
        picture(root / "pairs" / "Thermal IR" / f"{number}.png", (12, 9), "L", 200 + number)
    picture(root / "pairs" / "visible" / "lone.png", (12, 9))
    picture(root / "pairs" / "Thermal IR" / "3.jpg", (12, 9), "L", 1)
    source = opened("aligned_pairs", zipped(root, tmp_path / "set.zip") if zip_it else root)
    assert {name: (c.names, c.dtype) for name, c in source.contracts.items()} == {
        "thermal-ir": (("grey",), "uint8"), "visible": (("red", "green", "blue"), "uint8")
    }  # fmt: skip
    made = samples(source)
    for number in range(4):
        _, sample = made[str(number)]
        got = {name: [np.unique(band).tolist() for band in part.pixels] for name, part in sample.parts.items()}
        thermal = [[1]] if number == 3 else [[200 + number]]  # 3.jpg comes before 3.png
        assert got == {"visible": [[10 + number], [20 + number], [30 + number]], "thermal-ir": thermal}
        assert sample.parts["visible"].extension == "png"
    assert sorted(made) == ["0", "1", "2", "3"]
    assert source.notes == (
        "1 samples lack thermal-ir and are left out",
        "1 files stand twice, the first is taken, such as pairs/Thermal IR/3.png",
    )


@pytest.mark.parametrize("form", ["{split}/{folder}/{name}", "{folder}/{split}/{name}"])
def test_splits_above_or_below(tmp_path: Path, form: str):
    for split in ("train", "test"):
        for folder in ("infrared", "visible"):
            path = tmp_path / "LLVIP" / form.format(split=split, folder=folder, name="010001.jpg")
            picture(path, 8, "L" if folder == "infrared" else "RGB", 7 if folder == "infrared" else (1, 2, 3))
    source = opened("aligned_pairs", tmp_path)
    assert [(item.key, item.split) for item in source.items] == [("test/010001", "test"), ("train/010001", "train")]
    assert all(list(s.parts) == ["infrared", "visible"] for _, s in samples(source).values())


def test_tiffs_of_any_kind(tmp_path: Path):
    for name in ("a", "b"):
        picture(tmp_path / "rgb" / f"{name}.png", 8)
        tiff(tmp_path / "multi" / f"{name}.tif", np.arange(5 * 64, dtype=np.int16).reshape(5, 8, 8))
    source = opened("aligned_pairs", tmp_path)
    assert (source.contracts["multi"].names, source.contracts["multi"].dtype) == (("b1", "b2", "b3", "b4", "b5"), "int16")
    _, sample = samples(source)["a"]
    assert np.array_equal(sample.parts["multi"].pixels.ravel(), np.arange(320))


def test_folders_that_are_no_pairs(tmp_path: Path):
    picture(tmp_path / "visible" / "a.png")
    with pytest.raises(InputError, match=r"2 to 4 folders such as visible/ and thermal/; found \."):
        opened("aligned_pairs", tmp_path)
    for number in range(5):
        picture(tmp_path / f"band{number}" / "a.png")
    with pytest.raises(InputError, match="found band0, band1"):
        opened("aligned_pairs", tmp_path)
    picture(tmp_path / "other" / "a b" / "x.png")
    picture(tmp_path / "other" / "a-b" / "x.png")
    with pytest.raises(InputError, match="cannot be told apart"):
        opened("aligned_pairs", tmp_path / "other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="found none"):
        opened("aligned_pairs", tmp_path / "empty")
