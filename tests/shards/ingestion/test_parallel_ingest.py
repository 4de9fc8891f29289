"""An ingest by several processes: the same bytes for any number of them, and whoever is killed when."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from swath.shards.errors import InputError
from swath.shards.ingest import shard
from swath.shards.ingestion import packer
from swath.shards.ingestion.quality import LeftOut
from swath.shards.ingestion.selection import Selection
from swath.shards.ingestion.work import Job, Rules
from swath.shards.ingestion.workers import Opening, Workers
from swath.shards.reader import ShardReader
from swath.shards.sources.open import open_source
from swath.shards.sources.source import Options
from swath.shards.writer import ShardWriter

pytestmark = pytest.mark.timeout(120)
COUNT, PER_SHARD, CHUNKS = 150, 40, 11  # images; samples in a shard; chunks in a split: 13 jobs each, an odd number


def image(seed: int, channels: int = 3, size: tuple[int, int] = (8, 8)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, channels), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Of mixed sizes, some of them copies, two of them damaged."""
    for number in range(COUNT):
        path = tmp_path / "set" / "ABC"[number % 3] / f"im.{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = image(number if number % 10 else 0, size=(263, 7) if number == 77 else (8, 8 + number % 2))
        path.write_bytes(data[:60] if number in (31, 90) else data)
    return tmp_path / "set"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packer, "MAX_SAMPLES", PER_SHARD)
    monkeypatch.setattr(packer, "_CHUNKS", CHUNKS)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def make(source: Path, out: Path, **given: Any) -> Any:
    return shard(source, out, max_failed=0.1, progress=False, **given)


