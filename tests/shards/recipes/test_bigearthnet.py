"""BigEarthNet v1 and reBEN: native grids, names with lost zeros, partners by table or sidecar, snow and cloud."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.ingest import shard
from tests.shards.recipes.published import DATA, DN, GSD_M, flat, need, opened, own, samples, tiff, values

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
V2 = ("S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_75_43", "S2B_MSIL2A_20180221T093029_N9999_R136_T34TCR_05_06")
V2_S1 = ("S1A_IW_GRDH_1SDV_20170613T165043_33UUP_75_43", "S1B_IW_GRDH_1SDV_20180221T163514_34TCR_5_6")


def sentinel2(folder: Path, patch: str, bands: tuple[str, ...] = BANDS) -> None:
    """Native grids: 120, 60 and 20 pixels."""
    for name in bands:
        gsd_m = GSD_M.get(name, 10)
        tiff(folder / patch / f"{patch}_{name}.tif", flat(name, 1200 // gsd_m), gsd_m=gsd_m)


def sentinel1(folder: Path, patch: str) -> None:
    for name in ("VH", "VV"):
        tiff(folder / patch / f"{patch}_{name}.tif", flat(name, 120, np.float32) - np.float32(0.25))


def note(folder: Path, patch: str, **said: Any) -> None:
    (folder / patch / f"{patch}_labels_metadata.json").write_text(json.dumps({"labels": ["Pastures", "Sea and ocean"], **said}))


def reben(root: Path) -> list[dict[str, Any]]:
    """Two patches, the second without Sentinel-1 files; the rows of the table."""
    rows = []
    for patch, radar in zip(V2, V2_S1, strict=True):
        sentinel2(root / "BigEarthNet-S2" / patch.rsplit("_", 2)[0], patch)
        row = {
            "patch_id": patch, "labels": ["Pastures", "Arable land"], "split": "train", "country": "Austria", "s1_name": radar,
            "s2v1_name": patch.replace("_N9999_R022_T33UUP", ""), "contains_seasonal_snow": False,
            "contains_cloud_or_shadow": False,
        }  # fmt: skip
        rows.append(row)
    rows[1]["split"] = "validation"
    sentinel1(root / "BigEarthNet-S1" / V2_S1[0].rsplit("_", 3)[0], V2_S1[0])
    tiff(root / "Reference_Maps" / "t" / V2[0] / f"{V2[0]}_reference_map.tif", np.full((1, 120, 120), 211, np.uint16), nodata=0)
    return rows


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def test_reben(tmp_path: Path):
    parquet(tmp_path / "metadata.parquet", reben(tmp_path))
    source = opened("reben", tmp_path)
    contract = source.contracts["sentinel2"]
    assert contract.names == BANDS
    assert [b.gsd_m for b in contract.bands] == [60, 10, 10, 10, 20, 20, 20, 10, 20, 60, 20, 20]
    assert (contract.resampling, contract.nodata, contract.level) == ("nearest to the finest grid", 0, "L2A")
    radar = source.contracts["sentinel1"]
    assert (radar.names, radar.dtype, radar.unit, radar.level) == (("VV", "VH"), "float32", "dB", "sigma0")
    made = samples(source)
    assert [item.split for item, _ in made.values()] == ["train", "validation"]
    for key, (item, sample) in made.items():
        assert values(source, sample, "sentinel2") == own(BANDS)
        part = sample.parts["sentinel2"]
        assert (part.pixels.shape, part.scale, part.add, part.valid) == ((12, 120, 120), 1e-4, 0, None)
        assert (sample.meta["labels"], sample.meta["country"], item.cloud) == (["Pastures", "Arable land"], "Austria", 0)
        assert (item.time, item.key, sample.label) == (sample.meta["time"], key, None)
    first, second = (sample for _, sample in made.values())
    assert first.meta["time"] == "2017-06-13T10:10:31"
    assert values(source, first, "sentinel1") == {"VV": [-10.25], "VH": [-20.25]}  # not cut to whole dB
    assert first.meta["times"] == {"sentinel1": ["2017-06-13T16:50:43"]}
    assert list(second.parts) == ["sentinel2"]  # absent, not zeros
    assert source.notes == ("1 samples lack sentinel1: it is masked", "1 files left out: reference maps")


def test_reben_through_an_ingest(tmp_path: Path):
    rows = reben(tmp_path / "set")
    parquet(tmp_path / "set" / "metadata.parquet", [row | {"split": "train"} for row in rows])
    manifest = shard(tmp_path / "set", tmp_path / "out", recipe="reben", progress=False)["train"]
    means = {name: contract.normalisation.mean for name, contract in manifest.contracts.items()}
    assert means == {"sentinel2": pytest.approx([DN[name] * 1e-4 for name in BANDS]), "sentinel1": (-10.25, -20.25)}
    pixels = {name: contract.normalisation.pixels[0] for name, contract in manifest.contracts.items()}
    assert pixels == {"sentinel2": 2 * 120**2, "sentinel1": 120**2}  # the absent part is in no statistics


def test_reben_snow_and_cloud_are_left_out_or_told(tmp_path: Path):
    rows = reben(tmp_path)
    parquet(tmp_path / "metadata.parquet", rows[:1])
    rows[1] |= {"contains_seasonal_snow": True, "contains_cloud_or_shadow": True}
    parquet(tmp_path / "metadata_for_patches_with_snow_cloud_or_shadow.parquet", rows[1:])
    source = opened("reben", tmp_path)
    assert [item.key for item in source.items] == [V2[0]]
    assert "1 samples have no row in the tables and are left out" in source.notes
    items = opened("reben_all", tmp_path).items
    assert [(item.cloud, item.place.meta["snow"]) for item in items] == [(0, False), (1, True)]


def test_reben_without_its_table(tmp_path: Path):
    reben(tmp_path)
    with pytest.raises(InputError, match=r"^reben: no file metadata\.parquet beside the imagery; download it there$"):
        opened("reben", tmp_path)
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(InputError, match=r"metadata.parquet, near row 0: .*as published") as caught:
        opened("reben", tmp_path)
    assert "\n" not in str(caught.value)
    parquet(tmp_path / "metadata.parquet", [{"patch_id": V2[0], "labels": []}])
    with pytest.raises(InputError, match=r"metadata.parquet has no column 'country'"):
        opened("reben", tmp_path)


def test_v1_sidecars_and_names_with_lost_zeros(tmp_path: Path):
    patch, radar = "S2A_MSIL2A_20180510T94033_19_86", "S1A_IW_GRDH_1SDV_20180510T165043_33UUP_19_86"
    sentinel2(tmp_path / "BigEarthNet-v1.0", patch)
    sentinel2(tmp_path / "BigEarthNet-v1.0", "S2B_MSIL2A_20170924T093019_43_47")
    note(tmp_path / "BigEarthNet-v1.0", patch)
    for name in (radar, radar.replace("T1650", "T1710"), radar.replace("19_86", "1_1")):
        sentinel1(tmp_path / "BigEarthNet-S1-v1.0", name)
        partner = patch if "19_86" in name else "S2A_MSIL2A_20180510T94033_1_1"
        note(tmp_path / "BigEarthNet-S1-v1.0", name, corresponding_s2_patch=partner, acquisition_time="2018-05-10T16:50:43")
    source = opened("bigearthnet_v1", tmp_path)
    made = samples(source)
    item, sample = made[patch]
    assert (item.time, sample.meta["labels"]) == ("2018-05-10T09:40:33", ["Pastures", "Sea and ocean"])
    assert values(source, sample, "sentinel2") == own(BANDS)
    assert values(source, sample, "sentinel1") == {"VV": [-10.25], "VH": [-20.25]}
    assert "labels" not in made["S2B_MSIL2A_20170924T093019_43_47"][1].meta
    assert source.notes == (
        "1 of sentinel1 belong to a sample that has one already, and are left out",
        "1 samples lack sentinel1: it is masked",
        "2 of sentinel1 are no sample's partner and are left out",
    )


def test_v1_partners_and_splits_by_the_lists(tmp_path: Path):
    patch, radar = "S2A_MSIL2A_20180510T94033_19_86", "S1A_IW_GRDH_1SDV_20180510T165043_33UUP_19_86"
    sentinel2(tmp_path, patch)
    sentinel1(tmp_path, radar)
    (tmp_path / "bigearthnet-val.csv").write_text(f"{patch},{radar}\n")
    item, sample = samples(opened("bigearthnet_v1", tmp_path))[patch]
    assert (item.split, list(sample.parts)) == ("val", ["sentinel2", "sentinel1"])
    (tmp_path / "bigearthnet-val.csv").write_text(f"{patch}\n")
    with pytest.raises(InputError, match=r"bigearthnet-val.csv, near row 0: it has not as many fields"):
        opened("bigearthnet_v1", tmp_path)


def test_nodata_is_a_mask(tmp_path: Path):
    patch = "S2A_MSIL2A_20180510T94033_19_86"
    sentinel2(tmp_path, patch)
    holed = flat("B01", 20)
    holed[0, 0, 0] = 0
    tiff(tmp_path / patch / f"{patch}_B01.tif", holed, gsd_m=60)
    _, sample = samples(opened("bigearthnet_v1", tmp_path))[patch]
    valid = sample.parts["sentinel2"].valid
    assert valid is not None
    assert (valid[:6, :6].any(), (valid == 0).sum()) == (False, 36)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("absent", "_B8A.tif is not there"), ("cut", "_B8A.tif: "), ("dtype", "is of int16, the layout has uint16"),
        ("ground", "does not cover the same ground"), ("size", "_B01.tif is 121×121, the layout has 120×120"),
        ("vrt", "_B8A.tif: .*not recognized"), ("json", "_labels_metadata.json is not as published"), ("two", "has 2 band"),
    ],
)  # fmt: skip
def test_a_bad_patch_is_one_line_in_the_manifest(tmp_path: Path, spoil: str, message: str):
    patch = "S2A_MSIL2A_20180510T94033_19_86"
    sentinel2(tmp_path, patch)
    path = tmp_path / patch / f"{patch}_B8A.tif"
    if spoil == "absent":
        path.unlink()
    elif spoil == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif spoil == "vrt":  # GDAL would follow it to other files
        path.write_text(f'<VRTDataset rasterXSize="1" rasterYSize="1"><x>{tmp_path}</x></VRTDataset>')
    elif spoil == "json":
        (tmp_path / patch / f"{patch}_labels_metadata.json").write_text("[1, 2]")
    elif spoil == "size":
        for name in BANDS:
            tiff(tmp_path / patch / f"{patch}_{name}.tif", flat(name, 121))
    elif spoil == "two":
        tiff(path, np.concatenate([flat("B8A", 60)] * 2), gsd_m=20)
    else:
        options = {"dtype": {}, "ground": {"crs": "EPSG:32634"}}[spoil]
        tiff(path, flat("B8A", 60, np.int16 if spoil == "dtype" else np.uint16), gsd_m=20, **options)
    source = opened("bigearthnet_v1", tmp_path)
    with pytest.raises(DecodeError, match=message) as caught:
        source.read(source.items[0])
    assert "\n" not in str(caught.value)


def test_real_sentinel2_patches():
    rasterio = pytest.importorskip("rasterio")
    folder = need("bigearthnet_samples/S2")
    source = opened("bigearthnet_v1", folder)
    assert (len(source.items), list(source.contracts)) == (11, ["sentinel2"])
    assert {item.time for item in source.items} >= {"2018-05-10T09:40:33", "2017-09-24T09:30:21"}  # T94033, T93021
    for key, (_, sample) in samples(source).items():
        said = json.loads((folder / key / f"{key}_labels_metadata.json").read_text())
        assert sample.meta["labels"] == said["labels"]
        assert sample.meta["time"] == said["acquisition_date"].replace(" ", "T")
        assert -32 < sample.meta["lon"] < 35 < sample.meta["lat"] < 71
        for name, band in zip(BANDS, sample.parts["sentinel2"].pixels, strict=True):
            with rasterio.open(folder / key / f"{key}_{name}.tif") as file:
                stored = file.read(1)
            assert np.array_equal(band, stored.repeat(120 // len(stored), 0).repeat(120 // len(stored), 1))


def test_real_samples_of_both_sensors_are_no_pairs():
    need("bigearthnet_samples/S1")
    source = opened("bigearthnet_v1", DATA / "bigearthnet_samples")
    assert list(source.contracts) == ["sentinel2"]
    assert "3 of sentinel1 are no sample's partner and are left out" in source.notes
