"""`swath inspect`: the text names what there is, the sheets show it with what is not clear dimmed, the map says where it lies."""

import errno
import io
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from matplotlib.figure import Figure
from matplotlib.path import Path as Outline
from PIL import Image

from swath.launch.cli import main
from swath.shards.bands import Band, InputContract
from swath.shards.codec import encode_npy
from swath.shards.draw import hash_text
from swath.shards.errors import InputError
from swath.shards.index import FORMATS, Index, columns_of
from swath.shards.inspect import inspect
from swath.shards.inspection import map as module
from swath.shards.inspection import survey as survey_module
from swath.shards.inspection.map import draw_map
from swath.shards.inspection.outline import outlines
from swath.shards.inspection.sheet import CAPTION, CELL, GAP, HEAD, contact_sheet
from swath.shards.inspection.survey import survey
from swath.shards.inspection.view import Picture, limits, painted, picture, view_of
from swath.shards.manifest import BandStatistics, Manifest, read_manifest
from swath.shards.reader import ShardReader
from swath.shards.reindex import reindex
from swath.shards.writer import Member, Place, ShardWriter
from tests.shard_folders import contract, make_shards


def test_text_and_sheet(tmp_path: Path):
    folder = make_shards(tmp_path / "shards", samples=20, per_shard=8, classes=3)
    report = inspect(folder)
    for line in (
        "image: in 20 samples 32×32",
        "class class0: 7",
        "class class2: 6",
        "shard-000002.tar: 4 samples",
        "0 could not be decoded",
    ):
        assert line in report.text
    assert str(report) == report.text
    assert report.sheets == (folder / "contact_sheet.png",)
    across, down = 8 * (CELL + GAP) + GAP, HEAD + 3 * (CELL + CAPTION + GAP)
    assert Image.open(report.sheets[0]).size == (across, down)
    assert report.map is None and "no map: no sample has a position" in report.text
    inspect(folder, tmp_path / "own" / "pictures")
    assert sorted(path.name for path in (tmp_path / "own" / "pictures").iterdir()) == ["contact_sheet.png"]


def cell(sheet: np.ndarray, number: int) -> np.ndarray:
    """(CELL, CELL, 3) of the first row."""
    left = GAP + number * (CELL + GAP)
    return sheet[HEAD : HEAD + CELL, left : left + CELL]


