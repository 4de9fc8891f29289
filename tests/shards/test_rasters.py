"""GeoTIFF scenes → shards: band order, resampling, nodata, labels, and what must stop an ingest or only be listed."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swath.shards.errors import InputError
from swath.shards.ingest import shard
from swath.shards.ingestion import packer
from swath.shards.reader import ShardReader
from swath.shards.sources.open import open_source
from swath.shards.sources.source import Options
from swath.shards.writer import ShardWriter

rasterio = pytest.importorskip("rasterio")
from rasterio.transform import from_origin  # noqa: E402
from rasterio.warp import transform as warp  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning", "ignore::UserWarning")
GROUND_M = 1200  # side of a scene
SENTINEL2 = {"B02": 10, "B01": 60, "B12": 20, "B8A": 20, "B08": 10, "B11": 20}  # written out of order on purpose
SPECTRAL = ("B01", "B02", "B08", "B8A", "B11", "B12")
DN = {name: 300 + 100 * number for number, name in enumerate(SPECTRAL)}


def write(path: Path, pixels: np.ndarray, *, names: tuple[str, ...] = (), crs: str | None = "EPSG:32633", **options: Any) -> Path:
    """A (C, H, W) GeoTIFF over the common ground; `tags`, `scale` and `offset` go where GDAL keeps them."""
    tags, scale, offset = options.pop("tags", {}), options.pop("scale", None), options.pop("offset", 0.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    place = {"crs": crs, "transform": from_origin(500_000, 5_000_000, GROUND_M / width, GROUND_M / height)} if crs else {}
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width, dtype=pixels.dtype, **place, **options
    ) as file:
        file.write(pixels)
        file.update_tags(**tags)
        if names:
            file.descriptions = names
        if scale is not None:
            file.scales, file.offsets = (scale,) * count, (offset,) * count
    return path


def patch(folder: Path, name: str, dn: dict[str, int] = DN) -> None:
    """One file per band, each on its own grid and with its own constant, as in BigEarthNet."""
    for band, value in dn.items():
        side = GROUND_M // SENTINEL2[band]
        write(folder / name / f"{name}_{band}.tif", np.full((1, side, side), value, np.uint16))


def noise(count: int, side: int = 32, dtype: Any = np.uint16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 5000, (count, side, side)).astype(dtype)


def refused(source: Path, out: Path, match: str, **options: Any) -> None:
    """One line, and nothing left behind."""
    with pytest.raises(InputError, match=match) as caught:
        shard(source, out, progress=False, **options)
    assert "\n" not in str(caught.value)
    assert not list(out.parent.glob(f"*{out.name}*"))


def test_band_files_of_three_grids_become_one_sample_in_spectral_order(tmp_path: Path):
    patch(tmp_path / "set", "S2A_MSIL2A_20170617T113321_1_2")
    patch(tmp_path / "set", "S2B_MSIL2A_20170618T113321_3_4")
    contract = shard(tmp_path / "set", tmp_path / "out", progress=False)[""].contract()
    reader = ShardReader(tmp_path / "out")
    assert contract.names == SPECTRAL
    assert [b.gsd_m for b in contract.bands] == [60, 10, 10, 20, 20, 20]
    assert [b.wavelength_nm for b in contract.bands] == [442.7, 492.4, 832.8, 864.7, 1613.7, 2202.4]
    assert (contract.height, contract.width, contract.gsd_m, contract.resampling) == (120, 120, 10, "nearest to the finest grid")
    assert (contract.sensor, contract.level, contract.unit, contract.nodata) == ("sentinel2", "L2A", "reflectance", 0)
    for number in range(2):
        pixels = reader.pixels(number)
        assert pixels.dtype == np.uint16
        assert [np.unique(band).tolist() for band in pixels] == [[DN[name]] for name in SPECTRAL]
        meta = reader.meta(number)
        told = meta["radiometry"]["sentinel2"]
        assert told["scale"] == reader.chips([number]).stored["sentinel2"].scale.item() == 1e-4
        assert told["scale_source"].startswith("sensor default: sentinel2")
        assert meta["time"] == f"2017-06-{17 + (meta['key'][2] == 'B')}T11:33:21"
        assert (meta["gsd_m"], meta["window"]) == (10, [0, 0, 120, 120])
    np.testing.assert_allclose(contract.normalisation.mean, [DN[name] * 1e-4 for name in SPECTRAL])
    assert contract.normalisation.std == pytest.approx((0,) * 6, abs=1e-12)


def test_coarse_bands_are_repeated_where_they_lie(tmp_path: Path):
    """Each 60 m pixel stands over its own 6 × 6 pixels of 10 m, in windows too."""
    coarse = np.arange(1, 401, dtype=np.uint16).reshape(1, 20, 20)
    write(tmp_path / "set" / "S2A_x_B01.tif", coarse)
    fine = np.arange(1, 14401, dtype=np.uint16).reshape(1, 120, 120)
    write(tmp_path / "set" / "S2A_x_B02.tif", fine)
    shard(tmp_path / "set", tmp_path / "out", options=Options(chip=32, stride=17), progress=False)
    reader, expected = ShardReader(tmp_path / "out"), np.concatenate([coarse.repeat(6, 1).repeat(6, 2), fine])
    assert len(reader) == 36
    for number in range(36):
        top, left, height, width = reader.meta(number)["window"]
        assert np.array_equal(reader.pixels(number), expected[:, top : top + height, left : left + width])


def test_place_of_a_chip(tmp_path: Path):
    write(tmp_path / "set" / "S2A_a.tif", noise(2, 40), names=("B02", "B03"))
    shard(tmp_path / "set", tmp_path / "out", options=Options(chip=20), progress=False)
    reader = ShardReader(tmp_path / "out")
    meta = next(m for m in map(reader.meta, range(4)) if m["window"] == [20, 0, 20, 20])
    assert meta["bounds"] == [500_000, 4_998_800, 500_600, 4_999_400]
    assert (meta["lon"], meta["lat"]) == pytest.approx((15.0038, 45.1448), abs=1e-3)
    assert (meta["gsd_m"], meta["crs"]) == (30, "EPSG:32633")


def test_nodata_becomes_the_valid_member_and_stays_out_of_the_statistics(tmp_path: Path):
    pixels = noise(2, 64)
    pixels[0, :10, :10] = 0  # in one band only: the pixel is invalid in both
    pixels[1, 40:] = 60000
    write(tmp_path / "set" / "S2A_a.tif", pixels, names=("B02", "B03"), nodata=0)
    mask = np.ones((1, 64, 64), np.uint8)
    mask[0, 40:], mask[0, 30] = 2, 3
    write(tmp_path / "set" / "S2A_a_valid.tif", mask)
    norm = shard(tmp_path / "set", tmp_path / "out", progress=False)[""].contract().normalisation
    expected = mask[0].copy()
    expected[:10, :10] = 0
    reader = ShardReader(tmp_path / "out")
    valid = reader.valid(0)
    assert valid is not None
    assert np.array_equal(valid, expected[None])
    assert np.array_equal(reader.pixels(0), pixels)
    clear = pixels[:, expected == 1] * 1e-4
    assert norm.pixels == (clear.shape[1],) * 2
    np.testing.assert_allclose(norm.mean, clear.mean(1))
    np.testing.assert_allclose(norm.std, clear.std(1))
    np.testing.assert_allclose((norm.minimum, norm.maximum), (clear.min(1), clear.max(1)))


def test_not_finite_pixels_are_invalid(tmp_path: Path):
    pixels = np.random.default_rng(0).normal(-12, 3, (2, 16, 16)).astype(np.float32)
    pixels[0, 0, 0], pixels[1, 3, 3] = np.nan, -np.inf
    write(tmp_path / "set" / "S1A_a.tif", pixels, names=("VV", "VH"), nodata=np.nan)
    contract = shard(tmp_path / "set", tmp_path / "out", progress=False)[""].contract()
    valid = ShardReader(tmp_path / "out").valid(0)
    assert valid is not None
    assert valid.sum() == 254
    assert (contract.unit, contract.nodata, contract.bands[0].wavelength_nm) == ("dB", None, None)
    assert np.isfinite(contract.normalisation.mean).all()
    assert contract.normalisation.pixels == (254, 254)


def test_chips_mostly_nodata_are_left_out(tmp_path: Path):
    pixels = noise(1, 64)
    pixels[:, :, 20:] = 0
    write(tmp_path / "set" / "S2A_a.tif", pixels, names=("B02",))
    manifest = shard(tmp_path / "set", tmp_path / "out", options=Options(chip=32), progress=False)[""]
    assert (manifest.samples, [entry["samples"] for entry in manifest.source["left_out"].values()]) == (2, [2])
    write(tmp_path / "none" / "S2A_a.tif", pixels * 0, names=("B02",))
    refused(
        tmp_path / "none",
        tmp_path / "left",
        "no samples are left: .*4 chips left out: more than 50% nodata",
        options=Options(chip=32),
    )


@pytest.mark.parametrize(
    "tag", ["1=water,2=dry land", "water,dry land", '["water", "dry land"]', '{"1": "water", "2": "dry land"}']
)
def test_land_cover_gives_labels(tmp_path: Path, tag: str):
    write(tmp_path / "set" / "S2A_a.tif", noise(1, 64), names=("B02",))
    cover = np.ones((1, 64, 64), np.uint8)
    cover[0, :32, :32] = 2  # a chip all of 2
    cover[0, :32, 32:40] = 2  # a quarter of the next
    cover[0, 32:, :32] = np.arange(1024).reshape(32, 32) % 3  # no class has half
    write(tmp_path / "set" / "S2A_a_landcover.tif", cover, tags={"CLASSES": tag})
    manifest = shard(tmp_path / "set", tmp_path / "out", options=Options(chip=32), progress=False)[""]
    assert manifest.classes == ("water", "dry land")
    reader = ShardReader(tmp_path / "out")
    found = {tuple(m["window"][:2]): (m["label"], m["landcover_share"]) for m in map(reader.meta, range(4))}
    assert found == {(0, 0): ("dry land", 1), (0, 32): ("water", 0.75), (32, 0): (None, 0.333), (32, 32): ("water", 1)}
    numbers = {tuple(reader.meta(n)["window"][:2]): int(reader.labels[n]) for n in range(4)}
    assert numbers == {(0, 0): 1, (0, 32): 0, (32, 0): -1, (32, 32): 0}


@pytest.mark.parametrize(
    "tag", ['{"1": "water"', "x=water", "1=water,1=land", "1=,2=land", "0=water", "[" * 100_000, '{"a": 1}', "1=a,2=a"]
)
def test_malformed_classes_are_one_line(tmp_path: Path, tag: str):
    write(tmp_path / "set" / "S2A_a.tif", noise(1), names=("B02",))
    write(tmp_path / "set" / "S2A_a_landcover.tif", np.ones((1, 32, 32), np.uint8), tags={"CLASSES": tag})
    refused(tmp_path / "set", tmp_path / "out", "S2A_a_landcover.tif: its CLASSES tag")


def test_maps_must_agree_and_fit(tmp_path: Path):
    for name, tag in (("a", "1=water"), ("b", "1=land")):
        write(tmp_path / "set" / f"S2A_{name}.tif", noise(1), names=("B02",))
        write(tmp_path / "set" / f"S2A_{name}_landcover.tif", np.ones((1, 32, 32), np.uint8), tags={"CLASSES": tag})
    refused(tmp_path / "set", tmp_path / "out", "S2A_b_landcover.tif: its classes are not those of")
    write(tmp_path / "set" / "S2A_b_landcover.tif", np.ones((1, 32, 32), np.float32), tags={"CLASSES": "1=water"})
    refused(tmp_path / "set", tmp_path / "out", "S2A_b_landcover.tif has 1 band.* of float32")
    write(tmp_path / "set" / "S2A_b_landcover.tif", np.ones((1, 32, 32), np.uint8), crs=None, tags={"CLASSES": "1=water"})
    refused(tmp_path / "set", tmp_path / "out", "S2A_b_landcover.tif does not cover the same ground")


@pytest.mark.parametrize("text", ['{"labels": ["a"', "[1, 2]", "\xff\xfe", "[" * 100_000])
def test_damaged_labels_metadata_is_one_line(tmp_path: Path, text: str):
    patch(tmp_path / "set", "S2A_p")
    (tmp_path / "set" / "S2A_p" / "S2A_p_labels_metadata.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path / "set", tmp_path / "out", "S2A_p_labels_metadata.json .*repair it or remove it")


def test_labels_metadata_is_kept(tmp_path: Path):
    patch(tmp_path / "set", "S2A_p")
    notes = {"labels": ["Pastures", "Sea"], "acquisition_date": "2017-06-17 11:33:21"}
    (tmp_path / "set" / "S2A_p" / "S2A_p_labels_metadata.json").write_text(json.dumps(notes))
    shard(tmp_path / "set", tmp_path / "out", progress=False)
    meta = ShardReader(tmp_path / "out").meta(0)
    assert (meta["labels"], meta["time"]) == (["Pastures", "Sea"], "2017-06-17T11:33:21")


def test_change_maps_and_pictures_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write(tmp_path / "set" / "S2A_a.tif", noise(1), names=("B02",))
    write(tmp_path / "set" / "S2A_a_change.tif", np.ones((1, 32, 32), np.uint8))
    (tmp_path / "set" / "preview.jpg").write_bytes(b"")
    with caplog.at_level("INFO"):
        manifest = shard(tmp_path / "set", tmp_path / "out", progress=False)[""]
    assert manifest.contract().names == ("B02",)
    for line in ("1 change raster (*_change.tif) left out", "1 JPEG or PNG files left out"):
        assert line in caplog.text
    assert len(manifest.source["notes"]) == 3  # and the customary scale
    write(tmp_path / "sar" / "S1A_a_sar.tif", -noise(2, dtype=np.float32) / 200, names=("VV", "VH"))
    assert shard(tmp_path / "sar", tmp_path / "sar_out", progress=False)[""].contract().sensor == "sentinel1"


def test_radar_beside_a_scene_is_a_second_modality_of_its_samples(tmp_path: Path):
    """On the scene's grid, with its own nodata; a scene without it gives samples without that part."""
    for name in ("a", "b"):
        write(tmp_path / "set" / f"S2A_{name}.tif", noise(1, 32), names=("B02",))
    radar = np.random.default_rng(0).normal(-12, 3, (2, 16, 16)).astype(np.float32)
    radar[:, 0, 0] = np.nan
    write(tmp_path / "set" / "S2A_a_sar.tif", radar, names=("VV", "VH"), nodata=np.nan)
    source = open_source(tmp_path / "set", Options(chip=16))
    assert list(source.contracts) == ["sentinel2", "sentinel1"]
    assert (source.contracts["sentinel1"].unit, source.contracts["sentinel1"].gsd_m) == ("dB", 37.5)
    repeated = radar.repeat(2, 1).repeat(2, 2)
    for item in source.items:
        parts = source.read(item).parts
        if item.key.startswith("S2A_b"):
            assert list(parts) == ["sentinel2"]
            continue
        _, top, left, height, width = item.place
        assert np.array_equal(parts["sentinel1"].pixels, repeated[:, top : top + height, left : left + width], equal_nan=True)
        assert parts["sentinel2"].valid is None
        assert (parts["sentinel1"].valid is None) == ((top, left) != (0, 0))
    write(tmp_path / "set" / "S2A_b_sar.tif", radar, names=("VV", "VH"), crs=None)
    with pytest.raises(InputError, match=r"S2A_b_sar.tif does not cover the same ground"):
        open_source(tmp_path / "set", Options())


