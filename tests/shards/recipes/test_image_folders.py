"""RGB sets in class folders, each in its published tree."""

from pathlib import Path

import numpy as np
import pytest

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.recipes.registry import find
from tests.shards.recipes.published import opened, picture, samples


@pytest.mark.parametrize(
    ("recipe", "pattern"),
    [
        ("resisc45", "NWPU-RESISC45/{}/{}_{:03}.jpg"), ("aid", "AID/{}/{}_{}.jpg"), ("whu_rs19", "WHU-RS19/{}/{}_{:02}.jpg"),
        ("patternnet", "PatternNet/images/{}/{}{:03}.jpg"),
    ],
)  # fmt: skip
def test_class_folders(tmp_path: Path, recipe: str, pattern: str):
    classes = ("airplane", "golf_course", "river")
    for name in classes:
        for number in range(1, 4):
            picture(tmp_path / pattern.format(name, name, number), 24)
    source = opened(recipe, tmp_path)
    assert (source.dataset, source.classes, len(source.items), source.notes) == (recipe, classes, 9, ())
    for key, (item, sample) in samples(source).items():
        assert (item.label, sample.label, item.split) == (key.split("/")[0], key.split("/")[0], None)
        assert np.abs(sample.parts["rgb"].pixels.mean((1, 2)) - (100, 200, 50)).max() < 3
    assert source.contracts["rgb"].names == ("red", "green", "blue")


def test_resisc45_lists(tmp_path: Path):
    for number in (1, 2):
        picture(tmp_path / "NWPU-RESISC45" / "golf_course" / f"golf_course_00{number}.jpg", 24)
    (tmp_path / "resisc45-train.txt").write_text("golf_course_002.jpg\n")
    assert [item.split for item in opened("resisc45", tmp_path).items] == [None, "train"]


def test_ucmerced_sizes_wobble(tmp_path: Path):
    """253 to 257 pixels: all become 256, and what was not there is masked."""
    folder = tmp_path / "UCMerced_LandUse" / "Images" / "beach"
    for number, size in enumerate([(256, 256), (253, 256), (257, 257), (256, 255)]):
        picture(folder / f"beach{number:02}.tif", size)
    (tmp_path / "uc_merced-test.txt").write_text("beach01.tif\n")
    source = opened("ucmerced", tmp_path)
    assert [item.split for item in source.items] == [None, "test", None, None]
    parts = [sample.parts["rgb"] for _, sample in samples(source).values()]
    assert all(part.pixels.shape == (3, 256, 256) for part in parts)
    assert [part.valid is None for part in parts] == [True, False, True, False]
    assert parts[1].valid is not None and parts[3].valid is not None
    assert (parts[1].valid[:, :253].all(), parts[1].valid[:, 253:].any()) == (True, False)
    assert (parts[3].valid[:255].all(), parts[3].valid[255:].any()) == (True, False)
    for part in parts:
        there = slice(None) if part.valid is None else part.valid == 1
        assert [np.unique(band[there]).tolist() for band in part.pixels] == [[100], [200], [50]]


def test_firerisk_folders_are_splits(tmp_path: Path):
    for split in ("train", "val"):
        for name in ("High", "Non-burnable"):
            picture(tmp_path / "FireRisk" / split / name / "27032281_4_-103.43044_44.28.png", 24)
    source = opened("firerisk", tmp_path)
    assert source.classes == ("High", "Non-burnable")
    assert [(item.key, item.split, item.label) for item in source.items][::3] == [
        ("train/High/27032281_4_-103.43044_44.28", "train", "High"),
        ("val/Non-burnable/27032281_4_-103.43044_44.28", "val", "Non-burnable"),
    ]
    _, sample = samples(source)["train/High/27032281_4_-103.43044_44.28"]
    assert (sample.parts["rgb"].extension, sample.meta["gsd_m"]) == ("png", 1)


def test_millionaid_leaves_and_its_unlabelled_test(tmp_path: Path):
    picture(tmp_path / "train" / "agriculture_land" / "grassland" / "meadow" / "P0115918.jpg", (31, 17))
    picture(tmp_path / "train" / "water_area" / "beach" / "P0000002.jpg", 20)
    picture(tmp_path / "test" / "P0000003.jpg", 12)
    source = opened("millionaid", tmp_path)
    assert {item.key: (item.split, item.label) for item in source.items} == {
        "train/agriculture_land/grassland/meadow/P0115918": ("train", "agriculture_land/grassland/meadow"),
        "train/water_area/beach/P0000002": ("train", "water_area/beach"),
        "test/P0000003": ("test", None),
    }
    assert source.read(source.items[1]).parts["rgb"].pixels.shape == (3, 17, 31)
    assert source.classes == ("agriculture_land/grassland/meadow", "water_area/beach")


def test_opticalrs_any_folders_corrupt_files_and_parts_of_archives(tmp_path: Path):
    picture(tmp_path / "DOTA" / "P0001.png", 9)
    picture(tmp_path / "fMoW" / "airport" / "x.y.jpg", 9)
    picture(tmp_path / "flat.JPG", 9)
    picture(tmp_path / "DOTA" / "grey.png", 9, "L", 3)
    picture(tmp_path / "DOTA" / "deep.png", 9, "I;16", 3)
    (tmp_path / "DOTA" / "cut.png").write_bytes((tmp_path / "DOTA" / "P0001.png").read_bytes()[:40])
    source = opened("opticalrs", tmp_path)
    read, bad = {}, []
    for item in source.items:
        try:
            read[item.key] = source.read(item).meta.get("source_set")
        except DecodeError:
            bad.append(item.key)
    assert read == {"DOTA/P0001": "DOTA", "fMoW/airport/x.y": "airport", "flat": None}
    assert bad == ["DOTA/cut", "DOTA/deep", "DOTA/grey"]
    assert source.classes == ()
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "OpticalRS-4M.z01").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds no files of opticalrs.*OpticalRS-4M.z01 looks packed: join its parts"):
        opened("opticalrs", tmp_path / "parts")


def test_same_name_twice_is_counted(tmp_path: Path):
    picture(tmp_path / "a" / "AID" / "Port" / "port_1.jpg", 24)
    picture(tmp_path / "b" / "AID" / "Port" / "port_1.jpg", 24)
    picture(tmp_path / "stray.jpg", 3)
    source = opened("aid", tmp_path)
    assert len(source.items) == 1
    assert source.notes == (
        "1 files stand twice, the first is taken, such as b/AID/Port/port_1.jpg",
        "1 files fit no pattern, left out, such as stray.jpg",
    )


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(InputError, match="did you mean resisc45"):
        find("resisc54")
