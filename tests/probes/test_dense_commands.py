"""`swath probe segment|change|pixel`, as a user gives them."""

import json
from pathlib import Path

import pytest

from swath.launch.cli import main
from swath.probes import maps, scene
from swath.probes.task import Bench
from tests.hub.made import save_run
from tests.probes.dense_shards import bench, hyperspectral, scenes
from tests.probes.test_pixel import given


def command(task: str, made: Bench, parts: dict[str, Path], tmp_path: Path, *flags: str) -> tuple[int, Path]:
    run, out = tmp_path / "run", tmp_path / "out" / f"{task}.json"
    if not run.exists():
        save_run(made.loaded, run)
    said = [word for part, folder in parts.items() for word in (f"--{part}", str(folder))]
    return main(["probe", task, str(run), *said, "--json", str(out), "--cache", str(tmp_path / "cache"), *flags]), out


def rerun_computes_nothing(
    task: str, made: Bench, parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *flags: str
) -> bool:
    """The same command again gives the same rows, by features that are kept."""
    out = tmp_path / "out" / f"{task}.json"
    rows = json.loads(out.read_text())["rows"]
    for module, name in ((maps, "extract_maps"), (scene, "features")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("computed again"))
    code, _ = command(task, made, parts, tmp_path, *flags)
    return code == 0 and json.loads(out.read_text())["rows"] == rows


@pytest.mark.parametrize("task,pairs,metric", [("segment", False, "miou"), ("change", True, "f1")])
def test_dense_tasks_of_scenes(
    task: str, pairs: bool, metric: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = scenes(tmp_path / "scenes", tmp_path / "shards", pairs=pairs)
    parts = {part: shards / part for part in ("train", "val", "test")}
    code, out = command(task, bench(shards), parts, tmp_path, "--steps", "5", "--scratch-steps", "1")
    assert code == 0, capsys.readouterr().err
    told, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert told["metric"].lower() == metric and "random initialisation" in shown and "from scratch" in shown
    assert told["by_row"]["backbone"]["confusion"] and told["backbone"]["name"]
    assert out.with_name(f"{task}-overlays.png").stat().st_size > 500
    assert rerun_computes_nothing(task, bench(shards), parts, tmp_path, monkeypatch, "--steps", "5", "--scratch-steps", "1")


def test_pixels_of_a_scene(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shards = hyperspectral(tmp_path / "scene", tmp_path / "shards", size=(70, 56))
    flags = ["--per-class", "5", "--splits", "1", "--scratch-steps", "0"]
    code, out = command("pixel", given(shards), {"train": shards, "test": shards}, tmp_path, *flags)
    assert code == 0, capsys.readouterr().err
    told, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert "too" not in shown and told["interval"] is None and told["interval_method"].startswith("95 % bootstrap of the splits")
    rows = {row["name"] for row in told["rows"]}
    assert "backbone" in rows and "random initialisation" in rows and len(rows) > 4
    assert rerun_computes_nothing("pixel", given(shards), {"train": shards, "test": shards}, tmp_path, monkeypatch, *flags)
