"""Tars by WebDataset's own writer and by others, made into shards of ours."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from swath.shards.codec import DecodeError, encode_npy
from swath.shards.errors import InputError
from swath.shards.ingest import shard
from swath.shards.inspect import inspect
from swath.shards.reader import ShardReader
from swath.shards.sources.open import open_source
from swath.shards.sources.source import Options
from swath.shards.sources.webdataset import at_first_dot, at_last_dot, captions_of, cut_of, kind_of, open_webdataset, plain_json
from tests.shard_folders import make_sensor_shards, sensor
from tests.shards.recipes.published import opened, samples

TarWriter = getattr(webdataset, "TarWriter")  # noqa: B009 - untyped


def image(number: int, form: str = "JPEG", mode: str = "RGB", side: int = 16) -> bytes:
    buffer = io.BytesIO()
    colour: Any = (10 * number % 250, 80, 7) if mode == "RGB" else 10 * number % 250
    Image.new(mode, (side, side), colour).save(buffer, form)
    return buffer.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def rs5m(root: Path) -> Path:
    """As published: suffixes that decoders do not know, images of both sorts, one of them grey, names with dots and slashes."""
    for part, split in (("pub11", "train"), ("rs3", "train"), ("pub11", "val")):
        members = {}
        for n in range(4):
            key = f"{part}_{split}_{n:07d}"
            members[f"{key}.caption"] = f"{part} number {n}".encode()
            members[f"{key}.img_content"] = image(n, "PNG" if n == 1 else "JPEG")
            members[f"{key}.img_name"] = f"{part}/im.{n}.jpg".encode()
        tar(root / split / f"{part}-{split}-0000.tar", members)
    return root


def test_rs5m(tmp_path: Path):
    source = opened("rs5m", rs5m(tmp_path))
    made = samples(source)
    assert len(made) == 12
    for key, (item, sample) in made.items():
        part, split, n = key.split("_")
        raw = image(int(n), "PNG" if int(n) == 1 else "JPEG")
        assert (sample.parts["rgb"].data, sample.parts["rgb"].extension) == (raw, "png" if int(n) == 1 else "jpg")
        assert sample.meta["captions"] == [f"{part} number {int(n)}"]
        assert sample.meta["img_name"] == f"{part}/im.{int(n)}.jpg"
        assert (item.split, sample.meta["source"]) == (split, f"{split}/{part}-{split}-0000.tar/{key}")


def test_rs5m_to_shards(tmp_path: Path):
    manifests = shard(rs5m(tmp_path / "in"), tmp_path / "out", recipe="rs5m", progress=False)
    assert {name: manifest.samples for name, manifest in manifests.items()} == {"train": 8, "val": 4}
    reader = ShardReader(tmp_path / "out" / "val")
    for n in range(4):
        meta = reader.meta(n)
        number = int(meta["key"][-7:])
        assert meta["captions"] == [f"pub11 number {number}"]
        assert abs(int(reader.pixels(n)[0].mean()) - 10 * number) <= 2


def rsteller(path: Path, count: int = 6) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path)) as writer:
        for n in range(count):
            meta = {"captions": [f"first {n}", f"second {n}"], "lat": 40.5, "lon": -100.0 + n, "gsd_m": 0.6, "label": n % 2}
            writer.write({"__key__": f"{n:08d}", "jpg": image(n), "json": meta | {"dataset": "other", "radiometry": {}}})
    return path


def test_jpg_and_json_with_places_and_labels(tmp_path: Path):
    rsteller(tmp_path / "in" / "part-000.tar")
    (manifest,) = shard(tmp_path / "in", tmp_path / "out", recipe="rsteller", progress=False).values()
    assert (manifest.dataset, manifest.classes, manifest.samples) == ("rsteller", ("0", "1"), 6)
    reader = ShardReader(tmp_path / "out")
    for n in range(6):
        meta = reader.meta(n)
        number = int(meta["key"])
        assert meta["captions"] == [f"first {number}", f"second {number}"]
        assert (meta["dataset"], meta["lon"], meta["label"]) == ("rsteller", -100.0 + number, str(number % 2))
        assert reader.index.samples["lon"][n] == -100.0 + number
        assert manifest.classes[reader.labels[n]] == str(number % 2)


def test_modalities_masks_and_scale(tmp_path: Path):
    def chip(n: int, bands: int) -> np.ndarray:
        return np.stack([np.full((5, 7), 100 * k + n, np.int16) for k in range(1, bands + 1)])

    mask = np.ones((5, 7), np.uint8)
    mask[0] = 0
    path = tmp_path / "a.tar"
    with TarWriter(str(path)) as writer:
        for n in range(3):
            sample = {"__key__": f"deep/er/{n}", "s2.npy": chip(n, 4), "cls": n}
            extra = {
                "s1.npy": chip(n, 2).astype(np.float32),
                "s2.valid.npy": mask,
                "json": {"radiometry": {"s2": {"scale": 0.5}}},
            }
            writer.write(sample | (extra if n else {}))
    source = open_webdataset(path, Options())
    assert {name: (c.names, c.dtype) for name, c in source.contracts.items()} == {
        "s2": (("band_1", "band_2", "band_3", "band_4"), "int16"), "s1": (("band_1", "band_2"), "float32"),
    }  # fmt: skip
    made = samples(source)
    assert source.classes == ("0", "1", "2")
    assert list(made) == ["deep/er/0", "deep/er/1", "deep/er/2"]
    for n, (item, sample) in enumerate(made.values()):
        assert np.array_equal(sample.parts["s2"].pixels, chip(n, 4))
        assert sample.parts["s2"].data == encode_npy(chip(n, 4))
        assert (item.label, "s1" in sample.parts, sample.parts["s2"].scale) == (str(n), n > 0, 0.5 if n else 1.0)
        codes = sample.parts["s2"].valid
        assert n == 0 if codes is None else np.array_equal(codes, mask)


def test_geotiff_members_become_npy_with_their_place(tmp_path: Path):
    from tests.shards.recipes.published import tiff

    pixels = np.arange(4 * 6 * 5, dtype=np.uint16).reshape(4, 6, 5)
    data = tiff(tmp_path / "x.tif", pixels).read_bytes()
    ((item, sample),) = samples(open_webdataset(tar(tmp_path / "a.tar", {"one.tif": data}), Options(sensor="sentinel2"))).values()
    part = sample.parts["image"]
    assert np.array_equal(part.pixels, pixels)
    assert (part.data, part.extension, sample.meta["crs"], item.key) == (None, "npy", "EPSG:32633", "one")
    assert 45 < sample.meta["lat"] < 46


def test_bands_by_name(tmp_path: Path):
    path = tar(tmp_path / "a.tar", {"one.npy": encode_npy(np.zeros((2, 4, 4), np.uint16))})
    made = open_webdataset(path, Options(bands=("B8", "B04"), sensor="sentinel2", nodata=0)).contracts["image"]
    assert (made.names, made.bands[0].wavelength_nm, made.nodata) == (("B08", "B04"), 832.8, 0)
    with pytest.raises(InputError, match="has 2 bands, --bands names 1"):
        open_webdataset(path, Options(bands=("B04",)))
    with pytest.raises(InputError, match="leave --chip out"):
        open_webdataset(path, Options(chip=2))


def test_a_bad_sample_is_named_and_the_rest_read(tmp_path: Path):
    good, big = image(3), image(3, side=20)
    path = tar(
        tmp_path / "a.tar",
        {
            "a.jpg": good[:200], "b.jpg": good, "b.json": b"{", "c.jpg": big, "d.jpg": good, "d.png": image(1, "PNG"),
            "e.jpg": image(2, mode="L"), "f.jpg": good, "f.rgb.valid.npy": encode_npy(np.ones((3, 3), np.uint8)),
            "g.txt": b"only",
            "h.jpg": good, "h.json": b"[" * 100_000,
        },
    )  # fmt: skip
    source = open_webdataset(path, Options())
    reasons = {}
    for item in source.items:
        try:
            reasons[item.key] = sorted(source.read(item).parts)
        except DecodeError as error:
            reasons[item.key] = str(error)
    assert reasons["c"] == ["rgb"]  # sizes may differ
    assert reasons["g"] == []  # left out, and counted, by whoever writes
    for key, words in {
        "a": "JPEG", "b": "JSON is damaged", "d": "two images", "e": "is 1 band", "f": "its mask", "h": "JSON is damaged",
    }.items():  # fmt: skip
        assert words in reasons[key]


def test_content_says_what_an_image_is(tmp_path: Path):
    """Files are often called .jpg and hold a PNG."""
    source = open_webdataset(tar(tmp_path / "a.tar", {"a.jpg": image(1, "PNG"), "b.jpg": image(2)}), Options())
    assert [sample.parts["rgb"].extension for _, sample in samples(source).values()] == ["png", "jpg"]
    assert kind_of("txt", b"II*\0") == "tif"
    assert kind_of("left.PNG", b"") == "png"
    assert kind_of("h5", b"\x89HDF\r\n\x1a\n") is None


def test_keys_with_dots(tmp_path: Path):
    names = [f"S2A_20200101_v1.{n}.x.{suffix}" for n in range(30) for suffix in ("jpg", "txt")]
    assert cut_of(names) is at_last_dot
    assert cut_of([f"{n}.{suffix}" for n in range(30) for suffix in ("s1.npy", "s2.npy", "json")]) is at_first_dot
    assert cut_of([f"a.{n}.npy" for n in range(20)]) is at_first_dot  # a sample of many members
    assert at_first_dot("a.b/c.d.jpg") == ("a.b/c", "d.jpg")
    assert at_last_dot("a.b/c.d.jpg") == ("a.b/c.d", "jpg")
    assert at_last_dot("a.b/c") == ("a.b/c", "")
    data = {name: image(n // 2) if name.endswith("jpg") else str(n // 2).encode() for n, name in enumerate(names)}
    made = samples(open_webdataset(tar(tmp_path / "a.tar", data), Options()))
    assert len(made) == 30
    assert {key: sample.meta["captions"] for key, (_, sample) in made.items()} == {
        f"S2A_20200101_v1.{n}.x": [str(n)] for n in range(30)
    }


def test_what_is_refused(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no \.tar files"):
        open_webdataset(tmp_path / "empty", Options())
    with pytest.raises(InputError, match=r"members \.h5 are no images"):
        open_webdataset(tar(tmp_path / "h5.tar", {"a.h5": b"\x89HDF\r\n\x1a\n", "a.json": b"{}"}), Options())
    with pytest.raises(InputError, match="no plain file with a plain path"):
        open_webdataset(tar(tmp_path / "up.tar", {"../a.jpg": image(0)}), Options())
    with pytest.raises(InputError, match=r"no UTF-8"):
        open_webdataset(tar(tmp_path / "odd.tar", {"\udcff.jpg": image(0)}), Options())
    rsteller(tmp_path / "wds" / "a.tar")
    (tmp_path / "wds" / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="is a folder of shards already"):
        open_webdataset(tmp_path / "wds", Options())
    path = rsteller(tmp_path / "cut.tar")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"cut short|cannot be read|damaged"):
        open_webdataset(path, Options())


def test_crisislandmark_as_published_is_refused(tmp_path: Path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "crisislandmark.h5", "w") as file:
        file["a"] = h5py.ExternalLink("benv2s2_part1.h5", "/a")
    with pytest.raises(InputError, match="links to other HDF5 files are not followed"):
        opened("crisislandmark", tmp_path)
    tar(tmp_path / "tars" / "a.tar", {"a.npy": encode_npy(np.zeros((12, 4, 4), np.uint16)), "a.json": b"{}"})
    assert len(opened("crisislandmark", tmp_path / "tars").contracts["image"].bands) == 12


def test_json_that_could_not_be_written_again():
    value = plain_json(b'{"a": NaN, "b": -Infinity, "c": 1e999, "d": 1' + b"0" * 400 + b', "e": 1.5, "f": 3}')
    assert value == {"a": None, "b": None, "c": None, "d": None, "e": 1.5, "f": 3}
    json.dumps(value, allow_nan=False)
    for damaged in (b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(DecodeError, match="JSON is damaged"):
            plain_json(damaged)


def test_captions_come_once():
    assert captions_of({"captions": [" a ", "b", 3], "caption": "c"}, [b"a", b"", "\u00e9".encode(), b"\xff"]) == [
        "a", "b", "c", "\u00e9", "\ufffd",
    ]  # fmt: skip


@pytest.mark.parametrize("single", [True, False])
def test_tars_are_told_without_a_recipe(tmp_path: Path, single: bool):
    path = rsteller(tmp_path / "in" / "part.tar")
    (manifest,) = shard(path if single else path.parent, tmp_path / "out", progress=False).values()
    assert (manifest.samples, list(manifest.contracts), manifest.source["kind"]) == (6, ["rgb"], "webdataset")


def test_shards_that_were_inspected_are_still_shards(tmp_path: Path):
    """Contact sheets and map lie beside the tars, and are not the data set."""
    folder = make_sensor_shards(tmp_path / "set", sensor("sentinel2", 4), samples=5)
    inspect(folder)
    assert list(folder.glob("*.png"))
    with pytest.raises(InputError, match="is a folder of shards already"):
        open_source(folder, Options())
