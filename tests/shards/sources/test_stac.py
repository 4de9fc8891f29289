"""STAC items of versions 1.0 and 1.1 on disk, alone and behind catalogs; what lies elsewhere is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swath.shards.errors import InputError
from swath.shards.ingest import shard
from swath.shards.reader import ShardReader
from swath.shards.sources.open import open_source
from swath.shards.sources.source import Options

rasterio = pytest.importorskip("rasterio")
from rasterio.transform import from_origin  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
VALUE = {"B02": 720, "B03": 730, "B04": 740, "B08": 780, "B11": 810}
COMMON = {"B02": "blue", "B03": "green", "B04": "red", "B08": "nir", "B11": "swir16"}


def tif(path: Path, values: list[int], side: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    place = {"crs": "EPSG:32633", "transform": from_origin(300_000, 5_000_000, 240 / side, 240 / side)}
    with rasterio.open(path, "w", driver="GTiff", count=len(values), height=side, width=side, dtype="uint16", **place) as file:
        file.write(np.broadcast_to(np.array(values, np.uint16)[:, None, None], (len(values), side, side)))


def item(folder: Path, name: str, *, version: str = "1.1.0", offset: float = -0.1, **changes: Any) -> dict[str, Any]:
    """A Sentinel-2 item with an asset for each band beside it, written to `<name>.json`."""
    assets: dict[str, Any] = {}
    for band, value in reversed(VALUE.items()):
        tif(folder / name / f"{band}.tif", [value], 12 if band == "B11" else 24)
        said = {"scale": 0.0001, "offset": offset}
        assets[COMMON[band]] = {"href": f"./{name}/{band}.tif", "type": "image/tiff; application=geotiff", "roles": ["data"]} | (
            {
                "bands": [{"name": band, "eo:common_name": COMMON[band], **{f"raster:{k}": v for k, v in said.items()}}],
                "nodata": 0,
            }
            if version == "1.1.0"
            else {"eo:bands": [{"name": band, "common_name": COMMON[band]}], "raster:bands": [{"nodata": 0, **said}]}
        )
    bands = [{"name": band, "eo:common_name": COMMON[band], "common_name": COMMON[band]} for band in ("B04", "B03", "B02")]
    assets["visual"] = {"href": "./missing.tif", "roles": ["visual"], "bands": bands, "eo:bands": bands}
    assets["thumbnail"] = {"href": "https://example.com/t.jpg", "roles": ["thumbnail"]}
    value = {
        "type": "Feature", "stac_version": version, "id": name, "geometry": None, "bbox": [0, 0, 1, 1],
        "properties": {
            "datetime": "2022-02-10T10:11:41Z", "platform": "sentinel-2a", "eo:cloud_cover": 12.5, "processing:level": "L2A",
        },
        "links": [], "assets": assets, **changes,
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(value))
    return value


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0"])
def test_items_of_both_versions(tmp_path: Path, version: str):
    item(tmp_path / "set", "a", version=version)
    item(tmp_path / "set", "b", version=version, offset=0.0)
    manifest = shard(tmp_path / "set", tmp_path / "out", progress=False)[""]
    contract, reader = manifest.contract(), ShardReader(tmp_path / "out")
    assert (contract.names, contract.sensor, contract.level) == (tuple(VALUE), "sentinel2", "L2A")
    assert (contract.unit, contract.nodata, contract.gsd_m) == ("reflectance", 0, 10)
    assert [b.wavelength_nm for b in contract.bands] == [492.4, 559.8, 664.6, 832.8, 1613.7]
    for number in range(2):
        meta = reader.meta(number)
        told = meta["radiometry"]["sentinel2"]
        assert reader.pixels(number)[:, 0, 0].tolist() == list(VALUE.values())
        assert (told["scale"], told["add"]) == (1e-4, -0.1 if meta["key"] == "a" else 0)
        assert "STAC" in told["scale_source"]
        assert (meta["time"], meta["scene_cloud"], meta["platform"]) == ("2022-02-10T10:11:41+00:00", 0.125, "sentinel-2a")
    made = open_source(tmp_path / "set", Options(chip=12)).items[0]
    assert (made.time, made.cloud, made.lookup) == ("2022-02-10T10:11:41+00:00", 0.125, "a.json")
    assert made.lat is not None


def test_bands_by_name_or_common_name_in_the_order_asked_for(tmp_path: Path):
    item(tmp_path, "a")
    source = open_source(tmp_path, Options(bands=("B11", "red")))
    assert source.contracts["sentinel2"].names == ("B11", "B04")
    assert source.read(source.items[0]).parts["sentinel2"].pixels[:, 0, 0].tolist() == [810, 740]
    with pytest.raises(InputError, match="has no band B12; it has B02, B03"):
        open_source(tmp_path, Options(bands=("B12",)))


def test_bands_of_an_unknown_sensor_have_the_wavelengths_of_the_item(tmp_path: Path):
    tif(tmp_path / "x.tif", [5, 6], 8)
    bands = [
        {"name": "near", "eo:center_wavelength": 0.85, "eo:full_width_half_max": 0.03},
        {"name": "far", "eo:center_wavelength": 1.6, "eo:full_width_half_max": 0.1},
    ]
    item(tmp_path, "x", properties={"datetime": None}, assets={"data": {"href": "x.tif", "bands": bands}})
    source = open_source(tmp_path, Options())
    assert [(b.name, b.wavelength_nm, b.width_nm) for b in source.contracts["optical"].bands] == [
        ("near", 850, 30),
        ("far", 1600, 100),
    ]
    assert source.contracts["optical"].unit == "digital number"
    assert (source.items[0].time, source.items[0].cloud) == (None, None)


def test_catalogs_lead_to_their_items_only(tmp_path: Path):
    item(tmp_path / "one", "a")
    item(tmp_path / "one", "left")
    catalog = {"type": "Catalog", "stac_version": "1.1.0", "id": "c", "description": ""}
    links = [{"rel": "root", "href": "./catalog.json"}, {"rel": "child", "href": "./one/collection.json"}]
    (tmp_path / "catalog.json").write_text(json.dumps(catalog | {"links": links}))
    back = [{"rel": "item", "href": "./a.json"}, {"rel": "parent", "href": "../catalog.json"}]
    (tmp_path / "one" / "collection.json").write_text(json.dumps(catalog | {"type": "Collection", "links": back}))
    assert [i.key for i in open_source(tmp_path / "catalog.json", Options()).items] == ["a"]
    assert [i.key for i in open_source(tmp_path, Options()).items] == ["a", "left"]
    values = [json.loads((tmp_path / "one" / f"{n}.json").read_text()) for n in ("a", "left")]
    whole = {"type": "FeatureCollection", "stac_version": "1.1.0", "features": values}
    (tmp_path / "one" / "all.json").write_text(json.dumps(whole))
    assert len(open_source(tmp_path / "one" / "all.json", Options()).items) == 2


@pytest.mark.parametrize(
    ("href", "match"),
    [
        ("https://example.com/a.tif", "which is not here; download it"),
        ("s3://bucket/a.tif", "which is not here; download it"),
        ("/vsicurl/http://example.com/a.tif", "which is not here"),
        ("../../outside.tif", "which is no file below"),
        ("/etc/passwd.tif", "which is no file below"),
        ("./linked.tif", "which is no file below"),
        ("./gone.tif", "which is no file below"),
    ],
)
def test_assets_elsewhere_are_refused(tmp_path: Path, href: str, match: str):
    tif(tmp_path / "outside.tif", [1], 8)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked.tif").symlink_to(tmp_path / "outside.tif")
    item(tmp_path / "set", "a", assets={"B02": {"href": href, "bands": [{"name": "B02"}]}})
    with pytest.raises(InputError, match=match) as caught:
        open_source(tmp_path / "set", Options())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"assets": {}}, "has no assets"),
        ({"assets": {"B02": {"bands": [{"name": "B02"}]}}}, "asset 'B02' has no href"),
        ({"assets": []}, "has an id .* and assets"),
        ({"id": 3}, "has an id"),
        ({"assets": {"B02": {"href": "a/B02.tif", "bands": [3]}}}, "bands that are no objects"),
    ],
)
def test_malformed_items_are_one_line(tmp_path: Path, changes: dict[str, Any], match: str):
    item(tmp_path, "a", **changes)
    with pytest.raises(InputError, match=match):
        open_source(tmp_path, Options())


def test_items_whose_bands_contradict_each_other(tmp_path: Path):
    value = item(tmp_path, "a")
    value["assets"]["red"]["bands"][0]["raster:offset"] = 0
    (tmp_path / "a.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match="different scales, offsets or nodata values"):
        open_source(tmp_path, Options())
    (tmp_path / "a.json").write_text('{"stac_version": ')
    with pytest.raises(InputError, match="cannot be read as JSON"):
        open_source(tmp_path, Options())


def test_damaged_asset_is_listed(tmp_path: Path):
    item(tmp_path / "set", "a")
    item(tmp_path / "set", "b")
    (tmp_path / "set" / "b" / "B03.tif").write_bytes(b"II*\0")
    manifest = shard(tmp_path / "set", tmp_path / "out", max_failed=0.5, progress=False)[""]
    assert (manifest.samples, [key for key, _ in manifest.skipped]) == (1, ["b"])
