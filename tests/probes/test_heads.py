"""kNN and linear probe against independent implementations, and what both are judged by."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler, normalize

from swath.probes.features import Features, match_classes
from swath.probes.knn import knn
from swath.probes.linear import held_out, linear
from swath.probes.metrics import interval
from swath.shards.errors import InputError

CLASSES = ("field", "forest", "water")


def blobs(count: int, seed: int, *, spread: float = 1.6, blocks: int = 0, classes: tuple[str, ...] = CLASSES) -> Features:
    """Gaussian classes in 12 dimensions of very different scale."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(len(classes), 12))
    label = random.integers(0, len(classes), count)
    x = (centres[label] + spread * random.normal(size=(count, 12))) * np.logspace(-2, 2, 12) + 5
    block = random.integers(0, blocks, count) if blocks else np.full(count, -1)
    return Features(x.astype(np.float32), label, block, random.integers(-(2**62), 2**62, count), classes)


def brute_force(train: Features, test: Features, k: int, temperature: float) -> np.ndarray:
    scaler = StandardScaler().fit(train.x.astype(np.float64))
    bank, queries = (np.asarray(normalize(scaler.transform(part.x.astype(np.float64)))) for part in (train, test))
    predicted = []
    for query in queries:
        cosine = bank @ query
        nearest = np.argsort(-cosine, kind="stable")[:k]
        votes = np.bincount(train.label[nearest], weights=np.exp(cosine[nearest] / temperature), minlength=len(train.classes))
        predicted.append(votes.argmax())
    return np.array(predicted)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 10.0)])
def test_knn_is_brute_force(k: int, temperature: float) -> None:
    train, test = blobs(300, 0), blobs(200, 1)
    predicted = brute_force(train, test, k, temperature)
    scores = knn(train, test, k=k, temperature=temperature)
    assert scores.accuracy == pytest.approx((predicted == test.label).mean(), abs=1e-12)
    assert (scores.confusion.sum(axis=0) == np.bincount(predicted, minlength=3)).all()


def test_knn_breaks_ties_by_order_and_bounds_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.repeat(np.array([[1.0, 0.0], [0.0, 1.0]], np.float32), 4, axis=0)
    none = np.full(8, -1)
    train = Features(x, np.array([0, 1, 1, 1, 2, 2, 2, 2]), none, none, CLASSES)
    test = Features(x[:1], np.array([0]), none[:1], none[:1], CLASSES)
    assert knn(train, test, k=1).accuracy == 1  # of four equals, the first
    assert knn(train, test, k=2).accuracy == 1  # one vote each: the first class
    assert knn(train, test, k=3).accuracy == 0
    assert knn(train, test, k=99).settings["k"] == 8
    whole = knn(blobs(300, 0), blobs(100, 1)).confusion
    monkeypatch.setattr("swath.probes.knn._BLOCK_VALUES", 1000)
    assert (knn(blobs(300, 0), blobs(100, 1)).confusion == whole).all()


def test_linear_is_scikit_learn_at_the_chosen_strength() -> None:
    train, test = blobs(600, 0, blocks=12), blobs(400, 1)
    scores = linear(train, test)
    scaler = StandardScaler().fit(train.x)
    reference = LogisticRegression(C=scores.settings["C"], max_iter=5000).fit(scaler.transform(train.x), train.label)
    assert scores.accuracy == pytest.approx(reference.score(scaler.transform(test.x), test.label), abs=0.003)
    assert scores.settings["converged"] and len(scores.settings["path"]) == 10
    best = max(step["val_accuracy"] for step in scores.settings["path"])
    assert next(s["C"] for s in scores.settings["path"] if s["val_accuracy"] == best) == scores.settings["C"]


def test_linear_chooses_on_val_where_there_is_one() -> None:
    scores = linear(blobs(300, 0), blobs(100, 1), blobs(50, 2))
    assert scores.settings["chosen_on"] == "val" and scores.settings["n_chosen_on"] == 50


def test_linear_takes_two_classes_and_labels_with_gaps() -> None:
    part = blobs(200, 0, classes=("a", "b"))
    gap = Features(part.x, part.label * 2, part.block, part.id, ("a", "unused", "b"))
    scores = linear(gap, gap)
    assert scores.accuracy == linear(part, part).accuracy and np.isnan(scores.recall[1])


def test_what_chooses_is_a_fifth_by_whole_blocks_or_by_id() -> None:
    for blocks in (0, 40):
        train = blobs(2000, 0, blocks=blocks)
        held = held_out(train)
        assert 0.18 < held.mean() < 0.25
        shuffled = np.random.default_rng(0).permutation(2000)
        moved = Features(train.x[shuffled], train.label[shuffled], train.block[shuffled], train.id[shuffled], train.classes)
        assert (held_out(moved) == held[shuffled]).all()
        if blocks:
            assert not set(train.block[held]) & set(train.block[~held])


@pytest.mark.parametrize("head", [knn, linear])
def test_the_same_twice(head) -> None:  # type: ignore[no-untyped-def]
    first, second = (head(blobs(300, 0, blocks=9), blobs(150, 1, blocks=9)) for _ in range(2))
    assert first.accuracy == second.accuracy and first.interval == second.interval and first.settings == second.settings
    assert first.interval[0] < first.accuracy < first.interval[1]
    assert first.confusion.sum() == 150 and np.trace(first.confusion) / 150 == pytest.approx(first.accuracy)
    assert first.recall == pytest.approx(np.diag(first.confusion) / first.confusion.sum(axis=1))


def test_interval_has_the_width_that_theory_gives() -> None:
    correct = np.random.default_rng(0).random(2000) < 0.8
    low, high = interval(correct, np.full(2000, -1))
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(0.16 / 2000), rel=0.1)


def test_dependent_samples_widen_the_interval() -> None:
    by_block = np.random.default_rng(0).random(40) < 0.8
    correct, block = np.repeat(by_block, 50), np.repeat(np.arange(40), 50)
    low, high = interval(correct, block)
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(0.16 / 40), rel=0.25)


def test_classes_agree_by_name() -> None:
    train, test = blobs(100, 0), blobs(60, 1)
    renamed = Features(test.x, 2 - test.label, test.block, test.id, CLASSES[::-1])
    assert (match_classes(train, renamed).label == test.label).all()
    extra = Features(test.x, test.label, test.block, test.id, ("field", "glacier", "lava"))
    with pytest.raises(InputError, match=r"no training sample is of class glacier, lava; train has field, forest, water"):
        match_classes(train, extra)
    unused = Features(test.x, np.zeros(60, np.int64), test.block, test.id, ("water", "glacier"))
    assert (match_classes(train, unused).label == 2).all()
    with pytest.raises(InputError, match="all training samples are of class field"):
        linear(Features(train.x, 0 * train.label, train.block, train.id, CLASSES), test)
