"""Images → shards: identity after a kill, bad input, split files, foreign readers."""

import errno
import io
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from swath.shards.errors import InputError
from swath.shards.ingest import _bar, shard
from swath.shards.ingestion import packer
from swath.shards.reader import ShardReader
from swath.shards.reindex import reindex
from swath.shards.sources import images as image_source
from swath.shards.sources.source import Options
from swath.shards.writer import ShardWriter


def encoded(seed: int, channels: int = 3, kind: str = "PNG", size: int = 8) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, channels), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, kind)
    return buffer.getvalue()


def png(seed: int, channels: int = 3) -> bytes:
    return encoded(seed, channels)


def bomb() -> bytes:
    """A small PNG that says it is a million pixels on each side."""
    head = b"IHDR" + (1 << 20).to_bytes(4, "big") * 2 + png(1)[24:29]
    return png(1)[:12] + head + zlib.crc32(head).to_bytes(4, "big") + png(1)[33:]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(24):
        path = tmp_path / "set" / "ABC"[number % 3] / f"im.{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return tmp_path / "set"


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """Two of three images train, the rest is tested; one image is not named."""
    lines = [f"{'ABC'[n % 3]}/im.{n}.png,{'ABC'[n % 3]},{'test' if n % 3 == 2 else 'train'},{n // 4}" for n in range(23)]
    path = tmp_path / "split.csv"
    path.write_text("\n".join(["file,class,split,block", *lines]))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def dying_after(samples: int, *args: Any, **options: Any) -> None:
    """Run an ingest in a child that dies while it writes that sample."""
    pid = os.fork()
    if pid == 0:
        count, add = [0], ShardWriter.add

        def dying(*given: Any) -> None:
            count[0] += 1
            if count[0] == samples:
                os._exit(9)
            add(*given)

        setattr(ShardWriter, "add", dying)  # noqa: B010 - in the child only
        shard(*args, **options, progress=False)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


@pytest.mark.parametrize("samples", [1, 6, 13, 23])
@pytest.mark.parametrize("by_split", [False, True])
def test_killed_ingest_continues_to_the_same_bytes(
    images: Path, split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: int, by_split: bool
):
    monkeypatch.setattr(packer, "MAX_SAMPLES", 5)
    options: dict[str, Any] = {"split": split} if by_split else {}
    shard(images, tmp_path / "whole", **options, progress=False)
    dying_after(samples, images, tmp_path / "killed", **options)
    assert not (tmp_path / "killed").exists()
    shard(images, tmp_path / "killed", **options, progress=False)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_continuing_decodes_nothing_twice(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packer, "MAX_SAMPLES", 5)
    dying_after(18, images, tmp_path / "out")
    read, count = image_source.Images.read, []
    monkeypatch.setattr(image_source.Images, "read", lambda *given: count.append(1) or read(*given))
    shard(images, tmp_path / "out", progress=False)
    assert len(count) == 24 - 15


