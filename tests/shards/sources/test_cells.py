import numpy as np
import pytest

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.sources.cells import open_parquet
from swath.shards.sources.parquet import Table, geotiff
from swath.shards.sources.source import Options

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
rasterio = pytest.importorskip("rasterio")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def tif(values, driver="GTiff"):
    with rasterio.io.MemoryFile() as memory:
        count, height, width = values.shape
        with memory.open(driver=driver, width=width, height=height, count=count, dtype=values.dtype) as file:
            file.write(values)
        return memory.read()


def write(path, rows, group=2):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)


def full(value, side=8, dtype="u2"):
    return tif(np.full((1, side, side), value, dtype))


def test_columns_are_bands_and_rows_samples(tmp_path):
    rows = [
        {"id": n, "B04": full(400 + n), "thumb": b"\x89PNG\r\n", "B05": full(500 + n, 4), "B02": full(200 + n)} for n in range(5)
    ]
    write(tmp_path / "part.parquet", rows)
    write(tmp_path / "metadata.parquet", [{"id": 1}])
    source = open_parquet(tmp_path, Options(sensor="sentinel2"))
    assert source.contracts["sentinel2"].names == ("B04", "B05", "B02") and len(source.items) == 5
    for n, item in enumerate(source.items):
        pixels = source.read(item).parts["sentinel2"].pixels
        assert pixels.shape == (3, 8, 8) and (pixels == np.array([400, 500, 200])[:, None, None] + n).all()
    assert any("metadata.parquet" in note for note in source.notes)
    chosen = open_parquet(tmp_path, Options(bands=("B02", "B04")))
    assert (chosen.read(chosen.items[4]).parts["optical"].pixels[:, 0, 0] == [204, 404]).all()
    with pytest.raises(InputError, match="no column B09"):
        open_parquet(tmp_path, Options(bands=("B02", "B09")))


def test_one_column_of_multi_band_tiffs_and_nodata(tmp_path):
    values = np.arange(3)[:, None, None] * 100 + np.zeros((3, 5, 7), "u2")
    values[1, 2, 3] = 9
    write(tmp_path / "a.parquet", [{"image": tif(values.astype("u2"))}])
    source = open_parquet(tmp_path / "a.parquet", Options(bands=("x", "y", "z"), nodata=9, scale=0.5))
    part = source.read(source.items[0]).parts["optical"]
    np.testing.assert_array_equal(part.pixels, values)
    assert part.valid is not None and part.valid[2, 3] == 0 and part.scale == 0.5


def test_bad_rows_are_bad_samples(tmp_path):
    write(
        tmp_path / "a.parquet",
        [
            {"b": full(1)},
            {"b": full(1)[:60]},
            {"b": full(1, dtype="u1")},
            {"b": None},
            {"b": tif(np.zeros((1, 8, 8), "u1"), "PNG")},
        ],
    )
    source = open_parquet(tmp_path, Options())
    assert source.read(source.items[0])
    for item in source.items[1:]:
        with pytest.raises(DecodeError):
            source.read(item)


def test_tables_and_cells_that_are_none(tmp_path):
    with pytest.raises(InputError, match="no Parquet files with columns"):
        write(tmp_path / "a.parquet", [{"id": 1}])
        open_parquet(tmp_path, Options())
    (tmp_path / "b.parquet").write_bytes(b"PAR1 rubbish PAR1")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        Table(tmp_path / "b.parquet")
    with pytest.raises(DecodeError, match="1 rows"):
        Table(tmp_path / "a.parquet").row(1, ["id"])
    vrt = b'<VRTDataset rasterXSize="8" rasterYSize="8"><SimpleSource>/etc/passwd</SimpleSource></VRTDataset>'
    with pytest.raises(DecodeError):
        geotiff(vrt, "a vrt in a cell")