def test_sheet_of_few_samples_with_pixels_that_are_not_clear(tmp_path: Path):
    folder = tmp_path / "wds"
    folder.mkdir()
    pixels = np.full((3, 16, 16), np.nan, np.float32)
    pixels[:, :8] = np.linspace(0, 1, 128, dtype=np.float32).reshape(8, 16)
    codes = np.ones((16, 16), np.uint8)
    codes[4:8] = 2
    with getattr(webdataset, "TarWriter")(str(folder / "a.tar")) as tar:  # noqa: B009 - untyped
        tar.write({"__key__": "one", "npy": pixels, "rgb.valid.npy": codes})
        tar.write({"__key__": "two", "npy": pixels * np.nan})
    reindex(folder)
    shown = np.asarray(Image.open(inspect(folder).sheets[0]))
    rows = cell(shown, 0)[..., 0].mean(1) / 255
    assert rows[: CELL // 5].max() > 0.4  # clear: stretched
    assert rows[CELL * 5 // 16 : CELL * 7 // 16].max() < 0.36  # cloud: dimmed, though the values are higher
    assert rows[CELL * 9 // 16 :].max() == 0
    assert cell(shown, 1).max() == 0


@pytest.mark.parametrize("method", [(Image.Image, "save"), (Figure, "savefig")])
def test_sheet_that_cannot_be_written(method: tuple[type, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = placed(tmp_path / "shards", np.zeros(4), np.zeros(4))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(*method, full)
    with pytest.raises(InputError, match="no space left while writing the contact sheet"):
        inspect(folder)


def test_a_place_that_is_no_folder_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = make_shards(tmp_path / "shards", samples=4)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "inside"):
        assert main(["inspect", str(folder), "--out", str(out)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert main(["inspect", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert "image: in 4 samples" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "file")]) == 2
    assert not list(folder.glob("*.png"))


def test_a_picture_that_is_cut_off_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make_shards(tmp_path / "shards", samples=4)
    before = inspect(folder).sheets[0].read_bytes()

    def gone(*_: Any) -> None:
        raise OSError(errno.EIO, "gone")

    monkeypatch.setattr(os, "fsync", gone)
    with pytest.raises(InputError, match="failed"):
        inspect(folder)
    assert (folder / "contact_sheet.png").read_bytes() == before


# A folder with everything: two modalities that not all samples have, masks, dates, several labels, radiometry.
_BGR = (("B02", "blue", 492.4), ("B03", "green", 559.8), ("B04", "red", 664.6))
S2 = contract(
    tuple(Band(name=n, common_name=c, wavelength_nm=w) for n, c, w in _BGR), 16, "uint16",
).model_copy(update={"modality": "optical", "sensor": "sentinel2", "unit": "reflectance", "dates": 2, "nodata": 0.0})  # fmt: skip
S1 = contract((Band(name="VV"), Band(name="VH")), 16, "float32").model_copy(
    update={"modality": "radar", "sensor": "sentinel1", "unit": "dB", "level": "gamma0"}
)


def rich(folder: Path, samples: int = 12, **manifest: Any) -> Path:
    """Every third sample lacks radar; from the 8th on an offset; one colour band a constant each."""
    folder.mkdir(parents=True)
    columns = columns_of(["optical", "radar"])
    writer = ShardWriter(folder, 0, "rich", columns)
    for n in range(samples):
        add = -0.1 if n >= 8 else 0.0
        dates = np.stack([np.full((16, 16), 1000 * (b + 1) + 3000 * d, np.uint16) for d in range(2) for b in range(3)])
        codes = np.ones((2, 16, 16), np.uint8)
        codes[1, :4] = 3
        told = {"optical": {"scale": 1e-4, "add": add, "scale_source": "offset of the baseline" if add else "sensor default"}}
        meta = {
            "labels": ["forest", "water"] if n % 2 else ["forest"], "radiometry": told,
            "times": {"optical": [f"2020-01-0{n % 9 + 1}", None]},
        }  # fmt: skip
        members = [
            Member("optical.npy", "optical", encode_npy(dates), 1e-4, add),
            Member("optical.valid.npy", "optical.valid", encode_npy(codes)),
            Member("json", "json", json.dumps(meta).encode()),
        ]
        if n % 3:
            members.append(Member("radar.npy", "radar", encode_npy(np.full((2, 16, 16), -10.0 - n, np.float32))))
        writer.add(f"s{n}", members, n % 2 - 1, -1, Place(45 + n, 170 + n * 2, 10.0, 1_577_836_800 + 86400 * n))
    shard, rows = writer.close()
    Index(rows.samples, rows.members, np.frombuffer(rows.keys, np.uint8), columns).write(folder)
    spread = BandStatistics(
        percentiles={"1": (0.1, 0.2, None), "50": (0.3, 0.4, 0.5), "99": (0.6, 0.7, 0.8)}, nodata_share=(0.25,) * 3
    )
    Manifest(
        dataset="rich", samples=samples, contracts={"optical": S2, "radar": S1}, shards=(shard,), classes=("one", "none of it"),
        statistics={"optical": spread},
        skipped=(("bad.tif", "cut\x1b[31m short\nmore"),), made_by="swath shard",
        source={
            "kind": "rasters", "chip": 16, "scale": None,
            "left_out": {"more than 50% nodata": {"samples": 3, "examples": ["x", "y"]}},
            "notes": ["guessed: the level"], "findings": [{"severity": "warn", "modality": "radar", "text": "VV is constant"}],
        } | manifest,
    ).write(folder)  # fmt: skip
    return folder


def test_everything_is_told(tmp_path: Path):
    report = inspect(rich(tmp_path / "rich"))
    for line in (
        "rich: 12 samples",
        "time: 2020-01-01 to 2020-01-12, all samples",
        "GSD: 10 m, all samples",
        "place: 45.0000 to 56.0000 °N, 170.0000 to -168.0000 °E across the date line, all samples",
        "optical: in 12 samples 16×16, 2 dates, sentinel2 none, reflectance, stored as uint16, nodata 0.0, 12 of them with",
        "radar: in 8 of 12 samples 16×16, sentinel1 gamma0, dB, stored as float32, nodata None",
        "value = stored · 0.0001 + 0 in 8 samples (sensor default)",
        "value = stored · 0.0001 − 0.1 in 4 samples (offset of the baseline)",
        "class (none): 6",
        "class one: 6",
        "1 classes without a sample: none of it",
        "label forest: 12",
        "label water: 6",
        "1 could not be decoded",
        "  bad.tif: cut?[31m short?more",
        "3 left out: more than 50% nodata (such as x, y)",
        "note: guessed: the level",
        "warning: VV is constant",
        "made by swath shard with kind rasters, chip 16",
    ):
        assert line in report.text, line
    table = {line.split()[0]: line.split() for line in report.text.splitlines() if line.startswith(("B0", "V"))}
    assert table["B03"] == ["B03", "green", "559.8", "–", "100", "50", "0.2", "0.4", "0.7", "25"]
    assert table["B04"][6] == "–"
    assert table["VV"] == ["VV", "–", "–", "–", "100", "50"]
    assert [path.name for path in report.sheets] == ["contact_sheet_optical.png", "contact_sheet_radar.png"]
    assert report.map is not None and report.map == tmp_path / "rich" / "map.png"
    assert Image.open(report.map).width > 800
    assert all(line.isprintable() for line in report.text.splitlines())


@pytest.mark.parametrize(
    "odd", [{"left_out": 7, "notes": "x", "findings": [3]}, {"left_out": {"a": 7, "b": {}}, "settings": {"q": [1]}}]
)
def test_a_manifest_with_another_source_is_told_too(odd: dict[str, Any], tmp_path: Path):
    assert "rich: 12 samples" in inspect(rich(tmp_path / "rich", **odd)).text


def test_a_series_shows_its_dates_side_by_side(tmp_path: Path):
    folder = rich(tmp_path / "rich")
    reader = ShardReader(folder)
    sheet = np.asarray(contact_sheet(reader, "optical", [0, 1], "").image)
    first, second = sheet[HEAD : HEAD + CELL, GAP : GAP + CELL], sheet[HEAD : HEAD + CELL, GAP + CELL + 2 : GAP + 2 * CELL + 2]
    assert second[CELL // 2].mean() > 1.5 * first[CELL // 2].mean()  # the second date is brighter
    assert second[: CELL // 5].mean() < 0.4 * second[CELL // 2].mean()  # but for its shadow
    assert np.ptp(first[CELL // 2], axis=0).max() == 0


def test_splits_are_inspected_together(tmp_path: Path):
    for split, samples in (("val", 3), ("train", 6), (".half", 4)):
        rich(tmp_path / "set" / split, samples)
    report = inspect(tmp_path / "set", tmp_path / "out")
    assert "splits train (6 samples), val (3 samples)" in report.text
    assert report.text.index("== train ==") < report.text.index("== val ==")
    names = [f"contact_sheet_{split}_{modality}.png" for split in ("train", "val") for modality in ("optical", "radar")]
    assert [path.name for path in report.sheets] == names
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*names, "map.png"]
    with pytest.raises(InputError, match="not a folder of shards"):
        inspect(tmp_path)


def test_damaged_samples_are_told_and_the_rest_is_shown(tmp_path: Path):
    folder = make_shards(tmp_path / "shards", samples=20, per_shard=8)
    whole = np.asarray(Image.open(inspect(folder).sheets[0]))
    with (folder / "shard-000000.tar").open("r+b") as file:
        file.seek(512 + 300)
        file.write(b"\xff\xfe\xfd")
    (folder / "shard-000002.tar").unlink()
    report = inspect(folder)
    assert "5 of the 20 samples on contact_sheet.png cannot be read" in report.text
    assert "sample chip0 in shard" in report.text and "shard-000002.tar cannot be opened" in report.text
    shown = np.asarray(Image.open(report.sheets[0]))
    assert shown.shape == whole.shape
    assert (cell(shown, 0) != cell(whole, 0)).any()
    assert cell(shown, 1).std() > 20
    lines = [line for line in report.text.splitlines() if "\n" in line]
    assert not lines


def test_members_that_are_not_what_the_contract_says(tmp_path: Path):
    folder = make_shards(tmp_path / "shards", samples=4)
    manifest = read_manifest(folder)
    wider = contract((*contract().bands, Band(name="nir")))
    manifest.model_copy(update={"contracts": {"image": wider}}).write(folder)
    assert "damaged: image of shape (3, 32, 32), not 4 channels" in inspect(folder).text


def test_labels_that_no_class_has(tmp_path: Path):
    folder = make_shards(tmp_path / "shards", samples=6)
    index = ShardReader(folder).index
    rows = index.samples.copy()
    rows["label"][:3] = 2**31 - 1, -7, 2
    Index(rows, index.members, index.keys, index.columns).write(folder)
    assert "3 samples have the number of a class that the manifest does not list" in inspect(folder).text


def test_many_shards_classes_and_bands_stay_short(tmp_path: Path):
    bands = tuple(Band(name=f"b{n}", wavelength_nm=400 + 10 * n) for n in range(200))
    folder = make_shards(tmp_path / "shards", samples=90, per_shard=1, classes=80, bands=bands, size=4)
    text = inspect(folder).text
    assert "shards have 1 to 1 samples" in text and "in 90 shards" in text and "shard-000000" not in text
    assert "… 160 more bands …" in text and "b0 " in text and "b199 " in text
    assert "… 20 more classes, with 1 to 1 samples" in text
    assert text.count("class class") == 60


# What is shown.


def of(unit: str, *bands: Band | str, **update: Any) -> InputContract:
    made = tuple(Band(name=band) if isinstance(band, str) else band for band in bands)
    return contract(made).model_copy(update={"unit": unit, **update})


def near(*wavelengths: float) -> tuple[Band, ...]:
    return tuple(Band(name=f"b{n}", wavelength_nm=nm) for n, nm in enumerate(wavelengths))


@pytest.mark.parametrize(
    ("given", "bands", "kind"),
    [
        (S2, (2, 1, 0), "colour"),
        (contract(), (0, 1, 2), "as stored"),
        (contract(dtype="uint16"), (0, 1, 2), "colour"),
        (of("dB", "VH", "VV"), (1, 0), "radar"),
        (of("dB", "HH", "HV"), (0, 1), "radar"),
        (of("dB", "VV"), (0,), "grey"),
        (of("linear power", "VV", "VH"), (0, 1), "radar"),
        (of("metres", "height"), (0,), "scale"),
        (of("class", "cover"), (0,), "classes"),
        (of("reflectance", *near(450, 495, 555, 660, 800)), (3, 2, 1), "colour"),
        (of("reflectance", *near(1000, 1500, 1600, 2100, 2200)), (4, 2, 0), "colour"),
        (of("digital number", "a", "b"), (0,), "scale"),
        (of("digital number", "a", "b", "c", "d"), (3, 2, 0), "colour"),
        (of("reflectance", *(Band(name=n, common_name=n) for n in ("green", "red", "nir"))), (2, 1, 0), "colour"),
    ],
)
def test_which_bands_are_shown(given: InputContract, bands: tuple[int, ...], kind: str):
    view = view_of(given)
    assert (view.bands, view.kind) == (bands, kind)


def test_radar_is_shown_in_db_with_the_ratio_in_blue():
    given = of("linear power", "VV", "VH")
    stored = np.array([[[0.1, 0.0, -1.0]], [[0.01, 0.5, 0.5]]], np.float32)
    made = picture(stored, None, 1.0, 0.0, given, view_of(given))
    np.testing.assert_allclose(made.values[:, 0, 0], (-10, -20, 10), rtol=1e-5)
    assert made.codes.tolist() == [[1, 0, 0]]  # no power has no dB


def test_stored_nodata_is_black_and_classes_keep_their_colours():
    given = of("class", "cover", nodata=0.0)
    view = view_of(given)
    made = picture(np.array([[[0, 1, 2, 21, 255]]], np.uint8), None, 1.0, 0.0, given, view)
    shown = painted(made, *limits([made], view), view)
    assert shown[0, 0].max() == 0
    assert len({tuple(one) for one in shown[0, 1:4].tolist()}) == 2
    assert shown[0, 1].tolist() == shown[0, 3].tolist()


def test_constant_and_empty_pictures_are_painted():
    view = view_of(S2)
    flat = Picture(np.full((3, 4, 4), 7.0), np.ones((4, 4), np.uint8))
    assert painted(flat, *limits([flat], view), view).min() == 128
    empty = Picture(np.full((3, 4, 4), np.nan), np.zeros((4, 4), np.uint8))
    assert painted(empty, *limits([empty], view), view).max() == 0
    assert painted(flat, *limits([empty, flat], view), view).min() == 128


# Where it lies.


def placed(folder: Path, lat: np.ndarray, lon: np.ndarray, classes: int = 1, labels: np.ndarray | None = None) -> Path:
    """A folder whose index has these positions; the samples repeat a few."""
    make_shards(folder, samples=16, classes=classes)
    reader = ShardReader(folder)
    take = np.arange(len(lat)) % 16
    rows = reader.index.samples[take].copy()
    rows["lat"], rows["lon"] = lat, lon
    if labels is not None:
        rows["label"] = labels
    Index(rows, np.array(reader.index.members[take]), np.array(reader.index.keys), reader.index.columns).write(folder)
    reader.manifest.model_copy(update={"samples": len(lat)}).write(folder)
    return folder


def drawn(folder: Path) -> Figure:
    readers = {"": ShardReader(folder)}
    figure = draw_map(readers, {"": survey(readers[""])})
    assert figure is not None
    figure.savefig(io.BytesIO(), format="png")
    return figure


RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("lat", "lon", "window"),
    [
        ([52.5], [13.4], (13, 14, 52, 53)),
        ([-17.0, -18.0], [179.0, -179.0], (178, 182, -19, -16)),
        ([-17.0, -18.0], [540.0, 181.0], None),  # 540 is off the globe
        ([89.9, 90.0], [0.0, 30.0], (-3, 33, 88, 90)),
        (RNG.uniform(-90, -75, 50), RNG.uniform(-180, 180, 50), (-180, 180, -90, 90)),
        ([0.0, 0.0], [-180.0, 179.9], (179, 181, -1, 1)),
    ],
)
def test_the_closer_look_holds_the_samples(lat: Any, lon: Any, window: tuple[float, ...] | None, tmp_path: Path):
    figure = drawn(placed(tmp_path / "shards", np.asarray(lat, float), np.asarray(lon, float)))
    close = figure.axes[-1]
    (west, east), (south, north) = close.get_xlim(), close.get_ylim()
    points = np.concatenate([np.asarray(c.get_offsets()) for c in close.collections[-1:]])
    assert ((points >= (west, south)) & (points <= (east, north))).all()
    if window is not None:
        assert len(points) == len(lat)
        assert window[0] <= west < east <= window[1] and window[2] <= south < north <= window[3]


def test_positions_that_are_none_are_no_positions(tmp_path: Path):
    lat, lon = np.array([10.0, np.nan, 95.0, 20.0, np.inf]), np.array([10.0, 5.0, 5.0, np.nan, 0.0])
    report = inspect(placed(tmp_path / "some", lat, lon))
    assert "place: 10.0000 to 10.0000 °N, 10.0000 to 10.0000 °E, 1 of 5 samples" in report.text
    assert "2 samples have a position that is not on the globe" in report.text
    assert "no map" in inspect(placed(tmp_path / "none", lat[1:], lon[1:])).text


def test_colours_by_class_and_by_split(tmp_path: Path):
    labels = np.array([0, 0, 0, 1, 1, -1] * 10)
    where = np.linspace(0, 40, 60)
    one = placed(tmp_path / "train", where, where, 3, labels)
    legend = drawn(one).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["class0", "class1", "all others"]
    two = placed(tmp_path / "_test$x$", where, where, 3, labels)
    readers = {path.name: ShardReader(path) for path in (one, two)}
    figure = draw_map(readers, {name: survey(reader) for name, reader in readers.items()})
    assert figure is not None
    figure.savefig(io.BytesIO(), format="png")  # `$x$` is no mathematics, and a leading `_` hides nothing
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["train", "_test$x$"]
    assert not any(text.get_parse_math() for text in figure.legends[0].get_texts())


@pytest.mark.slow
def test_a_million_samples_are_counted_by_cell_in_seconds(tmp_path: Path):
    count = 1_000_000
    lat, lon = RNG.normal(0, 20, count).clip(-90, 90), RNG.normal(100, 60, count)
    folder = placed(tmp_path / "shards", lat, (lon + 180) % 360 - 180)
    start = time.perf_counter()
    report = inspect(folder)
    assert time.perf_counter() - start < 30  # a second; a Python loop over the rows would take minutes
    assert f"image: in {count} samples" in report.text and report.map is not None
    counts = drawn(folder).axes[0].collections[-1].get_array()
    assert counts is not None and counts.sum() == count


def test_chunks_and_strides_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = rich(tmp_path / "rich")
    reader = ShardReader(folder)
    whole = survey(reader)
    monkeypatch.setattr(survey_module, "CHUNK", 5)
    parts = survey(reader)
    assert parts.stored == whole.stored
    assert parts.labels.tolist() == whole.labels.tolist() == [6, 6, 0, 0]
    assert replace(parts, labels=whole.labels, stored=whole.stored).longitudes == whole.longitudes == (170, 192)
    assert parts.stored["radar"].spread == [1, 2, 4, 5, 7, 8, 10, 11]
    assert parts.stored["radar"].chosen(3) == [1, 7, 11]
    monkeypatch.setattr(module, "MOST", 4)
    figure = drawn(folder)
    assert "12 samples with a position, one in 3 is drawn" in figure.get_suptitle()


def test_a_scale_of_its_own_for_each_of_many_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make_shards(tmp_path / "shards", samples=40)
    index = ShardReader(folder).index
    members = np.array(index.members)
    members["scale"][:, 0] = np.arange(40) % 25 + 1
    members["format"][5, 0] = FORMATS.index("absent")
    Index(index.samples, members, index.keys, index.columns).write(folder)
    monkeypatch.setattr(survey_module, "_PAIRS", 20)
    monkeypatch.setattr(survey_module, "CHUNK", 25)
    found = survey(ShardReader(folder)).stored["image"]
    assert found.samples == 39 and len(found.pairs) == 20
    assert (found.pairs[1.0, 0.0], found.first[1.0, 0.0], found.pairs[25.0, 0.0]) == (2, 0, 0)
    assert "other scales and offsets in 19 samples" in inspect(folder).text


@pytest.mark.parametrize(
    ("name", "lat", "lon", "land"),
    [
        ("Berlin", 52.5, 13.4, True), ("Nairobi", -1.3, 36.8, True), ("Manaus", -3.1, -60, True), ("Delhi", 28.6, 77.2, True),
        ("Alice Springs", -23.7, 133.9, True), ("Denver", 39.7, -105, True), ("Anadyr", 65, 171, True),
        ("South Pole", -89, 5, True),
        ("mid Pacific", 10, -150, False), ("mid Atlantic", 30, -40, False), ("Bay of Bengal", 12, 88, False),
        ("Hudson Bay", 60, -86, False), ("Black Sea", 43, 34, False), ("Southern Ocean", -58, 100, False),
    ],
)  # fmt: skip
def test_land_is_land(name: str, lat: float, lon: float, land: bool):
    assert any(Outline(ring).contains_point((lon, lat)) for ring in outlines()) is land, name


def test_the_samples_ids_are_untouched(tmp_path: Path):
    folder = rich(tmp_path / "rich")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    inspect(folder)
    after = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".png")}
    assert before == after
    assert int(ShardReader(folder).index.samples["id"][0]) == hash_text("rich", "s0")
