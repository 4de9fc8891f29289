"""What probes on frozen pooled features share: the rows that a backbone is compared with, and the table of preprocessing."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from swath.hub.load import Loaded
from swath.probes import pictures
from swath.probes.features import Features, features, labelled, match_classes, require_classes, require_contract, with_labels
from swath.probes.metrics import Scores
from swath.probes.statistics import colour_statistics, places, unnormalised
from swath.probes.task import Bench, Result, Row
from swath.probes.tuned import SCRATCH_EPOCHS, SCRATCH_SAMPLES, Tuned, fresh, from_scratch
from swath.shards.bands import InputContract, Normalisation
from swath.shards.errors import InputError
from swath.shards.reader import ShardReader

Parts = dict[str, Features]
Pick = Callable[[ShardReader], np.ndarray]


@dataclass(frozen=True)
class FrozenOptions:
    from_scratch: int | None = field(
        default=None,
        metadata={
            "help": "epochs over train of the same backbone from random weights, for a row of its own; 0 leaves it out "
            f"(as many as see {SCRATCH_SAMPLES} samples, 1 to {SCRATCH_EPOCHS})"
        },
    )
    context: bool = field(
        default=False, metadata={"help": "rows with the backbone told place and time, and of place alone; off by default"}
    )
    preprocessing_table: bool = field(
        default=False, metadata={"help": "the first metric at {native, pretraining, 2×} size and four normalisations"}
    )

    def __post_init__(self) -> None:
        if self.from_scratch is not None and self.from_scratch < 0:
            raise ValueError(f"--from-scratch must be 0 or more epochs, not {self.from_scratch}")


@dataclass
class Judged:
    """One row's numbers, as in `Row` and `Result`."""

    metrics: dict[str, float | None]
    interval: dict[str, tuple[float, float]]
    settings: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def parts_of(bench: Bench, make: Callable[[str], Features], *, classes: bool) -> Parts:
    """`make` of train, test and val; with `classes`, labels are numbered as in train."""
    parts = {part: make(part) for part in bench.readers}
    if not classes:
        return parts
    require_classes(parts["train"])
    return {part: one if part == "train" else match_classes(parts["train"], one) for part, one in parts.items()}


def sources(bench: Bench, options: FrozenOptions, pick: Pick | None = None) -> Iterator[tuple[str, Parts]]:
    """The rows of the table and the features behind each, but for training from scratch; `pick` says which samples count, by
    default those with a class."""
    numbers = numbers_of(bench, pick)

    def of(bench: Bench, loaded: Loaded | None = None) -> Parts:
        return parts_of(bench, lambda part: features(bench, part, loaded=loaded, numbers=numbers[part]), classes=pick is None)

    # refused before anything is computed, where there are no places
    where = options.context and {part: places(reader, numbers[part]) for part, reader in bench.readers.items()}
    yield "backbone", of(bench)
    if options.context:
        yield "backbone, told place and time", of(replace(bench, context=True))
    yield "random initialisation", of(bench, fresh(bench.loaded, bench.seed))
    contract = require_contract(bench.loaded, bench.readers["train"])
    started = time.perf_counter()
    made = {part: colour_statistics(reader, contract, numbers[part]) for part, reader in bench.readers.items()}
    bench.seconds["features"] += time.perf_counter() - started
    yield "statistics", parts_of(bench, made.__getitem__, classes=pick is None)
    if where:
        yield "place only", parts_of(bench, where.__getitem__, classes=pick is None)


def numbers_of(bench: Bench, pick: Pick | None = None) -> dict[str, np.ndarray]:
    """The samples of each part that count."""
    return {part: (pick or labelled)(reader) for part, reader in bench.readers.items()}


def scratch_parts(bench: Bench, model: Tuned, pick: Pick | None) -> Parts:
    numbers = numbers_of(bench, pick)

    def make(part: str) -> Features:
        return with_labels(model.features(part, numbers[part]), bench.readers[part], numbers[part])

    return parts_of(bench, make, classes=pick is None)


