import numpy as np
import pytest

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.recipes.registry import find
from swath.shards.sources.source import Options
from tests.shards.recipes.zarr_fixtures import BANDS, SIDE, many, pixels, single, tar

pytest.importorskip("zarr")
OPEN = find("ssl4eo_s12_v11").open
IDS = ["0080717", "0060573", "0179869", "0012333"]
NAME = "ssl4eos12_train_seasonal_data_000001.zarr.zip"


@pytest.fixture
def layout_a(tmp_path):
    for folder in ("S1GRD", "S2L1C", "S2L2A"):
        many(tmp_path / "train" / folder / NAME, folder, IDS)
        many(tmp_path / "val" / folder / NAME.replace("train", "val"), folder, ["0000001", "0000002"], seed=100)
    return tmp_path


def test_every_band_and_date_stands_where_the_contract_says(layout_a):
    source = OPEN(layout_a, Options())
    assert [i.key for i in source.items] == [f"train/{i}" for i in IDS] + ["val/0000001", "val/0000002"]
    assert [i.split for i in source.items] == ["train"] * 4 + ["val"] * 2
    sample = source.read(source.items[2])
    for folder, modality in (("S2L1C", "sentinel2_l1c"), ("S2L2A", "sentinel2_l2a"), ("S1GRD", "sentinel1_grd")):
        contract, part = source.contracts[modality], sample.parts[modality]
        assert contract.dates == 4 and part.pixels.shape == (contract.channels, SIDE, SIDE)
        assert [b.upper() for b in BANDS[folder]] == list(contract.names)
        np.testing.assert_array_equal(part.pixels, pixels(folder, 4, 4, 1000)[2].reshape(-1, SIDE, SIDE))
        assert str(part.pixels.dtype) == contract.dtype
    assert source.contracts["sentinel1_grd"].dtype == "float16" and source.contracts["sentinel1_grd"].unit == "dB"


def test_offset_of_1000_is_taken_out_by_add_with_its_source(layout_a):
    sample = OPEN(layout_a, Options()).read(OPEN(layout_a, Options()).items[0])
    part = sample.parts["sentinel2_l1c"]
    assert (part.scale, part.add) == (1e-4, -0.1) and "added" in part.scale_source
    assert float(part.pixels[10, 0, 0]) * part.scale + part.add == pytest.approx(0.0012)  # B10 of the first date
    assert (sample.parts["sentinel1_grd"].scale, sample.parts["sentinel1_grd"].add) == (1.0, 0.0)


def test_cloud_mask_becomes_codes_of_its_date(layout_a):
    source = OPEN(layout_a, Options())
    valid = source.read(source.items[0]).parts["sentinel2_l2a"].valid
    assert valid is not None and valid.shape == (4, SIDE, SIDE)
    assert valid[1, 0, :7].tolist() == [1, 1, 1, 2, 2, 3, 0] and (valid[[0, 2, 3]] == 1).all()
    assert source.read(source.items[1]).parts["sentinel2_l2a"].valid is None


def test_times_and_places(layout_a):
    source = OPEN(layout_a, Options())
    meta = source.read(source.items[1]).meta
    assert meta["times"]["sentinel2_l1c"] == [f"2020-09-13T12:26:{44 + t}" for t in range(4)]
    assert meta["crs"] == "EPSG:32651" and meta["lat"] == pytest.approx(13.3333333)
    assert source.items[1].lat == pytest.approx(13.3333333) and "time" not in meta


def test_layout_b_has_no_offset(tmp_path):
    for folder in ("S2L1C", "S2L2A"):
        tar(tmp_path / "train" / folder / "ssl4eos12_shard_000001.tar", {f"s{n}": single(folder, n, 4, 0) for n in range(3)})
    source = OPEN(tmp_path, Options())
    sample = source.read(source.items[1])
    np.testing.assert_array_equal(sample.parts["sentinel2_l1c"].pixels, pixels("S2L1C", 8, 4)[1].reshape(-1, SIDE, SIDE))
    assert {part.add for part in sample.parts.values()} == {0.0}
    assert "removed" in sample.parts["sentinel2_l2a"].scale_source


def test_offset_that_b10_contradicts_is_a_bad_sample(tmp_path):
    tar(tmp_path / "val" / "S2L1C" / "ssl4eos12_shard_000001.tar", {"s0": single("S2L1C", 0, 4, 1000)})
    source = OPEN(tmp_path, Options())
    with pytest.raises(DecodeError, match="B10 shows the contrary"):
        source.read(source.items[0])
    given = OPEN(tmp_path, Options(add=-0.1))
    assert given.read(given.items[0]).parts["sentinel2_l1c"].add == -0.1


def test_other_band_order_is_refused(tmp_path):
    order = [*BANDS["S2L1C"][:8], "B09", "B8A", *BANDS["S2L1C"][10:]]
    many(tmp_path / "train" / "S2L1C" / NAME, "S2L1C", IDS, bands=order)
    source = OPEN(tmp_path, Options())
    with pytest.raises(DecodeError, match="B09, B8A"):
        source.read(source.items[0])


def test_modalities_with_other_samples_do_not_pair(layout_a):
    many(layout_a / "train" / "S1GRD" / NAME, "S1GRD", [IDS[1], IDS[0], *IDS[2:]])
    source = OPEN(layout_a, Options())
    with pytest.raises(DecodeError, match="not 0080717"):
        source.read(source.items[0])


def test_a_modality_that_was_not_downloaded_is_no_part(tmp_path):
    many(tmp_path / "train" / "S2L2A" / NAME, "S2L2A", IDS)
    source = OPEN(tmp_path, Options())
    assert set(source.contracts) == set(source.read(source.items[0]).parts) == {"sentinel2_l2a"}
    with pytest.raises(InputError, match="is not SSL4EO"):
        OPEN(tmp_path / "train", Options())