def test_another_pixel_size_on_request(tmp_path: Path):
    """Averages of valid pixels only, masks by nearest neighbour, and the contract says it."""
    fine = np.arange(1, 1601, dtype=np.uint16).reshape(1, 40, 40)
    fine[0, :2, :2], fine[0, 2, 0] = 0, 0
    write(tmp_path / "set" / "S2A_x_B02.tif", fine)
    write(tmp_path / "set" / "S2A_x_B11.tif", np.full((1, 20, 20), 7, np.uint16))
    write(tmp_path / "set" / "S2A_x_valid.tif", np.repeat([[[1, 2]]], 20, 1).repeat(10, 2).astype(np.uint8))
    source = open_source(tmp_path / "set", Options(gsd_m=60, resampling="average"))
    contract = source.contracts["sentinel2"]
    assert (contract.gsd_m, contract.resampling, [b.gsd_m for b in contract.bands]) == (60, "average to 60 m", [60, 60])
    (item,) = source.items
    sample = source.read(item)
    part, bounds = sample.parts["sentinel2"], sample.meta["bounds"]
    assert bounds == [500_000, 4_998_800, 501_200, 5_000_000]
    blocks = fine[0].reshape(20, 2, 20, 2).astype(float)
    mean = blocks.sum((1, 3)) / np.maximum((blocks > 0).sum((1, 3)), 1)
    assert np.abs(part.pixels[0] - mean).max() <= 0.5  # stored as integers
    assert (part.pixels[1] == 7).all()
    assert part.valid is not None
    assert part.valid[0, 0] == 0
    assert (part.valid[1:, :10] == 1).all()
    assert (part.valid[:, 10:] == 2).all()
    coarse = open_source(tmp_path / "set", Options(resampling="bilinear")).contracts["sentinel2"]
    assert (coarse.gsd_m, coarse.resampling) == (30, "bilinear to the finest grid")
    with pytest.raises(InputError, match="--resampling 'guess' is not one of nearest, bilinear"):
        open_source(tmp_path / "set", Options(resampling="guess"))
    with pytest.raises(InputError, match="smaller than one pixel"):
        open_source(tmp_path / "set", Options(gsd_m=5000))


