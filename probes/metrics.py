"""What a classification probe is judged by, and how sure one can be of it."""

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import confusion_matrix

from swath.shards.draw import hashes

REPLICATES, SEED = 1000, 0


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
    unit = np.where(block >= 0, block, -1 - np.arange(len(block)))
    _, unit = np.unique(unit, return_inverse=True)
    total = np.bincount(unit).astype(np.float64)
    right = np.bincount(unit, weights=correct)
    count = len(total)
    accuracy = np.empty(REPLICATES)
    for replicate in range(REPLICATES):
        bits = hashes(SEED, "bootstrap", replicate * count, count).numpy()
        drawn = (bits & np.int64(2**62 - 1)) % count
        accuracy[replicate] = right[drawn].sum() / total[drawn].sum()
    low, high = np.quantile(accuracy, [0.025, 0.975])
    return float(low), float(high)
