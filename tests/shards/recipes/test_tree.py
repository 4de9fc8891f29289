"""What all declarative layouts share: safe reading, sizes, options, and the way through an ingest."""

import multiprocessing
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.ingest import shard
from swath.shards.layouts.layout import Facts, Layer, Layout, Sidecar, Size, iso_time
from swath.shards.layouts.tree import Tree
from swath.shards.reader import ShardReader
from swath.shards.recipes.registry import recipes
from swath.shards.sources.source import Options, Sample, Source
from tests.shards.recipes.published import DN, cube, picture, tiff, values, zipped

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning", "ignore::UserWarning")
EUROSAT = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A")
ORDER = ("B04", "B8A", "B02")
LAYER = Layer(r"(?:.*/)?(?P<key>[^/]+)\.tif", ORDER, "uint16", "sentinel2", "L2A", "reflectance", scale=1e-4)


def layout(layer: Layer = LAYER, **layers: Layer) -> Layout:
    return Layout("made", "made for a test", "none", "<name>.tif", layers or {"sentinel2": layer})


def opened_tree(layer: Layer, path: Path, **options: Any) -> Tree:
    return Tree(layout(layer), path, Options(**options))


def one(source: Source) -> Sample:
    return source.read(source.items[0])


@pytest.mark.parametrize(
    ("policy", "shapes"),
    [
        ("keep", {(16, 16): (16, 16), (15, 18): (15, 18)}), ("reject", {(16, 16): (16, 16), (15, 18): None}),
        ("crop", {(16, 16): (16, 16), (19, 18): (16, 16), (15, 18): None}), ("pad", {(15, 18): (16, 16), (19, 16): (16, 16)}),
    ],
)  # fmt: skip
def test_sizes(tmp_path: Path, policy: Any, shapes: dict[tuple[int, int], tuple[int, int] | None]):
    for size, becomes in shapes.items():
        ramp = np.arange(size[0] * size[1], dtype=np.uint16).reshape(size) + 1
        folder = tmp_path / f"{size}"
        tiff(folder / "a.tif", np.stack([ramp] * 3))
        source = opened_tree(replace(LAYER, size=Size(policy, 16)), folder)
        if becomes is None:
            with pytest.raises(DecodeError, match=r"a.tif is 18×15, the layout has (at least )?16×16"):
                one(source)
            continue
        sample = one(source)
        part = sample.parts["sentinel2"]
        assert part.pixels.shape == (3, *becomes)
        top, left = max(0, size[0] - 16) // 2, max(0, size[1] - 16) // 2
        if policy == "keep":
            top, left = 0, 0
        shown = ramp[top : top + becomes[0], left : left + becomes[1]]
        assert np.array_equal(part.pixels[0, : shown.shape[0], : shown.shape[1]], shown)
        west, south, east, north = sample.meta["bounds"]
        assert (west, north) == (500_000 + 10 * left, 5_000_000 - 10 * top)
        assert (east - west, north - south) == (10 * becomes[1], 10 * becomes[0])
        lacking = shown.shape != becomes
        assert (part.valid is not None) == lacking
        if part.valid is not None:
            assert part.valid.sum() == shown.size


def test_bytes_are_kept_only_where_they_are_the_pixels(tmp_path: Path):
    picture(tmp_path / "a.png", 16)
    for side, options, kept in ((16, {}, True), (12, {}, False), (20, {}, False), (16, {"bands": ("blue",)}, False)):
        layer = Layer(r"(?P<key>[^/]+)\.png", ("red", "green", "blue"), "uint8", size=Size("pad", side))
        part = one(opened_tree(layer, tmp_path, **options)).parts["sentinel2"]
        assert (part.extension, part.data == (tmp_path / "a.png").read_bytes()) == (("png", True) if kept else ("npy", False))
        assert part.pixels.shape[1:] == (side, side)


def test_not_finite_is_masked(tmp_path: Path):
    pixels = cube(ORDER, 8, 8, np.float32)
    pixels[1, 0, 0], pixels[2, 1, 1] = np.nan, -np.inf
    tiff(tmp_path / "a.tif", pixels)
    valid = one(opened_tree(replace(LAYER, dtype="float32"), tmp_path)).parts["sentinel2"].valid
    assert valid is not None
    assert np.argwhere(valid == 0).tolist() == [[0, 0], [1, 1]]


