"""docs/handover.md is a walk that works: every block of it is run, in order, in one folder, against a stand-in of the Hub."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import swath
from tests.hub.conftest import environment
from tests.hub.hub_server import serving

ROOT = Path(swath.__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = {"scenes", "shard", "inspect", "pretrain", "probe", "export", "adapt", "embed", "retrieve"}


def blocks() -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / "docs" / "handover.md").read_text())


def test_the_walk_uses_every_command_of_handing_on() -> None:
    used = {line.split()[1] for kind, text in blocks() if kind == "sh" for line in text.splitlines()}
    assert used == COMMANDS


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_command_of_the_walk_runs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("rasterio")
    pytest.importorskip("pyarrow")
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "swath").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m swath.launch.cli "$@"\n')
    (bin_ / "swath").chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    with serving() as server:
        given = os.environ | environment(server, tmp_path) | {"PATH": f"{bin_}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        said = []
        for kind, text in blocks():
            command = ["sh", "-e"] if kind == "sh" else [sys.executable, "-"]
            ran = subprocess.run(command, input=text, cwd=work, env=given, capture_output=True, text=True)
            assert ran.returncode == 0, f"{text}\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"
            said.append(ran.stdout)
    card = (work / "mine" / "README.md").read_text()
    assert "cc-by-4.0" in card.lower() and "apache-2.0" in card
    assert (work / "runs" / "mine" / "report.html").stat().st_size > 10_000
    assert "random" in said[2] and "statistics" in said[2]
    assert "torch.Size([1, " in said[4]
    assert (work / "features.parquet").stat().st_size > 1000 and (work / "four-bands" / "model.safetensors").exists()
