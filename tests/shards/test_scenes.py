"""Synthetic scenes: what is on disk, that it repeats, and that the layers agree with one another."""

import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swath.shards.errors import InputError
from swath.shards.scenes import BANDS, write_scenes
from swath.shards.terrain import BROADLEAF, COVERS, WATER

rasterio = pytest.importorskip("rasterio")


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as raster:
        return raster.read()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain")
    write_scenes(out, count=6, size=128, seed=3)
    return out


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layer; the scenes of `plain`, with clouds."""
    out = tmp_path_factory.mktemp("full")
    write_scenes(out, count=3, size=128, seed=3, dates=3, sar=True, clouds=True)
    return out


def test_raster_carries_grid_bands_scale_and_tags(plain: Path) -> None:
    with rasterio.open(plain / "scene_0000.tif") as raster:
        assert raster.descriptions == BANDS and raster.count == 13
        assert set(raster.dtypes) == {"uint16"} and raster.nodata == 0
        assert raster.scales == (1e-4,) * 13 and raster.offsets == (0.0,) * 13
        assert 32601 <= raster.crs.to_epsg() <= 32660 and raster.res == (10, 10)
        assert 166_000 < raster.bounds.left < 834_000 and 0 < raster.bounds.bottom < 9_400_000
        assert raster.compression.name == "deflate"
        tags = raster.tags()
    assert (tags["SENSOR"], tags["LEVEL"], tags["SYNTHETIC"]) == ("sentinel2", "L1C", "yes")
    date.fromisoformat(tags["ACQUIRED"])


def test_large_scene_is_tiled(tmp_path: Path) -> None:
    write_scenes(tmp_path, count=1, size=300)
    with rasterio.open(tmp_path / "scene_0000.tif") as raster:
        assert raster.block_shapes[0] == (256, 256)


def test_land_cover_shares_the_grid_and_has_known_codes(plain: Path) -> None:
    met = set()
    for image in sorted(plain.glob("scene_????.tif")):
        with rasterio.open(image) as a, rasterio.open(image.with_name(f"{image.stem}_landcover.tif")) as b:
            assert (a.crs, a.transform, a.shape) == (b.crs, b.transform, b.shape)
            assert b.dtypes == ("uint8",) and b.nodata == 0
            assert b.colormap(1)[1] != b.colormap(1)[2]
            assert b.tags()["CLASSES"].split(",") == [f"{code}={name}" for code, name in enumerate(COVERS, 1)]
            cover = b.read(1)
            assert ((a.read() == 0) == (cover == 0)).all()
        met |= set(np.unique(cover).tolist())
    assert met <= set(range(len(COVERS) + 1)) and len(met) > 6


def test_some_scenes_have_cut_corners_and_some_have_none(plain: Path) -> None:
    missing = [(read(path)[0] == 0) for path in sorted(plain.glob("scene_????.tif"))]
    cut = [m for m in missing if m.any()]
    assert 0 < len(cut) < len(missing)
    for m in cut:
        assert m[[0, 0, -1, -1], [0, -1, 0, -1]].any() and m.mean() < 0.5


def test_reflectance_looks_like_sentinel_2(plain: Path) -> None:
    for path in sorted(plain.glob("scene_????.tif")):
        image = read(path).astype(float)
        cover = read(path.with_name(f"{path.stem}_landcover.tif"))[0]
        seen = image[:, cover > 0]
        cirrus = seen[BANDS.index("B10")]
        assert 8 < np.median(cirrus) < 30 and seen.max() < 12_000
        near_infrared, red = image[BANDS.index("B08")], image[BANDS.index("B04")]
        for code, darker, brighter in ((WATER, near_infrared, red), (BROADLEAF, red, near_infrared)):
            if (cover == code).sum() > 300:
                assert np.median(darker[cover == code]) < np.median(brighter[cover == code])


def test_coarse_bands_come_in_blocks(plain: Path) -> None:
    image, seen = read(plain / "scene_0000.tif"), read(plain / "scene_0000_landcover.tif")[0] > 0
    for name, factor in (("B11", 2), ("B8A", 2), ("B01", 6), ("B09", 6)):
        within = (np.arange(127) + 1) % factor != 0
        pairs = seen[:, 1:] & seen[:, :-1]
        same = image[BANDS.index(name)][:, 1:] == image[BANDS.index(name)][:, :-1]
        assert same[:, within][pairs[:, within]].all() and not same[:, ~within][pairs[:, ~within]].all()


def test_same_arguments_give_the_same_bytes_and_another_seed_does_not(full: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "again", count=3, size=128, seed=3, dates=3, sar=True, clouds=True)
    files = sorted(path.name for path in full.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in files:
        assert (full / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    write_scenes(tmp_path / "other", count=1, size=128, seed=4)
    for name in ("scene_0000.tif", "scene_0000_landcover.tif"):
        assert (full / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_further_scenes_dates_and_layers_leave_a_scene_as_it_was(plain: Path, full: Path) -> None:
    for stem in ("scene_0000", "scene_0001", "scene_0002"):
        assert (plain / f"{stem}_landcover.tif").read_bytes() == (full / f"{stem}_landcover.tif").read_bytes()
        clear = read(full / f"{stem}_valid.tif")[0] == 1
        untouched = np.kron(clear[:126, :126].reshape(21, 6, 21, 6).all((1, 3)), np.ones((6, 6), bool))
        difference = read(plain / f"{stem}.tif")[:, :126, :126].astype(int) - read(full / f"{stem}.tif")[:, :126, :126]
        # Thin cloud below the threshold of the mask remains, so most clear pixels are equal, not all.
        assert (difference[:, untouched] == 0).mean() > 0.5


def test_change_map_is_the_difference_of_the_land_covers(full: Path) -> None:
    struck = 0
    for stem in ("scene_0000", "scene_0001", "scene_0002"):
        first, last = read(full / f"{stem}_landcover.tif"), read(full / f"{stem}_d2_landcover.tif")
        seen = (first > 0) & (last > 0)
        change = read(full / f"{stem}_change.tif")
        assert (change == np.where(seen, 1 + (first != last), 0)).all()
        assert (change == 2).sum() < 0.4 * seen.sum()
        struck += (change == 2).sum()
    assert struck > 100


def test_dates_differ_and_follow_one_another(full: Path) -> None:
    days = []
    for suffix in ("", "_d1", "_d2"):
        with rasterio.open(full / f"scene_0000{suffix}.tif") as raster:
            days.append(raster.tags()["ACQUIRED"])
    assert days == sorted(set(days))
    assert (read(full / "scene_0000.tif") != read(full / "scene_0000_d1.tif")).mean() > 0.5


def test_sar_is_in_decibels_and_dark_over_water(full: Path) -> None:
    water, land = [], []
    for stem in ("scene_0000", "scene_0001", "scene_0002", "scene_0000_d1"):
        with rasterio.open(full / f"{stem}_sar.tif") as raster:
            assert raster.descriptions == ("VV", "VH") and np.isnan(raster.nodata)
            assert raster.dtypes == ("float32", "float32") and raster.tags()["UNITS"] == "dB"
            echo = raster.read()
        cover = read(full / f"{stem}_landcover.tif")[0]
        assert (np.isnan(echo) == (cover == 0)).all()
        seen = echo[:, cover > 0]
        assert seen.min() >= -40 and seen.max() <= 10
        assert -18 < np.median(seen[0]) < -5 and 3 < np.median(seen[0] - seen[1]) < 12
        water.append(echo[0][cover == WATER])
        land.append(echo[0][(cover > 0) & (cover != WATER)])
    assert np.concatenate(water).size > 100
    assert np.median(np.concatenate(water)) < np.median(np.concatenate(land)) - 4


def test_clouds_brighten_shadows_darken_and_the_mask_says_where(plain: Path, full: Path) -> None:
    for stem in ("scene_0000", "scene_0001", "scene_0002"):
        mask = read(full / f"{stem}_valid.tif")[0]
        assert ((mask == 0) == (read(full / f"{stem}_landcover.tif")[0] == 0)).all()
        assert set(np.unique(mask)) - {0} == {1, 2, 3} and (mask == 1).mean() > 0.3
        green = BANDS.index("B03")
        without, under = read(plain / f"{stem}.tif")[green].astype(int), read(full / f"{stem}.tif")[green].astype(int)
        gain = under - without
        assert np.median(gain[mask == 2]) > 500 and (gain[mask == 2] > 0).mean() > 0.9
        assert np.median(gain[mask == 3]) < -50 and (gain[mask == 3] < 0).mean() > 0.8


def test_returned_paths_and_listing_name_every_file(tmp_path: Path) -> None:
    lines: list[str] = []
    paths = write_scenes(tmp_path / "new", count=2, size=64, dates=2, sar=True, clouds=True, progress=lines.append)
    assert [path.name for path in paths] == [
        "scene_0000.tif",
        "scene_0000_d1.tif",
        "scene_0001.tif",
        "scene_0001_d1.tif",
    ]
    listing = json.loads((tmp_path / "new" / "scenes.json").read_text())
    named = {"scenes.json"} | {scene["change"] for scene in listing["scenes"]}
    for scene in listing["scenes"]:
        for each in scene["dates"]:
            named |= {each[layer] for layer in ("image", "landcover", "sar", "valid")}
    assert named == {path.name for path in (tmp_path / "new").iterdir()}
    assert listing["classes"]["1"] == "water" and listing["size"] == 64 and listing["seed"] == 0
    assert len(lines) == 2 and lines[0].startswith("scene_0000")


def test_a_failed_write_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scenes(tmp_path, count=1, size=64)
    before = (tmp_path / "scene_0000.tif").read_bytes()

    def fail(handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_scenes(tmp_path, count=1, size=64, seed=1)
    assert (tmp_path / "scene_0000.tif").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scene_0000.tif", "scene_0000_landcover.tif"]


@pytest.mark.parametrize(("name", "value"), [("count", 0), ("size", 63), ("dates", 0), ("seed", -1)])
def test_bad_arguments_are_named(tmp_path: Path, name: str, value: int) -> None:
    arguments: dict[str, Any] = {"count": 1, "size": 64, "dates": 1, "seed": 0, name: value}
    with pytest.raises(InputError, match=rf"{name} is {value}; it must be at least"):
        write_scenes(tmp_path / "none", **arguments)
    assert not (tmp_path / "none").exists()


def test_without_rasterio_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(InputError, match=r"swath\[geo\]"):
        write_scenes(tmp_path, count=1, size=64)
