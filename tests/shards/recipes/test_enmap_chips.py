import numpy as np
import pytest

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.recipes import enmap
from swath.shards.recipes.registry import find
from swath.shards.sources.source import Options

rasterio = pytest.importorskip("rasterio")
SIDE = 6
pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")


def write(path, numbers, add=0, void=True):
    """Band n holds n + add; void ones −32768."""
    path.parent.mkdir(parents=True, exist_ok=True)
    n = np.array(numbers)
    values = np.where(np.isin(n, enmap.VOID) & void, enmap.NODATA, n + add).astype("i2")
    profile = {"driver": "GTiff", "width": SIDE, "height": SIDE, "count": len(n), "dtype": "int16", "compress": "deflate"}
    place = rasterio.transform.from_origin(500_000, 5_500_000, 30, 30)
    profile |= {"nodata": -32768, "crs": "EPSG:32632", "transform": place}
    with rasterio.open(path, "w", **profile) as file:
        file.write(np.broadcast_to(values[:, None, None], (len(n), SIDE, SIDE)))


PATCHES = [f"ENMAP01-____L2A-DT0000004950_2022100{n}T101523Z_001_V010110_2022111{n}T{n}Z-Y01460273_X03110438" for n in range(3)]


@pytest.fixture
def hyspecnet(tmp_path):
    for add, patch in enumerate(PATCHES):
        tile = patch.rsplit("-", 1)[0]
        write(tmp_path / "patches" / tile / patch / f"{patch}-SPECTRAL_IMAGE.TIF", range(1, 225), 1000 * add)
        (tmp_path / "patches" / tile / patch / f"{patch}-QL_VNIR.TIF").write_bytes(b"quick look")
    for scheme, order in (("easy", (0, 1, 2)), ("hard", (2, 0, 1))):
        for split, n in zip(("train", "val", "test"), order, strict=True):
            path = tmp_path / "splits" / scheme / f"{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            tile = PATCHES[n].rsplit("-", 1)[0]
            path.write_text(f"{tile}/{PATCHES[n]}/{PATCHES[n]}-DATA.npy\n")
    return tmp_path


@pytest.fixture
def spectral_earth(tmp_path):
    for add, name in enumerate(("0000823/04138", "0000823/04139", "0000824/00001")):
        write(tmp_path / "enmap" / f"{name}.tif", enmap.KEPT, 1000 * add)
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "train.txt").write_text("0000823/04138.tif\n0000823/04139.tif\n")
    (tmp_path / "splits" / "val.txt").write_text("0000824/00001.tif\n")
    return tmp_path


@pytest.mark.parametrize("name", ["hyspecnet", "spectral_earth"])
def test_every_band_is_the_one_of_its_number(name, request):
    source = find(name).open(request.getfixturevalue(name), Options())
    pixels = source.read(source.items[1]).parts["enmap"].pixels
    assert pixels.shape == (202, SIDE, SIDE)
    for band, values in zip(source.contracts["enmap"].bands, pixels, strict=True):
        number = int(band.name[1:])
        assert (values == number + 1000).all() and band.wavelength_nm == enmap.CENTRES_NM[number - 1]


def test_wavelengths_jump_where_bands_are_missing():
    nm = [band.wavelength_nm or 0.0 for band in enmap.bands()]
    assert len(nm) == 202 and (nm[0], nm[-1]) == (418.416, 2445.3)
    assert (nm[90], nm[91]) == (993.338, 901.961)  # detector order: VNIR's last, SWIR's first
    jumps = [i for i in range(92, 202) if nm[i] - nm[i - 1] > 20]
    assert jumps == [126, 145] and nm[126] - nm[125] > 240 and nm[145] - nm[144] > 240
    assert nm[130:145] == list(enmap.CENTRES_NM[145:160])  # what the upstream table has wrong


def test_splits_name_other_files(hyspecnet):
    easy, hard = (find(name).open(hyspecnet, Options()) for name in ("hyspecnet", "hyspecnet_hard"))
    assert [i.split for i in easy.items] == ["train", "val", "test"]
    assert [i.split for i in hard.items] == ["val", "test", "train"]
    assert [i.key for i in easy.items] == [i.key for i in hard.items] and easy.fingerprint != hard.fingerprint


def test_void_bands_that_hold_data_are_a_bad_sample(hyspecnet):
    path = next(hyspecnet.rglob("*-SPECTRAL_IMAGE.TIF"))
    write(path, range(1, 225), void=False)
    source = find("hyspecnet").open(hyspecnet, Options())
    with pytest.raises(DecodeError, match="bands 127"):
        source.read(source.items[0])


def test_dates_of_a_place_and_where_it_is(spectral_earth):
    source = find("spectral_earth").open(spectral_earth, Options())
    metas = [source.read(item).meta for item in source.items]
    assert [m["location"] for m in metas] == ["0000823", "0000823", "0000824"]
    assert metas[0]["crs"] == "EPSG:32632" and metas[0]["lon"] == pytest.approx(9.00123, abs=1e-4)
    assert [i.split for i in source.items] == ["train", "train", "val"]


def test_nodata_within_and_other_band_counts(spectral_earth):
    with rasterio.open(spectral_earth / "enmap/0000823/04138.tif", "r+") as file:
        values = file.read()
        values[7, 2, 3] = enmap.NODATA
        file.write(values)
    write(spectral_earth / "enmap/0000823/04139.tif", range(1, 225))
    source = find("spectral_earth").open(spectral_earth, Options())
    part = source.read(source.items[0]).parts["enmap"]
    assert part.valid is not None and part.valid[2, 3] == 0 and part.valid.sum() == SIDE * SIDE - 1
    assert part.scale == 1e-4
    with pytest.raises(DecodeError, match="224 bands"):
        source.read(source.items[1])


def test_what_split_files_leave_out_is_told(spectral_earth):
    (spectral_earth / "splits" / "val.txt").write_text("0000999/00001.tif\n")
    source = find("spectral_earth").open(spectral_earth, Options())
    assert len(source.items) == 2 and any("in no split" in n for n in source.notes) and any("0000999" in n for n in source.notes)
    with pytest.raises(InputError, match="enmap/<id>"):
        find("spectral_earth").open(spectral_earth / "splits", Options())
