"""`swath index` beside tars that others have written: RS5M, dotted keys, several images, what is bad."""

import io
import logging
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from swath.shards.codec import encode_npy
from swath.shards.errors import InputError
from swath.shards.loader import Loader
from swath.shards.order import SampleOrder
from swath.shards.reader import ShardReader
from swath.shards.reindex import reindex

TarWriter = getattr(webdataset, "TarWriter")  # noqa: B009 - untyped


def image(number: int, form: str = "JPEG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    colour: Any = (10 * number % 250, 80, 7) if mode == "RGB" else 40
    Image.new(mode, (16, 16), colour).save(buffer, form)
    return buffer.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def test_rs5m_is_trained_from_as_it_is(tmp_path: Path):
    for part in ("pub11", "rs3"):
        members = {}
        for n in range(5):
            form = "PNG" if n == 1 else "JPEG"
            key = f"{part}_{n:07d}"
            members |= {
                f"{key}.caption": f" field {n}\n".encode(),
                f"{key}.img_content": image(n, form),
                f"{key}.img_name": b"a.jpg",
            }
        tar(tmp_path / f"{part}-train-0000.tar", members)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    manifest = reindex(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert (manifest.samples, list(manifest.contracts), manifest.contract().names) == (10, ["rgb"], ("red", "green", "blue"))
    reader = ShardReader(tmp_path)
    for n in range(10):
        assert abs(int(reader.pixels(n)[0].mean()) - 10 * int(reader.index.key(n)[-7:])) <= 2
        assert reader.meta(n) == {"captions": [f"field {int(reader.index.key(n)[-7:])}"]}
    loader = Loader(reader, SampleOrder(reader.shard_sizes, seed=0), global_batch=5, micro_batch=5)
    loaded = [b.chips for b in islice(loader, 2)]
    assert sorted(i for chips in loaded for i in chips.id.tolist()) == sorted(reader.index.samples["id"].tolist())


def test_several_images_of_which_the_first_sample_has_one(tmp_path: Path):
    pair = {n: np.full((2, 8, 8), n, np.int16) for n in range(4)}
    with TarWriter(str(tmp_path / "a.tar")) as writer:
        for n in range(4):
            writer.write({"__key__": f"k{n}", "optical.png": image(n, "PNG")} | ({"radar.npy": pair[n]} if n else {}))
    manifest = reindex(tmp_path)
    reader = ShardReader(tmp_path)
    assert list(manifest.contracts) == ["optical", "radar"]
    assert [reader.has(n, "radar") for n in range(4)] == [False, True, True, True]
    assert manifest.contracts["radar"].normalisation.mean == (2.0, 2.0)
    stored = reader.chips([0, 3]).stored["radar"]
    assert stored.valid is not None
    assert stored.valid.flatten(1).any(1).tolist() == [False, True]
    assert int(stored.pixels[1].min()) == 3


def test_keys_with_dots_and_slashes(tmp_path: Path):
    members = {}
    for n in range(30):
        members |= {f"x.y/S2A_v1.{n}.q.cls": b"1", f"x.y/S2A_v1.{n}.q.jpg": image(n)}
    tar(tmp_path / "a.tar", members)
    assert reindex(tmp_path).samples == 30
    reader = ShardReader(tmp_path)
    assert [reader.index.key(n) for n in range(30)] == [f"x.y/S2A_v1.{n}.q" for n in range(30)]
    assert reindex(tmp_path).samples == 30  # the second time as well
    assert abs(int(reader.pixels(7)[0].mean()) - 70) <= 2


def test_keys_that_come_in_several_tars(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for name in ("a", "b"):
        tar(tmp_path / f"{name}.tar", {"000.jpg": image(1), "001.jpg": image(2)})
    with caplog.at_level(logging.WARNING):
        reindex(tmp_path)
    reader = ShardReader(tmp_path)
    assert [reader.index.key(n) for n in range(4)] == ["a/000", "a/001", "b/000", "b/001"]
    assert len(set(reader.index.samples["id"].tolist())) == 4
    assert "keys come several times" in caplog.text


def test_members_that_do_not_follow_each_other(tmp_path: Path):
    tar(tmp_path / "a.tar", {"a.png": image(1, "PNG"), "b.png": image(1, "PNG"), "a.x.png": image(1, "PNG")})
    with pytest.raises(InputError, match="sample a stands twice; members of one sample must follow"):
        reindex(tmp_path)


def test_bad_samples_are_left_out_by_choice_and_listed(tmp_path: Path):
    good, grey = image(5), image(0, mode="L")
    tar(
        tmp_path / "a.tar",
        {"a.jpg": good, "b.jpg": good[:300], "c.jpg": grey, "d.jpg": good, "e.txt": b"no image", "f.jpg": good, "f.json": b"{"},
    )
    with pytest.raises(InputError, match="sample b cannot be decoded"):
        reindex(tmp_path)
    with pytest.raises(InputError, match=r"4 of 6 samples cannot be indexed, more than --max-failed allows: .*sample b"):
        reindex(tmp_path, max_failed=0.5)
    assert not (tmp_path / "manifest.json").exists()
    manifest = reindex(tmp_path, max_failed=0.7)
    assert (manifest.samples, manifest.shards[0].samples) == (2, 2)
    assert [key for key, _ in manifest.skipped] == ["b", "c", "e", "f"]
    for (_, reason), words in zip(manifest.skipped, ("cannot be decoded", "samples differ", "has no image", "JSON"), strict=True):
        assert words in reason
    reader = ShardReader(tmp_path)
    assert [reader.index.key(n) for n in range(2)] == ["a", "d"]
    assert manifest.contract().normalisation.pixels == (512, 512, 512)
    assert reindex(tmp_path, max_failed=0.7).skipped == manifest.skipped  # not listed twice


def test_a_bad_sample_leaves_no_trace_in_the_statistics(tmp_path: Path):
    """Its first image is good, its second is not."""
    flat = {n: encode_npy(np.full((1, 4, 4), n, np.uint8)) for n in (1, 9)}
    tar(tmp_path / "a.tar", {"a.p.npy": flat[9], "a.q.npy": b"\x93NUMPY", "b.p.npy": flat[1], "b.q.npy": flat[1]})
    manifest = reindex(tmp_path, max_failed=0.5)
    assert {name: made.normalisation.maximum for name, made in manifest.contracts.items()} == {"p": (1.0,), "q": (1.0,)}


def test_a_series_by_its_times_or_by_its_mask(tmp_path: Path):
    chip = np.arange(6 * 4 * 4, dtype=np.uint16).reshape(6, 4, 4)
    mask = np.ones((3, 4, 4), np.uint8)
    mask[1] = 0
    times = {"times": {"s2": ["2020-01-01", None, "2020-03-01"]}}
    for folder, extra in (("times", {"json": times}), ("mask", {"s2.valid.npy": mask})):
        (tmp_path / folder).mkdir()
        with TarWriter(str(tmp_path / folder / "a.tar")) as writer:
            writer.write({"__key__": "k", "s2.npy": chip} | extra)
        made = reindex(tmp_path / folder).contract()
        assert (made.dates, made.names) == (3, ("band_1", "band_2"))
        dates_tc = chip.reshape(3, 2, -1)[[0, 2] if folder == "mask" else [0, 1, 2]]
        np.testing.assert_allclose(made.normalisation.mean, dates_tc.mean((0, 2)))


@pytest.mark.parametrize(
    ("name", "members", "match"),
    [
        ("a.tar", {"a.tif": b"II*\0"}, r"no image \(jpg, png or npy\); `swath shard` converts tif"),
        ("a b.tar", {"a.jpg": image(0)}, "a shard's name is made of letters"),
        ("a.tar", {"\udcff.jpg": image(0)}, "no plain file with a plain path"),
        ("a.tar", {"a.jpg": image(0), "a.json": b'{"lat": 1' + b"0" * 400 + b"}", "b.jpg": b""}, "sample b cannot be decoded"),
    ],
)
def test_what_is_refused(tmp_path: Path, name: str, members: dict[str, bytes], match: str):
    tar(tmp_path / name, members)
    with pytest.raises(InputError, match=match) as caught:
        reindex(tmp_path)
    assert "\n" not in str(caught.value)


def test_packed_tars(tmp_path: Path):
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(InputError, match=r"holds no \.tar files; unpack a\.tar\.gz"):
        reindex(tmp_path)


def test_what_is_said_of_a_sample(tmp_path: Path):
    """Its JSON, else its text, else nothing."""
    tar(
        tmp_path / "a.tar",
        {
            "a.jpg": image(1), "a.txt": b"t", "a.json": b'{"c": 1}', "b.jpg": image(1), "c.jpg": image(1),
            "c.caption": b"\xef\xbb\xbfx\xff", "d.jpg": image(1), "d.json": b"[1]",
        },
    )  # fmt: skip
    reindex(tmp_path)
    reader = ShardReader(tmp_path)
    assert [reader.meta(n) for n in range(4)] == [{"c": 1}, {}, {"captions": ["x\ufffd"]}, {}]
