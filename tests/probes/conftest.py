"""For the tests of probes: features are not kept in the home folder."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def features_are_kept_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swath.probes.run.default", lambda: tmp_path / "features")
