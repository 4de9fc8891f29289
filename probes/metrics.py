"""What a classification probe is judged by, and how sure one can be of it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import confusion_matrix

from swath.shards.draw import hashes

REPLICATES, SEED = 1000, 0
_AT_ONCE = 1 << 19  # numbers drawn


@dataclass
class Scores:
    """accuracy and the ends of its 95 % interval, shares of 1; confusion (C, C), rows are the truth; recall (C,), nan for
    classes without a test sample; correct (N,) bool, for paired comparisons; `settings` is what the probe chose or was given."""

    accuracy: float
    interval: tuple[float, float]
    recall: np.ndarray
    confusion: np.ndarray
    correct: np.ndarray
    settings: dict


def score(label: np.ndarray, predicted: np.ndarray, block: np.ndarray, classes: int, settings: dict) -> Scores:
    """Scores of predictions (N,) against labels (N,); blocks (N,) as in `interval`."""
    confusion = confusion_matrix(label, predicted, labels=np.arange(classes))
    with np.errstate(invalid="ignore"):
        recall = np.diag(confusion) / confusion.sum(axis=1)
    correct = label == predicted
    return Scores(float(correct.mean()), interval(correct, block), recall, confusion, correct, settings)


def interval(correct: np.ndarray, block: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean of `correct` (N,) bool, or of any number per sample.

    Neighbours are not independent, so whole blocks are drawn; a sample with block -1 stands for itself.
    """
    unit, count = _units(block)
    total = np.bincount(unit).astype(np.float64)
    right = np.bincount(unit, weights=correct)
    return ends(np.concatenate([right[rows].sum(axis=1) / total[rows].sum(axis=1) for rows in _drawn(count)]))


def interval_of_draws(correct_dn: np.ndarray, block: np.ndarray) -> tuple[float, float]:
    """As `interval`, of the mean over D repetitions (draws of the training samples, seeds) too: those are drawn as well."""
    unit, count = _units(block)
    total = np.bincount(unit).astype(np.float64)
    right_du = np.stack([np.bincount(unit, weights=correct) for correct in correct_dn])
    again = np.concatenate(list(_drawn(len(right_du), "bootstrap/draws")))
    accuracy, first = [], 0
    for rows in _drawn(count):
        right_rdu = np.take_along_axis(right_du[again[first : first + len(rows)]], rows[:, None], axis=2)
        accuracy.append(right_rdu.sum(axis=(1, 2)) / (len(right_du) * total[rows].sum(axis=1)))
        first += len(rows)
    return ends(np.concatenate(accuracy))


def resampled(block: np.ndarray) -> Iterator[np.ndarray]:
    """(N,) float64, REPLICATES times: how often each sample is drawn when whole blocks are, as in `interval`. For a measure of
    all samples together."""
    unit, count = _units(block)
    for rows in _drawn(count):
        for drawn in rows:
            yield np.bincount(drawn, minlength=count)[unit].astype(np.float64)


def ends(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of a bootstrap's values; nan is left out."""
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def _units(block: np.ndarray) -> tuple[np.ndarray, int]:
    """(which unit each sample belongs to (N,), number of units)."""
    names, unit = np.unique(np.where(block >= 0, block, -1 - np.arange(len(block))), return_inverse=True)
    return unit, len(names)


def _drawn(count: int, stream: str = "bootstrap") -> Iterator[np.ndarray]:
    """(R, count) int64 in [0, count), with repetition; REPLICATES rows in all, some at a time."""
    some = max(1, min(REPLICATES, _AT_ONCE // count))
    for first in range(0, REPLICATES, some):
        rows = min(some, REPLICATES - first)
        bits = hashes(SEED, stream, first * count, rows * count).numpy()
        yield ((bits & np.int64(2**62 - 1)) % count).reshape(rows, count)


class AveragePrecision:
    """Average precision as scikit-learn defines it (steps of recall, equal scores together), of many classes (N, C) and for any
    weights of samples, sorted once. A class without positives has 0."""

    def __init__(self, truth_nc: np.ndarray, score_nc: np.ndarray) -> None:
        self._order = np.argsort(-score_nc, axis=0, kind="stable")
        self._truth = np.take_along_axis(truth_nc.astype(np.float64), self._order, axis=0)
        ranked = np.take_along_axis(score_nc, self._order, axis=0)
        # a step ends where the next score is another one
        self._last = np.concatenate([ranked[1:] != ranked[:-1], np.ones((1, ranked.shape[1]), dtype=bool)])

    def __call__(self, weight_n: np.ndarray | None = None) -> np.ndarray:
        """(C,) float64."""
        weight_nc = np.ones_like(self._truth) if weight_n is None else weight_n[self._order]
        hit_nc, seen_nc = (weight_nc * self._truth).cumsum(axis=0), weight_nc.cumsum(axis=0)
        precision_nc = hit_nc / np.maximum(seen_nc, 1e-300)
        ap = np.empty(hit_nc.shape[1])
        for c in range(len(ap)):
            steps = self._last[:, c]
            gained = np.diff(hit_nc[steps, c], prepend=0.0)
            ap[c] = (gained * precision_nc[steps, c]).sum() / hit_nc[-1, c] if hit_nc[-1, c] > 0 else 0.0
        return ap