def test_options(tmp_path: Path):
    tiff(tmp_path / "a.tif", cube(ORDER, 8, 8))
    source = opened_tree(LAYER, tmp_path, add=-0.1, nodata=DN["B02"], bands=("B02", "red"))
    sample = one(source)
    part = sample.parts["sentinel2"]
    assert values(source, sample, "sentinel2") == {"B02": [200], "B04": [400]}
    assert (part.scale, part.add, part.scale_source) == (1e-4, -0.1, "given by hand")
    assert part.valid is not None and not part.valid.any()
    for name, value in (("chip", 4), ("gsd_m", 10.0), ("sensor", "landsat8")):
        with pytest.raises(InputError, match=f"recipe made fixes --{name.removesuffix('_m')}"):
            opened_tree(LAYER, tmp_path, **{name: value})
    radar = replace(LAYER, sensor="sentinel1", unit="dB", level="sigma0", bands=("VV", "VH", "HH"))
    with pytest.raises(InputError, match="made has a, b: choose one by --bands to give its add"):
        Tree(layout(a=radar, b=replace(radar, unit="linear power")), tmp_path, Options(add=1.0))


def test_offset_by_hand_wins_and_leaves_radar_alone(tmp_path: Path):
    tiff(tmp_path / "s2" / "a.tif", cube(ORDER, 8, 8))
    tiff(tmp_path / "s1" / "a.tif", cube(("VV", "VH"), 8, 8, np.float32))
    (tmp_path / "s2" / "a.json").write_text("{}")
    said = Sidecar("{folder}/{key}.json", lambda data: Facts(add=-0.5, add_source="the file"))
    both = layout(
        s2=replace(LAYER, files=r"s2/(?P<key>[^/]+)\.tif", sidecar=said),
        s1=Layer(r"s1/(?P<key>[^/]+)\.tif", ("VV", "VH"), "float32", "sentinel1", "sigma0", "dB"),
    )
    for options, adds in ((Options(), {"s2": -0.5, "s1": 0}), (Options(add=-0.1), {"s2": -0.1, "s1": 0})):
        parts = one(Tree(both, tmp_path, options)).parts
        assert {name: part.add for name, part in parts.items()} == adds
        assert parts["s2"].scale_source == ("given by hand" if options.add else "none: values as stored; the file")


def test_links_and_hidden_files_are_not_followed(tmp_path: Path):
    outside = tiff(tmp_path / "outside" / "secret.tif", cube(ORDER, 8, 8))
    tiff(tmp_path / "set" / "a.tif", cube(ORDER, 8, 8))
    tiff(tmp_path / "set" / ".trash" / "c.tif", cube(ORDER, 8, 8))
    (tmp_path / "set" / "b.tif").symlink_to(outside)
    (tmp_path / "set" / "more").symlink_to(outside.parent)
    (tmp_path / "set" / "a.json").symlink_to(outside)
    source = opened_tree(LAYER, tmp_path / "set")
    assert ([item.key for item in source.items], source.notes) == (["a"], ("3 symbolic links are left out",))
    (tmp_path / "set" / "a.tif").unlink()
    (tmp_path / "set" / "a.tif").symlink_to(outside)
    with pytest.raises(DecodeError, match=r"a.tif cannot be read"):
        one(source)
    sidecar = replace(LAYER, files=r"(?P<key>[^/]+)\.tif", sidecar=Sidecar("{key}.json", lambda data: pytest.fail("was read")))
    (tmp_path / "set" / "a.tif").unlink()
    tiff(tmp_path / "set" / "a.tif", cube(ORDER, 8, 8))
    with pytest.raises(DecodeError, match=r"a.json cannot be read"):
        one(opened_tree(sidecar, tmp_path / "set"))


