"""A colleague's process, which does not see swath."""

import os
import subprocess
import sys
from pathlib import Path


def run_elsewhere(code: str, *arguments: Path | str, at: Path, python: Path | str = sys.executable) -> str:
    """What `code` prints, run in the folder `at` with caches of its own; AssertionError ends like its errors if it fails."""
    cache = {"HF_HOME": str(at / "home"), "HF_MODULES_CACHE": str(at / "modules"), "HF_HUB_OFFLINE": "1"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | cache
    command = [str(python), "-P", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=at, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