def test_torn_journal_is_written_again(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packer, "MAX_SAMPLES", 5)
    shard(images, tmp_path / "whole", progress=False)
    dying_after(18, images, tmp_path / "out")
    (tmp_path / ".out.partial" / "journal" / "all" / "000001.json").write_text('{"shard": {')
    shard(images, tmp_path / "out", progress=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_disk_full_keeps_the_partial_folder_and_continues(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="no space left"):
        patch.setattr(ShardWriter, "_write", full)
        shard(images, tmp_path / "out", progress=False)
    assert (tmp_path / ".out.partial").exists()
    assert not (tmp_path / "out").exists()
    assert shard(images, tmp_path / "out", progress=False)[""].samples == 24
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize("per_shard", [7, 4096])
def test_values_statistics_webdataset_and_reindex(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_shard: int):
    monkeypatch.setattr(packer, "MAX_SAMPLES", per_shard)
    out = tmp_path / "out"
    manifest = shard(images, out, progress=False)[""]
    reader = ShardReader(out)
    pixels = np.stack([reader.pixels(n) for n in range(24)]).astype(np.float64)
    norm = manifest.contract().normalisation
    np.testing.assert_allclose(norm.mean, pixels.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(norm.std, pixels.std((0, 2, 3)), rtol=1e-9)
    assert norm.pixels == (24 * 64,) * 3
    assert reader.shard_sizes == ([7, 7, 7, 3] if per_shard == 7 else [24])
    for number in range(24):
        source = Image.open(images / reader.meta(number)["source"])
        assert np.array_equal(reader.pixels(number), np.moveaxis(np.asarray(source), 2, 0))
    assert reader.meta(0)["radiometry"]["rgb"]["scale_source"] == "none: values as stored"
    urls = [str(out / s.name) for s in manifest.shards]
    foreign = list(getattr(webdataset, "WebDataset")(urls, shardshuffle=False).decode("pil"))  # noqa: B009 - untyped
    assert [s["__key__"].removeprefix("./") for s in foreign] == [reader.index.key(n) for n in range(24)]
    before = contents(out)
    reindex(out)
    assert contents(out) == before


def test_progress_in_a_log_file_is_a_line_every_half_minute(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    shard(images, tmp_path / "out")
    assert capfd.readouterr().err == ""
    bar = _bar(24, True)
    bar.start_t -= 100
    bar.last_print_t -= 100
    for _ in range(24):
        bar.update()
    bar.close()
    lines = [line for line in capfd.readouterr().err.replace("\r", "").splitlines() if line.strip()]
    assert 1 <= len(lines) <= 2
    assert "of 24 chips" in lines[0]


def test_same_plan_is_done_and_other_content_is_refused(images: Path, tmp_path: Path):
    out = tmp_path / "out"
    made = shard(images, out, progress=False)
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert shard(images, out, progress=False) == made
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before
    (images / "A" / "new.png").write_bytes(png(99))
    with pytest.raises(InputError, match="exists and was not made by this command"):
        shard(images, out, progress=False)
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before


def test_an_out_that_is_a_file_or_below_one_is_refused(images: Path, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="exists and was not made"):
        shard(images, tmp_path / "file", progress=False)
    with pytest.raises(InputError, match=r"writing shards in .* failed"):
        shard(images, tmp_path / "file" / "out", progress=False)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("A/grey.png", png(1, 1), "images differ"),
        ("A/cut.png", png(1)[:60], "cannot be decoded"),
        ("A/cut.jpg", encoded(1, kind="JPEG", size=64)[:900], "cannot be decoded"),
        ("A/cut.tif", encoded(1, kind="TIFF", size=64)[:900], "cannot be decoded"),
        ("A/bomb.png", bomb(), "exceeds limit|is beyond the limit"),
        ("A/text.jpg", b"no image", "cannot be decoded"),
        ("A/empty.png", b"", "cannot be decoded"),
    ],
)
def test_bad_files_leave_nothing(images: Path, tmp_path: Path, name: str, data: bytes, message: str):
    (images / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        shard(images, tmp_path / "out", progress=False)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    assert not list(tmp_path.glob("*out*"))


def test_bad_files_below_the_limit_are_listed_and_counted(images: Path, tmp_path: Path):
    (images / "A" / "cut.jpg").write_bytes(encoded(1, kind="JPEG", size=64)[:900])
    (images / "B" / "cut.png").write_bytes(png(1)[:60])
    manifest = shard(images, tmp_path / "out", max_failed=0.1, progress=False)[""]
    assert manifest.samples == 24
    assert sorted(key for key, _ in manifest.skipped) == ["A/cut", "B/cut"]
    with pytest.raises(InputError, match=r"2 of 26 files \(7\.7%\) cannot be decoded"):
        shard(images, tmp_path / "strict", max_failed=0.05, progress=False)
    assert not list(tmp_path.glob("*strict*"))


def test_unreadable_file_is_listed_and_unreadable_folder_stops(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read_bytes, scandir = Path.read_bytes, os.scandir

    def no_file(path: Path) -> bytes:
        if path.name == "im.3.png":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read_bytes(path)

    def no_folder(path: Any) -> Any:
        if str(path).endswith("B"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", no_file)
        skipped = shard(images, tmp_path / "out", max_failed=0.1, progress=False)[""].skipped
    assert skipped == (("A/im.3", "cannot be read: Permission denied"),)
    monkeypatch.setattr(os, "scandir", no_folder)
    with pytest.raises(InputError, match="set/B cannot be read"):
        shard(images, tmp_path / "other", progress=False)


def test_links_are_left_out_and_said(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (images / "A" / "link.png").symlink_to(images / "B" / "im.1.png")
    with caplog.at_level("INFO"):
        assert shard(images, tmp_path / "out", progress=False)[""].samples == 24
    assert "1 symbolic links are left out" in caplog.text


@pytest.mark.parametrize("kind", ["missing", "empty", "text"])
def test_source_without_images_is_refused(tmp_path: Path, kind: str):
    source = tmp_path / "source"
    if kind != "missing":
        source.mkdir()
    if kind == "text":
        (source / "readme.txt").write_text("none here")
    with pytest.raises(InputError, match="does not exist" if kind == "missing" else "holds no images"):
        shard(source, tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "x/../../a.png", "C:/a.png", "..\\a.png"])
def test_zip_that_leads_outside_is_refused(tmp_path: Path, name: str):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("good.png", png(1))
        archive.writestr(name, png(1))
    with pytest.raises(InputError, match="leads outside"):
        shard(tmp_path / "x.zip", tmp_path / "out", progress=False)


def test_zip_bomb_and_damaged_zip(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(1 << 24))
    with pytest.raises(InputError, match="beyond the limits"):
        shard(tmp_path / "bomb.zip", tmp_path / "out", progress=False)
    (tmp_path / "cut.zip").write_bytes(b"PK\3\4 not a zip")
    with pytest.raises(InputError, match="neither a folder nor a zip"):
        shard(tmp_path / "cut.zip", tmp_path / "out", progress=False)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_damaged_member_of_a_zip_is_listed(tmp_path: Path, method: int):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        for number in range(5):
            archive.writestr(f"all/A/{number}.png", png(number))
        info = archive.getinfo("all/A/2.png")
    raw = bytearray((tmp_path / "x.zip").read_bytes())
    start = info.header_offset + 60
    raw[start : start + 40] = bytes(40)
    (tmp_path / "x.zip").write_bytes(raw)
    manifest = shard(tmp_path / "x.zip", tmp_path / "out", max_failed=0.5, progress=False)[""]
    assert (manifest.samples, [key for key, _ in manifest.skipped], manifest.classes) == (4, ["A/2"], ("A",))


def test_split_gives_a_folder_each_with_labels_and_blocks(
    images: Path, split: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level("INFO"):
        made = shard(images, tmp_path / "out", split=split, progress=False)
    assert {name: m.samples for name, m in made.items()} == {"train": 16, "test": 7}
    assert f"1 chips left out: not in {split} (such as" in caplog.text
    assert made["test"].source["left_out"] == {f"not in {split}": {"samples": 1, "examples": ["C/im.23"]}}
    test, train = (ShardReader(tmp_path / "out" / name) for name in ("test", "train"))
    assert test.manifest.classes == train.manifest.classes == ("A", "B", "C")
    assert set(test.labels.tolist()) == {2}
    for number in range(len(train)):
        meta = train.meta(number)
        assert meta["block"] == train.index.samples["block"][number] == int(meta["key"].rsplit(".", 1)[1]) // 4
        assert train.manifest.classes[train.labels[number]] == meta["key"][0]
    assert not set(train.index.samples["id"].tolist()) & set(test.index.samples["id"].tolist())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,split\nA/im.0.png,train\n", "has no column class"),
        ("", "has no column file, class, split"),
        ("file,class,split\n", "has no rows"),
        (
            "file,class,split\nA/im.0.png,A,train\nA/gone.png,A,train\n",
            "1 files that the source does not have, such as A/gone.png",
        ),
        ("file,class,split\nA/im.0.png,A,../up\n", "not usable names"),
        ("file,class,split\nA/im.0.png,A,train\nA/im.0.png,A,test\n", "stands twice"),
        ("file,class,split,block\nA/im.0.png,A,train,north\n", "cannot be read"),
        ("file,class,split\n\xff", "cannot be read"),
    ],
)
def test_bad_split_files(images: Path, tmp_path: Path, text: str, message: str):
    path = tmp_path / "split.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        shard(images, tmp_path / "out", split=path, progress=False)
    assert not list(tmp_path.glob("*out*"))


def test_missing_split_file(images: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"split file .* cannot be read"):
        shard(images, tmp_path / "out", split=tmp_path / "none.csv", progress=False)


@pytest.mark.parametrize(
    "given",
    [{"options": Options(chip=0)}, {"options": Options(stride=-1)}, {"max_failed": 2.0}, {"max_nodata": -0.1}, {"workers": -1}],
)
def test_numbers_out_of_range(images: Path, tmp_path: Path, given: dict[str, Any]):
    with pytest.raises(InputError, match=r"must be at least|between 0 and 1"):
        shard(images, tmp_path / "out", **given, progress=False)
