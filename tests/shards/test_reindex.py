"""`swath index`: foreign WebDatasets, damaged manifests, damaged tars."""

import io
import json
import logging
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from swath.shards import reindex as reindexing
from swath.shards.codec import encode_npy
from swath.shards.errors import InputError
from swath.shards.ingest import shard
from swath.shards.loader import Loader
from swath.shards.manifest import read_manifest
from swath.shards.order import SampleOrder
from swath.shards.reader import ShardReader
from swath.shards.reindex import reindex

TarWriter = getattr(webdataset, "TarWriter")  # noqa: B009 - untyped


def chip(number: int, bands: int = 3, dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(number).integers(1, 200, (bands, 16, 16)).astype(dtype)


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.moveaxis(chip(number), 0, 2)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def refused(folder: Path, match: str) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(InputError, match=match) as caught:
        reindex(folder)
    assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def foreign(folder: Path, samples: int = 10, **extra: Any) -> Path:
    """Two tars by webdataset's own writer: JPEG, class number and JSON."""
    folder.mkdir()
    for number in range(2):
        with TarWriter(str(folder / f"part-{number}.tar")) as tar:
            for n in range(number, samples, 2):
                tar.write({"__key__": f"im{n:03d}", "jpg": jpeg(n), "cls": 2 + n % 9, "json": {"year": 2020}} | extra)
    return folder


def test_foreign_jpegs_with_class_numbers(tmp_path: Path):
    manifest = reindex(foreign(tmp_path / "wds"))
    assert (manifest.samples, manifest.dataset, manifest.made_by) == (10, "wds", "swath index")
    assert manifest.classes == tuple(str(n) for n in range(2, 11))  # as numbers, not as text
    reader = ShardReader(tmp_path / "wds")
    decoded = {}
    for n in range(10):
        key = reader.index.key(n)
        decoded[key] = reader.pixels(n)
        assert manifest.classes[reader.labels[n]] == str(2 + int(key[2:]) % 9)
        assert reader.meta(n) == {"year": 2020}
    for key, pixels in decoded.items():
        expected = np.moveaxis(np.asarray(Image.open(io.BytesIO(jpeg(int(key[2:]))))), 2, 0)
        assert np.abs(pixels.astype(int) - expected).max() <= 3  # two JPEG libraries
    values = np.stack(list(decoded.values())).astype(np.float64)
    np.testing.assert_allclose(manifest.contract().normalisation.mean, values.mean((0, 2, 3)))
    batch = next(iter(Loader(reader, SampleOrder(reader.shard_sizes, seed=0), global_batch=10, micro_batch=10))).chips
    assert sorted(batch.id.tolist()) == sorted(reader.index.samples["id"].tolist())


def test_foreign_npy_with_names_and_scale(tmp_path: Path):
    folder = tmp_path / "wds"
    folder.mkdir()
    with TarWriter(str(folder / "a.tar")) as tar:
        for n in range(6):
            meta = {"label": "forest" if n % 2 else "sea", "radiometry": {"hyper": {"scale": 0.5, "add": -1}}, "block": n}
            tar.write({"__key__": f"deep/er/{n}", "hyper.npy": chip(n, 5, np.int16), "json": meta})
    manifest = reindex(folder)
    reader = ShardReader(folder)
    assert (manifest.contract().modality, manifest.contract().dtype, manifest.classes) == ("hyper", "int16", ("forest", "sea"))
    assert manifest.contract().names == ("band_1", "band_2", "band_3", "band_4", "band_5")
    for n in range(6):
        assert np.array_equal(reader.pixels(n), chip(n, 5, np.int16))
        assert reader.index.key(n) == f"deep/er/{n}"
    assert reader.index.samples["block"].tolist() == list(range(6))
    values = np.stack([chip(n, 5) for n in range(6)]) * 0.5 - 1
    np.testing.assert_allclose(manifest.contract().normalisation.mean, values.mean((0, 2, 3)))
    assert (reader.chips([0, 1]).stored["hyper"].scale == 0.5).all()


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ({"jpg": jpeg(0)[:300]}, "part-0.tar: sample im000 cannot be decoded"),
        ({"jpg": b""}, "part-0.tar: sample im000 cannot be decoded"),
        ({"png": jpeg(0)}, "part-0.tar: sample im000 has two images that would be called rgb"),
        ({"json": b"{"}, "part-0.tar: the JSON of sample im000 is damaged"),
        ({"json": {"radiometry": {"rgb": {"scale": "big"}}}}, "part-0.tar: sample im000: scale 'big'"),
        ({"json": {"radiometry": {"rgb": {"scale": None}}}}, "part-0.tar: sample im000: scale None"),
        ({"rgb.valid.npy": encode_npy(np.ones((2, 2), np.uint8))}, "part-0.tar: sample im000 .* validity mask"),
    ],
)
def test_bad_foreign_samples_are_named(tmp_path: Path, extra: dict[str, Any], match: str):
    refused(foreign(tmp_path / "wds", **extra), match)


def test_foreign_samples_that_differ(tmp_path: Path):
    folder = tmp_path / "wds"
    folder.mkdir()
    with TarWriter(str(folder / "a.tar")) as tar:
        tar.write({"__key__": "one", "npy": chip(0, 3)})
        tar.write({"__key__": "two", "npy": chip(0, 4)})
    refused(folder, "samples differ: .*one is .* 3 band.*, .*two is .* 4 band")


