"""Landsat Collection-2 folders as published: scale and offset by MTL, clouds by QA_PIXEL, temperature as its own modality."""

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
L8 = "LC08_L2SP_191030_20200605_20200824_02_T1"
CLEAR = 1 << 6
SURFACE = {f"SR_B{n}": 8000 + 100 * n for n in range(1, 8)}


def tif(path: Path, value: Any, side: int = 16, dtype: Any = np.uint16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    place = {"crs": "EPSG:32633", "transform": from_origin(300_000, 5_000_000, 480 / side, 480 / side)}
    with rasterio.open(path, "w", driver="GTiff", count=1, height=side, width=side, dtype=dtype, **place) as file:
        file.write(np.broadcast_to(np.asarray(value, dtype), (side, side)), 1)


def groups(craft: str, level: str, second: dict[str, dict[str, str]], first: dict[str, str]) -> dict[str, dict[str, str]]:
    return {
        "PRODUCT_CONTENTS": {"PROCESSING_LEVEL": level, "COLLECTION_NUMBER": "02"},
        "IMAGE_ATTRIBUTES": {
            "SPACECRAFT_ID": craft, "DATE_ACQUIRED": "2020-06-05", "SCENE_CENTER_TIME": "09:47:37.1234560Z",
            "CLOUD_COVER": "23.40", "SUN_ELEVATION": "62.1",
        },
        **second,
        "LEVEL1_RADIOMETRIC_RESCALING": first,
    }  # fmt: skip


def rescaling(kind: str, bands: dict[str, tuple[str, str]]) -> dict[str, str]:
    rows = {f"{kind}_MULT_BAND_{band}": mult for band, (mult, _) in bands.items()}
    return rows | {f"{kind}_ADD_BAND_{band}": add for band, (_, add) in bands.items()}


def second_level(
    craft: str = "LANDSAT_8", bands: tuple[int, ...] = tuple(range(1, 8)), thermal: str = "ST_B10"
) -> dict[str, dict[str, str]]:
    """With level 1's own rescaling of the same names, as published; it must not be taken."""
    return groups(
        craft, "L2SP",
        {
            "LEVEL2_SURFACE_REFLECTANCE_PARAMETERS": rescaling("REFLECTANCE", {str(n): ("2.75e-05", "-0.2") for n in bands}),
            "LEVEL2_SURFACE_TEMPERATURE_PARAMETERS": rescaling("TEMPERATURE", {thermal: ("0.00341802", "149.0")}),
        },
        rescaling("REFLECTANCE", {str(n): ("2.0000E-05", "-0.100000") for n in bands}),
    )  # fmt: skip


def odl(content: dict[str, dict[str, str]]) -> str:
    lines = ["GROUP = LANDSAT_METADATA_FILE"]
    for group, pairs in content.items():
        quoted = {k: v if v[:1] in "-0123456789" and k != "DATE_ACQUIRED" else f'"{v}"' for k, v in pairs.items()}
        lines += [f"  GROUP = {group}", *(f"    {k} = {v}" for k, v in quoted.items()), f"  END_GROUP = {group}"]
    return "\n".join([*lines, "END_GROUP = LANDSAT_METADATA_FILE", "END"])


def scene(
    folder: Path, name: str, bands: dict[str, int], content: dict[str, dict[str, str]], *, text: bool = False, qa: Any = CLEAR,
    dtype: Any = np.uint16,
) -> Path:  # fmt: skip
    root = folder / name
    for band, value in bands.items():
        tif(root / f"{name}_{band}.TIF", value, 32 if band == "B8" else 16, dtype)
    tif(root / f"{name}_QA_PIXEL.TIF", qa)
    tif(root / f"{name}_QA_RADSAT.TIF", 0)
    if text:
        (root / f"{name}_MTL.txt").write_text(odl(content))
    else:
        (root / f"{name}_MTL.json").write_text(json.dumps({"LANDSAT_METADATA_FILE": content}))
        (root / f"{name}_MTL.txt").write_text("the JSON is read")
    (root / f"{name}_SR_stac.json").write_text(json.dumps({"type": "Feature", "stac_version": "1.0.0", "id": name, "assets": {}}))
    return root


@pytest.mark.parametrize("text", [False, True])
def test_surface_reflectance_and_temperature(tmp_path: Path, text: bool):
    scene(tmp_path / "set", L8, SURFACE | {"ST_B10": 44_000}, second_level(), text=text)
    manifest = shard(tmp_path / "set", tmp_path / "out", progress=False)[""]
    reader = ShardReader(tmp_path / "out")
    optical, thermal = (manifest.contracts[name] for name in ("landsat8", "landsat8_thermal"))
    assert optical.names == tuple(f"B{n}" for n in range(1, 8))
    assert (optical.level, optical.unit, optical.nodata, optical.gsd_m) == ("L2SP", "reflectance", 0, 30)
    assert [b.common_name for b in optical.bands] == ["coastal", "blue", "green", "red", "nir08", "swir16", "swir22"]
    assert (thermal.names, thermal.unit, thermal.sensor) == (("B10",), "kelvin", "landsat8")
    assert reader.pixels(0, "landsat8")[:, 0, 0].tolist() == list(SURFACE.values())
    np.testing.assert_allclose(optical.normalisation.mean, [v * 2.75e-5 - 0.2 for v in SURFACE.values()])
    np.testing.assert_allclose(thermal.normalisation.mean, [44_000 * 0.00341802 + 149])
    meta = reader.meta(0)
    assert (meta["time"], meta["scene_cloud"], meta["platform"]) == ("2020-06-05T09:47:37.123456+00:00", 0.234, "LANDSAT_8")
    assert "REFLECTANCE_MULT_BAND" in meta["radiometry"]["landsat8"]["scale_source"]
    (item,) = open_source(tmp_path / "set", Options()).items
    assert (item.time, item.cloud, item.lookup) == (meta["time"], 0.234, L8)


def test_quality_bits_become_the_mask(tmp_path: Path):
    qa = np.full((16, 16), CLEAR, np.uint16)
    qa[0, :8] = [1, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 7, (1 << 3) | (1 << 4)]  # …, snow, water, cloud and shadow
    root = scene(tmp_path, L8, SURFACE | {"ST_B10": 44_000}, second_level(), qa=qa)
    source = open_source(root, Options())
    for part in source.read(source.items[0]).parts.values():
        assert part.valid is not None
        assert part.valid[0, :9].tolist() == [0, 2, 2, 2, 3, 1, 1, 2, 1]
        assert (part.valid[1:] == 1).all()


def test_landsat_9_goes_with_8_and_a_scene_may_lack_temperature(tmp_path: Path):
    scene(tmp_path, L8, SURFACE | {"ST_B10": 44_000}, second_level())
    scene(tmp_path, L8.replace("LC08", "LC09"), SURFACE, second_level("LANDSAT_9"))
    source = open_source(tmp_path, Options())
    assert [list(source.read(item).parts) for item in source.items] == [["landsat8", "landsat8_thermal"], ["landsat8"]]


@pytest.mark.parametrize(
    ("craft", "prefix", "sensor", "green"), [("LANDSAT_7", "LE07", "landsat7", 560), ("LANDSAT_5", "LT05", "landsat5", 560)]
)
def test_thematic_mappers(tmp_path: Path, craft: str, prefix: str, sensor: str, green: float):
    bands = (1, 2, 3, 4, 5, 7)
    content = second_level(craft, bands, "ST_B6")
    scene(tmp_path, L8.replace("LC08", prefix), {f"SR_B{n}": 8000 + n for n in bands} | {"ST_B6": 44_000}, content)
    source = open_source(tmp_path, Options())
    assert source.contracts[sensor].names == ("B1", "B2", "B3", "B4", "B5", "B7")
    assert source.contracts[sensor].bands[1].wavelength_nm == green
    assert source.contracts[f"{sensor}_thermal"].bands[0].wavelength_nm == 11450
    parts = source.read(source.items[0]).parts
    assert parts[sensor].pixels[:, 0, 0].tolist() == [8000 + n for n in bands]
    assert (parts[f"{sensor}_thermal"].scale, parts[f"{sensor}_thermal"].add) == (0.00341802, 149)


def test_level_1_of_oli_is_reflectance_and_its_panchromatic_band_a_choice(tmp_path: Path):
    name = L8.replace("L2SP", "L1TP")
    values = {f"B{n}": 7000 + n for n in range(1, 12)}
    first = rescaling("REFLECTANCE", {str(n): ("2.0000E-05", "-0.100000") for n in range(1, 10)})
    first |= rescaling("RADIANCE", {str(n): ("3.3420E-04", "0.10000") for n in (10, 11)})
    scene(tmp_path, name, values, groups("LANDSAT_8", "L1TP", {}, first))
    source = open_source(tmp_path, Options())
    assert any("1 panchromatic bands (B8, 15 m) left out" in note for note in source.notes)
    optical, thermal = source.contracts["landsat8"], source.contracts["landsat8_thermal"]
    assert (optical.names, optical.unit, optical.level) == (
        tuple(f"B{n}" for n in (1, 2, 3, 4, 5, 6, 7, 9)),
        "reflectance",
        "L1TP",
    )
    assert (thermal.names, thermal.unit) == (("B10", "B11"), "radiance")
    parts = source.read(source.items[0]).parts
    assert (parts["landsat8"].scale, parts["landsat8"].add) == (2e-5, -0.1)
    assert "not corrected for the sun" in parts["landsat8"].scale_source
    chosen = open_source(tmp_path, Options(bands=("B8", "B4")))
    assert list(chosen.contracts) == ["landsat8"]
    part = chosen.read(chosen.items[0]).parts["landsat8"]
    assert part.pixels.shape == (2, 32, 32)
    assert part.pixels[:, 0, 0].tolist() == [7008, 7004]
    with pytest.raises(InputError, match="--bands names B12"):
        open_source(tmp_path, Options(bands=("B12",)))


def test_level_1_whose_bands_differ_stays_digital_numbers(tmp_path: Path):
    first = rescaling("REFLECTANCE", {"1": ("1.2E-03", "-0.01"), "2": ("2.4E-03", "-0.02")})
    first |= rescaling("RADIANCE", {"6_VCID_1": ("6.7087E-02", "-0.06709"), "6_VCID_2": ("3.7205E-02", "3.1628")})
    content = groups("LANDSAT_7", "L1TP", {}, first)
    bands = {"B1": 50, "B2": 60, "B6_VCID_1": 70, "B6_VCID_2": 80}
    scene(tmp_path, L8.replace("LC08_L2SP", "LE07_L1TP"), bands, content, dtype=np.uint8)
    source = open_source(tmp_path, Options())
    assert source.contracts["landsat7_thermal"].names == ("B6_VCID_1", "B6_VCID_2")
    for name, values in (("landsat7", [50, 60]), ("landsat7_thermal", [70, 80])):
        part = source.read(source.items[0]).parts[name]
        assert source.contracts[name].unit == "digital number"
        assert (part.pixels[:, 0, 0].tolist(), part.scale, part.add) == (values, 1, 0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"LANDSAT_METADATA_FILE": ', "is no JSON of a LANDSAT_METADATA_FILE"),
        ('{"L1_METADATA_FILE": {}}', "is no JSON of a LANDSAT_METADATA_FILE"),
        ('{"LANDSAT_METADATA_FILE": {"IMAGE_ATTRIBUTES": {}}}', "is no Collection-2 metadata"),
        (json.dumps({"LANDSAT_METADATA_FILE": groups("LANDSAT_8", "L2SP", {}, {})}), "gives no REFLECTANCE_MULT_BAND"),
        (json.dumps({"LANDSAT_METADATA_FILE": second_level()}).replace("2.75e-05", "much"), "'much', not a number"),
        ("[" * 100_000, "is no JSON of a LANDSAT_METADATA_FILE"),
    ],
)
def test_damaged_metadata_is_listed_with_its_reason(tmp_path: Path, text: str, reason: str):
    scene(tmp_path / "set", L8, SURFACE, second_level())
    broken = L8.replace("191030", "191031")
    (scene(tmp_path / "set", broken, SURFACE, second_level()) / f"{broken}_MTL.json").write_text(text)
    manifest = shard(tmp_path / "set", tmp_path / "out", max_failed=0.5, progress=False)[""]
    ((key, said),) = manifest.skipped
    assert broken in key
    assert reason in said


def test_sensors_and_levels_that_do_not_go_together(tmp_path: Path):
    scene(tmp_path, L8, SURFACE, second_level())
    other = scene(tmp_path, L8.replace("LC08", "LE07"), {f"SR_B{n}": 9 for n in (1, 2)}, second_level("LANDSAT_7", (1, 2)))
    with pytest.raises(InputError, match=r"is of landsat8, .*LE07.* of landsat7; make shards from one kind at a time"):
        open_source(tmp_path, Options())
    (other / f"{other.name}_MTL.json").write_text(json.dumps({"LANDSAT_METADATA_FILE": second_level("LANDSAT_2")}))
    with pytest.raises(InputError, match="is of 'LANDSAT_2'; bands are known of LANDSAT_4, 5, 7, 8 and 9"):
        open_source(tmp_path, Options())
