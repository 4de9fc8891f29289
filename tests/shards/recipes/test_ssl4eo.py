"""SSL4EO-S12 v1: four seasons as a series, sizes of 263 to 265, no B10 in L2A, radar under other names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swath.shards.codec import DecodeError
from tests.shards.recipes.published import GSD_M, canonical, flat, opened, samples, tiff, values

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
L1C = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12")
L2A = tuple(name for name in L1C if name != "B10")
DAYS = ("20200318", "20200621", "20200924", "20201218")
ISO = ["2020-03-18T14:27:19", "2020-06-21T14:27:19", "2020-09-24T14:27:19", "2020-12-18T14:27:19"]


def scene(root: Path, folder: str, place: str, day: str, side: int = 264, **said: Any) -> Path:
    """One date: band k holds DN + 10000 · its season, so that neither bands nor dates can be mixed up."""
    season = DAYS.index(day) * 10_000
    name = f"{day}T142719_{day}T143654_T20LMH" if folder != "s1" else f"S1{'BABA'[DAYS.index(day)]}_IW_GRDH_1SDV_{day}T095921_x"
    path = root / folder / place / name
    for band in {"s1": ("VV", "VH"), "s2a": L2A, "s2c": L1C}[folder]:
        gsd_m = GSD_M.get(canonical(band), 10)
        dtype = np.float32 if folder == "s1" else np.uint16
        size = side if gsd_m == 10 else round(2640 / gsd_m)
        degrees = gsd_m / 111_320
        tiff(path / f"{band}.tif", flat(band, size, dtype, season), crs="EPSG:4326", gsd_m=degrees, west=10, north=45)
    (path / "metadata.json").write_text(json.dumps(said))
    return path


def expected(names: tuple[str, ...]) -> dict[str, list[int]]:
    return {canonical(n): [int(flat(n, 1, np.int64, 10_000 * season)[0, 0, 0]) for season in range(4)] for n in names}


def test_seasons_are_a_series_in_the_order_of_time(tmp_path: Path):
    for number, day in enumerate(DAYS):
        for folder in ("s2c", "s2a", "s1"):
            said = {"PROCESSING_BASELINE": "02.09", "CLOUDY_PIXEL_PERCENTAGE": number, "PRODUCT_ID": f"S2_{day}"}
            scene(tmp_path, folder, "0000042", day, (264, 263, 265, 264)[number], **({} if folder == "s1" else said))
    source = opened("ssl4eo_s12", tmp_path)
    assert {name: (c.dates, c.channels, c.level) for name, c in source.contracts.items()} == {
        "sentinel2_l1c": (4, 52, "L1C"), "sentinel2_l2a": (4, 48, "L2A"), "sentinel1": (4, 8, "sigma0")
    }  # fmt: skip
    ((item, sample),) = samples(source).values()
    assert (item.key, item.label, item.time) == ("0000042", None, None)
    for modality, names in (("sentinel2_l1c", L1C), ("sentinel2_l2a", L2A), ("sentinel1", ("VV", "VH"))):
        part = sample.parts[modality]
        assert part.pixels.shape[1:] == (256, 256)
        assert (part.valid, part.add) == (None, 0)
        wanted = expected(names)
        got = values(source, sample, modality)
        assert got == {name: sorted(numbers) for name, numbers in wanted.items()}
        for channel, band in enumerate(part.pixels):  # date after date, bands in order within
            season, number = divmod(channel, len(names))
            assert band[0, 0] == wanted[canonical(names[number])][season]
    assert sample.meta["times"] == {
        "sentinel2_l1c": ISO, "sentinel2_l2a": ISO, "sentinel1": [t.replace("14:27:19", "09:59:21") for t in ISO]
    }  # fmt: skip
    assert sample.meta["cloud_percent"]["sentinel2_l1c"] == [0, 1, 2, 3]
    assert source.contracts["sentinel2_l2a"].names == tuple(map(canonical, L2A))
    assert "B10" not in source.contracts["sentinel2_l2a"].names


def test_what_is_missing_is_masked(tmp_path: Path):
    for day in DAYS[:3]:
        scene(tmp_path, "s2c", "0000001", day)
    scene(tmp_path, "s1", "0000002", DAYS[0])
    source = opened("ssl4eo_s12", tmp_path)
    made = samples(source)
    assert list(source.contracts) == ["sentinel2_l1c", "sentinel1"]
    assert source.notes == (
        "sentinel2_l2a: no files, left out of the contracts",
        "1 samples lack sentinel1: it is masked",
        "1 samples lack sentinel2_l1c: it is masked",
    )
    part = made["0000001"][1].parts["sentinel2_l1c"]
    assert part.pixels.shape == (52, 256, 256)
    assert part.valid is not None
    assert part.valid.shape == (4, 256, 256)
    assert [int(v.min()) for v in part.valid] == [1, 1, 1, 0]
    assert part.valid[3].max() == 0
    assert made["0000001"][1].meta["times"]["sentinel2_l1c"] == [*ISO[:3], None]
    assert list(made["0000002"][1].parts) == ["sentinel1"]


def test_offset_by_the_named_baseline(tmp_path: Path):
    for number, day in enumerate(DAYS):
        scene(tmp_path, "s2a", "0000001", day, PROCESSING_BASELINE="04.00")
        scene(tmp_path, "s2a", "0000002", day, PROCESSING_BASELINE="03.01" if number else "04.00")
    source = opened("ssl4eo_s12", tmp_path)
    part = source.read(source.items[0]).parts["sentinel2_l2a"]
    assert (part.add, part.scale) == (-0.1, 1e-4)
    assert "PROCESSING_BASELINE" in part.scale_source
    with pytest.raises(DecodeError, match="dates have different radiometric offsets"):
        source.read(source.items[1])


def test_too_small_and_too_many(tmp_path: Path):
    for day in DAYS:
        scene(tmp_path, "s1", "0000001", day, 255)
        scene(tmp_path, "s1", "0000002", day)
    for band in ("VV", "VH"):
        tiff(tmp_path / "s1" / "0000002" / "S1A_IW_GRDH_1SDV_20210101T095921_x" / f"{band}.tif", flat(band, 264, np.float32))
    source = opened("ssl4eo_s12", tmp_path)
    assert "1 dates of sentinel1 beyond 4 are left out" in source.notes
    with pytest.raises(DecodeError, match=r"VV.tif is 255×255, the layout has at least 256×256"):
        source.read(source.items[0])
    source.read(source.items[1])
