"""docs/reliability.md: each row of its table names tests, and they are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
# what the page calls a file by
SHORT = {"ranks": "test_faults_of_ranks.py", "resume": "test_resume.py", "worlds": "test_ranks.py"}


def rows() -> list[list[str]]:
    table = PAGE.read_text().partition("\n## Faults\n")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if line.startswith("|")]
    return [row for row in cells[2:] if len(row) == 3 and row[1].strip("| ")]


def named(words: str) -> list[tuple[Path, str | None]]:
    """(file, function or None) of each test that a cell names."""
    found: list[tuple[Path, str | None]] = []
    file = None
    for quoted, bare in re.findall(r"`([^`]+)`|(\w+)", words):
        if bare in SHORT or quoted.endswith(".py"):
            name = quoted or SHORT[bare]
            file = ROOT / name if "/" in name else ROOT / "tests" / "pretrain" / name
            found.append((file, None))
        elif quoted:
            assert file is not None, f"{quoted}: of which file?"
            found.append((file, f"test_{quoted}"))
    return found


def test_the_table_is_read() -> None:
    assert len(rows()) > 30


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:40])
def test_a_row_names_tests_that_are_there(row: list[str]) -> None:
    tests = named(row[2])
    assert tests, f"no test: {row}"
    for file, function in tests:
        assert file.exists(), file
        assert function is None or f"\ndef {function}(" in file.read_text(), f"{file} has no {function}"
