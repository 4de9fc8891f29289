"""Several dates of one place: on one grid, in the order of time, what is missing a mask."""

import json
from pathlib import Path

import numpy as np
import pytest

from swath.shards.errors import InputError
from swath.shards.ingestion.work import Job, Rules, make
from swath.shards.sources.match import Dates
from swath.shards.sources.open import open_source
from swath.shards.sources.series import Series
from swath.shards.sources.source import Options
from tests.shards.sources.test_joined import CHIP, optical, place_of, read, scene

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning", "ignore::UserWarning")
WEST, NORTH = 500_000, 5_000_000  # in UTM 33: 15° E, 45.15° N


def series(folder: Path, dates: Dates, options: Options = CHIP) -> Series:
    return Series(open_source(folder / "s2", options), dates)


def test_dates_of_a_place_come_in_order(tmp_path: Path):
    for number, day in enumerate((20, 5, 11, 8, 25)):
        optical(tmp_path, f"202006{day:02d}T100000", value=1000 * (number + 1))
    optical(tmp_path, "20200601T000000", west=WEST + 50_000, side=32)  # another place
    source = series(tmp_path, Dates(2))
    assert "series: 5 of 1 date, 8 of 2 dates" in source.notes
    made = read(source)
    sample = made["S2A_MSIL2A_20200605T100000_y00032_x00000"]
    part = sample.parts["sentinel2"]
    assert part.pixels.shape == (4, 32, 32)
    assert part.valid is None
    assert (part.pixels[::2, 0, 0] // 1000).tolist() == [2, 4]  # days 5 and 8
    assert (part.pixels[1::2, 0, 0] // 1000).tolist() == [4, 8]
    assert sample.meta["time"] == "2020-06-05T10:00:00"
    assert sample.meta["times"] == {"sentinel2": ["2020-06-05T10:00:00", "2020-06-08T10:00:00"]}
    last = made["S2A_MSIL2A_20200625T100000_y00000_x00000"]
    assert last.meta["times"] == {"sentinel2": ["2020-06-25T10:00:00", None]}
    valid = last.parts["sentinel2"].valid
    assert valid is not None
    assert valid[0].all()
    assert not valid[1].any()
    assert (last.parts["sentinel2"].pixels[2:] == source.contracts["sentinel2"].nodata).all()
    assert source.contracts["sentinel2"].dates == 2
    assert source.contracts["sentinel2"].resampling is None
    least = series(tmp_path, Dates(2, at_least=2))
    assert len(least.items) == 8
    assert "5 series have fewer than 2 dates, and are left out" in least.notes


def test_a_series_spans_no_more_than_asked(tmp_path: Path):
    for day in (1, 3, 5, 20, 21):
        optical(tmp_path, f"202006{day:02d}T100000", side=32)
    for days, lengths in ((3, [2, 1, 2]), (4, [3, 2]), (100, [4, 1])):
        numbers = [item.place[1] for item in series(tmp_path, Dates(4, within_days=days)).items]
        assert [len(some) for some in numbers] == lengths


def test_dates_on_other_grids_are_read_on_the_first(tmp_path: Path):
    optical(tmp_path, "20200601T100000")
    optical(tmp_path, "20200602T100000", west=WEST + 130, north=NORTH - 70)  # reaches 19 columns of 32 in the west
    source = series(tmp_path, Dates(2))
    assert source.contracts["sentinel2"].resampling == "nearest onto the first date"
    made = read(source)
    assert len(made) == 4
    for key, sample in made.items():
        easting, northing = place_of(sample)
        part = sample.parts["sentinel2"]
        assert len(sample.meta["scenes"]) == (1 if key.endswith("y00000_x00000") else 2), key
        for date in range(len(sample.meta["scenes"])):
            seen = np.ones((32, 32), bool) if part.valid is None else part.valid[date] == 1
            assert seen.sum() >= 512
            assert np.abs(part.pixels[2 * date] - 1000.0 - easting)[seen].max() <= 0.5
            assert np.abs(part.pixels[2 * date + 1] - 2000.0 - northing)[seen].max() <= 0.5
    corner = made["S2A_MSIL2A_20200601T100000_y00000_x00000"]
    assert corner.meta["times"]["sentinel2"][1] is None


def test_scenes_that_share_little_ground_are_of_different_places(tmp_path: Path):
    optical(tmp_path, "20200601T100000", side=32)
    optical(tmp_path, "20200602T100000", side=32, west=WEST + 180)
    assert [item.place[1] for item in series(tmp_path, Dates(2)).items] == [(0,), (1,)]


def test_dates_of_different_offset_are_different_samples(tmp_path: Path):
    for day in range(1, 7):
        tags = {"BOA_ADD_OFFSET": "-1000"} if day % 2 else {}
        optical(tmp_path, f"202006{day:02d}T100000", side=32, tags=tags)
    for sample in read(series(tmp_path, Dates(3))).values():
        part = sample.parts["sentinel2"]
        days = [int(time[8:10]) % 2 for time in sample.meta["times"]["sentinel2"]]
        assert len(set(days)) == 1
        assert part.add == pytest.approx(-0.1 * days[0])


def test_a_modality_that_a_date_lacks_is_masked(tmp_path: Path):
    for day in (1, 2, 3):
        path = optical(tmp_path, f"202006{day:02d}T100000", side=32)
        if day != 2:
            scene(path.with_name(f"{path.stem}_sar.tif"), ("VV", "VH"), side=32, dtype=np.float32, value=day)
    (sample,) = read(series(tmp_path, Dates(3))).values()
    assert sample.parts["sentinel2"].valid is None
    valid = sample.parts["sentinel1"].valid
    assert valid is not None
    assert valid.reshape(3, -1).all(1).tolist() == [True, False, True]
    assert [time is None for time in sample.meta["times"]["sentinel1"]] == [False, True, False]
    json.dumps(sample.meta)


def test_a_scene_that_stands_twice_counts_once(tmp_path: Path):
    for name in ("_a", "_b"):
        optical(tmp_path, "20200601T100000", name, side=32)
    optical(tmp_path, "20200602T100000", side=32)
    source = series(tmp_path, Dates(3))
    assert [sample.meta["scenes"] for sample in read(source).values()] == [
        ["S2A_MSIL2A_20200601T100000_a", "S2A_MSIL2A_20200602T100000"]
    ]
    assert "1 scenes are of the same place and time as one before them, and are left out" in source.notes


def test_series_that_cannot_be(tmp_path: Path):
    optical(tmp_path, "x", side=32)
    with pytest.raises(InputError, match=r"S2A_MSIL2A_x has no time"):
        series(tmp_path, Dates(2))
    (tmp_path / "s2" / "S2A_MSIL2A_x.tif").unlink()
    optical(tmp_path, "20200601T100000", side=32)
    with pytest.raises(InputError, match="no place of s2 has 2 dates"):
        series(tmp_path, Dates(2, at_least=2))


def test_a_series_is_written_and_counted(tmp_path: Path):
    for day in (1, 2, 3):
        optical(tmp_path, f"202006{day:02d}T100000", side=32)
    source = series(tmp_path, Dates(2))
    chunk = make(source, [Job(n, item, f"k{n}", "", None) for n, item in enumerate(source.items)], Rules(0.5, 1, False))
    assert [one.failure or one.left_out for one in chunk.made] == [None, None]
    assert chunk.seen.statistics["sentinel2"].count.tolist() == [3 * 1024] * 2
    assert chunk.seen.statistics["sentinel2"].invalid.tolist() == [1024] * 2
