import numpy as np
import pytest

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.recipes.radiometric_offset import by_baseline, by_cirrus, decide
from swath.shards.recipes.registry import find
from swath.shards.sources.source import Options
from tests.shards.recipes.zarr_fixtures import BANDS, SIDE, pixels, single, tar

pytest.importorskip("zarr")
OPEN = find("terramesh").open
KEYS = [f"majortom_train_{n:07d}" for n in range(3)]


def shard(root, folder, name="majortom_shard_000001.tar", keys=KEYS, offsets=(0, 1000, 0)):
    tar(root / "train" / folder / name, {k: single(folder, n, 1, offsets[n]) for n, k in enumerate(keys)})


@pytest.fixture
def root(tmp_path):
    for folder in ("DEM", "S1RTC", "S2L1C", "S2L2A"):
        shard(tmp_path, folder)
    for folder in ("DEM", "S1GRD", "S2L1C", "S2L2A"):
        shard(tmp_path, folder, "ssl4eos12_shard_000002.tar", [k.replace("majortom", "ssl4eos12") for k in KEYS])
    return tmp_path


def test_every_band_stands_where_the_contract_says(root):
    source = OPEN(root, Options())
    assert [i.key for i in source.items][:3] == [f"train/{k}" for k in KEYS] and len(source.items) == 6
    sample = source.read(source.items[1])
    assert list(sample.parts) == ["sentinel2_l2a", "sentinel2_l1c", "sentinel1_rtc", "dem"]
    for folder, modality in (("S2L1C", "sentinel2_l1c"), ("S2L2A", "sentinel2_l2a"), ("S1RTC", "sentinel1_rtc"), ("DEM", "dem")):
        np.testing.assert_array_equal(sample.parts[modality].pixels, pixels(folder, 8, 1, 1000)[1].reshape(-1, SIDE, SIDE))
        assert len(source.contracts[modality].bands) == len(BANDS[folder])
    assert sample.parts["sentinel2_l1c"].valid is not None and sample.parts["sentinel2_l1c"].valid.shape == (SIDE, SIDE)
    assert sample.meta["time"] == "2020-09-13T12:26:40" and "dem" not in sample.meta["times"]


def test_radar_of_the_other_half_is_absent(root):
    source = OPEN(root, Options())
    assert {"sentinel1_grd", "sentinel1_rtc"} <= set(source.contracts)
    assert "sentinel1_rtc" not in source.read(source.items[3]).parts and "sentinel1_grd" in source.read(source.items[3]).parts


def test_offset_is_decided_sample_by_sample_and_pixels_agree_afterwards(root):
    source = OPEN(root, Options())
    old, new = (source.read(source.items[n]).parts for n in (0, 1))
    assert (old["sentinel2_l1c"].add, new["sentinel2_l1c"].add) == (0.0, -0.1)
    assert "its B10" in new["sentinel2_l1c"].scale_source and "same sample" in new["sentinel2_l2a"].scale_source
    for modality in ("sentinel2_l1c", "sentinel2_l2a"):
        a, b = (p[modality].pixels * p[modality].scale + p[modality].add for p in (old, new))
        np.testing.assert_allclose(b - a, 1e-4, atol=1e-9)  # the two samples differ by 1 DN


def test_offset_that_nothing_tells_is_refused(tmp_path):
    dn = pixels("S2L1C", 1, 1)[0] + 900
    tar(tmp_path / "train" / "S2L1C" / "majortom_shard_000001.tar", {"a": single("S2L1C", 0, 1, 0, dn=dn)})
    source = OPEN(tmp_path, Options())
    with pytest.raises(DecodeError, match="give --add"):
        source.read(source.items[0])
    assert by_cirrus(np.full((4, 4), 1022)) is True and by_cirrus(np.full((4, 4), 22)) is False
    assert by_cirrus(np.full((4, 4), 850)) is None and by_cirrus(np.full((4, 4), 2500)) is None
    assert decide("mixed", "L2A", np.full((1, 12, 4, 4), 300), None)[0] == 0.0
    with pytest.raises(DecodeError):
        decide("mixed", "L2A", np.full((1, 12, 4, 4), 1300), None)


def test_baselines():
    assert by_baseline("S2B_MSIL2A_20200223T033739_N0400_R061_T48PUT") is True
    assert by_baseline("S2B_MSIL2A_20200223T033739_N9999_R061_T48PUT") is False
    assert by_baseline("S2B_MSIL1C_20200223T033739_N0209_R061_T48PUT") is False
    assert by_baseline("S2B_MSIL1C_20200223T033739") is None


def test_mismatched_keys_fail(root):
    shard(root, "S1RTC", keys=[KEYS[0], KEYS[2], KEYS[1]])
    with pytest.raises(InputError, match=r"sample 1 is majortom_train_0000002, in .* it is majortom_train_0000001"):
        OPEN(root, Options())
    shard(root, "S1RTC", keys=KEYS[:2])
    with pytest.raises(InputError, match=r"sample 2 is missing, in .* it is majortom_train_0000002"):
        OPEN(root, Options())


def test_damaged_members_are_bad_samples(root):
    good = single("S2L2A", 0, 1, 0)
    tar(root / "train" / "S2L2A" / "majortom_shard_000001.tar", {KEYS[0]: good, KEYS[1]: good[:-40], KEYS[2]: good})
    source = OPEN(root, Options())
    with pytest.raises(DecodeError, match=KEYS[1]):
        source.read(source.items[1])
    assert source.read(source.items[2])


def test_missing_tree_says_what_is_expected(tmp_path):
    with pytest.raises(InputError, match="is not TerraMesh"):
        OPEN(tmp_path, Options())