@pytest.mark.parametrize(("copies_go", "counts"), [(False, (1, 2)), (True, (3,))])
def test_any_number_of_workers_makes_the_same_bytes(images: Path, tmp_path: Path, copies_go: bool, counts: tuple[int, ...]):
    selection = Selection(drop_duplicates=copies_go)
    manifest = make(images, tmp_path / "0", selection=selection)[""]
    whole = contents(tmp_path / "0")
    for workers in counts:
        make(images, tmp_path / str(workers), selection=selection, workers=workers)
        assert contents(tmp_path / str(workers)) == whole
        assert not active_children()
    assert {key for key, _ in manifest.skipped} == {"B/im.31", "A/im.90"}
    # every tenth is the same image; of these one is damaged, and those of odd width are another
    assert manifest.samples == COUNT - 2 - (COUNT // 10 - 2 if copies_go else 0)
    assert len(manifest.shards) > 3
    assert max(s.samples for s in manifest.shards) <= PER_SHARD
    assert manifest.contract().height is None
    reader = ShardReader(tmp_path / "0")
    pixels = np.concatenate([reader.pixels(n).reshape(3, -1) for n in range(len(reader))], axis=1)
    norm, spread = manifest.contract().normalisation, manifest.statistics["rgb"]
    assert norm.pixels == (pixels.shape[1],) * 3
    np.testing.assert_allclose(norm.mean, pixels.mean(axis=1), rtol=1e-9)
    np.testing.assert_allclose(norm.std, pixels.std(axis=1), rtol=1e-9)
    for q, row in spread.percentiles.items():
        assert row == tuple(np.percentile(pixels, int(q), axis=1, method="inverted_cdf"))
    assert spread.nodata_share == (0, 0, 0)


def test_copies_in_another_split_go_too(images: Path, tmp_path: Path):
    lines = [f"{p.relative_to(images).as_posix()},X,{'b' if n % 2 else 'a'}" for n, p in enumerate(sorted(images.rglob("*.png")))]
    split = tmp_path / "split.csv"
    split.write_text("\n".join(["file,class,split", *lines]))
    made = make(images, tmp_path / "out", split=split, selection=Selection(drop_duplicates=True))
    seen = [bytes(r.pixels(n)) for r in (ShardReader(tmp_path / "out" / name) for name in made) for n in range(len(r))]
    assert len(set(seen)) == len(seen) == COUNT - 2 - (COUNT // 10 - 2)
    gone = [LeftOut.from_state(m.source["left_out"]).counts.total() for m in made.values()]
    assert sum(gone) == COUNT // 10 - 2
    assert all(gone)


DYING = """
import os, sys, signal
from pathlib import Path
from swath.shards.ingestion import packer
from swath.shards.ingest import shard
from swath.shards.ingestion.selection import Selection
from swath.shards.writer import ShardWriter
packer.MAX_SAMPLES, packer._CHUNKS = {per_shard}, {chunks}
add, count = ShardWriter.add, [0]
def dying(*given):
    count[0] += 1
    if count[0] == {samples}:
        from multiprocessing import active_children
        Path(sys.argv[3]).write_text(" ".join(str(p.pid) for p in active_children()))
        os.kill(os.getpid(), signal.SIGKILL)
    add(*given)
ShardWriter.add = dying
shard(Path(sys.argv[1]), Path(sys.argv[2]), max_failed=0.1, workers=2, selection=Selection(drop_duplicates=True), progress=False)
"""


@pytest.mark.parametrize("samples", [1, 60, 131])
def test_killed_main_leaves_no_worker_and_continues_to_the_same_bytes(images: Path, tmp_path: Path, samples: int):
    script = textwrap.dedent(DYING).format(per_shard=PER_SHARD, chunks=CHUNKS, samples=samples)
    arguments = [sys.executable, "-c", script, str(images), str(tmp_path / "out"), str(tmp_path / "pids")]
    assert subprocess.run(arguments, timeout=60).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    workers = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    selection = Selection(drop_duplicates=True)
    make(images, tmp_path / "out", selection=selection)
    make(images, tmp_path / "whole", selection=selection)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_killed_worker_is_replaced(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    make(images, tmp_path / "whole")
    count, add = [0], ShardWriter.add

    def killing(*given: Any) -> None:
        count[0] += 1
        if count[0] in (1, 30):
            victim = active_children()[0]
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGKILL)
        add(*given)

    monkeypatch.setattr(ShardWriter, "add", killing)
    with caplog.at_level(logging.WARNING):
        make(images, tmp_path / "out", workers=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert "a worker process died (SIGKILL) at" in caplog.text
    assert not active_children()


def test_workers_that_all_die_end_in_one_line_and_what_is_done_is_kept(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    start = Workers._start

    def stillborn(workers: Workers) -> Any:
        made = start(workers)
        made.process.kill()
        return made

    with (
        monkeypatch.context() as patch,
        pytest.raises(InputError, match=r"3 worker processes died \(SIGKILL\) at") as caught,
    ):
        patch.setattr(Workers, "_start", stillborn)
        make(images, tmp_path / "out", workers=2)
    assert "\n" not in str(caught.value)
    assert (tmp_path / ".out.partial" / "journal").exists()
    assert make(images, tmp_path / "out")[""].samples == COUNT - 2


def test_errors_come_back_from_workers_as_they_are(images: Path, tmp_path: Path):
    (images / "A" / "grey.png").write_bytes(image(1, 1))
    said = []
    for workers in (0, 2):
        with pytest.raises(InputError, match="images differ") as caught:
            make(images, tmp_path / "out", workers=workers)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert not list(tmp_path.glob("*out*"))
    assert not active_children()


def test_too_many_bad_files_stop_workers_too(images: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"2 of 150 files \(1\.3%\) cannot be decoded"):
        shard(images, tmp_path / "out", max_failed=0.01, workers=2, progress=False)
    assert not list(tmp_path.glob("*out*"))


def test_a_worker_that_finds_other_files_says_so(images: Path):
    source = open_source(images, Options())
    opening = Opening(images, Options(), None, "another")
    with Workers(2, opening, source, Rules(1.0, 1.0, False)) as crew:
        with pytest.raises(InputError, match="has changed since it was opened"):
            list(crew.run([[Job(n, item, item.key, "", None)] for n, item in enumerate(source.items)]))


def test_ctrl_c_is_one_line(tmp_path: Path):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(2000):
        (folder / f"{number}.png").write_bytes(image(number, size=(40, 40)))
    command = [sys.executable, "-m", "swath.launch.cli", "shard", str(folder), "--out", str(tmp_path / "out"), "--workers", "2"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / ".out.partial" / "shard-000000.tar").exists():
        assert time.monotonic() < deadline
        assert run.poll() is None
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    _, said = run.communicate(timeout=30)
    assert said.splitlines() == ["swath shard: interrupted; the same command continues"]
    assert run.returncode == 130
    assert json.loads((tmp_path / ".out.partial" / "journal" / "plan.json").read_text())
