"""Ten kills at arbitrary moments, as the committed figure was made."""

import pytest

from benchmarks.resume import main


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_kills() -> None:
    assert main(["--kills", "10", "--seed", "7"]) == 0
