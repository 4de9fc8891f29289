"""What changed between two dates of a place, pixel by pixel: F1 of the change class over all pixels of test."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from swath.backbones.base import Backbone
from swath.hub.load import Loaded
from swath.probes.confusion import IGNORE, accuracy, confusions, f1, interval
from swath.probes.dense import Fitted, Judge, Model, fitted, from_scratch, frozen
from swath.probes.maps import (
    Tiles,
    contract_of,
    encoder,
    held,
    inputs_of,
    label_map,
    maps_of,
    place_maps,
    read_tiles,
    untrained,
)
from swath.probes.overlays import overlays
from swath.probes.task import Bench, Result, Row, task
from swath.shards.bands import InputContract
from swath.shards.errors import InputError
from swath.shards.reader import ShardReader

ROWS = (
    "backbone", "backbone, told place and time", "random initialisation", "statistics", "place only", "from scratch",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    labels: str = field(default="change", metadata={"help": "name of the label map (change)"})
    changed: str = field(default="changed", metadata={"help": "the class of that map that F1 is of (changed)"})
    steps: int = field(default=1000, metadata={"help": "steps that a head is trained for, of 16 pairs (1000)"})
    scratch_steps: int = field(default=1000, metadata={"help": "steps from random weights; 0 leaves that row out (1000)"})
    context: bool = field(
        default=False, metadata={"help": "rows with the backbone told place and time, and of place alone; off by default"}
    )


def require_pairs(loaded: Loaded, reader: ShardReader) -> InputContract:
    """The backbone's contract. InputError unless `reader` has series of two dates of what the backbone takes one date of."""
    ours = contract_of(loaded, reader)
    theirs = reader.contracts[ours.modality]
    if ours.dates != 1 or theirs.dates != 2:
        raise InputError(
            f"change compares two dates by a backbone of one: {loaded.name} takes {ours.dates}, data set "
            f"{reader.manifest.dataset} has {theirs.dates}; `swath shard --dates-per-sample 2` makes pairs"
        )
    ours.require(
        theirs.model_copy(update={"dates": 1}), ours=f"backbone {loaded.name}", theirs=f"data set {reader.manifest.dataset}",
        remedy="make shards with these bands (`swath shard`), or pretrain on these (`swath pretrain`)",
    )  # fmt: skip
    return ours


@task("change", Options, "what changed between two dates: F1 of a linear head on how far frozen maps differ", require_pairs)
def run(bench: Bench, options: Options) -> Result:
    """Rows are the backbone, its random initialisation, change vector analysis of the bands, and training from scratch.

    The threshold of each is the one of best F1 on val, or on the fixed fifth of train. Raises InputError for shards that are no
    pairs, and where no pixel of test, or of what the threshold is chosen on, has changed.
    """
    loaded, readers = bench.loaded, bench.readers
    if options.steps < 1 or options.scratch_steps < 0:
        raise InputError("--steps must be at least 1, and --scratch-steps at least 0")
    for reader in readers.values():
        require_pairs(loaded, reader)
    names = _names(readers["train"], options)
    tiles = {part: read_tiles(loaded, reader, options.labels, names, apart=True) for part, reader in readers.items()}
    contract, device = contract_of(loaded, readers["train"]), next(loaded.backbone.parameters()).device
    build = partial(encoder, loaded, contract=contract, dates=2)

    def of(backbone: Backbone, told: bool = False) -> Model:
        levels = {part: maps_of(bench, part, build(backbone, told=told), some) for part, some in tiles.items()}
        return frozen(levels, "linear", 1, options.steps, device)

    where = {part: place_maps(some, readers[part].manifest.dataset) for part, some in tiles.items()} if options.context else {}
    first = of(loaded.backbone)
    models: dict[str, Model] = {"backbone": first}
    if options.context:
        models["backbone, told place and time"] = of(loaded.backbone, told=True)
    models["random initialisation"] = of(untrained(loaded, bench.seed))
    if where:
        models["place only"] = frozen(where, "linear", 1, options.steps, device)
    if options.scratch_steps:
        inputs = {part: inputs_of(some) for part, some in tiles.items()}
        widths = [level.shape[1] for level in first.inputs["train"]]
        models["from scratch"] = from_scratch(
            inputs, lambda: build(untrained(loaded, bench.seed)), widths, "linear", 1, options.scratch_steps
        )
    judge = Judge(_loss, lambda logits: logits[:, 0], threshold)
    made = {name: fitted(model, tiles, judge, bench.seed) for name, model in models.items()}
    made["statistics"] = magnitudes(tiles)
    truth, block = tiles["test"].target.numpy(), tiles["test"].block
    if not (truth == 1).any():
        raise InputError("no pixel of test has changed, so there is no F1 of change")
    rows, by_row = [], {}
    for name in ROWS:
        if name not in made:
            continue
        counts = confusions(truth, made[name].test >= made[name].settings["threshold"], 2)
        total = counts.sum(axis=0)
        hit, called, there = int(total[1, 1]), int(total[:, 1].sum()), int(total[1].sum())
        metrics: dict[str, float | None] = {
            "f1": f1(total), "precision": hit / called if called else None, "recall": hit / there, "accuracy": accuracy(total),
        }  # fmt: skip
        rows.append(Row(name, metrics, {"f1": interval(counts, block, f1)}))
        by_row[name] = {"confusion": total.tolist()}
    shown = np.argsort(-(truth == 1).sum(axis=(1, 2)), kind="stable")[:6]  # where there is something to see
    called = (made["backbone"].test >= made["backbone"].settings["threshold"]).astype(np.uint8)
    dates = [each[shown].numpy() for each in tiles["test"].pixels]
    settings = {
        "features": "absolute difference of the two dates' maps, linear head",
        "labels": options.labels, "changed": options.changed,
        "statistics": "change vector analysis: length of the difference of a pixel's bands, each over its deviation in train",
        "interval_method": "95 % block bootstrap of the samples' confusion matrices",
        "rows": {name: one.settings for name, one in made.items()},
        **{f"n_{part}": len(some) for part, some in tiles.items()},
        "test_pixels": int((truth != IGNORE).sum()), "changed_pixels": int((truth == 1).sum()),
    }  # fmt: skip
    pictures = {"overlays": overlays(contract, dates, {"labels": truth[shown], "predicted": called[shown]}, names)}
    return Result(rows, settings, {"classes": list(names), "by_row": by_row}, pictures)


