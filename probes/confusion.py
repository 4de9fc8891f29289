"""Counts over all pixels of a data set, and what follows from them: overlap, accuracy, F1, and how sure one can be of these.

Letters: n sample, k class (rows of a confusion matrix are the truth).
"""

from collections.abc import Callable

import numpy as np

from swath.probes.metrics import REPLICATES, SEED
from swath.shards.draw import hashes

IGNORE = 255  # in maps of class numbers: a pixel that has no label


def confusions(truth_nhw: np.ndarray, predicted_nhw: np.ndarray, classes: int) -> np.ndarray:
    """(N, K, K) int64 counts of each sample's pixels, rows are the truth; those that are IGNORE in the truth are left out."""
    made = np.empty((len(truth_nhw), classes, classes), dtype=np.int64)
    for number, (truth, predicted) in enumerate(zip(truth_nhw, predicted_nhw, strict=True)):
        seen = truth != IGNORE
        pairs = truth[seen].astype(np.int64) * classes + predicted[seen]
        made[number] = np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
    return made


def overlaps(counts_kk: np.ndarray) -> np.ndarray:
    """(K,) intersection over union; nan for a class that is neither there nor predicted."""
    both = np.diag(counts_kk).astype(np.float64)
    either = counts_kk.sum(axis=0) + counts_kk.sum(axis=1) - both
    return np.divide(both, either, out=np.full(len(both), np.nan), where=either > 0)


def mean_overlap(counts_kk: np.ndarray) -> float:
    """mIoU: the mean over the classes that are there or predicted."""
    found = overlaps(counts_kk)
    return float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")


def accuracy(counts_kk: np.ndarray) -> float:
    """Overall accuracy, of labelled pixels."""
    return float(np.trace(counts_kk) / counts_kk.sum())


def mean_recall(counts_kk: np.ndarray) -> float:
    """Average accuracy: the mean recall of the classes that are there."""
    there = counts_kk.sum(axis=1)
    return float((np.diag(counts_kk)[there > 0] / there[there > 0]).mean())


def kappa(counts_kk: np.ndarray) -> float:
    """Cohen's; 0 where all pixels are of one class and called so."""
    total = counts_kk.sum()
    chance = float(counts_kk.sum(axis=0) @ counts_kk.sum(axis=1)) / float(total) ** 2
    return (accuracy(counts_kk) - chance) / (1 - chance) if chance < 1 else 0.0


def f1(counts_22: np.ndarray) -> float:
    """Of class 1 against class 0; 0 where it is neither there nor predicted."""
    twice = 2 * int(counts_22[1, 1])
    return twice / max(twice + int(counts_22[0, 1]) + int(counts_22[1, 0]), 1)


def interval(
    counts_nkk: np.ndarray, block_n: np.ndarray, measure: Callable[[np.ndarray], float]
) -> tuple[float, float]:  # fmt: skip
    """95 % percentile bootstrap of `measure` of the sum of `counts` (N, …): whole blocks are drawn, a sample with block -1
    stands for itself."""
    unit = np.where(block_n >= 0, block_n, -1 - np.arange(len(block_n)))
    names, unit = np.unique(unit, return_inverse=True)
    sums = np.zeros((len(names), *counts_nkk.shape[1:]), dtype=np.int64)
    np.add.at(sums, unit, counts_nkk)
    count, made = len(names), []
    for replicate in range(REPLICATES):
        bits = hashes(SEED, "bootstrap", replicate * count, count).numpy()
        drawn = np.bincount((bits & np.int64(2**62 - 1)) % count, minlength=count)
        total = np.tensordot(drawn, sums, axes=1)
        if total.sum():
            made.append(measure(total))
    low, high = np.quantile(made, [0.025, 0.975])
    return float(low), float(high)
