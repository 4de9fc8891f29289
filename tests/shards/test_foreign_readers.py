"""Other people's readers on our shards: `webdataset`, and `wids` where an old webdataset has brought it."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from swath.shards.codec import decode
from swath.shards.index import FORMATS, VALID
from swath.shards.ingest import shard
from swath.shards.reader import ShardReader
from tests.shard_folders import make_sensor_shards, sensor

WebDataset = getattr(webdataset, "WebDataset")  # noqa: B009 - untyped
PAGE = Path(__file__).resolve().parents[2] / "docs" / "webdataset.md"
JPEG_LIBRARIES = 3  # levels by which two of them differ


def images(root: Path) -> Path:
    """JPEGs and PNGs in classes, of several sizes, with names that are no keys as they stand."""
    rng = np.random.default_rng(0)
    for n in range(11):
        path = root / "in" / ("a class", "b.class")[n % 2] / f"im.{n} x.{'jpg' if n % 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16 + n, 20, 3), np.uint8)).resize((20, 16 + n)).save(path)
    shard(root / "in", root / "out", shard_bytes=8192, progress=False)
    return root / "out"


def one(root: Path) -> Path:
    return make_sensor_shards(root / "one", sensor("s2", 13), samples=11, per_shard=4)


def several(root: Path) -> Path:
    """Pairs with masks; one sample lacks its radar, one its optical image."""
    return make_sensor_shards(
        root / "several", sensor("s2", 4, size=9), sensor("s1", 2, size=5), samples=11, per_shard=4, missing={3: "s1", 6: "s2"}
    )


def series(root: Path) -> Path:
    return make_sensor_shards(root / "series", sensor("s2", 3, dates=4), samples=7, per_shard=4)


@pytest.fixture(params=[images, one, several, series])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return request.param(tmp_path)


def members(reader: ShardReader, number: int) -> dict[str, Any]:
    """What our reader has of a sample, by the suffix in the tar: arrays (C, H, W), and the JSON."""
    found: dict[str, Any] = {}
    for column in reader.index.columns:
        if not reader.has(number, column):
            continue
        kind = FORMATS[reader.index.members[number, reader.index.columns.index(column)]["format"]]
        name = column.removesuffix(VALID)
        if column == "json":
            found["json"] = reader.meta(number)
        elif column.endswith(VALID):
            found[f"{column}.{kind}"] = reader.valid(number, name)
        else:
            found[f"{column}.{kind}"] = reader.pixels(number, name)
    return found


def same(theirs: dict[str, Any], ours: dict[str, Any], raw: bool) -> None:
    """Every member, nothing more: arrays to the bit, or as near as JPEG libraries are."""
    assert set(theirs) == set(ours)
    for suffix, expected in ours.items():
        got = theirs[suffix]
        if suffix == "json":
            assert got == expected
            continue
        kind = suffix.rpartition(".")[2]
        if kind != "npy":
            got = decode(got, kind) if raw else np.moveaxis(np.asarray(got), 2, 0)
        got = got[None] if got.ndim == 2 else got
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        slack = 0 if raw or kind != "jpg" else JPEG_LIBRARIES
        assert np.abs(got.astype(np.int64) - expected).max() <= slack


def run_page(library: str, folder: Path) -> dict[str, Any]:
    """Run the example of the page for that library; returns its names."""
    (block,) = (text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if f"import {library}\n" in text)
    names: dict[str, Any] = {}
    exec(block.replace('Path("shards")', f"Path({str(folder)!r})"), names)
    return names


def tars(reader: ShardReader, folder: Path) -> list[str]:
    return [str(folder / made.name) for made in reader.manifest.shards]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("images_as", [None, "rgb8"])
def test_webdataset_reads_what_we_read(folder: Path, images_as: str | None):
    reader = ShardReader(folder)
    assert len(reader.manifest.shards) > 1
    read = WebDataset(tars(reader, folder), shardshuffle=False)
    number = -1
    for number, sample in enumerate(read.decode(images_as) if images_as else read.decode()):
        assert sample.pop("__key__") == reader.index.key(number)
        theirs = {name: value for name, value in sample.items() if not name.startswith("__")}
        same(theirs, members(reader, number), raw=images_as is None)
    assert number + 1 == len(reader)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_example_for_webdataset(folder: Path):
    reader = ShardReader(folder)
    names = run_page("webdataset", folder)
    theirs = {name: value for name, value in names["sample"].items() if not name.startswith("__")}
    same(theirs, members(reader, len(reader) - 1), raw=False)
    assert set(names["arrays"]) == set(theirs) - {"json"}


@pytest.fixture
def wids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    module = pytest.importorskip("wids", reason="wids came with webdataset up to 0.2.111")
    monkeypatch.setenv("WIDS_CACHE", str(tmp_path / "cache"))
    yield module


def test_wids_reads_what_we_read(folder: Path, wids: Any):
    """Its index is made from our manifest."""
    reader = ShardReader(folder)
    shards = [
        {"url": str(folder / made.name), "nsamples": made.samples, "filesize": made.bytes} for made in reader.manifest.shards
    ]
    read = wids.ShardListDataset(shards, transformations="numpy")
    assert len(read) == len(reader)
    for number in reversed(range(len(reader))):  # random access
        sample = read[number]
        assert sample["__key__"] == reader.index.key(number)
        theirs = {name[1:]: value for name, value in sample.items() if not name.startswith("__")}
        same(theirs, members(reader, number), raw=False)
    assert all(os.path.exists(made["url"]) for made in shards)  # noqa: PTH110 - it has deleted none of ours


def test_the_example_for_wids(folder: Path, wids: Any):
    reader = ShardReader(folder)
    sample = run_page("wids", folder)["sample"]
    theirs = {name[1:]: value for name, value in sample.items() if not name.startswith("__")}
    same(theirs, members(reader, len(reader) - 1), raw=False)
