"""The card tells how a backbone came about and what may be done with it, and nothing of where or on what samples."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from swath.hub.card import card
from swath.hub.export import export
from swath.hub.history import POINTS, history
from swath.hub.load import load_backbone
from swath.pretrain.config import read_recipe
from swath.pretrain.trainer import pretrain
from swath.shards.manifest import read_manifest
from tests.hub.made import loaded, save_run
from tests.shard_folders import make_shards

# What may not be in any file of an export; `told_run` plants them wherever a run folder has room for them.
SECRETS = ("/data/secret", "gpu-node-17.example.org", "somebody", "T32TPS_0042", "47.37654", "8.54321")


def told_run(run: Path, steps: int = 1000) -> Path:
    """A run at step 7 of `steps`, with everything that one has, and what should not get out in every place of it."""
    save_run(loaded(), run)
    place, host, _, sample, lat, lon = SECRETS
    extra = {"dir": place, "host": host, "note": f"{place}/x on {host}", "sample_ids": [sample], "lat": float(lat), "lon": lon}

    def row(step: int) -> dict[str, Any]:
        return {
            "step": step, "samples": step * 256, "epoch": step / 10, "loss": None if step == 3 else 1 / step, "lr": 1e-3,
            "seconds": 3.6, "grad_norm": 0.5, "samples_per_second": 71.0, "data_wait": 0.0, "mfu": 0.25, "skipped": step == 3,
            "damaged_samples": 0, **extra,
        }  # fmt: skip

    def look(step: int) -> dict[str, Any]:
        names = ("pooled_std", "pooled_cosine", "pooled_rank", "tokens_std", "tokens_cosine", "tokens_rank", "positional")
        measured = dict.fromkeys(names, 0.5 + step)
        return {
            "step": step,
            "held_out": True,
            "loss": 2.5 - step / 8,
            **measured,
            "warnings": [f"rank <b>|fell at {place}/x"],
            **extra,
        }

    def lines(rows: list[dict[str, Any]]) -> str:
        return "".join(json.dumps(row) + "\n" for row in rows)

    (run / "metrics.jsonl").write_text(lines([row(step) for step in range(1, steps + 1)]))
    (run / "health.jsonl").write_text(lines([look(0), look(4), look(800)]))
    (run / "choices.json").write_text(json.dumps({"device": "cuda", "precision": "bf16", "peak_flops": 1e12, **extra}))
    (run / "probes").mkdir()
    old = {"task": "knn", "accuracy": 0.875, "interval": [0.75, 1.0], "backbone": {"name": "vit", "step": 7, **extra}, **extra}
    new = {
        "task": "linear", "backbone": {"step": 5}, "datasets": {"train": f"{place}/eurosat", "test": "eurosat"}, "n_test": 90,
        "rows": [
            {"name": "backbone", "metrics": {"accuracy": 0.9, "kappa": None}, "interval": {"accuracy": [0.8, 0.95]}},
            {"name": "random | initialisation", "metrics": {"accuracy": 0.3}, "interval": {}, "transductive": None},
            {"name": "statistics", "metrics": {"accuracy": 0.2}, "interval": {}, "transductive": True},
        ],
        **extra,
    }  # fmt: skip
    for name, value in (("knn", old), ("linear", new)):
        (run / "probes" / f"{name}.json").write_text(json.dumps(value))
    (run / "probes" / "broken.json").write_text("{")
    return run


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading in a fresh process is tested elsewhere."""
    monkeypatch.setattr("swath.hub.export._verify", lambda *args: None)


