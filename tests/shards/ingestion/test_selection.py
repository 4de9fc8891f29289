"""What is taken of a source, by place, date, cloud and as a sample; what is told of the rest; and what stops an ingest."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.path import Path as Outline

from swath.launch.cli import main
from swath.shards import ingest
from swath.shards.bands import Band, InputContract, Normalisation
from swath.shards.errors import InputError
from swath.shards.ingest import Blocks, shard
from swath.shards.ingestion import packer
from swath.shards.ingestion.quality import LeftOut
from swath.shards.ingestion.selection import Selection, drawn, period, region, select
from swath.shards.ingestion.work import Job
from swath.shards.manifest import Manifest, read_manifest
from swath.shards.reader import ShardReader
from swath.shards.sources.source import Item, Options, Part, Sample

_NM = {"B02": 492.0, "B03": 560.0, "B04": 665.0}
DAY = 86_400
Y2019 = 17_897 * DAY  # 2019-01-01


def contract(modality: str, names: tuple[str, ...], **given: Any) -> InputContract:
    none = tuple(0.0 for _ in names)
    return InputContract(
        modality=modality, sensor=given.pop("sensor", "unknown"), level="unknown", unit=given.pop("unit", "digital number"),
        bands=tuple(Band(name=n, wavelength_nm=_NM.get(n)) for n in names), dtype=given.pop("dtype", "uint16"),
        normalisation=Normalisation(mean=none, std=none, pixels=tuple(0 for _ in names)), **given,
    )  # fmt: skip


class Made:
    """A source in memory: `read` is given."""

    dataset, kind, classes, fingerprint, notes = "made", "made", ("a", "b", "c"), "1", ()

    def __init__(self, items: list[Item], contracts: dict[str, InputContract], read: Callable[[Item], Sample]) -> None:
        self.items, self.contracts, self.read = items, contracts, read


def grey(item: Item) -> Sample:
    seed = int(item.key.lstrip("x"))
    return Sample({"image": Part(np.random.default_rng(seed).integers(1, 99, (1, 4, 4)).astype(np.uint16))}, item.label)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Manifest]]:
    """shard() of a source in memory."""

    def run(items: list[Item], *, contracts: Any = None, read: Any = grey, out: str = "out", **given: Any) -> dict[str, Manifest]:
        source = Made(items, contracts or {"image": contract("image", ("grey",))}, read)
        monkeypatch.setattr(ingest, "open_source", lambda *_: source)
        return shard(tmp_path, tmp_path / out, progress=False, **given)

    return run


def spread(count: int = 60) -> list[Item]:
    """Along a parallel, one degree apart across the date line; a month apart from 2019 on; clouds of 0 to 0.9."""
    return [
        Item(
            f"x{n}", f"{n}.tif", "abc"[n % 3 % 2], None, None, 10.0, (160.0 + n + 180) % 360 - 180,
            f"{2019 + n // 12}-{n % 12 + 1:02d}-15T10:00:00Z", n % 10 / 10,
        )
        for n in range(count)
    ]  # fmt: skip


def jobs(items: list[Item]) -> list[Job]:
    return [Job(n, item, item.key, "", item.label) for n, item in enumerate(items)]


def chosen(items: list[Item], **given: Any) -> tuple[list[int], dict[str, Any]]:
    left_out = LeftOut()
    kept = select(jobs(items), "made", Selection(**given), left_out)
    assert len(kept) + left_out.counts.total() == len(items)
    return [job.number for job in kept], left_out.state()


@pytest.mark.parametrize(
    ("text", "first", "end"),
    [
        ("2019-01-01..2019-12-31", 0, 365),
        ("2019..2019", 0, 365),
        ("2019", 0, 365),
        ("2019-02", 31, 59),
        ("2019-01-05..2019-01-05", 4, 5),
        ("2019-12..2020-02", 334, 365 + 60),
    ],
)
def test_periods_have_both_ends(text: str, first: int, end: int):
    assert period(text) == (Y2019 + first * DAY, Y2019 + end * DAY)


def test_periods_may_be_open():
    assert period("2019..") == (Y2019, np.inf)
    assert period("..2018-12-31") == (-np.inf, Y2019)


@pytest.mark.parametrize("text", ["", "..", "2019-13", "2019-02-30", "19", "2019/01/01", "2020..2019", "2019..x", "9999..9999"])
def test_what_is_no_period(text: str):
    with pytest.raises(InputError, match="--dates") as caught:
        period(text)
    assert "\n" not in str(caught.value)


def geojson(tmp_path: Path, *polygons: Any, kind: str = "MultiPolygon") -> str:
    value = {"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": {"type": kind, "coordinates": polygons}}]}
    path = tmp_path / "area.geojson"
    path.write_text(json.dumps(value))
    return str(path)


def box(west: float, south: float, east: float, north: float) -> list[list[float]]:
    return [[west, south], [east, south], [east, north], [west, north], [west, south]]


def test_areas_across_the_date_line(tmp_path: Path):
    given = {
        "a box": "170,0,-170,20",
        "a box beyond": "170,0,190,20",
        "a box far east": "-190,0,-170,20",
        "cut": geojson(tmp_path, [box(170, 0, 180, 20)], [box(-180, 0, -170, 20)]),
    }
    for name, text in given.items():
        kept, left_out = chosen(spread(), aoi=text)
        assert kept == list(range(10, 30)), name
        assert left_out["outside --aoi"]["samples"] == 40
    assert chosen(spread(), aoi=geojson(tmp_path, [box(170, 0, 190, 20)]))[0] == list(range(10, 30))
    assert chosen(spread(), aoi=geojson(tmp_path, [box(-180, -90, 180, 90)]))[0] == list(range(60))
    assert chosen(spread(), aoi="-180,-90,180,90")[0] == list(range(60))
    holed = geojson(tmp_path, [box(170, 0, 190, 20), box(175, 5, 178, 15)])
    assert chosen(spread(), aoi=holed)[0] == [*range(10, 15), *range(18, 30)]


@pytest.mark.parametrize("seed", range(20))
def test_points_in_polygons(tmp_path: Path, seed: int):
    rng = np.random.default_rng(seed)
    corners = int(rng.integers(3, 40))
    angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
    radius = rng.uniform(5, 60, corners)
    ring = np.stack([20 + radius * np.cos(angle), 10 + radius * np.sin(angle)], axis=1)
    lat, lon = rng.uniform(-80, 80, 3000), rng.uniform(-180, 180, 3000)
    inside = region(geojson(tmp_path, [ring.tolist()]))(lat, lon)
    closed = Outline(np.concatenate([ring, ring[:1]]))
    assert np.array_equal(inside, closed.contains_points(np.stack([lon, lat], axis=1)))
    assert 0 < inside.sum() < 3000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,3", "neither a GeoJSON file"),
        ("10,50,0,40", "is no box"),
        ("0,-95,10,0", "is no box"),
        ('{"type": "Point", "coordinates": [1, 2]}', "holds a Point"),
        ('{"type": "FeatureCollection", "features": []}', "holds no polygon"),
        ('{"type": "Polygon", "coordinates": [[[179, 0], [-179, 0], [-179, 9], [179, 9], [179, 0]]]}', "either way round"),
        ('{"type": "Polygon", "coordinates": [[[500000, 5000000], [500010, 5000000], [500000, 5000010]]]}', "in degrees"),
        ('{"type": "Polygon", "coordinates": [[[1, NaN], [2, 2], [3, 3]]]}', "in degrees"),
        ('{"type": "Polygon", "coordinates": [["a", "b", "c"]]}', "no GeoJSON of polygons"),
        ('{"type": "Polygon"}', "no GeoJSON of polygons"),
        ('{"type": "Feature", "geometry": null}', "no GeoJSON of polygons"),
        ("[1, 2]", "no GeoJSON of polygons"),
        ("[" * 100_000, "neither a GeoJSON file"),
    ],
)
def test_what_is_no_area(tmp_path: Path, text: str, message: str):
    path = tmp_path / "area.json"
    if text[0] in "{[":
        path.write_text(text)
        text = str(path)
    with pytest.raises(InputError, match=message) as caught:
        region(text)
    assert "\n" not in str(caught.value)


def test_dates_and_clouds_and_what_is_unknown():
    items = [*spread(12), Item("x98", "x"), Item("x99", "x")]
    assert chosen(items, dates="2019-03..2019-04-15") == (
        [2, 3],
        {
            "no date": {"samples": 2, "examples": ["x98", "x99"]},
            "outside --dates": {"samples": 10, "examples": ["x0", "x1", "x10", "x11", "x4"]},
        },
    )
    kept, left_out = chosen(items, max_cloud=0.25)
    assert kept == [0, 1, 2, 10, 11, 12, 13]
    assert left_out["more than 25% cloud by their metadata"]["samples"] == 7
    kept, left_out = chosen(items, aoi="160,0,165,20")
    assert (kept, left_out["no location"]["samples"]) == ([0, 1, 2, 3, 4], 2)
    for given in ({"aoi": "0,0,1,1"}, {"dates": "2019"}, {"thin_km": 5.0}):
        with pytest.raises(InputError, match="none has one before it is decoded"):
            chosen([Item("x1", "x"), Item("x2", "x")], **given)


@pytest.mark.parametrize("by", [None, "class", "place", "time"])
def test_samples_are_fair_and_do_not_depend_on_the_rest(by: Any):
    items = spread()
    whole = jobs(items)
    rng = np.random.default_rng(0)
    before: set[int] = set()
    for size in (1, 7, 20, 41, 59, 60, 99):
        left_out = LeftOut()
        picked = drawn(whole, "made", Selection(sample=size, stratify=by), left_out)
        assert len(picked) == min(size, 60)
        assert left_out.counts.total() == 60 - len(picked)
        numbers = {job.number for job in picked}
        assert before <= numbers  # a larger sample holds the smaller
        before = numbers
        shuffled = [whole[n] for n in rng.permutation(60)]
        assert {job.number for job in drawn(shuffled, "made", Selection(sample=size, stratify=by), LeftOut())} == numbers
        if by == "class":
            have, there = Counter(job.label for job in picked), Counter(job.label for job in whole)
            assert max(have.values()) - min(have[label] for label in there) <= 1 or any(have[x] == there[x] for x in there)
    assert {job.number for job in drawn(whole, "other", Selection(sample=20), LeftOut())} != {
        job.number for job in drawn(whole, "made", Selection(sample=20), LeftOut())
    }


def test_a_sample_of_unlike_classes_takes_the_rare_ones_whole():
    items = [Item(f"x{n}", "x", "a" if n < 50 else "b" if n < 57 else "c") for n in range(60)]
    picked = drawn(jobs(items), "made", Selection(sample=20, stratify="class"), LeftOut())
    assert Counter(job.label for job in picked) == {"a": 10, "b": 7, "c": 3}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sample": 0}, "at least 1"),
        ({"max_cloud": 1.5}, "between 0 and 1"),
        ({"stratify": "class"}, "give its size with --sample"),
    ],
)
def test_what_is_no_selection(given: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        Selection(**given)


def test_the_manifest_says_what_was_left_out_and_why(made: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def cloudy(item: Item) -> Sample:
        sample = grey(item)
        valid = np.ones((4, 4), np.uint8)
        valid.flat[: int(item.key[1:]) % 4 * 4] = 2
        sample.parts["image"].valid = valid
        return sample

    selection = Selection(aoi="170,0,-170,20", dates="2020..", max_cloud=0.5, thin_km=1.0, sample=4)
    with caplog.at_level("INFO"):
        manifest = made(spread(), read=cloudy, selection=selection)[""]
    counts = LeftOut.from_state(manifest.source["left_out"]).counts
    assert counts.total() + manifest.samples == 60
    assert counts["outside --aoi"] == 40
    assert counts["outside --dates"] == 2
    # 0.6 to 0.9: eight of the eighteen from 12 to 29
    assert counts["more than 50% cloud by their metadata"] == 8
    assert counts["not drawn for --sample"] == 10 - 4
    assert counts["more than 50% cloud or shadow"] == 4 - manifest.samples
    for reason in counts:
        assert f"left out: {reason} (such as x" in caplog.text
    assert manifest.source["selection"]["aoi"] == "170,0,-170,20"
    assert read_manifest(tmp_path / "out") == manifest
    with pytest.raises(
        InputError, match=r"no sample of .* is left: 60 chips left out: outside --aoi \(such as x0, x1\)"
    ) as caught:
        made(spread(), out="none", selection=Selection(aoi="0,0,1,1", sample=3))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*none*"))


def test_splits_by_block(made: Any, tmp_path: Path):
    split = Blocks({"train": 0.7, "test": 0.3}, block_km=500, buffer_km=120)
    manifests = made(spread(), split=split)
    assert set(manifests) == {"test", "train"}
    test, train = (ShardReader(tmp_path / "out" / name).index.samples for name in ("test", "train"))
    assert not set(test["block"].tolist()) & set(train["block"].tolist())
    assert (test["block"] >= 0).all()
    assert any("within 120 km" in reason for reason in manifests["train"].source["left_out"])
    assert manifests["train"].source["blocks"] == {"fractions": {"train": 0.7, "test": 0.3}, "block_km": 500, "buffer_km": 120}


def test_neighbours_do_not_come_into_different_splits(tmp_path: Path):
    """Chips of one scene, side by side, in blocks of three by three: without a word, splits are a chip's diagonal apart."""
    rasterio = pytest.importorskip("rasterio")
    profile = {"driver": "GTiff", "width": 256, "height": 256, "count": 3, "dtype": "uint8", "crs": "EPSG:32632"}
    profile["transform"] = rasterio.transform.from_origin(500_000, 5_000_000, 10, 10)
    (tmp_path / "set").mkdir()
    with rasterio.open(tmp_path / "set" / "a.tif", "w", **profile) as file:
        file.write(np.random.default_rng(0).integers(1, 255, (3, 256, 256), np.uint8))
    split = Blocks({"train": 0.5, "test": 0.5}, block_km=0.48)
    manifests = shard(tmp_path / "set", tmp_path / "out", options=Options(chip=16), split=split, progress=False)
    assert set(manifests) == {"test", "train"}
    place = {}
    for name in manifests:
        reader = ShardReader(tmp_path / "out" / name)
        place[name] = np.array([reader.meta(n)["window"][:2] for n in range(len(reader))])
    apart = np.abs(place["train"][:, None] - place["test"][None]).max(axis=2)
    assert apart.min() > 16  # 16 pixels are next door, at an edge or a corner
    assert manifests["train"].source["blocks"]["buffer_km"] == pytest.approx(1.01 * 0.16 * 2**0.5)


