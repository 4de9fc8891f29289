"""Pairs and series from the command line to the batch."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from swath.launch.cli import main
from swath.shards.prepare import prepare
from swath.shards.reader import ShardReader

pytest.importorskip("rasterio")
from tests.shards.sources.test_joined import optical, radar

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning", "ignore::UserWarning")
ANYHOW = ["--implausible-ok"]  # pixels that tell their place are no reflectance


def test_pairs_from_the_command_line_whatever_the_workers(tmp_path: Path):
    optical(tmp_path, side=96)
    radar(tmp_path, side=64)
    for workers in ("1", "2"):
        out = tmp_path / f"out{workers}"
        args = ["shard", tmp_path / "s2", "--out", out, "--chip", "8", "--workers", workers, "--with", tmp_path / "s1"]
        assert main([*map(str, args), "--within-days", "3", *ANYHOW]) == 0
    one, two = (sorted((tmp_path / f"out{n}").iterdir()) for n in (1, 2))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    reader = ShardReader(tmp_path / "out1")
    assert list(reader.contracts) == ["sentinel2", "sentinel1"]
    assert len(reader) == 144
    notes = json.loads((tmp_path / "out1" / "manifest.json").read_text())["source"]["notes"]
    assert "joined by footprint: 64 of 144 samples matched, 80 unmatched, 0 late (beyond 3 days); " in "\n".join(notes)
    batch = prepare(reader.chips(range(144)), reader.contracts, (8, 8))
    present = batch.valid["sentinel1"].flatten(1).any(1)
    assert present.sum() == 64
    assert torch.equal(present, batch.valid["sentinel1"].flatten(1).all(1))
    assert (batch.images["sentinel1"][~present] == 0).all()
    for number in np.flatnonzero(present.numpy()).tolist():
        own, partner = reader.pixels(number, "sentinel2"), reader.pixels(number, "sentinel1")
        assert np.abs(own[0] - 1000.0 - (partner[0] - 5000)).max() <= 0.5
        assert np.abs(own[1] - 2000.0 - (partner[1] - 10_000)).max() <= 0.5


def test_only_pairs_and_what_it_would_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    optical(tmp_path, side=96)
    radar(tmp_path, side=64)
    args = [
        "shard", str(tmp_path / "s2"), "--out", str(tmp_path / "out"), "--chip", "32", "--with", str(tmp_path / "s1"),
        "--paired-only", "--join", "footprint",
    ]  # fmt: skip
    assert main([*args, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "joined by footprint: 4 of 9 samples matched, 5 unmatched; those without a partner are left out" in said
    assert main([*args, *ANYHOW]) == 0
    assert len(ShardReader(tmp_path / "out")) == 4


def test_series_from_the_command_line(tmp_path: Path):
    for day in (1, 2, 3, 4, 5):
        optical(tmp_path, f"202006{day:02d}T100000", side=32)
    args = ["shard", str(tmp_path / "s2"), "--out", str(tmp_path / "out"), "--chip", "16", "--dates-per-sample", "3"]
    assert main([*args, *ANYHOW]) == 0
    reader = ShardReader(tmp_path / "out")
    assert len(reader) == 8
    assert reader.contract.dates == 3
    chips = reader.chips(range(8))
    batch = prepare(chips, reader.contracts, (16, 16))
    assert batch.images["sentinel2"].shape == (8, 6, 16, 16)
    dates = batch.valid["sentinel2"].flatten(2).all(2).sum(1)
    assert sorted(dates.tolist()) == [2] * 4 + [3] * 4
    assert (~torch.isnan(chips.meta["time"])).sum(1).tolist() == dates.tolist()


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--with", "x", "--dates-per-sample", "2"], "cannot be given together"),
        (["--join", "key"], "--join and --paired-only say more of --with FOLDER, which is not given"),
        (["--paired-only", "--dates-per-sample", "2"], "--join and --paired-only say more of --with"),
        (["--within-days", "2"], "--within-days says more of --with FOLDER or --dates-per-sample"),
        (["--with", "nowhere"], "nowhere does not exist"),
        (["--with", "x", "--join", "near"], "--join 'near' is none of footprint, key and table=FILE"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], line: str):
    optical(tmp_path, side=32)
    assert main(["shard", str(tmp_path / "s2"), "--out", str(tmp_path / "out"), *args]) == 2
    said = capsys.readouterr().err.strip()
    assert line in said
    assert said.count("\n") == 0
