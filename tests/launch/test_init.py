"""From an archive to the first training step, as the README would have it."""

import json
import time
from pathlib import Path

import pytest

from swath.shards.manifest import read_manifest
from tests.launch.test_cli import TINY, run
from tests.shards.test_first_contact import dn, tif


def test_from_twenty_tiles_to_the_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Ten minutes on two cores is the promise; this takes seconds."""
    tiles, recipe, shards, trained = (tmp_path / name for name in ("tiles", "recipe.yaml", "shards", "run"))
    assert run(capsys, "scenes", "--out", tiles, "--count", 20, "--size", 128)[0] == 0
    begun = time.perf_counter()
    code, out, _ = run(capsys, "init", tiles, "--out", recipe)
    assert code == 0 and f"{recipe}: 0 guesses to confirm" in out and f"swath shard {recipe}" in out
    assert run(capsys, "shard", recipe, "--yes", "--out", shards, "--workers", 2)[0] == 0
    assert read_manifest(shards).samples == 20
    given = [f"data.train={shards}", "data.size=64", f"run.dir={trained}", *TINY, "train.max_steps=1"]
    code, out, _ = run(capsys, "pretrain", "mae_vit_tiny", *given)
    assert code == 0 and "1 steps done" in out
    assert len((trained / "metrics.jsonl").read_text().splitlines()) == 1
    assert time.perf_counter() - begun < 120, "a fifth of what was promised, on a machine that others use too"


def test_guesses_are_listed_refused_and_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for number in range(3):
        tif(tmp_path / "set" / f"S2A_MSIL2A_{number}.tif", dn(seed=number))
    recipe = tmp_path / "recipe.yaml"
    code, out, _ = run(capsys, "init", tmp_path / "set", "--out", recipe)
    assert code == 0 and "6 guesses to confirm" in out and "\n  sensor: sentinel2 (file name" in out
    code, _, err = run(capsys, "shard", recipe, "--out", tmp_path / "out")
    assert code == 2 and "guesses to confirm" in err and len(err.splitlines()) == 7 and not (tmp_path / "out").exists()
    code, _, err = run(capsys, "shard", recipe, "--out", tmp_path / "out", "--yes", "--sensor", "landsat8")
    assert code == 2 and "write options such as --bands and --sensor into it" in err
    code, out, _ = run(capsys, "shard", recipe, "--out", tmp_path / "out", "--yes", "--dry-run")
    assert code == 0 and "chips: 3" in out
    assert run(capsys, "shard", recipe, "--out", tmp_path / "out", "--yes", "--workers", 0)[0] == 0
    assert run(capsys, "shard", tmp_path / "set", "--out", tmp_path / "same", "--workers", 0)[0] == 0
    made, same = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("out", "same"))
    assert made == same
    assert run(capsys, "init", tmp_path / "set", "--out", recipe)[0] == 2
    assert run(capsys, "shard", tmp_path / "missing.yaml", "--out", tmp_path / "no")[0] == 2