SENTINEL2 = {"s2": contract("s2", ("B02", "B03", "B04"), sensor="sentinel2", unit="reflectance")}


def two(item: Item) -> Sample:
    """Radar only in train."""
    sample = grey(item)
    if item.split == "train":
        sample.parts["sar"] = Part(np.full((2, 4, 4), -5, np.float32) - sample.parts["image"].pixels)
    return sample


def test_a_modality_that_a_split_lacks_is_said(made: Any, caplog: pytest.LogCaptureFixture):
    items = [Item(f"x{n}", "x", split="test" if n % 4 == 0 else "train") for n in range(20)]
    both = {"image": contract("image", ("grey",)), "sar": contract("sar", ("VV", "VH"), unit="dB", dtype="float32")}
    manifests = made(items, contracts=both, read=two)
    assert "sar: no valid pixel in split test, so it has no normalisation there" in caplog.text
    assert manifests["test"].contracts["sar"].normalisation.pixels == (0, 0)
    assert set(manifests["test"].statistics) == {"image"}
    assert manifests["train"].contracts["sar"].normalisation.pixels == (240, 240)

    def blank(item: Item) -> Sample:
        sample = grey(item)
        sample.parts["image"].valid = np.full((4, 4), 2, np.uint8)
        return sample

    with pytest.raises(InputError, match="no valid pixels"):
        made(items, read=blank, out="blank")