def test_archives_that_try_something(tmp_path: Path):
    for number, (name, data, message) in enumerate([
        ("../a.tif", b"", "leads outside"), ("/a.tif", b"", "leads outside"), ("a.tif", bytes(10 << 20), "beyond the limits"),
    ]):  # fmt: skip
        with zipfile.ZipFile(tmp_path / f"{number}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, data)
        with pytest.raises(InputError, match=message):
            opened_tree(LAYER, tmp_path / f"{number}.zip")
    (tmp_path / "no.zip").write_bytes(b"no zip")
    with pytest.raises(InputError, match="neither a folder nor a zip"):
        opened_tree(LAYER, tmp_path / "no.zip")
    with pytest.raises(InputError, match="absent does not exist"):
        opened_tree(LAYER, tmp_path / "absent")


def test_rasters_beyond_the_limits_are_refused_unread(tmp_path: Path):
    rasterio = pytest.importorskip("rasterio")
    tiff(tmp_path / "a.tif", cube(ORDER, 8, 8))
    for name, side, options in (
        ("b", 1 << 16, {"tiled": True}),
        ("c", 64, {"tiled": True, "blockxsize": 1 << 15, "blockysize": 1 << 15}),
    ):
        with rasterio.open(
            tmp_path / f"{name}.tif", "w", driver="GTiff", count=3, height=side, width=side, dtype="uint16", SPARSE_OK=True,
            compress="deflate", interleave="band", **options,
        ):  # fmt: skip
            pass
    source = opened_tree(LAYER, tmp_path)
    for item in source.items[1:]:
        with pytest.raises(DecodeError, match="beyond the limit"):
            source.read(item)


def test_damaged_member_of_a_zip(tmp_path: Path):
    for name in "ab":
        tiff(tmp_path / "set" / f"{name}.tif", cube(ORDER, 8, 8))
    path = zipped(tmp_path / "set", tmp_path / "set.zip")
    data = bytearray(path.read_bytes())
    data[data.index(b"b.tif") + 300] ^= 0xFF
    path.write_bytes(data)
    source = opened_tree(LAYER, path)
    one(source)
    with pytest.raises(DecodeError, match=r"b.tif cannot be read: Bad CRC-32"):
        source.read(source.items[1])


def means(source: Source) -> list[float]:
    return [float(source.read(item).parts["rgb"].pixels.mean()) for item in source.items]


def test_workers_share_no_file_position(tmp_path: Path):
    for number in range(40):
        picture(tmp_path / "set" / "Port" / f"port_{number:02}.png", 24, colour=(number, number, number))
    tree = Layout("made", "t", "l", "x", {"rgb": Layer(r"(?:.*/)?(?P<key>[^/]+)\.png", ("red", "green", "blue"), "uint8")})
    source = Tree(tree, zipped(tmp_path / "set", tmp_path / "set.zip"), Options())
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    workers = [context.Process(target=lambda: queue.put(means(source))) for _ in range(3)]
    for worker in workers:
        worker.start()
    made = [queue.get() for _ in workers]
    for worker in workers:
        worker.join(60)
    assert made == [list(map(float, range(40)))] * 3


def test_fingerprint_follows_the_files(tmp_path: Path):
    path = tiff(tmp_path / "a.tif", cube(ORDER, 8, 8))
    first = opened_tree(LAYER, tmp_path).fingerprint
    assert opened_tree(LAYER, tmp_path).fingerprint == first
    os.utime(path, ns=(1, 1))
    assert opened_tree(LAYER, tmp_path).fingerprint != first


def test_times():
    assert iso_time("20170613T101031") == "2017-06-13T10:10:31"
    assert iso_time("20180510T94033") == "2018-05-10T09:40:33"
    assert iso_time("20150825") == "2015-08-25"
    assert iso_time("2017-06-17 11:33:21") == "2017-06-17T11:33:21"
    assert iso_time("2016-10-01") == "2016-10-01"
    assert [iso_time(text) for text in ("", "1", "20171332", "soon")] == [None] * 4


def test_every_recipe_refuses_a_folder_of_something_else_in_one_line(tmp_path: Path):
    (tmp_path / "notes.md").write_text("nothing")
    for name, recipe in recipes().items():
        assert recipe.title and recipe.licence
        with pytest.raises(InputError) as caught:
            recipe.open(tmp_path, Options())
        assert "\n" not in str(caught.value), name


def test_whole_way_through_an_ingest(tmp_path: Path):
    for name in ("Forest", "River"):
        tiff(tmp_path / "EuroSAT_MS" / name / f"{name}_1.tif", cube(EUROSAT, 64, 64))
    manifest = shard(tmp_path / "EuroSAT_MS", tmp_path / "out", recipe="eurosat_ms", progress=False)[""]
    reader = ShardReader(tmp_path / "out")
    assert (manifest.dataset, manifest.classes, manifest.samples) == ("eurosat_ms", ("Forest", "River"), 2)
    contract = manifest.contracts["sentinel2"]
    assert contract.names == EUROSAT
    assert contract.normalisation.mean == pytest.approx([DN[name] * 1e-4 for name in EUROSAT])
    assert sorted(reader.meta(n)["label"] for n in range(2)) == ["Forest", "River"]
