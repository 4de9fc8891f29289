"""What a run knows of a machine, its folders, its samples and their places is in no file of its export."""

import struct
from pathlib import Path

import pytest

from swath.hub.card import without_paths
from swath.hub.export import export
from swath.pretrain.config import read_recipe
from swath.pretrain.trainer import pretrain
from swath.shards.identity import hash_text
from tests.shard_folders import make_sensor_shards, sensor

LAT, LON = 47.376887, -8.541694
RECIPE = """
# remark-of-planted-person, /planted-notes/a.txt
run: {{dir: "{run}", seed: 3}}
data: {{train: "{shards}", val: "{shards}", cache_dir: "{cache}"}}
backbone: {{name: vit_tiny_patch8, width: 24, depth: 1, context: true}}
objective: {{name: mae, decoder_width: 24, decoder_depth: 1, decoder_heads: 2}}
train: {{global_batch: 8, max_steps: 2, precision: fp32, threads: 1}}
health: {{every: 100, samples: 8}}
"""


def test_nothing_planted_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swath.hub.export._verify", lambda folder, scratch: None)
    monkeypatch.setattr("socket.gethostname", lambda: "planted-host")
    for name in ("USER", "LOGNAME", "HOSTNAME", "SLURM_JOB_NAME", "HF_TOKEN"):
        monkeypatch.setenv(name, f"planted-{name}")
    place = tmp_path / "planted archive" / "planted-host"
    shards = make_sensor_shards(place / "train", sensor("image", 3), key="planted-scene-", place=(LAT, LON))
    run = tmp_path / "planted-runs" / "planted-run"
    text = RECIPE.format(run=run, shards=shards, cache=tmp_path / "planted-cache")
    pretrain(read_recipe(text, [], name="test"))
    folder = export(run, tmp_path / "exported", with_decoder=True)
    ids = [hash_text("train", f"planted-scene-{number:04d}") for number in range(24)]
    secrets = [b"planted", str(tmp_path).encode(), tmp_path.name.encode(), b"remark-of", b"2020-01-01", b"1577836800"]
    secrets += [f"{value:.{digits}f}".encode() for value in (LAT, abs(LON)) for digits in (2, 3, 4, 5, 6)]
    secrets += [struct.pack(kind, value) for value in (LAT, LON) for kind in ("<f", "<d")]
    secrets += [written for one in ids for written in (str(one).encode(), f"{one % 2**64:016x}".encode(), struct.pack("<q", one))]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 9
    for path in files:
        data = path.read_bytes()
        found = [secret for secret in secrets if secret in data]
        assert not found, f"{path.name} holds {found}"
    state = next(run.glob("checkpoints/*/state.json")).read_bytes()
    assert b"planted-run" in state and b"planted archive" in state, "which the run itself knows"


@pytest.mark.parametrize(
    ("value", "left"),
    [
        ("/home/some body/shards/train", "train"), ("~/some body/train/", "train"), ("~me/a b/c", "c"), ("../a b/c", "c"),
        ("s3://bucket/some prefix/train", "train"), ("C:\\Users\\some body\\x", "x"), ("data/train", "train"),
        ("see '/a/b/c' and d/e", "see 'c' and e"), ("reflectance", "reflectance"), ("on planted-host", "on host"),
        ({"dir": "a", "cache_dir": "b", "seed": 1, "x": [{"path": "/a b/c"}]}, {"seed": 1, "x": [{"path": "c"}]}),
    ],
)  # fmt: skip
def test_a_path_keeps_its_last_part(value: object, left: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "planted-host")
    assert without_paths(value) == left
