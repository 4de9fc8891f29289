"""A class for every pixel, from frozen feature maps: mIoU over one confusion matrix of all pixels of test."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from swath.backbones.base import Backbone
from swath.probes.confusion import IGNORE, accuracy, confusions, interval, mean_overlap, mean_recall, overlaps
from swath.probes.dense import Judge, Model, fitted, from_scratch, frozen
from swath.probes.maps import class_names, contract_of, encoder, inputs_of, maps_of, place_maps, read_tiles, untrained
from swath.probes.overlays import overlays
from swath.probes.pictures import confusion
from swath.probes.task import Bench, Result, Row, task
from swath.shards.errors import InputError

_MEASURES = {"miou": mean_overlap, "accuracy": accuracy, "mean_recall": mean_recall}


Head = Literal["linear", "upernet"]


@dataclass(frozen=True)
class Options:
    head: Head = field(default="linear", metadata={"help": "linear, or upernet on maps of several levels (linear)"})
    labels: str = field(default="landcover", metadata={"help": "name of the label map (landcover)"})
    steps: int = field(default=1000, metadata={"help": "steps that a head is trained for, of 16 chips (1000)"})
    scratch_steps: int = field(default=1000, metadata={"help": "steps from random weights; 0 leaves that row out (1000)"})
    context: bool = field(
        default=False, metadata={"help": "rows with the backbone told place and time, and of place alone; off by default"}
    )


@task("segment", Options, "a class for every pixel: mIoU of a linear or UPerNet-like head on frozen maps")
def run(bench: Bench, options: Options) -> Result:
    """Rows are the backbone, its random initialisation, the bands of a pixel alone, and training from scratch.

    Pixels of the map without a named class are ignored. Raises InputError where shards have no such map.
    """
    if options.head not in get_args(Head):
        raise InputError(f"--head {options.head!r} is neither linear nor upernet")
    if options.steps < 1 or options.scratch_steps < 0:
        raise InputError("--steps must be at least 1, and --scratch-steps at least 0")
    loaded, readers = bench.loaded, bench.readers
    names = class_names(readers["train"], options.labels)
    tiles = {part: read_tiles(loaded, reader, options.labels, names) for part, reader in readers.items()}
    contract, several = contract_of(loaded, readers["train"]), options.head == "upernet"
    device = next(loaded.backbone.parameters()).device
    build = partial(encoder, loaded, contract=contract, several=several)
    judge = Judge(_loss, _classes, lambda predicted, truth: (mean_overlap(confusions(truth, predicted, len(names)).sum(0)), {}))

    def of(backbone: Backbone, told: bool = False) -> Model:
        levels = {part: maps_of(bench, part, build(backbone, told=told), some) for part, some in tiles.items()}
        return frozen(levels, options.head, len(names), options.steps, device)

    where = {part: place_maps(some, readers[part].manifest.dataset) for part, some in tiles.items()} if options.context else {}
    first = of(loaded.backbone)
    widths = [level.shape[1] for level in first.inputs["train"]]
    models = {"backbone": first}
    if options.context:
        models["backbone, told place and time"] = of(loaded.backbone, told=True)
    models["random initialisation"] = of(untrained(loaded, bench.seed))
    models["statistics"] = frozen(
        {part: [some.pixels[0]] for part, some in tiles.items()}, "linear", len(names), options.steps, device
    )
    if where:
        models["place only"] = frozen(where, "linear", len(names), options.steps, device)
    if options.scratch_steps:
        inputs = {part: inputs_of(some) for part, some in tiles.items()}
        models["from scratch"] = from_scratch(
            inputs, lambda: build(untrained(loaded, bench.seed)), widths, options.head, len(names), options.scratch_steps
        )
    truth, block = tiles["test"].target.numpy(), tiles["test"].block
    rows, chosen, pictures = [], {}, {}
    by_row: dict[str, Any] = {}
    for name, model in models.items():
        made = fitted(model, tiles, judge, bench.seed)
        counts = confusions(truth, made.test, len(names))
        total = counts.sum(axis=0)
        metrics: dict[str, float | None] = {metric: measure(total) for metric, measure in _MEASURES.items()}
        rows.append(Row(name, metrics, {"miou": interval(counts, block, mean_overlap)}))
        chosen[name] = made.settings
        found = [None if np.isnan(x) else float(x) for x in overlaps(total)]
        by_row[name] = {"iou": dict(zip(names, found, strict=True)), "confusion": total.tolist()}
        if name == "backbone":
            pictures["confusion"] = confusion(total, names)
            pictures["overlays"] = overlays(
                contract, [tiles["test"].pixels[0].numpy()], {"labels": truth, "predicted": made.test}, names
            )
    settings = {
        "head": options.head, "labels": options.labels, "ignored": "0 and codes without a name", "rows": chosen,
        "statistics": "logistic regression on the bands of each pixel, normalised",
        "interval_method": "95 % block bootstrap of the samples' confusion matrices",
        **{f"n_{part}": len(some) for part, some in tiles.items()},
        "test_pixels": int((truth != IGNORE).sum()),
    }  # fmt: skip
    return Result(rows, settings, {"classes": list(names), "by_row": by_row}, pictures)


def _loss(logits_bkhw: Tensor, target_bhw: Tensor) -> Tensor:
    return F.cross_entropy(logits_bkhw, target_bhw.long(), ignore_index=IGNORE, reduction="sum") / (
        (target_bhw != IGNORE).sum().clamp_min(1)
    )


def _classes(logits_bkhw: Tensor) -> Tensor:
    return logits_bkhw.argmax(dim=1).to(torch.uint8)
