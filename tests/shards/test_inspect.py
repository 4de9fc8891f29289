"""`swath inspect`: the text names what there is, the sheet shows it with what is not clear dimmed."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from swath.shards.errors import InputError
from swath.shards.inspect import CELL, inspect
from swath.shards.reindex import reindex
from tests.shard_folders import make_shards


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
    assert report.sheet == folder / "contact_sheet.png"
    assert Image.open(report.sheet).size == (8 * CELL, 3 * CELL)
    inspect(folder, tmp_path / "own.png")
    assert (tmp_path / "own.png").exists()


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
    shown = np.asarray(Image.open(inspect(folder).sheet))
    assert shown.shape == (CELL, 2 * CELL, 3)
    rows = shown[:, :CELL, 0].mean(1) / 255
    assert rows[: CELL // 5].max() > 0.4  # clear: stretched
    assert rows[CELL * 5 // 16 : CELL * 7 // 16].max() < 0.36  # cloud: dimmed, though the values are higher
    assert rows[CELL * 9 // 16 :].max() == 0
    assert shown[:, CELL:].max() == 0


def test_sheet_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make_shards(tmp_path / "shards", samples=4)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(InputError, match="no space left while writing the contact sheet"):
        inspect(folder)
