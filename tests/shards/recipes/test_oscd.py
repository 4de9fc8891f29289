"""OSCD: folders with spaces, two dates as a series, masks and un-gridded images left out."""

from pathlib import Path

import numpy as np
import pytest

from swath.shards.codec import DecodeError
from tests.shards.recipes.published import DN, opened, picture, samples, tiff, values

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
NAME = "Onera Satellite Change Detection dataset - "


def city(root: Path, name: str, size: tuple[int, int]) -> Path:
    folder = root / f"{NAME}Images" / name
    for date in (1, 2):
        for band in BANDS:
            pixels = np.full((1, *size), DN[band] + 5000 * date, np.uint16)
            tiff(folder / f"imgs_{date}_rect" / f"{band}.tif", pixels, crs=None)
            tiff(folder / f"imgs_{date}" / f"S2A_OPER_{band}.tif", pixels[:, :2, :2])
    picture(folder / "pair" / "img1.png")
    (folder / "dates.txt").write_text("date_1: 20150825\ndate_2: 20171203\n")
    return folder


def test_two_dates(tmp_path: Path):
    city(tmp_path, "beirut", (33, 21))
    city(tmp_path, "saclay_e", (18, 40))
    for name, kind in (("beirut", "Train"), ("saclay_e", "Test")):
        picture(tmp_path / f"{NAME}{kind} Labels" / name / "cm" / "cm.png", 9, "L", 255)
    (tmp_path / f"{NAME}Images" / "train.txt").write_text("aguasclaras,beirut\n")
    (tmp_path / f"{NAME}Images" / "test.txt").write_text("saclay_e")
    source = opened("oscd", tmp_path)
    contract = source.contracts["sentinel2"]
    assert (contract.names, contract.dates, contract.resampling) == (BANDS, 2, "by the publisher, to one grid")
    made = samples(source)
    assert {key: (item.split, s.parts["sentinel2"].pixels.shape) for key, (item, s) in made.items()} == {
        "beirut": ("train", (26, 33, 21)), "saclay_e": ("test", (26, 18, 40))
    }  # fmt: skip
    for _, sample in made.values():
        assert sample.meta["times"] == {"sentinel2": ["2015-08-25", "2017-12-03"]}
        assert values(source, sample, "sentinel2") == {b: [DN[b] + 5000, DN[b] + 10_000] for b in BANDS}
        assert [int(band[0, 0]) for band in sample.parts["sentinel2"].pixels[:2]] == [5100, 5200]
    assert source.notes == (
        "1 rows of the tables have no files, such as aguasclaras",
        "2 files left out: change masks",
        "52 files left out: images before they were brought onto one grid",
        "2 files left out: previews",
    )


def test_dates_that_are_not_alike(tmp_path: Path):
    folder = city(tmp_path, "beirut", (33, 21))
    (folder / "dates.txt").unlink()
    source = opened("oscd", tmp_path)
    assert source.read(source.items[0]).meta["times"] == {"sentinel2": [None, None]}
    tiff(folder / "imgs_2_rect" / "B05.tif", np.ones((1, 17, 11), np.uint16), crs=None)
    with pytest.raises(DecodeError, match=r"imgs_2_rect/B05.tif is 11×17, other bands are 21×33"):
        source.read(source.items[0])  # all are published on one grid: nothing is resampled here
    for band in BANDS:
        tiff(folder / "imgs_2_rect" / f"{band}.tif", np.ones((1, 17, 11), np.uint16), crs=None)
    with pytest.raises(DecodeError, match="dates differ in size"):
        source.read(source.items[0])