def test_members_that_lead_outside(tmp_path: Path):
    for number, name in enumerate(("../up.jpg", "/etc/up.jpg")):
        folder = tmp_path / str(number)
        folder.mkdir()
        with tarfile.open(folder / "a.tar", "w") as tar:
            info = tarfile.TarInfo(name)
            info.size = len(jpeg(0))
            tar.addfile(info, io.BytesIO(jpeg(0)))
        refused(folder, "no plain file with a plain path")


def test_folder_without_tars(tmp_path: Path):
    refused(tmp_path, r"holds no \.tar files")
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    refused(tmp_path, "holds no samples")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Shards of our own, of images in two classes."""
    for n in range(12):
        path = tmp_path / "set" / "AB"[n % 2] / f"{n}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(n))
    shard(tmp_path / "set", tmp_path / "out", progress=False)
    return tmp_path / "out"


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[]", b"{}", b'{"schema_version": 2, "dataset": 3}', b"[" * 100_000])
def test_damaged_manifest_is_set_aside_and_made_from_the_tars(shards: Path, damage: bytes, caplog: pytest.LogCaptureFixture):
    before, index = read_manifest(shards), (shards / "index.bin").read_bytes()
    (shards / "manifest.json").write_bytes(damage)
    with pytest.raises(InputError, match=r"is damaged .*`swath index .*` makes one") as caught:
        ShardReader(shards)
    assert "\n" not in str(caught.value)
    made = reindex(shards)
    assert (made.samples, made.classes, made.dataset) == (12, ("A", "B"), "set")
    assert made.contract().normalisation.mean == pytest.approx(before.contract().normalisation.mean)
    assert (shards / "index.bin").read_bytes() == index  # ids, labels and places are the same
    assert (shards / "manifest.damaged.json").read_bytes() == damage
    assert "manifest.damaged.json" in caplog.text
    assert len(ShardReader(shards)) == 12


def test_manifest_of_a_newer_version_is_not_touched(shards: Path):
    value = json.loads((shards / "manifest.json").read_text())
    (shards / "manifest.json").write_text(json.dumps(value | {"schema_version": 9, "new": 1}))
    refused(shards, "schema version 9, this swath reads 2")


def test_masks_count_when_the_manifest_is_lost(tmp_path: Path):
    folder = tmp_path / "wds"
    folder.mkdir()
    pixels, codes = chip(0, 2, np.uint16), np.ones((16, 16), np.uint8)
    codes[:4], pixels[:, :4] = 0, 9999
    with TarWriter(str(folder / "a.tar")) as tar:
        tar.write({"__key__": "one", "s2.npy": pixels, "s2.valid.npy": codes})
    norm = reindex(folder).contract().normalisation
    np.testing.assert_allclose(norm.mean, pixels[:, 4:].mean((1, 2)))
    assert norm.pixels == (192, 192)


def test_shorter_shards_are_said(shards: Path, caplog: pytest.LogCaptureFixture):
    name = read_manifest(shards).shards[0].name
    samples = list(reindexing.read_samples(shards / name))
    with tarfile.open(shards / name, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples[:5]:
            for suffix, (_, data) in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with caplog.at_level(logging.WARNING):
        assert reindex(shards).samples == 5
    assert f"{name}: 5 samples, where the manifest had 12 samples" in caplog.text
    assert len(ShardReader(shards)) == 5


def test_damaged_tar_header_is_no_end(shards: Path):
    """tarfile takes a header that it cannot read for the end of the archive: samples would be lost in silence."""
    path = shards / read_manifest(shards).shards[0].name
    start = next(offset for key, members in list(reindexing.read_samples(path))[6:] for offset, _ in members.values()) - 512
    raw = bytearray(path.read_bytes())
    raw[start + 5] ^= 0xFF
    path.write_bytes(raw)
    refused(shards, f"damaged after sample .*byte {start} is no tar header")


def test_truncated_tar(shards: Path, caplog: pytest.LogCaptureFixture):
    path = shards / read_manifest(shards).shards[0].name
    whole, samples = path.read_bytes(), list(reindexing.read_samples(path))
    end = samples[5][1]["json"][0] + 512 * -(-len(samples[5][1]["json"][1]) // 512)
    for length in (end - 700, end + 100, end + 700):
        path.write_bytes(whole[:length])
        refused(shards, "cannot be read as a tar|is damaged after|is cut short")
    path.write_bytes(whole[:end])  # between two samples nothing tells but the end mark that lacks
    assert reindex(shards).samples == 6
    assert f"may be cut short behind sample {samples[5][0]}" in caplog.text


def test_index_comes_back_when_it_is_lost(shards: Path, tmp_path: Path):
    shutil.copytree(shards, tmp_path / "copy")
    for name in ("index.bin", "keys.bin"):
        (shards / name).unlink()
    with pytest.raises(InputError, match="`swath index"):
        ShardReader(shards)
    reindex(shards)
    for path in (tmp_path / "copy").iterdir():
        assert path.read_bytes() == (shards / path.name).read_bytes()
