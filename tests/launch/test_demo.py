"""The demo from end to end, with fewer scenes and epochs."""

from pathlib import Path

import pytest

from swath.launch import demo


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rasterio")
    pytest.importorskip("transformers")
    monkeypatch.setattr(demo, "SCENES", {"train": (2, 0), "test": (1, 1)})
    monkeypatch.setattr(demo, "EPOCHS", 2)
    assert demo.demo(tmp_path / "demo") == 0
    out = capsys.readouterr().out
    assert "linear, on band means and deviations" in out and (tmp_path / "demo" / "run" / "report.html").exists()
    assert (tmp_path / "demo" / "exported" / "model.safetensors").exists()
    assert demo.demo(tmp_path / "demo") == 0, "again: everything is there already"
