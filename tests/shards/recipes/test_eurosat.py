"""EuroSAT: B8A last in the multi-spectral files, lists that name .jpg for TIFFs, four places where people have it."""

from pathlib import Path

import numpy as np
import pytest

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from tests.shards.recipes.published import cube, need, opened, own, picture, samples, tiff, values, zipped

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
FILE_ORDER = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A")
CLASSES = ("AnnualCrop", "Forest", "River")


def multispectral(root: Path) -> None:
    for name in CLASSES:
        for number in (1, 2):
            tiff(root / name / f"{name}_{number}.tif", cube(FILE_ORDER, 64, 64), interleave="pixel")


@pytest.mark.parametrize("root", ["EuroSAT_MS", "ds/images/remote_sensing/otherDatasets/sentinel_2/tif"])
@pytest.mark.parametrize("zip_it", [False, True])
def test_bands_stand_in_file_order(tmp_path: Path, root: str, zip_it: bool):
    multispectral(tmp_path / "set" / root)
    source = opened("eurosat_ms", zipped(tmp_path / "set", tmp_path / "EuroSAT_MS.zip") if zip_it else tmp_path / "set")
    contract = source.contracts["sentinel2"]
    assert contract.names == FILE_ORDER
    assert [b.wavelength_nm for b in contract.bands][8:] == [945.1, 1373.5, 1613.7, 2202.4, 864.7]
    assert (contract.level, contract.unit, contract.nodata, contract.dtype) == ("L1C", "reflectance", None, "uint16")
    assert source.classes == CLASSES
    for key, (item, sample) in samples(source).items():
        assert values(source, sample, "sentinel2") == own(FILE_ORDER)
        part = sample.parts["sentinel2"]
        assert (part.scale, part.add, part.valid, part.data) == (1e-4, 0, None, None)
        assert (item.label, item.label == key.split("/")[0], sample.meta["crs"]) == (sample.label, True, "EPSG:32633")


def test_dropped_bands_are_dropped_by_name(tmp_path: Path):
    """B01, B09 and B10 are positions 0, 8 and 9 here: who drops 0, 9 and 10 drops B11 and keeps B09."""
    multispectral(tmp_path)
    kept = tuple(name for name in FILE_ORDER if name not in ("B01", "B09", "B10"))
    source = opened("eurosat_ms", tmp_path, bands=kept)
    assert source.contracts["sentinel2"].names == kept
    assert values(source, source.read(source.items[0]), "sentinel2") == own(kept)
    source = opened("eurosat_ms", tmp_path, bands=("nir08", "B4"))
    assert values(source, source.read(source.items[0]), "sentinel2") == {"B8A": [900], "B04": [400]}
    with pytest.raises(InputError, match=r"eurosat_ms has no band B99; there are sentinel2: B01, .*B8A"):
        opened("eurosat_ms", tmp_path, bands=("B99",))


def test_true_zero_of_cirrus_is_no_nodata(tmp_path: Path):
    pixels = cube(FILE_ORDER, 64, 64)
    pixels[9, 0] = 0
    pixels[:, 1] = 0
    tiff(tmp_path / "EuroSAT_MS" / "Forest" / "Forest_1.tif", pixels)
    source = opened("eurosat_ms", tmp_path)
    valid = source.read(source.items[0]).parts["sentinel2"].valid
    assert valid is not None
    assert valid.sum(1).tolist() == [64, 0] + [64] * 62


@pytest.mark.parametrize("recipe", ["eurosat_ms", "eurosat_rgb"])
def test_split_lists_name_jpg_for_both(tmp_path: Path, recipe: str):
    if recipe == "eurosat_ms":
        multispectral(tmp_path / "EuroSAT_MS")
    else:
        for name in CLASSES:
            for number in (1, 2):
                picture(tmp_path / "2750" / name / f"{name}_{number}.jpg", 64)
    (tmp_path / "eurosat-train.txt").write_text("AnnualCrop_1.jpg\nForest_1.jpg\nForest_2.jpg\n")
    (tmp_path / "eurosat-val.txt").write_text("River_1.jpg\n")
    (tmp_path / "eurosat-test.txt").write_text("River_2.jpg\nRiver_99.jpg\n")
    source = opened(recipe, tmp_path)
    assert {item.key.split("/")[1]: item.split for item in source.items} == {
        "AnnualCrop_1": "train", "AnnualCrop_2": None, "Forest_1": "train", "Forest_2": "train", "River_1": "val",
        "River_2": "test",
    }  # fmt: skip
    assert source.notes == ("1 rows of the tables have no files, such as River/River_99",)
    (tmp_path / "eurosat-test.txt").write_text("River_1.jpg\n")
    with pytest.raises(InputError, match=r"(val|test).txt: River/River_1 stands twice in the tables"):
        opened(recipe, tmp_path)


@pytest.mark.parametrize("root", ["2750", "EuroSAT_RGB", "."])
def test_rgb_stays_as_it_came(tmp_path: Path, root: str):
    for name in CLASSES:
        for number in range(1, 5):
            picture(tmp_path / root / name / f"{name}_{number}.jpg", 64)
    picture(tmp_path / root / "River" / "River_5.jpg", 64, "L", 9)
    (tmp_path / root / "River" / "River_6.jpg").write_bytes(b"\xff\xd8 cut")
    picture(tmp_path / root / "River" / "River_7.jpg", 65)
    source = opened("eurosat_rgb", tmp_path)
    good, bad = [], {}
    for item in source.items:
        try:
            good.append((item, source.read(item)))
        except DecodeError as error:
            bad[item.key] = str(error)
    for item, sample in good:
        part = sample.parts["rgb"]
        assert (part.data, part.extension) == ((tmp_path / item.place.slots["rgb"][0].path).read_bytes(), "jpg")
        assert np.abs(part.pixels.mean((1, 2)) - (100, 200, 50)).max() < 3  # red first, and JPEG is not exact
    assert (len(good), sorted(bad)) == (12, ["River/River_5", "River/River_6", "River/River_7"])
    assert "1 band(s) of uint8, the layout has 3" in bad["River/River_5"]
    assert "65×65, the layout has 64×64" in bad["River/River_7"]


def test_published_zip():
    source = opened("eurosat_rgb", need("EuroSAT_RGB.zip"))
    assert (len(source.items), len(source.classes), source.notes) == (27_000, 10, ())
    for item in source.items[::3000]:
        sample = source.read(item)
        assert sample.parts["rgb"].pixels.shape == (3, 64, 64)
        assert item.label == item.key.split("/")[0] == item.key.split("/")[1].rsplit("_", 1)[0]
        assert item.lookup == f"EuroSAT_RGB/{item.key}.jpg"  # what split files name