def test_chips_of_a_resampled_scene_are_windows_of_one_raster(tmp_path: Path):
    """No seams: what a kernel sees does not end where a chip does."""
    write(tmp_path / "set" / "S2A_x.tif", noise(2, 60), names=("B02", "B03"))
    whole = open_source(tmp_path / "set", Options(gsd_m=13, resampling="cubic"))
    (item,) = whole.items
    pixels = whole.read(item).parts["sentinel2"].pixels
    assert pixels.shape == (2, 92, 92)
    cut = open_source(tmp_path / "set", Options(chip=23, gsd_m=13, resampling="cubic"))
    assert len(cut.items) == 16
    for item in cut.items:
        _, top, left, height, width = item.place
        assert np.array_equal(cut.read(item).parts["sentinel2"].pixels, pixels[:, top : top + height, left : left + width])


def test_place_and_time_are_known_before_decoding(tmp_path: Path):
    write(tmp_path / "set" / "S2A_20170617T113321.tif", noise(1, 40), names=("B02",))
    write(tmp_path / "set" / "S2A_plain.tif", noise(1, 40), names=("B02",), crs=None)
    source = open_source(tmp_path / "set", Options(chip=20))
    for item in source.items[:4]:
        meta = source.read(item).meta
        west, south, east, north = meta["bounds"]
        (lon,), (lat,) = warp("EPSG:32633", "EPSG:4326", [(west + east) / 2], [(south + north) / 2])[:2]
        assert (item.lat, item.lon, item.time) == (pytest.approx(lat), pytest.approx(lon), "2017-06-17T11:33:21")
        assert (meta["lat"], meta["lon"]) == (item.lat, item.lon)
    assert {(item.lat, item.lon, item.time) for item in source.items[4:]} == {(None, None, None)}