def offset(item: Item) -> Sample:
    """Reflectances with the offset of the newer baseline left in."""
    pixels = np.random.default_rng(int(item.key[1:])).integers(1200, 3000, (3, 4, 4)).astype(np.uint16)
    return Sample({"s2": Part(pixels, scale=1e-4, scale_source="made")})


def test_implausible_numbers_stop_after_the_first_shard_and_nothing_is_lost(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(packer, "MAX_SAMPLES", 20)
    monkeypatch.setattr(packer, "_ENOUGH", 20)
    reads: list[str] = []

    def read(item: Item) -> Sample:
        reads.append(item.key)
        return offset(item)

    items = [Item(f"x{n}", "x") for n in range(60)]
    for _ in range(2):
        with pytest.raises(InputError, match=r"20 have .* --implausible-ok goes on") as caught:
            made(items, contracts=SENTINEL2, read=read)
        assert "\n" not in str(caught.value)
        assert len(reads) == 20
    assert not (tmp_path / "out").exists()
    manifest = made(items, contracts=SENTINEL2, read=read, implausible_ok=True)[""]
    assert len(reads) == 60
    assert manifest.source["findings"][0]["severity"] == "stop"
    assert "60 samples that claim no offset, 60 have" in manifest.source["findings"][0]["text"]
    assert made(items, contracts=SENTINEL2, read=offset, implausible_ok=True, out="again")[""] == manifest


def test_dry_run_says_much_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from PIL import Image

    for n in range(50):
        folder = tmp_path / "set" / "AB"[n % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{n}.png")
    (tmp_path / "set" / "A" / "bad.png").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    command = ["shard", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--sample", "40", "--workers", "2"]
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert "chips: 40\n" in said
    assert "11 chips left out: not drawn for --sample (such as" in said
    assert " kB in 1 shards or more" in said
    assert "hours at" in said
    size = float(said.partition("about ")[2].split()[0]) * 1000
    assert main([*command, "--max-failed", "0.1"]) == 0
    real = sum(s.bytes for s in read_manifest(tmp_path / "out").shards)
    assert 0.8 < size / real < 1.1  # a tar ends with up to 10 kB of nothing
    assert main(["shard", str(tmp_path / "set"), "--out", str(tmp_path / "o"), "--aoi", "0,0,1,1", "--dry-run"]) == 2
    assert main(["shard", str(tmp_path / "set"), "--out", str(tmp_path / "o"), "--split-blocks", "a=0.5,b=0.5"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert not list(tmp_path.glob("*o"))