def frozen(
    bench: Bench,
    options: FrozenOptions,
    judge: Callable[[Parts], Judged],
    pick: Pick | None = None,
    *,
    targets: dict[str, np.ndarray] | None = None,
    scratch: Callable[[Parts], Judged] | None = None,
) -> Result:
    """`judge` the features of every row; the backbone's own settings and details stand in the result.

    A backbone is trained from scratch to tell the class of a sample, or `targets` (N, C) bool of train; then its features are
    judged like others, unless `scratch` says how good it is, given the parts of the backbone.
    """
    rows: list[Row] = []
    result: Result | None = None
    first: Parts = {}
    for name, parts in sources(bench, options, pick):
        judged = judge(parts)
        rows.append(Row(name, judged.metrics, judged.interval))
        if result is None:
            first, counts = parts, {f"n_{part}": len(one.x) for part, one in parts.items()}
            unlabelled = {part: one.unlabelled for part, one in parts.items()}
            details = {**judged.details, **counts, "feature_width": parts["train"].x.shape[1], "unlabelled": unlabelled}
            result = Result(
                rows, {"standardised_on": "train", **judged.settings}, details, pictures.of(bench, parts, judged.details)
            )
    assert result is not None
    if options.from_scratch != 0:
        if scratch is not None:
            judged = scratch(first)
        else:
            train = first["train"]
            wanted = targets["train"] if targets else train.label[:, None] == np.arange(len(train.classes))
            model = from_scratch(bench, numbers_of(bench, pick)["train"], wanted, options.from_scratch)
            judged = judge(scratch_parts(bench, model, pick))
            result.settings |= {"from_scratch": model.tuning.epochs}
        rows.append(Row("from scratch", judged.metrics, judged.interval))
    if options.preprocessing_table:
        result.details["preprocessing"] = preprocessing(bench, judge, pick)
    return result


def classified(scores: Scores, classes: tuple[str, ...]) -> Judged:
    """Of a probe that gives each sample one class."""
    recall = {name: None if share != share else float(share) for name, share in zip(classes, scores.recall, strict=True)}
    present = [share for share in recall.values() if share is not None]
    metrics: dict[str, float | None] = {"accuracy": scores.accuracy, "mean_recall": float(np.mean(present))}
    details = {"classes": list(classes), "recall": recall, "confusion": scores.confusion.tolist()}
    return Judged(metrics, {"accuracy": scores.interval}, scores.settings, details)


# --- which size, which normalisation ---

NORMALISATIONS = ("pretraining", "target", "min-max", "no")


def preprocessing(bench: Bench, judge: Callable[[Parts], Judged], pick: Pick | None) -> list[dict[str, Any]]:
    """The first metric in every cell of {native, pretraining, 2×} size × normalisation; nothing is chosen from it. 2× is twice
    the chips' own size; a size that the patch does not divide becomes the nearest that it does."""
    contract = require_contract(bench.loaded, bench.readers["train"])
    target = bench.readers["train"].contracts[contract.modality]
    native = (target.height, target.width)
    sizes: dict[str, tuple[int, int] | None] = {"native": None, "pretraining": bench.trained_at or bench.loaded.size, "2×": None}
    if native[0] and native[1]:
        sizes["native"] = fitting_size(bench.loaded, native[0], native[1])
        sizes["2×"] = fitting_size(bench.loaded, 2 * native[0], 2 * native[1])
    numbers, cells = numbers_of(bench, pick), []
    for size_name, size in sizes.items():
        for name in NORMALISATIONS:
            cell: dict[str, Any] = {"size": size_name, "pixels": size and list(size), "normalisation": name}
            cell["contract"] = (size_name, name) == ("pretraining", "pretraining")
            changed = size and normalised(contract, target, name)
            if size is None or changed is None:
                cells.append({**cell, "value": None})
                continue
            loaded = replace(bench.loaded, size=size, contracts={contract.modality: changed})
            made = replace(bench, loaded=loaded)
            judged = judge(
                parts_of(made, lambda part, b=made, n=numbers: features(b, part, numbers=n[part]), classes=pick is None)
            )
            metric, value = next(iter(judged.metrics.items()))
            cells.append({**cell, "metric": metric, "value": value, "interval": judged.interval.get(metric)})
    return cells


def fitting_size(loaded: Loaded, height: int, width: int) -> tuple[int, int] | None:
    """The nearest (height, width) that the backbone takes, the larger of two; None where none near is."""
    for change in sorted(range(-64, 65), key=lambda step: (abs(step), -step)):
        try:
            loaded.backbone.grid(height + change, width + change)
        except ValueError:
            continue
        if min(height, width) + change > 0:
            return height + change, width + change
    return None


def normalised(contract: InputContract, target: InputContract, name: str) -> InputContract | None:
    """`contract` with the normalisation of this name: its own, that of the probe's train, train's range to 0 … 1, or none.

    None where the shards do not say the range.
    """
    own, theirs = contract.normalisation, target.normalisation
    if name == "target":
        own = theirs
    elif name == "min-max":
        if not theirs.minimum or not theirs.maximum:
            return None
        width = tuple(high - low for low, high in zip(theirs.minimum, theirs.maximum, strict=True))
        own = Normalisation(mean=theirs.minimum, std=width, pixels=theirs.pixels)
    elif name == "no":
        own = unnormalised(contract)
    elif name != "pretraining":
        raise InputError(f"no normalisation is called {name!r}; there are {', '.join(NORMALISATIONS)}")
    return contract.model_copy(update={"normalisation": own})
