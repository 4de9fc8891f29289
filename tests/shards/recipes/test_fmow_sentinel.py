"""fMoW-Sentinel: a CSV with an unnamed column and quoted polygons, two styles of time, test that is called test_gt."""

from pathlib import Path

import numpy as np
import pytest

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from tests.shards.recipes.published import cube, opened, own, samples, tiff, values, zipped

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
NATURAL = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
HEAD = ",category,location_id,image_id,timestamp,polygon\n"
POLYGON = '"POLYGON ((32.66 39.54, 32.70 39.54, 32.70 39.60, 32.66 39.60, 32.66 39.54))"'


def image(root: Path, split: str, category: str, place: int, number: int, size: tuple[int, int] = (31, 17)) -> Path:
    folder = root / "fmow-sentinel" / split / category / f"{category}_{place}"
    return tiff(folder / f"{category}_{place}_{number}.tif", cube(NATURAL, *size), crs="EPSG:4326", gsd_m=9e-5, west=32, north=40)


def published(root: Path) -> Path:
    image(root, "train", "airport", 0, 5)
    image(root, "train", "airport", 0, 104, (45, 52))
    image(root, "val", "space_facility", 12, 0)
    image(root, "test_gt", "airport", 0, 5)
    rows = {
        "train": f"0,airport,0,5,2015-07-09T08:37:26Z,{POLYGON}\n1,airport,0,104,2016-10-01,{POLYGON}\n",
        "val": f"0,space_facility,12,0,2017-01-02T00:00:00Z,{POLYGON}\n7,space_facility,12,1,2017-01-02T00:00:00Z,{POLYGON}\n",
        "test_gt": f"0,airport,0,5,2018-03-04T11:12:13Z,{POLYGON}\n",
    }
    for name, text in rows.items():
        (root / "fmow-sentinel" / f"{name}.csv").write_text(HEAD + text)
    return root


@pytest.mark.parametrize("zip_it", [False, True])
def test_csv_and_images(tmp_path: Path, zip_it: bool):
    folder = published(tmp_path / "set")
    source = opened("fmow_sentinel", zipped(folder, tmp_path / "set.zip") if zip_it else folder)
    contract = source.contracts["sentinel2"]
    assert (contract.names, contract.dtype, contract.level, contract.nodata) == (NATURAL, "uint16", "L1C", None)
    assert source.classes == ("airport", "space_facility")
    made = samples(source)
    assert {key: (item.split, item.label, item.time) for key, (item, _) in made.items()} == {
        "train/airport/airport_0/airport_0_5": ("train", "airport", "2015-07-09T08:37:26+00:00"),
        "train/airport/airport_0/airport_0_104": ("train", "airport", "2016-10-01"),
        "val/space_facility/space_facility_12/space_facility_12_0": ("val", "space_facility", "2017-01-02T00:00:00+00:00"),
        "test_gt/airport/airport_0/airport_0_5": ("test", "airport", "2018-03-04T11:12:13+00:00"),
    }
    for item, sample in made.values():
        assert values(source, sample, "sentinel2") == own(NATURAL)
        assert (item.lat, item.lon) == pytest.approx((39.57, 32.68))
        assert (sample.parts["sentinel2"].scale, sample.parts["sentinel2"].add) == (1e-4, 0)
    item, sample = made["train/airport/airport_0/airport_0_104"]
    assert sample.parts["sentinel2"].pixels.shape == (13, 45, 52)
    assert (sample.meta["composite_days"], sample.meta["image_id"]) == (90, 104)
    assert "composite_days" not in made["train/airport/airport_0/airport_0_5"][1].meta
    assert source.notes == (
        "1 rows of the tables have no files, such as val/space_facility/space_facility_12/space_facility_12_1",
    )


def test_images_without_a_row_and_rows_that_are_none(tmp_path: Path):
    folder = published(tmp_path)
    image(folder, "train", "airport", 3, 1)
    assert "1 samples have no row in the tables and are left out" in opened("fmow_sentinel", folder).notes
    table = folder / "fmow-sentinel" / "train.csv"
    for text, message in (
        ("0,airport,0,5,2015-07-09,POLYGON EMPTY\n", "train.csv, near row 1: polygon 'POLYGON EMPTY' has no points"),
        ("0,airport,zero,5,2015-07-09,x\n", "train.csv, near row 1: invalid literal"),
        ("0,airport,0\n", "train.csv, near row 0: it has not as many fields"),
        (f"0,airport,0,5,then,{POLYGON}\n0,airport,0,5,2015-07-09,{POLYGON}\n", "stands twice in the tables"),
    ):
        table.write_text(HEAD + text)
        with pytest.raises(InputError, match=message) as caught:
            opened("fmow_sentinel", folder)
        assert "\n" not in str(caught.value)
    table.write_text("category,image_id\nairport,1\n")
    with pytest.raises(InputError, match=r"train.csv has no column 'location_id'"):
        opened("fmow_sentinel", folder)


def test_other_dtypes_are_taken_from_the_first_and_hold_for_all(tmp_path: Path):
    folder = published(tmp_path)
    path = image(folder, "val", "space_facility", 12, 0)
    tiff(path, cube(NATURAL, 9, 9, np.float32))
    source = opened("fmow_sentinel", folder)
    with pytest.raises(DecodeError, match=r"space_facility_12_0.tif is of float32, the layout has uint16"):
        samples(source)
    tiff(path, cube(NATURAL[:12], 9, 9))
    with pytest.raises(DecodeError, match=r"has 12 band\(s\) of uint16, the layout has 13"):
        samples(source)
