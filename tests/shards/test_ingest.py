"""Images → shards: identity after a kill, bad input, foreign readers."""

import errno
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from swath.shards import ingest
from swath.shards.errors import InputError
from swath.shards.ingest import shard
from swath.shards.reader import ShardReader
from swath.shards.reindex import reindex
from swath.shards.writer import ShardWriter


def png(seed: int, channels: int = 3) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, channels), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(24):
        path = tmp_path / "set" / "ABC"[number % 3] / f"im.{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return tmp_path / "set"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("samples", [1, 6, 13, 23])
def test_killed_ingest_continues_to_the_same_bytes(images: Path, tmp_path: Path, monkeypatch, samples: int):
    monkeypatch.setattr(ingest, "MAX_SAMPLES", 5)
    shard(images, tmp_path / "whole", progress=False)
    pid = os.fork()
    if pid == 0:
        count, add = [0], ShardWriter.add

        def dying(self, *args):
            count[0] += 1
            if count[0] == samples:
                os._exit(9)
            add(self, *args)

        ShardWriter.add = dying
        shard(images, tmp_path / "killed", progress=False)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert not (tmp_path / "killed").exists()
    shard(images, tmp_path / "killed", progress=False)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_disk_full_keeps_the_partial_folder_and_continues(images: Path, tmp_path: Path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="no space left"):
        patch.setattr(ShardWriter, "_write", full)
        shard(images, tmp_path / "out", progress=False)
    assert (tmp_path / ".out.partial").exists()
    assert shard(images, tmp_path / "out", progress=False)[""].samples == 24


def test_values_statistics_webdataset_and_reindex(images: Path, tmp_path: Path):
    out = tmp_path / "out"
    manifest = shard(images, out, progress=False)[""]
    reader = ShardReader(out)
    pixels = np.stack([reader.pixels(n) for n in range(24)]).astype(np.float64)
    norm = manifest.contract().normalisation
    np.testing.assert_allclose(norm.mean, pixels.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(norm.std, pixels.std((0, 2, 3)), rtol=1e-9)
    urls = [str(out / s.name) for s in manifest.shards]
    foreign = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [s["__key__"].removeprefix("./") for s in foreign] == [reader.index.key(n) for n in range(24)]
    before = contents(out)
    reindex(out)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("A/grey.png", png(1, 1), "images differ"),
        ("A/cut.png", png(1)[:60], "cannot be decoded"),
        ("A/bomb.png", png(1)[:16] + (1 << 20).to_bytes(4, "big") * 2 + png(1)[24:], "cannot be decoded"),
    ],
)
def test_bad_files_leave_nothing(images: Path, tmp_path: Path, name: str, data: bytes, message: str):
    (images / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        shard(images, tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("*out*"))


def test_zip_that_leads_outside_is_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("../a.png", png(1))
    with pytest.raises(InputError, match="leads outside"):
        shard(tmp_path / "x.zip", tmp_path / "out", progress=False)
