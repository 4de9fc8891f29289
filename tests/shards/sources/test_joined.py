"""Partners by footprint, table and key, and series: on the same ground, nearest in time, nothing lost uncounted."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swath.shards.bands import Band
from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.ingestion.work import Job, Rules, make
from swath.shards.sources.joined import Joined
from swath.shards.sources.match import Dates, Pairs, boxes, covers, days_apart, neighbours
from swath.shards.sources.open import open_source
from swath.shards.sources.planned import Planned, contract
from swath.shards.sources.scene import Grid
from swath.shards.sources.series import Series
from swath.shards.sources.source import Item, Options, Part, Sample

rasterio = pytest.importorskip("rasterio")
from rasterio.crs import CRS  # noqa: E402
from rasterio.transform import from_origin  # noqa: E402
from rasterio.warp import transform as warp  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning", "ignore::UserWarning")
WEST, NORTH = 500_000, 5_000_000  # in UTM 33: 15° E, 45.15° N
CHIP = Options(chip=32)


def scene(
    path: Path, bands: Sequence[str], *, side: int = 64, gsd: float = 10, west: float = WEST, north: float = NORTH,
    crs: str = "EPSG:32633", dtype: Any = np.uint16, value: int = 1000, nodata: float | None = None,
    tags: dict[str, str] | None = None,
) -> Path:  # fmt: skip
    """Every pixel tells its place in UTM 33, in steps of 10 m: band b holds value · (b + 1) + easting, the last one northing."""
    pixels = np.empty((len(bands), side, side))
    place = from_origin(west, north, gsd, gsd)
    columns, rows = np.meshgrid(np.arange(side) + 0.5, np.arange(side) + 0.5)
    x, y = place.a * columns + place.c, place.e * rows + place.f
    if crs != "EPSG:32633":
        x, y = (np.reshape(axis, x.shape) for axis in warp(crs, "EPSG:32633", x.ravel(), y.ravel())[:2])
    for number in range(len(bands)):
        pixels[number] = value * (number + 1) + (x - WEST) / 10
    pixels[-1] = value * len(bands) + (NORTH - y) / 10
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="GTiff", count=len(bands), height=side, width=side, dtype=dtype, crs=crs, transform=place, nodata=nodata
    ) as file:
        file.write(np.round(pixels).astype(dtype) if np.dtype(dtype).kind in "iu" else pixels.astype(dtype))
        file.descriptions = tuple(bands)
        file.update_tags(**(tags or {}))
    return path


def optical(folder: Path, time: str = "20200610T101000", name: str = "", **options: Any) -> Path:
    return scene(folder / "s2" / f"S2A_MSIL2A_{time}{name}.tif", ("B02", "B03"), **options)


def radar(folder: Path, time: str = "20200611T050000", name: str = "", **options: Any) -> Path:
    options = {"dtype": np.float32, "value": 5000} | options
    return scene(folder / "s1" / f"S1A_IW_{time}{name}.tif", ("VV", "VH"), **options)


def joined(folder: Path, options: Options = CHIP, **rule: Any) -> Joined:
    pairs = Pairs(str(folder / "s1"), **rule)
    return Joined(open_source(folder / "s2", options), open_source(folder / "s1", Options()), pairs)


def read(source: Joined | Series) -> dict[str, Sample]:
    return {item.key: source.read(item) for item in source.items}


def place_of(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """(easting, northing) that the pixels of a radar partner must hold, (32, 32)."""
    west, _, _, north = sample.meta["bounds"]
    steps = np.arange(32) + 0.5
    return np.broadcast_to((west - WEST) / 10 + steps, (32, 32)), np.broadcast_to((NORTH - north) / 10 + steps[:, None], (32, 32))


def counted(source: Joined) -> tuple[int, int, int, int]:
    """(all, matched, unmatched, late) as the notes say."""
    (line,) = [note for note in source.notes if note.startswith("joined by")]
    found = re.search(r"(\d+) of (\d+) samples matched, (\d+) unmatched(?:, (\d+) late)?", line)
    assert found is not None
    matched, total, unmatched, late = (int(number or 0) for number in found.groups())
    return total, matched, unmatched, late


@pytest.mark.parametrize(
    ("other", "tolerance"),
    [
        pytest.param({"side": 128, "west": WEST - 320, "north": NORTH + 320}, 1e-3, id="same grid, shifted by whole pixels"),
        pytest.param({"side": 64, "gsd": 20, "west": WEST - 320, "north": NORTH + 320}, 0.51, id="coarser"),
        # 6° of another zone turn the grid by about 4°, so that its corners reach out
        pytest.param({"side": 128, "west": 28_500, "north": NORTH + 15_000, "crs": "EPSG:32634"}, 0.85, id="another zone"),
    ],
)
def test_a_partner_lies_on_the_same_ground(tmp_path: Path, other: dict[str, Any], tolerance: float):
    optical(tmp_path)
    if other.get("crs"):
        x, y = warp("EPSG:32633", "EPSG:32634", [WEST + 320], [NORTH - 320])[:2]
        other |= {"west": round(x[0], -1) - 640, "north": round(y[0], -1) + 640}
    radar(tmp_path, **other)
    source = joined(tmp_path)
    assert counted(source) == (4, 4, 0, 0)
    for sample in read(source).values():
        easting, northing = place_of(sample)
        own, partner = sample.parts["sentinel2"].pixels, sample.parts["sentinel1"]
        assert np.abs(own[0] - 1000 - easting).max() <= 0.5
        assert partner.pixels.dtype == np.float32
        assert partner.valid is None
        assert np.abs(partner.pixels[0] - 5000 - easting).max() <= tolerance
        assert np.abs(partner.pixels[1] - 10_000 - northing).max() <= tolerance
        assert (partner.scale, partner.add) == (1, 0)
        assert sample.meta["times"] == {"sentinel1": ["2020-06-11T05:00:00"]}
        assert sample.meta["partner"] == "S1A_IW_20200611T050000"


def test_contracts_are_a_union_and_say_what_was_resampled(tmp_path: Path):
    optical(tmp_path)
    radar(tmp_path, gsd=20)
    contracts = joined(tmp_path).contracts
    assert list(contracts) == ["sentinel2", "sentinel1"]
    assert contracts["sentinel2"] == open_source(tmp_path / "s2", CHIP).contracts["sentinel2"]
    radar_contract = contracts["sentinel1"]
    assert (radar_contract.names, radar_contract.unit) == (("VV", "VH"), "dB")
    assert (radar_contract.gsd_m, radar_contract.resampling) == (10, "nearest onto the grid of sentinel2")


@pytest.mark.parametrize(("dtype", "nodata"), [(np.float32, None), (np.uint16, None), (np.uint16, 0), (np.int16, -9999)])
def test_beyond_its_scene_a_partner_is_a_mask(tmp_path: Path, dtype: Any, nodata: float | None):
    optical(tmp_path, side=32)
    radar(tmp_path, side=32, west=WEST + 120, dtype=dtype, nodata=nodata)
    (sample,) = read(joined(tmp_path)).values()
    part = sample.parts["sentinel1"]
    assert part.valid is not None
    assert (part.valid == (np.arange(32) >= 12)).all()
    assert sample.parts["sentinel2"].valid is None
    assert np.abs(part.pixels[0, :, 12:] - 5000 - np.arange(12.5, 32)).max() <= 0.5
    source = joined(tmp_path, min_cover=0.7)
    assert counted(source) == (1, 0, 1, 0)
    assert list(read(source).popitem()[1].parts) == ["sentinel2"]


def test_a_partner_of_nodata_is_none(tmp_path: Path):
    optical(tmp_path, side=32)
    path = radar(tmp_path, side=32)
    with rasterio.open(path, "r+") as file:
        pixels = file.read()
        pixels[:, :20] = np.nan
        file.write(pixels)
    (sample,) = read(joined(tmp_path)).values()
    assert list(sample.parts) == ["sentinel2"]
    assert "partner" not in sample.meta
    source = joined(tmp_path, paired_only=True)
    job = Job(0, source.items[0], "a", "", None)
    assert make(source, [job], Rules(0.5, 1, False)).made[0].left_out == "no modality is there"
    (sample,) = read(joined(tmp_path, min_cover=0.3)).values()
    assert (sample.parts["sentinel1"].valid == (np.arange(32) >= 20)[:, None]).all()


def test_the_nearest_in_time_wins_then_the_name(tmp_path: Path):
    optical(tmp_path, "20200610T100000", side=32)
    for time, name in (("20200612T090000", ""), ("20200608T110000", "_b"), ("20200608T110000", "_a"), ("20200501T000000", "")):
        radar(tmp_path, time, name)
    (sample,) = read(joined(tmp_path)).values()
    assert sample.meta["partner"] == "S1A_IW_20200608T110000_a"  # 47 hours before; the one after is as far
    (tmp_path / "s1" / "S1A_IW_20200608T110000_a.tif").unlink()
    (tmp_path / "s1" / "S1A_IW_20200608T110000_b.tif").unlink()
    (sample,) = read(joined(tmp_path)).values()
    assert sample.meta["partner"] == "S1A_IW_20200612T090000"
    late = joined(tmp_path, within_days=1)
    assert counted(late) == (1, 0, 0, 1)
    assert "2 of the partners belong to no sample" in late.notes
    assert counted(joined(tmp_path, within_days=2)) == (1, 1, 0, 0)


def test_each_chip_has_its_own_partner(tmp_path: Path):
    """The radar scene that is nearer in time reaches one chip only."""
    optical(tmp_path)
    radar(tmp_path, "20200610T120000", side=40, west=WEST - 80)
    radar(tmp_path, "20200615T120000", side=80, west=WEST)
    partners = {key[-13:]: sample.meta["partner"][7:15] for key, sample in read(joined(tmp_path)).items()}
    assert partners.pop("y00000_x00000") == "20200610"
    assert set(partners.values()) == {"20200615"}
    assert counted(joined(tmp_path, within_days=2)) == (4, 1, 0, 3)


@pytest.mark.parametrize("seed", range(12))
def test_counts_add_up_and_agree_with_brute_force(tmp_path: Path, seed: int):
    """Random scenes of the same zone, where coverage can be counted in pixels."""
    draw = np.random.default_rng(seed)
    days, cover = float(draw.integers(0, 6)), float(draw.choice([0.2, 0.5, 0.9, 1.0]))
    ours, theirs = [], []
    for name, make_one, found in (("o", optical, ours), ("p", radar, theirs)):
        for number in range(4):
            west, north = (int(n) * 10 for n in draw.integers(-60, 60, 2))
            day = int(draw.integers(1, 10))
            path = make_one(tmp_path, f"2020061{day % 10}T120000", f"_{name}{number}", west=WEST + west, north=NORTH + north)
            found.append((path.stem, west // 10, -north // 10, day % 10))
    for paired in (False, True):
        expected = {"matched": 0, "unmatched": 0, "late": 0}
        partners = {}
        for stem, x, y, day in sorted(ours):
            for top in (0, 32):
                for left in (0, 32):
                    near = []
                    for other, ox, oy, oday in theirs:
                        wide = max(0, min(x + left + 32, ox + 64) - max(x + left, ox))
                        high = max(0, min(y + top + 32, oy + 64) - max(y + top, oy))
                        if wide * high / 1024 >= cover:
                            near.append((abs(day - oday), other))
                    late = bool(near) and min(near)[0] > days
                    expected["unmatched" if not near else "late" if late else "matched"] += 1
                    partners[f"{stem}_y{top:05d}_x{left:05d}"] = None if not near or late else min(near)[1]
        if paired and not expected["matched"]:
            with pytest.raises(InputError, match="has a partner"):
                joined(tmp_path, within_days=days, min_cover=cover, paired_only=True)
            continue
        source = joined(tmp_path, within_days=days, min_cover=cover, paired_only=paired)
        total, matched, unmatched, late = counted(source)
        assert total == matched + unmatched + late == 16
        assert len(source.items) == (matched if paired else 16)
        assert (matched, unmatched, late) == tuple(expected.values())
        for key, sample in read(source).items():
            assert sample.meta.get("partner") == partners[key]
            assert ("sentinel1" in sample.parts) == (partners[key] is not None)


def test_a_table_joins_and_counts_what_it_cannot(tmp_path: Path):
    for number in range(3):
        optical(tmp_path, name=f"_{number}", side=32)
    radar(tmp_path, name="_x")
    radar(tmp_path, "20200620T050000", name="_y")
    table = tmp_path / "pairs.csv"
    s2, s1 = "S2A_MSIL2A_20200610T101000", "S1A_IW_2020061"
    table.write_text(
        f"key,other,note\n{s2}_0,{s1}1T050000_x,\n{s2}_1.tif,S1A_IW_20200620T050000_y.tif,\n{s2}_1,{s1}1T050000_x,\n"
        f"{s2}_9,{s1}1T050000_x,\n{s2}_2,S1A_none,\n"
    )
    source = joined(tmp_path, by="table", table=str(table))
    partners = {key[-1]: sample.meta.get("partner", "none")[-1] for key, sample in read(source).items()}
    assert partners == {"0": "x", "1": "x", "2": "e"}
    assert counted(source) == (3, 2, 1, 0)
    assert "1 samples have several partners by table: the nearest in time is taken, or the first by name" in source.notes
    assert {"1 rows of the table name nothing in s2", "1 rows of the table name no partner in s1"} <= set(source.notes)
    mark = source.fingerprint
    table.write_text(table.read_text() + f"{s2}_2,{s1}1T050000_x,\n")
    assert joined(tmp_path, by="table", table=str(table)).fingerprint != mark


def test_scenes_of_the_same_name_are_joined_by_key(tmp_path: Path):
    for name in ("a", "b"):
        scene(tmp_path / "s2" / "x" / f"{name}.tif", ("B02", "B03"), side=32, tags={"SENSOR": "sentinel2"})
    scene(tmp_path / "s1" / "x" / "b.tif", ("VV", "VH"), side=64, dtype=np.float32, tags={"SENSOR": "sentinel1"})
    source = joined(tmp_path, by="key")
    assert {key: "sentinel1" in sample.parts for key, sample in read(source).items()} == {"x/a": False, "x/b": True}
    assert counted(source) == (2, 1, 1, 0)


@dataclass(kw_only=True)
class Drawers(Planned):
    """Samples without a place, of one band that tells the number of the item."""

    def read(self, item: Item) -> Sample:
        if item.place is None:
            raise DecodeError("torn")
        (name,) = self.contracts
        return Sample(
            {name: Part(np.full((1, 4, 4), item.place, np.uint8))}, item.label, {"time": item.time, "source": item.lookup}
        )


def drawers(name: str, items: list[Item]) -> Drawers:
    band = contract(name, [Band(name="a")], "uint8", sensor="camera", level="raw", unit="digital number")
    return Drawers(dataset=name, kind="drawers", contracts={name: band}, items=items, fingerprint=name)


def test_what_has_no_ground_is_joined_as_it_is():
    own = drawers("thermal", [Item(key, f"t/{key}.png", "field", n, time="2020-01-05") for n, key in enumerate("abcd")])
    days = {"b": ["2020-01-01", "2020-01-06T10:00:00"], "c": ["2020-01-09"], "d": ["2020-01-05"], "e": ["2020-01-05"]}
    pairs = [(key, day) for key, several in days.items() for day in several]
    other = drawers(
        "visible",
        [Item(key, f"v/{key}{n}.png", None, None if key == "d" else 10 + n, time=t) for n, (key, t) in enumerate(pairs)],
    )
    with pytest.raises(InputError, match=r"joining by footprint needs scenes with a georeference; thermal \(drawers\) has none"):
        Joined(own, other, Pairs("v"))
    source = Joined(own, other, Pairs("v", "key", within_days=3))
    assert counted(source) == (4, 2, 1, 1)
    assert "1 samples have several partners by key: the nearest in time is taken, or the first by name" in source.notes
    a, b, c = (source.read(item) for item in source.items[:3])
    assert (sorted(a.parts), sorted(b.parts), sorted(c.parts)) == (["thermal"], ["thermal", "visible"], ["thermal"])
    assert (int(b.parts["thermal"].pixels[0, 0, 0]), int(b.parts["visible"].pixels[0, 0, 0])) == (1, 11)
    assert (b.label, b.meta["time"], b.meta["times"]) == ("field", "2020-01-05", {"visible": ["2020-01-06T10:00:00"]})
    with pytest.raises(DecodeError, match="its partner: torn"):
        source.read(source.items[3])
    with pytest.raises(InputError, match="thermal and thermal both hold thermal"):
        Joined(own, own, Pairs("t", "key"))
    with pytest.raises(InputError, match="needs scenes with a georeference"):
        Series(own, Dates(2))


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        ({"within_days": -1}, "--within-days must be at least 0"),
        ({"within_days": float("nan")}, "--within-days must be at least 0"),
        ({"min_cover": 0}, "--min-cover is a share above 0"),
        ({"by": "table", "table": "nowhere.csv"}, "nowhere.csv cannot be read"),
        ({"within_days": 3}, "has no time, so it cannot be joined within days"),
    ],
)
def test_what_cannot_be_joined_is_one_line(tmp_path: Path, rule: dict[str, Any], line: str):
    optical(tmp_path, "x", side=32)
    radar(tmp_path)
    with pytest.raises(InputError, match=line) as caught:
        joined(tmp_path, **rule)
    assert "\n" not in str(caught.value)
    assert counted(joined(tmp_path)) == (1, 1, 0, 0)  # without a limit no time is needed


def test_tables_that_cannot_be_understood(tmp_path: Path):
    optical(tmp_path, side=32)
    radar(tmp_path, name="/x")
    table = tmp_path / "pairs.csv"
    for text, line in (("a,b\n1,2\n", "has no column key, other"), ("key,other\n", "has no rows"), ("key,other\n\0\n", "")):
        table.write_text(text)
        with pytest.raises(InputError, match=line):
            joined(tmp_path, by="table", table=str(table), paired_only=True)
    scene(tmp_path / "s1" / "S1_1" / "x.tif", ("VV", "VH"), dtype=np.float32)
    scene(tmp_path / "s1" / "S1_2" / "x.tif", ("VV", "VH"), dtype=np.float32)
    table.write_text("key,other\nS2A_MSIL2A_20200610T101000,x\n")
    with pytest.raises(InputError, match=r"x could be .* or .* of s1; write more of the path"):
        joined(tmp_path, by="table", table=str(table))


def test_rules_from_the_command_line():
    assert Pairs.of("b", "footprint", within_days=3.0) == Pairs("b", within_days=3.0)
    assert Pairs.of("b", "key").by == "key"
    assert Pairs.of("b", "table=x=y.csv") == Pairs("b", "table", "x=y.csv")
    for wrong in ("table", "table=", "near", "key=3"):
        with pytest.raises(InputError, match="is none of footprint, key and table=FILE"):
            Pairs.of("b", wrong)
    for rule, line in (((1,), "at least 2"), ((3, 4), "between 1 and"), ((3, 0), "between 1 and")):
        with pytest.raises(InputError, match=line):
            Dates(*rule)


def test_a_damaged_partner_is_named(tmp_path: Path):
    optical(tmp_path, side=32)
    path = radar(tmp_path)
    radar(tmp_path, "20200801T000000")
    (tmp_path / "s1" / "S1A_IW_20200801T000000.tif").write_bytes(b"II*\0nothing")
    source = joined(tmp_path)
    assert "1 scenes of the partners cannot be read" in source.notes
    path.write_bytes(path.read_bytes()[:2000])
    job = Job(0, source.items[0], "a", "", None)
    (made,) = make(source, [job], Rules(0.5, 1, False)).made
    assert made.failure is not None
    assert made.failure.startswith("its partner: S1A_IW_20200611T050000.tif")


def test_days():
    assert days_apart("2020-01-01T00:00:00", "2020-01-03T12:00:00") == 2.5
    assert days_apart("2020-01-01", "2020-01-01T23:00:00") == 0
    assert days_apart("2020-01-02T01:00:00+02:00", "2020-01-01T23:00:00") == 0
    assert days_apart(None, "2020-01-01") == float("inf")


def grid(west: float, north: float, side: int, gsd: float, crs: str) -> Grid:
    return Grid(side, side, from_origin(west, north, gsd, gsd), CRS.from_string(crs))


def test_boxes_meet_across_zones_and_the_date_line():
    at = [
        grid(300_000, 5_000_000, 100, 1000, "EPSG:32633"), grid(-180, 10, 10, 0.1, "EPSG:4326"),
        grid(179.5, 10, 10, 0.1, "EPSG:4326"), grid(-1e5, 1e5, 200, 1000, "EPSG:3031"), grid(0, -89, 10, 0.1, "EPSG:4326"),
    ]  # fmt: skip
    assert [found.tolist() for found in neighbours(boxes(at), boxes(at))] == [[0], [1, 2], [1, 2], [3, 4], [3, 4]]
    assert [found.tolist() for found in neighbours(boxes(at[:1]), np.zeros((0, 2, 3)))] == [[]]
    column = [grid(89.5, lat, 10, 0.1, "EPSG:4326") for lat in (20.5, -19.5)]  # of equal x and y
    assert [found.tolist() for found in neighbours(boxes(column), boxes(column))] == [[0], [1]]


def test_shares_are_of_the_chip():
    own = grid(WEST, NORTH, 64, 10, "EPSG:32633")
    others = [grid(WEST + 80, NORTH, 64, 10, "EPSG:32633"), grid(WEST - 5e5, NORTH, 64, 10, "EPSG:32633"), own]
    windows = np.array([[0, 0, 32, 32], [0, 32, 32, 32], [32, 0, 16, 16]])
    assert covers(own, windows, others).tolist() == [[0.75, 1, 0.5], [0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize(("crs", "turn"), [("EPSG:32634", 0), ("EPSG:32633", 30), ("EPSG:4326", 0)])
def test_shares_on_turned_grids_are_those_of_the_pixels(crs: str, turn: float):
    own = grid(WEST, NORTH, 64, 10, "EPSG:32633")
    x, y = (axis[0] for axis in warp("EPSG:32633", crs, [WEST + 300], [NORTH - 100])[:2])
    step = 10 / 111_320 if crs == "EPSG:4326" else 10
    place = from_origin(x, y, step, step)
    radians = np.radians(turn)
    a, b = step * np.cos(radians), step * np.sin(radians)
    other = Grid(50, 70, type(place)(a, b, place.c, b, -a, place.f), CRS.from_string(crs))
    windows = np.array([[top, left, 24, 40] for top in (0, 20, 40) for left in (0, 24)])
    expected = []
    for top, left, height, width in windows.tolist():
        columns, rows = np.meshgrid(np.arange(left, left + width) + 0.5, np.arange(top, top + height) + 0.5)
        ground = [axis.ravel().tolist() for axis in own.at(columns, rows)]
        x, y = (np.array(axis) for axis in warp(own.crs, other.crs, *ground)[:2])
        back = ~other.transform
        px, py = back.a * x + back.b * y + back.c, back.d * x + back.e * y + back.f
        expected.append(((px >= 0) & (px <= 70) & (py >= 0) & (py <= 50)).mean())
    assert min(expected) < 0.2 < 0.5 < max(expected) < 1
    assert np.abs(covers(own, windows, [other])[0] - expected).max() <= 2 / (24 * 40)  # pixels whose centre is on the edge


def test_a_partner_keeps_its_mask_scale_and_offset(tmp_path: Path):
    """Optical partners of radar chips, with a mask beside them and an offset of their own."""
    optical(tmp_path, side=48, west=WEST - 80, tags={"BOA_ADD_OFFSET": "-1000"})
    radar(tmp_path, side=32)
    mask = np.ones((48, 48), np.uint8)
    mask[:, 12:20], mask[:, 20:24] = 2, 0
    path = tmp_path / "s2" / "S2A_MSIL2A_20200610T101000_valid.tif"
    place = from_origin(WEST - 80, NORTH, 10, 10)
    with rasterio.open(
        path, "w", driver="GTiff", count=1, height=48, width=48, dtype="uint8", crs="EPSG:32633", transform=place
    ) as file:
        file.write(mask[None])
    source = Joined(open_source(tmp_path / "s1", CHIP), open_source(tmp_path / "s2", Options()), Pairs("s2"))
    (sample,) = read(source).values()
    part = sample.parts["sentinel2"]
    assert (part.scale, part.add) == (1e-4, pytest.approx(-0.1))
    assert part.scale_source.endswith("file tag: BOA_ADD_OFFSET")
    assert part.valid is not None
    assert (part.valid == mask[:32, 8:40]).all()
    assert part.pixels.dtype == np.uint16
