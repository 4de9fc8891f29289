"""`swath probe multilabel`: samples with several labels, as those of BigEarthNet."""

from dataclasses import dataclass, field

import numpy as np

from swath.probes.features import Features, standardised
from swath.probes.frozen import FrozenOptions, Judged, Parts, frozen
from swath.probes.linear import STRENGTHS, fit, held_out, require_strengths
from swath.probes.metrics import AveragePrecision, ends, resampled
from swath.probes.task import Bench, Result, task
from swath.shards.errors import InputError
from swath.shards.reader import ShardReader

_ITERATIONS = 1000


@dataclass(frozen=True)
class Options(FrozenOptions):
    c: tuple[float, ...] = field(
        default=STRENGTHS, metadata={"help": "values of C to choose from, on --val or a fifth of train (ten from 1e-4 to 100)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_strengths(self.c)


@task("multilabel", Options, "one logistic regression for each label on frozen features; micro and macro mAP")
def run(bench: Bench, options: Options) -> Result:
    """The labels of a sample are the list `labels` of its JSON. mAP is of the whole test set at once: micro over all
    pairs of sample and label, macro the mean over labels. A label without positives in test counts as 0 in macro, as
    scikit-learn has it; `macro_mAP_of_present` leaves it out."""
    named = {part: labels_of(reader) for part, reader in bench.readers.items()}
    classes = sorted({label for _, lists in named.values() for one in lists for label in one})
    number = {label: column for column, label in enumerate(classes)}
    truth: dict[str, np.ndarray] = {}
    for part, (rows, lists) in named.items():
        truth[part] = np.zeros((len(rows), len(classes)), dtype=bool)
        for row, labels in enumerate(lists):
            truth[part][row, [number[label] for label in labels]] = True
    rows_of = {reader.place: named[part][0] for part, reader in bench.readers.items()}
    result = frozen(
        bench, options, lambda parts: _judge(parts, truth, options.c), lambda reader: rows_of[reader.place], targets=truth
    )
    result.details |= {
        "classes": classes,
        "positives": {part: dict(zip(classes, given.sum(axis=0).tolist(), strict=True)) for part, given in truth.items()},
        "classes_without_positives": [name for name, count in zip(classes, truth["test"].sum(axis=0), strict=True) if not count],
    }
    result.details["AP"] = dict(zip(classes, result.details["AP"], strict=True))
    return result


def labels_of(reader: ShardReader) -> tuple[np.ndarray, list[list[str]]]:
    """(numbers of the samples whose JSON has a list `labels` (N,), those lists). InputError where none has."""
    rows, lists = [], []
    for number in range(len(reader)):
        labels = reader.meta(number).get("labels")
        if isinstance(labels, list) and all(isinstance(label, str) for label in labels):
            rows.append(number)
            lists.append(labels)
    if not rows:
        raise InputError(
            f"no sample of data set {reader.manifest.dataset} has a list of labels in its JSON; knn and linear take one"
        )
    return np.array(rows), lists


def _judge(parts: Parts, truth: dict[str, np.ndarray], strengths: tuple[float, ...]) -> Judged:
    train, test, val = parts["train"], parts["test"], parts.get("val")
    x_train, x_test, *x_val = standardised(train, test, *([val] if val is not None else []))
    held = held_out(train) if val is None else np.zeros(len(train.x), dtype=bool)
    choose_x, choose_truth = (x_train[held], truth["train"][held]) if val is None else (x_val[0], truth["val"])
    known = truth["train"][~held]
    path = []
    for strength in strengths if len(strengths) > 1 and len(choose_x) and len(known) else ():
        score = _scores(x_train[~held], known, choose_x, strength)
        path.append({"C": strength, "val_macro_mAP": _macro(choose_truth, score)})
    best = max(path, key=lambda step: step["val_macro_mAP"])["C"] if path else strengths[len(strengths) // 2]
    score_nc = _scores(x_train, truth["train"], x_test, best)
    metrics, intervals, ap = _measured(truth["test"], score_nc, test)
    chosen_on = ("val" if val is not None else "a fifth of train") if path else "nothing: given"
    settings = {"C": best, "chosen_on": chosen_on, "path": path}
    return Judged(metrics, intervals, settings, {"AP": ap})


def _scores(x: np.ndarray, truth_nc: np.ndarray, asked: np.ndarray, strength: float) -> np.ndarray:
    """(M, C) probabilities; of a label that all or none of train has, that."""
    made = np.empty((len(asked), truth_nc.shape[1]))
    for column, truth in enumerate(truth_nc.T):
        if truth.all() or not truth.any():
            made[:, column] = truth[0]
            continue
        made[:, column] = fit(x, truth, strength, _ITERATIONS).predict_proba(asked)[:, 1]
    return made


def _macro(truth_nc: np.ndarray, score_nc: np.ndarray) -> float:
    present = truth_nc.any(axis=0)
    return float(AveragePrecision(truth_nc, score_nc)()[present].mean()) if present.any() else 0.0


def _measured(
    truth_nc: np.ndarray, score_nc: np.ndarray, test: Features
) -> tuple[dict[str, float | None], dict[str, tuple[float, float]], list[float]]:
    """Metrics, their intervals, AP of each label."""
    each, together = AveragePrecision(truth_nc, score_nc), AveragePrecision(truth_nc.reshape(-1, 1), score_nc.reshape(-1, 1))
    classes = truth_nc.shape[1]

    def measures(weight_n: np.ndarray) -> tuple[float, float, float]:
        ap = each(weight_n)
        present = (truth_nc * weight_n[:, None]).any(axis=0)
        return (
            float(together(np.repeat(weight_n, classes))[0]),
            float(ap.mean()),
            float(ap[present].mean()) if present.any() else 0.0,
        )

    names = ("micro_mAP", "macro_mAP", "macro_mAP_of_present")
    ones = np.ones(len(truth_nc))
    drawn = np.array([measures(weight) for weight in resampled(test.block)])
    metrics: dict[str, float | None] = dict(zip(names, measures(ones), strict=True))
    return metrics, {name: ends(drawn[:, column]) for column, name in enumerate(names)}, each().tolist()
