"""Parity with published code, to fp32 noise: every fixture folder under $SWATH_GOLDEN."""

from pathlib import Path

import pytest

from tests.parity.fixtures import ROOT, folders, read
from tests.parity.kinds import KINDS


@pytest.mark.skipif(not folders(), reason=f"no golden fixtures under {ROOT}; set SWATH_GOLDEN")
def test_fixtures_are_found() -> None:
    assert any(read(folder).kind in KINDS for folder in folders())


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.name)
def test_parity(folder: Path) -> None:
    fixture = read(folder)
    if fixture.kind not in KINDS:
        pytest.skip(f"{fixture.name}: kind {fixture.kind} is not implemented yet")
    fixture.check(KINDS[fixture.kind](fixture))