def _names(reader: ShardReader, options: Options) -> tuple[str, str]:
    """(unchanged, changed) by name; InputError unless the map has two classes, and the one that was asked for."""
    found = set(label_map(reader, options.labels).classes.values())
    if options.changed not in found or len(found) != 2:
        raise InputError(
            f"the map {options.labels} has the classes {', '.join(sorted(found))}; two are needed, and --changed is one of them"
        )
    return (found - {options.changed}).pop(), options.changed


def magnitudes(tiles: dict[str, Tiles]) -> Fitted:
    """Change vector analysis (Malila 1980), its threshold chosen as those of the others are."""

    # of train: what the backbone's normalisation has seen has no part in this row
    std_c = torch.cat(tiles["train"].pixels).double().std(dim=(0, 2, 3), correction=0)
    std_c = torch.where(std_c > 0, std_c, 1.0).float()[:, None, None]

    def length(some: Tiles) -> np.ndarray:
        return ((some.pixels[1] - some.pixels[0]) / std_c).square().sum(dim=1).sqrt().numpy()

    if "val" in tiles:
        some, truth = length(tiles["val"]), tiles["val"].target.numpy()
    else:
        fifth = held(tiles["train"])
        some, truth = length(tiles["train"])[fifth], tiles["train"].target.numpy()[fifth]
    best, settings = threshold(some, truth)
    return Fitted(length(tiles["test"]), {"value": best, **settings, "n_chosen_on": len(truth)})


def threshold(score_nhw: np.ndarray, truth_nhw: np.ndarray) -> tuple[float, dict[str, Any]]:
    """(best F1 of calling changed what scores at least a threshold, that threshold); the highest of equally good ones.

    Raises InputError where nothing has changed.
    """
    seen = truth_nhw != IGNORE
    score, changed = score_nhw[seen], truth_nhw[seen] == 1
    if not changed.any():
        raise InputError("no pixel has changed in what the threshold is chosen on; give --val with some that have")
    order = np.argsort(-score, kind="stable")
    score, hit = score[order], np.cumsum(changed[order])
    value = 2 * hit / (np.arange(1, len(hit) + 1) + hit[-1])
    value[:-1][score[1:] == score[:-1]] = -1  # equal scores are called alike
    best = int(value.argmax())
    return float(value[best]), {"threshold": float(score[best])}


def _loss(logits_b1hw: Tensor, target_bhw: Tensor) -> Tensor:
    seen = target_bhw != IGNORE
    each = F.binary_cross_entropy_with_logits(logits_b1hw[:, 0], (target_bhw == 1).float(), reduction="none")
    return (each * seen).sum() / seen.sum().clamp_min(1)
