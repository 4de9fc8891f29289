import datetime

import numpy as np
import pytest

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.recipes.registry import find
from swath.shards.sources.source import Options

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
rasterio = pytest.importorskip("rasterio")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
OPEN = find("major_tom").open

# in the order of the published columns, B8A behind B12
L2A = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B11", "B12", "B8A"]
PIXELS = {"B02": 1068, "B03": 1068, "B04": 1068, "B08": 1068, "B01": 178, "B09": 178, "B10": 178}
PRODUCTS = (
    ("0U_199R", "S2B_MSIL2A_20200223T033739_N0400_R061_T48PUT_20230924T183543"),
    ("1U_200R", "S2A_MSIL2A_20200303T033529_N9999_R061_T48PUT_20231001T000000"),
    ("2D_3L", "S2A_MSIL2A_20190303T033529_N0211_R061_T48PUT_20190303T090000"),
)


def tif(values):
    with rasterio.io.MemoryFile() as memory:
        height, width = values.shape
        profile = {"driver": "GTiff", "width": width, "height": height, "count": 1, "dtype": values.dtype, "compress": "lzw"}
        with memory.open(**profile) as file:
            file.write(values[None])
        return memory.read()


def core(root, names, products=PRODUCTS, dn=None, extra=None, dtype="u2", part="part_00001.parquet"):
    """Band k of the n-th cell holds 100 · k + n, plus 1000 from baseline 04.00 on."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    rows, metas = [], []
    for n, (cell, product) in enumerate(products):
        offset = 1000 if "_N0400_" in product else 0
        row = {"grid_cell": cell, "product_id": product, "thumbnail": b"png"}
        for k, name in enumerate(names, start=1):
            side = PIXELS.get(name, 534) if dtype == "u2" else 1068
            row[name] = tif(np.full((side, side), 100 * k + n + offset if name != "B10" else 12 + offset, dtype))
        row |= {key: tif(value) for key, value in (extra or {}).items()} | (dn or {})
        rows.append(row)
        metas.append({
            "grid_cell": cell, "grid_row_u": 0, "grid_col_r": 199, "product_id": product, "cloud_cover": 1.5, "nodata": 0.0,
            "timestamp": datetime.datetime(2020, 2, 23, 3, 37, 39), "centre_lat": 0.05 + n, "centre_lon": 17.9,
            "crs": "EPSG:32633", "parquet_url": f"https://example.org/x/resolve/main/images/{part}", "parquet_row": n,
        })  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), root / "images" / part, row_group_size=1)
    pq.write_table(pa.Table.from_pylist(metas), root / "metadata.parquet")
    return root


@pytest.fixture(scope="module")
def l2a(tmp_path_factory):
    return core(tmp_path_factory.mktemp("l2a"), L2A)


def test_every_band_stands_where_the_contract_says_at_any_gsd(l2a):
    source = OPEN(l2a, Options(chip=178))
    assert len(source.items) == 3 * 36
    sample = source.read(source.items[36 + 35])
    part, contract = sample.parts["sentinel2"], source.contracts["sentinel2"]
    assert contract.names == ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
    assert part.pixels.shape == (12, 178, 178) and part.pixels.dtype == np.uint16
    for name, values in zip(contract.names, part.pixels, strict=True):
        assert (values == 100 * (L2A.index(name) + 1) + 1).all(), name


def test_offset_follows_the_product_of_each_sample(l2a):
    source = OPEN(l2a, Options(chip=1068))
    parts = [source.read(item).parts["sentinel2"] for item in source.items]
    assert [p.add for p in parts] == [-0.1, 0.0, 0.0]
    assert [p.scale_source.split(":")[0] for p in parts] == ["baseline N0400", "baseline N9999", "baseline N0211"]
    physical = [p.pixels * p.scale + p.add for p in parts]
    np.testing.assert_allclose(physical[1] - physical[0], 1e-4, atol=1e-9)


def test_pixels_that_contradict_the_baseline_are_a_bad_sample(tmp_path):
    dark = {"B04": tif(np.full((1068, 1068), 90, "u2"))}
    source = OPEN(core(tmp_path, L2A, PRODUCTS[:1], dn=dark), Options())
    with pytest.raises(DecodeError, match="its pixels say otherwise"):
        source.read(source.items[0])
    l1c = [*L2A, "B10"]
    product = (("0U_1R", "S2B_MSIL1C_20200223T033739_N9999_R061_T48PUT_20230924T183543"),)
    bright = {"B10": tif(np.full((178, 178), 1020, "u2"))}
    source = OPEN(core(tmp_path / "l1c", l1c, product, dn=bright), Options())
    assert source.contracts["sentinel2"].level == "L1C" and source.contracts["sentinel2"].names[10] == "B10"
    with pytest.raises(DecodeError, match="no offset of 1000"):
        source.read(source.items[0])
    unnamed = OPEN(core(tmp_path / "x", L2A, (("0U_1R", "S2B_MSIL2A_20200223"),)), Options())
    with pytest.raises(DecodeError, match="give --add"):
        unnamed.read(unnamed.items[0])


def test_chips_are_cut_from_the_same_ground_in_all_bands(tmp_path):
    def gradient(side):
        return np.broadcast_to((np.arange(side) * (1068 // side))[:, None] + 1, (side, side)).astype("u2")

    dn = {name: tif(gradient(PIXELS.get(name, 534))) for name in L2A}
    source = OPEN(core(tmp_path, L2A, PRODUCTS[1:2], dn=dn), Options(chip=90))
    item = source.items[11 * 5 + 2]
    pixels, top = source.read(item).parts["sentinel2"].pixels.astype(int), item.place[5][0]
    assert top == 450
    for name, values in zip(source.contracts["sentinel2"].names, pixels, strict=True):
        step = 1068 // PIXELS.get(name, 534)
        assert (values[:, 0] == (np.arange(top, top + 90) // step) * step + 1).all(), name
    assert item.lat == pytest.approx(0.05 + 10 * (534 - 495) / 111_320, abs=1e-4)


def test_cloud_mask_and_fill(tmp_path):
    mask = np.zeros((1068, 1068), "u1")
    mask[0, :4] = range(4)
    fill = {name: np.full((PIXELS.get(name, 534),) * 2, 300, "u2") for name in L2A}
    for values in fill.values():
        values[-1, -1] = 0
    source = OPEN(
        core(tmp_path, L2A, PRODUCTS[1:2], dn={k: tif(v) for k, v in fill.items()}, extra={"cloud_mask": mask}),
        Options(chip=1068),
    )
    valid = source.read(source.items[0]).parts["sentinel2"].valid
    assert valid is not None and valid[0, :5].tolist() == [1, 2, 2, 3, 1] and valid[-1, -1] == 0
    assert valid[-3, -3] == 1, "only where all bands are fill"


def test_radar_is_linear_with_its_nodata(tmp_path):
    vv = np.full((1068, 1068), 0.25, "f4")
    vv[3, 4] = -32768
    names = (("0U_199R", "S1A_IW_GRDH_1SDV_20200223T033739_rtc"),)
    source = OPEN(core(tmp_path, ["vv", "vh"], names, dn={"vv": tif(vv)}, dtype="f4"), Options(chip=64))
    contract, part = source.contracts["sentinel1"], source.read(source.items[0]).parts["sentinel1"]
    assert (contract.unit, contract.level, contract.nodata, contract.names) == (
        "linear power",
        "RTC gamma0",
        -32768.0,
        ("VV", "VH"),
    )
    assert part.pixels[0, 0, 0] == 0.25 and (part.pixels[1] == 200).all() and (part.scale, part.add) == (1.0, 0.0)
    assert part.valid is not None and part.valid[3, 4] == 0 and part.valid.sum() == 64 * 64 - 1


def test_rows_that_are_others_than_metadata_say(tmp_path):
    core(tmp_path, L2A)
    table = pq.read_table(tmp_path / "metadata.parquet").to_pylist()
    table[0]["parquet_row"], table[1]["parquet_row"] = 1, 0
    table[2]["parquet_url"] = "images/part_00002.parquet"
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "metadata.parquet")
    source = OPEN(tmp_path, Options())
    assert len(source.items) == 2 * 16 and "1 cells" in source.notes[0]
    with pytest.raises(DecodeError, match="metadata say 0U_199R"):
        source.read(source.items[0])


def test_damaged_cells_and_missing_files(tmp_path):
    core(tmp_path, L2A, PRODUCTS[:1], dn={"B08": b"II*\0 no tiff"})
    source = OPEN(tmp_path, Options())
    with pytest.raises(DecodeError, match="B08"):
        source.read(source.items[0])
    (tmp_path / "metadata.parquet").unlink()
    with pytest.raises(InputError, match=r"metadata\.parquet"):
        OPEN(tmp_path, Options())
