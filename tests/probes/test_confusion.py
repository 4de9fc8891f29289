"""Counts over pixels, against scikit-learn's measures of the same pixels."""

import numpy as np
import pytest
from sklearn import metrics

from swath.probes.confusion import IGNORE, accuracy, confusions, f1, interval, kappa, mean_overlap, mean_recall, overlaps


@pytest.fixture
def maps() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    truth = random.integers(0, 4, (5, 7, 3)).astype(np.uint8)
    predicted = np.where(random.random(truth.shape) < 0.6, truth, random.integers(0, 4, truth.shape)).astype(np.uint8)
    truth[random.random(truth.shape) < 0.2] = IGNORE
    return truth, predicted


def test_measures_are_those_of_scikit_learn(maps: tuple[np.ndarray, np.ndarray]) -> None:
    truth, predicted = maps
    each = confusions(truth, predicted, 4)
    total, seen = each.sum(axis=0), truth != IGNORE
    y, z = truth[seen], predicted[seen]
    assert (total == metrics.confusion_matrix(y, z, labels=range(4))).all()
    assert (each[2] == metrics.confusion_matrix(truth[2][seen[2]], predicted[2][seen[2]], labels=range(4))).all()
    assert overlaps(total) == pytest.approx(metrics.jaccard_score(y, z, average=None))  # type: ignore[arg-type]
    assert mean_overlap(total) == pytest.approx(metrics.jaccard_score(y, z, average="macro"))
    assert accuracy(total) == pytest.approx(metrics.accuracy_score(y, z))
    assert mean_recall(total) == pytest.approx(metrics.balanced_accuracy_score(y, z))
    assert kappa(total) == pytest.approx(metrics.cohen_kappa_score(y, z))
    two = confusions(np.where(seen, truth > 1, IGNORE), predicted > 1, 2).sum(axis=0)
    assert f1(two) == pytest.approx(metrics.f1_score(y > 1, z > 1))


def test_a_class_that_is_nowhere_does_not_count() -> None:
    counts = np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    assert np.isnan(overlaps(counts)[2]) and mean_overlap(counts) == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert mean_overlap(np.array([[3, 1, 1], [0, 2, 0], [0, 0, 0]])) < mean_overlap(counts)  # wrongly predicted it is 0
    assert f1(np.zeros((2, 2), np.int64)) == 0 and kappa(np.array([[4, 0], [0, 0]])) == 0


def test_whole_blocks_are_drawn() -> None:
    good, bad = np.array([[5, 0], [0, 5]]), np.array([[0, 5], [5, 0]])
    counts = np.stack([good, bad] * 8)
    low, high = interval(counts, np.full(16, -1), accuracy)
    assert 0.2 < low < 0.5 < high < 0.8
    assert interval(counts, np.arange(16) % 2, accuracy) == (0.0, 1.0)  # two blocks, of which one may be drawn twice
    assert interval(counts, np.arange(16) // 2, accuracy) == (0.5, 0.5)  # every block is as good as the others