def test_sensors_in_one_folder_are_told_apart(tmp_path: Path):
    write(tmp_path / "set" / "S2A_a.tif", noise(1), names=("B2",))
    write(tmp_path / "set" / "LC08_a.tif", noise(1), names=("B2",))
    refused(tmp_path / "set", tmp_path / "out", "LC08_a is of landsat8, S2A_a of sentinel2; make shards from one kind")
    write(tmp_path / "raw" / "s1a-iw-grd-vv-20200101t000000-20200101t000025-1-1-001.tiff", noise(1))
    refused(tmp_path / "raw", tmp_path / "out", "raw Sentinel-1 product.* calibrate and terrain-correct it first")


def test_a_person_says_what_the_numbers_mean(tmp_path: Path):
    pixels = noise(1)
    pixels[0, 0, 0] = 9
    write(tmp_path / "set" / "S2A_a.tif", pixels, names=("B02",))
    source = open_source(tmp_path / "set", Options(scale=1e-3, add=-0.5, nodata=9, unit="radiance"))
    part = source.read(source.items[0]).parts["sentinel2"]
    assert (part.scale, part.add, source.contracts["sentinel2"].unit) == (1e-3, -0.5, "radiance")
    assert "--scale" in part.scale_source
    assert part.valid is not None
    assert part.valid[0, 0] == 0


