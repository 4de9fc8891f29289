"""Rasters of labels that go into shards beside the images: which, read back, and that they are no input."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import rasterio

from swath.shards.errors import InputError
from swath.shards.ingest import shard
from swath.shards.manifest import LabelMap, read_manifest
from swath.shards.reader import ShardReader
from swath.shards.reindex import reindex
from swath.shards.scenes import write_scenes
from swath.shards.sources.match import Dates
from swath.shards.sources.source import Options

PAIRS = Dates(2, 2, within_days=None, min_cover=0.5)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("maps") / "scenes"
    write_scenes(folder, count=2, size=80, seed=1, dates=3)
    return folder


def raster(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read(1)


def test_land_cover_lies_beside_the_image(scenes: Path, tmp_path: Path) -> None:
    shard(scenes, tmp_path / "out", options=Options(chip=32), progress=False)
    reader = ShardReader(tmp_path / "out")
    assert list(reader.manifest.maps) == ["landcover"] and reader.manifest.maps["landcover"].classes[1] == "water"
    assert list(reader.contracts) == ["sentinel2"]  # what is pretrained on is the image alone
    assert list(reader.chips([0, 1]).stored) == ["sentinel2"]
    for number in range(len(reader)):
        meta = reader.meta(number)
        top, left, height, width = meta["window"]
        given = raster(scenes / meta["source"].replace(".tif", "_landcover.tif"))[top : top + height, left : left + width]
        found = reader.label_map(number, "landcover")
        assert found is not None and found.dtype == np.uint8 and (found[0] == given).all()
    # any reader of WebDataset finds it, and the index can be rebuilt with it
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        member = next(name for name in tar.getnames() if name.endswith(".landcover.npy"))
        assert np.load(io.BytesIO(tar.extractfile(member).read())).shape == (32, 32)  # type: ignore[union-attr]
    before = (tmp_path / "out" / "index.bin").read_bytes()
    reindex(tmp_path / "out")
    assert (tmp_path / "out" / "index.bin").read_bytes() == before
    assert read_manifest(tmp_path / "out").maps == reader.manifest.maps


def test_what_changed_is_of_the_first_and_the_last_date(scenes: Path, tmp_path: Path) -> None:
    for count, expected in ((3, True), (2, False)):
        out = tmp_path / f"out{count}"
        shard(scenes, out, options=Options(chip=40, join=Dates(count, 2, None, 0.5)), progress=False)
        reader = ShardReader(out)
        assert reader.manifest.maps["change"] == LabelMap(classes={1: "unchanged", 2: "changed"})
        for number in range(len(reader)):
            meta, found = reader.meta(number), reader.label_map(number, "change")
            assert (found is not None) == expected
            if found is not None:
                top, left, height, width = meta["window"]
                given = raster(scenes / f"{meta['scenes'][0]}_change.tif")[top : top + height, left : left + width]
                assert (found[0] == given).all()
            first = raster(scenes / f"{meta['scenes'][0]}_landcover.tif")
            cover = reader.label_map(number, "landcover")
            assert cover is not None and cover.shape == (1, 40, 40) and np.isin(cover, np.unique(first)).all()


def test_series_say_nothing_of_change_left_out(scenes: Path, tmp_path: Path) -> None:
    one = shard(scenes, tmp_path / "one", options=Options(chip=40), progress=False)[""]
    two = shard(scenes, tmp_path / "two", options=Options(chip=40, join=Dates(3, 2, None, 0.5)), progress=False)[""]
    said = [any("change raster" in note for note in made.source["notes"]) for made in (one, two)]
    assert said == [True, False] and "change" not in one.maps


def test_a_change_raster_must_fit_where_it_is_used(scenes: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "given", count=1, size=64, seed=1, dates=2)
    path = tmp_path / "given" / "scene_0000_change.tif"
    with rasterio.open(path) as file:
        profile, values = file.profile, file.read()
    with rasterio.open(path, "w", **profile) as file:
        file.write(values)  # without its CLASSES
    with pytest.raises(InputError, match="has no CLASSES tag"):
        shard(tmp_path / "given", tmp_path / "out", options=Options(chip=32, join=PAIRS), progress=False)
    shard(tmp_path / "given", tmp_path / "out", options=Options(chip=32), progress=False)  # of one date nobody looks at it


def test_without_maps_the_manifest_is_as_before(tmp_path: Path) -> None:
    write_scenes(tmp_path / "given", count=1, size=64, seed=1)
    (tmp_path / "given" / "scene_0000_landcover.tif").unlink()
    shard(tmp_path / "given", tmp_path / "out", options=Options(chip=32), progress=False)
    assert "maps" not in json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "landcover" not in ShardReader(tmp_path / "out").index.columns


def test_workers_and_a_second_call_change_nothing(scenes: Path, tmp_path: Path) -> None:
    given = {"options": Options(chip=40, join=Dates(3, 2, None, 0.5)), "progress": False}
    one = shard(scenes, tmp_path / "one", **given)  # type: ignore[arg-type]
    two = shard(scenes, tmp_path / "two", workers=1, **given)  # type: ignore[arg-type]
    assert one[""].shards == two[""].shards and one[""].maps == two[""].maps
    assert shard(scenes, tmp_path / "one", **given) == one  # type: ignore[arg-type]
