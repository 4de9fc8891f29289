"""swath demo: the whole way through the engine on synthetic scenes, sized for a few minutes on two cores."""

import sys
import time
from pathlib import Path

from swath.hub.export import export
from swath.launch.recipes import find
from swath.launch.report import write_report
from swath.pretrain.config import read_recipe
from swath.pretrain.trainer import pretrain
from swath.probes.features import match_classes
from swath.probes.linear import linear
from swath.probes.run import probes
from swath.probes.statistics import colour_statistics
from swath.shards.errors import InputError
from swath.shards.ingest import shard
from swath.shards.reader import ShardReader
from swath.shards.scenes import write_scenes

SCENES = {"train": (14, 0), "test": (6, 1)}  # number of scenes, and their seed
SIZE, EPOCHS = 768, 16


def demo(out: Path) -> int:
    """Run it, or continue it, in `out`; returns the exit code."""
    started = time.monotonic()
    for part, (count, seed) in SCENES.items():
        if not (out / "shards" / part / "manifest.json").exists():
            _say(f"{count} synthetic scenes of {SIZE} × {SIZE} pixels for {part}", started)
            write_scenes(out / "scenes" / part, count=count, size=SIZE, seed=seed)
            _say(f"cutting them into chips: {out / 'shards' / part}", started)
            shard(out / "scenes" / part, out / "shards" / part)
    train, test = out / "shards" / "train", out / "shards" / "test"
    run, exported = out / "run", out / "exported"

    _say("pretraining a masked autoencoder on the chips, without their labels", started)
    text, name = find("mae_vit_tiny")
    overrides = [f"run.dir={run}", f"data.train={train}", f"data.val={test}", f"train.epochs={EPOCHS}", "health.every=60"]
    result = pretrain(read_recipe(text, [*overrides, "train.global_batch=128", "train.warmup_epochs=2"], name=name))
    if result.stopped:
        raise InputError("the demo was asked to stop; the same command continues it")

    _say("probing the frozen backbone for land cover", started)
    rows = probes(["knn", "linear"], run, train, test, from_scratch=0, progress=False)
    fitted = colour_statistics(ShardReader(train))
    colour = linear(fitted, match_classes(fitted, colour_statistics(ShardReader(test))))

    if not exported.exists():
        _say("exporting it for transformers, and loading it back in a fresh process", started)
        export(run, exported)
    report = write_report(run)
    _say("done", started)
    print("\nland cover of scenes that it has not seen, accuracy of a probe on frozen features:")
    for probed in rows:
        low, high = probed["interval"]
        print(f"  {probed['task']:34} {probed['accuracy']:.3f}  ({low:.3f} to {high:.3f})")
    low, high = colour.interval
    print(f"  {'linear, on band means and deviations':34} {colour.accuracy:.3f}  ({low:.3f} to {high:.3f})")
    print(f"\nexported backbone: {exported}\nreport: {report}")
    return 0


def _say(text: str, started: float) -> None:
    print(f"[{time.monotonic() - started:4.0f} s] {text}", file=sys.stderr, flush=True)