@pytest.mark.parametrize(
    ("name", "options", "scale", "add", "source"),
    [
        ("S2A_L2A", {}, 1e-4, 0.0, "sensor default"),
        ("S2A_L2A", {"tags": {"BOA_ADD_OFFSET": "-1000"}}, 1e-4, -0.1, "BOA_ADD_OFFSET"),
        ("S2A_L2A", {"scale": 2e-4, "offset": -0.2}, 2e-4, -0.2, "file tag: scale"),
        ("x_Sentinel-2_L2A", {"raw": "_(Raw)"}, 1 / 65535, 0.0, "guessed from the file name"),
        ("LC08_L2SP", {}, 1.0, 0.0, "none"),
        ("LC08_L2SP", {"scale": 2.75e-5, "offset": -0.2}, 2.75e-5, -0.2, "file tag: scale"),
    ],
)
def test_who_says_what_the_numbers_mean(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, options: dict[str, Any], scale: float, add: float, source: str
):
    raw = options.pop("raw", "")
    write(
        tmp_path / "set" / f"{name}_B2{raw}.tif", noise(1) + np.uint16(-10000 * add * 1e-4 / scale if add else 0), **options
    )  # as an offset of -0.1 has it
    with caplog.at_level("INFO"):
        shard(tmp_path / "set", tmp_path / "out", progress=False)
    (told,) = ShardReader(tmp_path / "out").meta(0)["radiometry"].values()
    assert (told["scale"], told["add"]) == pytest.approx((scale, add))
    assert source in told["scale_source"]
    assert ("guessed from the file name" in caplog.text) == bool(raw)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"names": ("B02", "B03")}, {"names": ("B02",)}, r"scenes differ: .*\(S2A_b lacks B03\)"),
        ({"names": ("B02", "B03")}, {"names": ("B03", "B02")}, "scenes differ"),
        ({"names": ("B02",)}, {"names": ("B02",), "dtype": np.float32}, "scenes differ: .*uint16.*float32"),
        ({"names": ("B02",)}, {"names": ("B02",), "nodata": 7}, "different nodata"),
        ({"names": ("B02", "B02")}, {"names": ("B02", "B02")}, "band names repeat"),
        ({"names": ("B2", "B02")}, {"names": ("B2", "B02")}, "not all different ones"),
        ({}, {}, "S2A_a.tif has 1 bands of uint16 without names; give --bands"),
        ({"names": ("B02",), "scale": float("nan")}, {"names": ("B02",)}, "no numbers to decode with"),
        ({"names": ("B02",), "tags": {"BOA_ADD_OFFSET": "much"}}, {"names": ("B02",)}, "BOA_ADD_OFFSET is 'much'"),
        ({"names": ("B02",), "dtype": np.complex64}, {"names": ("B02",)}, "is of complex64"),
    ],
)
def test_scenes_that_do_not_go_together(tmp_path: Path, first: dict[str, Any], second: dict[str, Any], message: str):
    for name, options in (("a", dict(first)), ("b", dict(second))):
        count = len(options.get("names", ("B02",)))
        write(tmp_path / "set" / f"S2A_{name}.tif", noise(count, dtype=options.pop("dtype", np.uint16)), **options)
    refused(tmp_path / "set", tmp_path / "out", message)


