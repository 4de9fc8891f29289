"""Logistic regression on frozen features; the strength of its penalty is chosen without looking at test."""

import math
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from swath.probes.features import Features, require_classes, standardised
from swath.probes.metrics import Scores, score
from swath.shards.draw import mix
from swath.shards.errors import InputError
from swath.shards.identity import hash_text

STRENGTHS = tuple(float(c) for c in np.logspace(-4, 2, 10))
HELD_OUT = 0.2
# Along the path each C starts from the solution of the one before, so iterations add up.
_PATH_ITERATIONS, _FINAL_ITERATIONS = 150, 1000


def linear(train: Features, test: Features, val: Features | None = None, *, strengths: tuple[float, ...] = STRENGTHS) -> Scores:
    """scikit-learn's LogisticRegression (multinomial, L2, lbfgs) on features standardised on `train`.

    C is the first of `strengths` that is best on `val`, or on a fixed fifth of `train` (whole blocks where there are any);
    the model is then fitted to all of `train`, and `test` is read once.
    """
    require_classes(train)
    x_train, x_test, *x_val = standardised(train, test, *([val] if val is not None else []))
    held = np.zeros(len(train.label), dtype=bool) if val is not None else held_out(train)
    x_choose, label_choose = (x_val[0], val.label) if val is not None else (x_train[held], train.label[held])
    if len(np.unique(train.label[~held])) < 2:
        raise InputError("too few training samples to choose C on a part of them; give --val")
    model, path = None, []
    for strength in strengths:
        model = fit(x_train[~held], train.label[~held], strength, _PATH_ITERATIONS, model)
        accuracy = float(model.score(x_choose, label_choose))
        path.append({"C": strength, "val_accuracy": accuracy, "converged": _converged(model, _PATH_ITERATIONS)})
    best = max(path, key=lambda step: step["val_accuracy"])["C"]
    # where the held-out part had all of a class, the last model lacks it and is no start
    start = model if model is not None and len(model.classes_) == len(np.unique(train.label)) else None
    model = fit(x_train, train.label, best, _FINAL_ITERATIONS, start)
    settings = {
        "C": best,
        "chosen_on": "val" if val is not None else "a fifth of train",
        "n_chosen_on": len(label_choose),
        "converged": _converged(model, _FINAL_ITERATIONS),
        "iterations": int(model.n_iter_[0]),
        "path": path,
    }
    return score(test.label, np.asarray(model.predict(x_test)), test.block, len(train.classes), settings)


def require_strengths(strengths: tuple[float, ...]) -> None:
    """ValueError unless these are values of C."""
    if not strengths or not all(0 < c < math.inf for c in strengths):
        raise ValueError(f"--c must be numbers above 0, not {','.join(f'{c:g}' for c in strengths) or 'none'}")


def fit(
    x: np.ndarray, label: np.ndarray, strength: float, iterations: int, start: LogisticRegression | None = None
) -> LogisticRegression:
    """Logistic regression of this C, from the coefficients of `start`, of the same classes, where there is one."""
    model = LogisticRegression(C=strength, max_iter=iterations, warm_start=True)
    if start is not None:
        model.coef_, model.intercept_, model.classes_ = np.copy(start.coef_), np.copy(start.intercept_), start.classes_
    with warnings.catch_warnings():  # what did not converge stands in the result
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x, label)


def _converged(model: LogisticRegression, iterations: int) -> bool:
    return bool(model.n_iter_[0] < iterations)


def held_out(train: Features) -> np.ndarray:
    """(N,) bool: about a fifth of `train`, the same on every machine: whole blocks in the order of their hash until a fifth
    is reached; by sample id where samples have no blocks, or all have the same one."""
    blocks = np.unique(train.block)
    unit = train.block if len(blocks) > 1 and blocks[0] >= 0 else train.id
    names, inverse, count = np.unique(unit, return_inverse=True, return_counts=True)
    order = np.argsort(_hash(names), kind="stable")
    before = np.cumsum(count[order]) - count[order]
    chosen = np.zeros(len(names), dtype=bool)
    chosen[order] = before < HELD_OUT * len(unit)
    return chosen[inverse]


def _hash(numbers: np.ndarray) -> np.ndarray:
    return mix(mix(torch.from_numpy(numbers.astype(np.int64))) ^ hash_text("held-out")).numpy()