def metadata(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_run_is_told_of(quick: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = export(told_run(tmp_path / "run"), tmp_path / "exported", license="CC-BY-NC-4.0")
    text = (folder / "README.md").read_text()
    assert metadata(text)["license"] == "cc-by-nc-4.0"
    for line in (
        "| steps | 7 |",
        "| samples seen | 1,792 |",
        "Compute: 25.2 seconds of steps on cuda in bf16, 6.3e+12 floating-point operations, 71 samples per second, "
        "steps skipped as not finite: 1.",  # 7 steps of 3.6 s at a quarter of 1e12 per second
        "](assets/curves.png)",
        "Loss on held-out samples at the end: **2**.",
        "| pooled rank | 0.5 | 4.5 |",
        "| knn |  | backbone | accuracy | 0.875 | 0.75 to 1 |",
        "| linear (of step 5, not these weights) | eurosat | backbone | accuracy | 0.9 | 0.8 to 0.95 |",
        "| backbone | kappa | – | – |",
        "| random initialisation (transductive or not is unknown) | accuracy | 0.3 | – |",
        "| statistics (transductive) | accuracy | 0.2 | – |",
        "Warning during training: rank b fell at x.",
        "It has seen ground sampling of 10 m only.",
    ):
        assert line in text, line
    with Image.open(folder / "assets" / "curves.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10
    assert "broken.json is not understood" in caplog.text


def test_it_says_nothing_of_places_machines_and_samples(quick: None, tmp_path: Path) -> None:
    folder = export(told_run(tmp_path / "somebody"), tmp_path / "exported", license="mit")
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            for word in (*SECRETS, str(tmp_path)):
                assert word.encode() not in data, (path.name, word)


def test_an_export_of_an_export_is_the_same(quick: None, tmp_path: Path) -> None:
    first = export(told_run(tmp_path / "run"), tmp_path / "first", license="mit")
    second = export(first, tmp_path / "second")
    names = {path.relative_to(first) for path in first.rglob("*") if path.is_file()}
    assert names == {path.relative_to(second) for path in second.rglob("*") if path.is_file()}
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_curves_are_short_however_long_the_run(tmp_path: Path) -> None:
    run = told_run(tmp_path / "run")
    told = history(run, {"step": 999})["training"]
    assert len(told["curves"]["step"]) == len(told["curves"]["loss"]) == POINTS and told["curves"]["step"][-1] == 999
    assert told["curves"]["loss"][0] == pytest.approx((1 + 1 / 2 + 1 / 4 + 1 / 5) / 4, rel=1e-5), (
        "without the step that was skipped"
    )
    assert history(run / "checkpoints" / "step-00000007", {"step": 7})["training"]["curves"]["step"] == list(range(1, 8))
    assert history(tmp_path, {}) == {}
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "training" not in history(run, {"step": 7})


def test_data_and_licences_are_shown() -> None:
    source = loaded()
    data = [
        {"name": "firerisk", "samples": 91872, "licence": "CC-BY-NC-4.0"},
        {"name": "mine | <b>", "samples": 10, "licence": ""},
    ]
    text = card(source, {"license": "mit", "datasets": data})
    assert metadata(text)["datasets"] == ["firerisk"] and "offered under **mit**" in text
    assert "| firerisk | 91,872 | CC-BY-NC-4.0 | non-commercial use only |" in text
    assert "| mine b | 10 | not stated | not known: the data's owner must be asked |" in text
    bare = card(source, {})
    assert "license" not in metadata(bare) and "No licence is stated for the weights" in bare and "not recorded" in bare
    assert "No probe has been run" in bare and "measure on your own" in bare


def test_a_real_run_carries_its_data_sets_licence_to_the_card(quick: None, tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", samples=24)
    read_manifest(shards).model_copy(update={"licence": "CC-BY-SA-4.0"}).write(shards)
    text = """
backbone: {name: vit_tiny_patch8, width: 24, depth: 1, heads: 3}
objective: {name: mae, decoder_width: 24, decoder_depth: 1, decoder_heads: 3}
train: {global_batch: 8, max_steps: 3, precision: fp32, threads: 1, epochs: 9}
health: {samples: 8}
"""
    overrides = [f"run.dir={tmp_path / 'run'}", f"data.train={shards}"]
    pretrain(read_recipe(text, overrides, name="test"))
    origin = load_backbone(tmp_path / "run").origin
    assert origin["datasets"] == [{"name": "made", "samples": 24, "licence": "CC-BY-SA-4.0"}]
    readme = (export(tmp_path / "run", tmp_path / "exported") / "README.md").read_text()
    assert "| made | 24 | CC-BY-SA-4.0 | derived works under the same licence |" in readme
    assert "| steps | 3 |" in readme and "assets/curves.png" in readme and "Loss on fixed training samples" in readme