def test_scale_in_some_scenes_only(tmp_path: Path):
    write(tmp_path / "set" / "LC08_a_B2.tif", noise(1), scale=2.75e-5, offset=-0.2)
    write(tmp_path / "set" / "LC08_b_B2.tif", noise(1))
    refused(tmp_path / "set", tmp_path / "out", "LC08_a_B2.tif has a scale or an offset, LC08_b_B2.tif has none")


def test_missing_band_in_one_of_several_patches(tmp_path: Path):
    for number in range(3):
        patch(tmp_path / "set", f"S2A_p{number}")
    (tmp_path / "set" / "S2A_p1" / "S2A_p1_B8A.tif").unlink()
    refused(tmp_path / "set", tmp_path / "out", "S2A_p1/S2A_p1 lacks B8A")


def test_bands_of_one_patch_that_do_not_go_together(tmp_path: Path):
    patch(tmp_path / "dtype", "S2A_p")
    write(tmp_path / "dtype" / "S2A_p" / "S2A_p_B02.tif", noise(1, 120, np.float32))
    refused(tmp_path / "dtype", tmp_path / "out", "bands differ in dtype: .*B02.tif float32")
    patch(tmp_path / "ground", "S2A_p")
    write(tmp_path / "ground" / "S2A_p" / "S2A_p_B02.tif", noise(1, 120), crs="EPSG:32634")
    refused(tmp_path / "ground", tmp_path / "out", "do not cover the same ground")
    patch(tmp_path / "nodata", "S2A_p")
    for band, value in (("B01", 1), ("B02", 2)):
        write(tmp_path / "nodata" / "S2A_p" / f"S2A_p_{band}.tif", noise(1, 20), nodata=value)
    refused(tmp_path / "nodata", tmp_path / "out", "bands declare different nodata values")


