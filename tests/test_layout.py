"""The layout's traps, kept shut (see CONTRIBUTING)."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_folders_are_one_package() -> None:
    """`swath/` holds relative links to the folders at the top, and only swath/__init__.py has a version."""
    for name in ("kernels", "backbones", "shards", "pretrain", "hub", "probes", "launch"):
        link = ROOT / "swath" / name
        assert link.is_symlink() and str(link.readlink()) == f"../{name}"
        assert "__version__" not in (ROOT / name / "__init__.py").read_text()


def test_transformers_imports_from_the_checkout() -> None:
    """It looks for a published package called `kernels`, and finds our folder when the checkout is the working directory."""
    pytest.importorskip("transformers")
    done = subprocess.run([sys.executable, "-c", "import transformers"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_file_is_a_second_utils() -> None:
    names = {p.name for folder in (ROOT / "swath").iterdir() if folder.is_dir() for p in folder.rglob("*.py")}
    assert not names & {"utils.py", "common.py", "helpers.py", "misc.py"}