def test_band_names_can_be_given(tmp_path: Path):
    write(tmp_path / "set" / "anything.tif", noise(2))
    refused(tmp_path / "set", tmp_path / "out", "without names; give --bands with 2 names")
    refused(tmp_path / "set", tmp_path / "out", "has 2 bands, --bands names 1", options=Options(bands=("near",)))
    options = Options(bands=("near", "far"), level="L3", sensor="camera")
    contract = shard(tmp_path / "set", tmp_path / "out", options=options, progress=False)[""].contract()
    assert (contract.names, contract.sensor, contract.level) == (("near", "far"), "camera", "L3")


def test_no_georeference_is_said_and_no_place_invented(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write(tmp_path / "set" / "plain.tif", noise(1), names=("nir",), crs=None)
    with caplog.at_level("INFO"):
        contract = shard(tmp_path / "set", tmp_path / "out", progress=False)[""].contract()
    assert (contract.gsd_m, contract.bands[0].gsd_m) == (None, None)
    assert not {"gsd_m", "lat", "lon", "crs", "bounds"} & ShardReader(tmp_path / "out").meta(0).keys()
    assert "1 scenes have no georeference" in caplog.text


@pytest.mark.parametrize("keep", [40, 0.5])
def test_truncated_tiff_is_listed_below_the_limit_and_stops_above(tmp_path: Path, keep: float):
    """Cut inside the header the file cannot be opened, cut inside the pixels it cannot be read."""
    for number in range(4):
        write(
            tmp_path / "set" / f"S2A_{number}.tif",
            noise(1, 48, seed=number),
            names=("B02",),
            tiled=True,
            blockxsize=16,
            blockysize=16,
        )
    cut = tmp_path / "set" / "S2A_2.tif"
    data = cut.read_bytes()
    cut.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    manifest = shard(tmp_path / "set", tmp_path / "out", max_failed=0.25, progress=False)[""]
    assert (manifest.samples, [key for key, _ in manifest.skipped]) == (3, ["S2A_2"])
    refused(tmp_path / "set", tmp_path / "strict", r"1 of 4 files \(25.0%\) cannot be decoded.*S2A_2", max_failed=0.2)


def test_first_file_broken_is_only_listed(tmp_path: Path):
    patch(tmp_path / "set", "S2A_p0")
    patch(tmp_path / "set", "S2A_p1")
    (tmp_path / "set" / "S2A_p0" / "S2A_p0_B8A.tif").write_bytes(b"II*\0")
    manifest = shard(tmp_path / "set", tmp_path / "out", max_failed=0.5, progress=False)[""]
    assert (manifest.samples, manifest.skipped[0][0]) == (1, "S2A_p0/S2A_p0")
    (tmp_path / "set" / "S2A_p1" / "S2A_p1_B8A.tif").write_bytes(b"II*\0")
    refused(tmp_path / "set", tmp_path / "none", "none of the 2 scenes .* can be read")


def test_bombs_are_refused_unread(tmp_path: Path):
    write(tmp_path / "set" / "S2A_a.tif", noise(1), names=("B02",))
    place = {"crs": "EPSG:32633", "transform": from_origin(0, 0, 1, 1)}
    for name, side, options in (
        ("wide", 1 << 18, {"tiled": True, "blockxsize": 4096, "blockysize": 4096, "SPARSE_OK": True, "BIGTIFF": "YES"}),
        ("strip", 1 << 15, {"blockysize": 1 << 15, "SPARSE_OK": True, "compress": "deflate"}),
    ):
        with rasterio.open(
            tmp_path / "set" / f"S2A_{name}.tif",
            "w",
            driver="GTiff",
            count=1,
            height=side,
            width=side,
            dtype="uint16",
            **place,
            **options,
        ) as file:
            file.descriptions = ("B02",)
    manifest = shard(tmp_path / "set", tmp_path / "out", max_failed=0.8, progress=False)[""]
    assert manifest.samples == 1
    assert sorted(key for key, _ in manifest.skipped) == ["S2A_strip", "S2A_wide"]
    assert all("beyond the limit" in reason for _, reason in manifest.skipped)


def test_without_scenes(tmp_path: Path):
    (tmp_path / "set").mkdir()
    refused(tmp_path / "set", tmp_path / "out", "holds no images")
    write(tmp_path / "zip" / "S2A_a.tif", noise(13), names=tuple(f"b{n}" for n in range(13)))
    with zipfile.ZipFile(tmp_path / "scenes.zip", "w") as archive:
        archive.write(tmp_path / "zip" / "S2A_a.tif", "S2A_a.tif")
    refused(tmp_path / "scenes.zip", tmp_path / "out", "scenes in a zip must be unpacked")


def test_killed_ingest_of_scenes_continues_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for number in range(2):
        write(tmp_path / "set" / f"S2A_{number}.tif", noise(2, 64, seed=number), names=("B02", "B03"))
    monkeypatch.setattr(packer, "MAX_SAMPLES", 5)
    shard(tmp_path / "set", tmp_path / "whole", options=Options(chip=16), progress=False)
    add, count = ShardWriter.add, []

    def interrupted(*given: Any) -> None:
        count.append(1)
        if len(count) == 13:
            raise KeyboardInterrupt
        add(*given)

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(ShardWriter, "add", interrupted)
        shard(tmp_path / "set", tmp_path / "out", options=Options(chip=16), progress=False)
    shard(tmp_path / "set", tmp_path / "out", options=Options(chip=16), progress=False)
    whole, out = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("whole", "out"))
    assert whole == out
    assert len(whole) == 7 + 3
