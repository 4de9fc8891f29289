"""`swath probe fewshot`: how far a few labels of each class go."""

from dataclasses import dataclass, field

import numpy as np
import torch

from swath.probes.features import Features
from swath.probes.frozen import FrozenOptions, Judged, Parts, frozen, numbers_of
from swath.probes.linear import STRENGTHS, fit
from swath.probes.metrics import interval, interval_of_draws
from swath.probes.task import Bench, Result, task
from swath.probes.tuned import from_scratch
from swath.shards.draw import Draw
from swath.shards.errors import InputError


@dataclass(frozen=True)
class Options(FrozenOptions):
    shots: tuple[int, ...] = field(default=(1, 5, 10), metadata={"help": "labels of each class (1,5,10)"})
    draws: int = field(default=10, metadata={"help": "how often they are drawn (10)"})
    c: float = field(default=1.0, metadata={"help": "C of the logistic regression where there is no --val to choose it on (1)"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shots or min(self.shots) < 1 or self.draws < 1 or not 0 < self.c < np.inf:
            raise ValueError("--shots and --draws must be at least 1, --c above 0")


@task("fewshot", Options, "logistic regression on a few labels of each class, drawn several times")
def run(bench: Bench, options: Options) -> Result:
    """Features are standardised on the samples that were drawn, since no more of train is there. The interval is of draws and of
    blocks of test. C is chosen on --val, by its mean accuracy over the draws. From scratch, the backbone and a linear head are
    trained on the samples of the first draw."""
    return frozen(
        bench, options, lambda parts: _judge(parts, options, bench.seed), scratch=lambda parts: _scratch(bench, parts, options)
    )


def _judge(parts: Parts, options: Options, seed: int) -> Judged:
    train, test, val = parts["train"], parts["test"], parts.get("val")
    smallest = np.bincount(train.label)[np.unique(train.label)].min()
    if max(options.shots) > smallest:
        raise InputError(f"the smallest class of train has {smallest} samples, fewer than --shots {max(options.shots)}")
    metrics: dict[str, float | None] = {}
    intervals, chosen = {}, {}
    for n in options.shots:
        picks = [pick(train, n, seed, draw) for draw in range(options.draws)]
        best = options.c
        if val is not None:
            best = max(STRENGTHS, key=lambda c: np.mean([_correct(train, rows, val, c).mean() for rows in picks]))
        correct_dn = np.stack([_correct(train, rows, test, best) for rows in picks])
        name = _metric(n)
        metrics[name], intervals[name], chosen[name] = float(correct_dn.mean()), interval_of_draws(correct_dn, test.block), best
    settings = {
        "C": chosen,
        "chosen_on": "val" if val is not None else "nothing: given",
        "standardised_on": "the samples that were drawn",
        "from_scratch": "the first draw" if options.from_scratch != 0 else 0,
    }
    return Judged(metrics, intervals, settings)


def _scratch(bench: Bench, parts: Parts, options: Options) -> Judged:
    train, test, numbers = parts["train"], parts["test"], numbers_of(bench)
    metrics: dict[str, float | None] = {}
    intervals = {}
    for n in options.shots:
        rows = pick(train, n, bench.seed, 0)
        wanted_nc = train.label[rows][:, None] == np.arange(len(train.classes))
        model = from_scratch(bench, numbers["train"][rows], wanted_nc, options.from_scratch)
        correct = model.logits("test", numbers["test"]).argmax(axis=1) == test.label
        name = _metric(n)
        metrics[name], intervals[name] = float(correct.mean()), interval(correct, test.block)
    return Judged(metrics, intervals)


def _metric(n: int) -> str:
    return f"accuracy, {n} per class"


def pick(train: Features, n: int, seed: int, draw: int) -> np.ndarray:
    """(n · classes,) rows of `train`: n of each class, by a hash of (seed, sample id, draw). More shots contain the fewer."""
    ids = torch.from_numpy(train.id)
    rank = Draw(seed, ids, torch.full_like(ids, draw)).uniform("fewshot", 1)[:, 0].numpy()
    order = np.argsort(rank, kind="stable")
    return np.concatenate([order[train.label[order] == label][:n] for label in np.unique(train.label)])


def _correct(train: Features, rows: np.ndarray, asked: Features, strength: float) -> np.ndarray:
    x = train.x[rows].astype(np.float64)
    mean, std = x.mean(axis=0), x.std(axis=0)
    std[std == 0] = 1
    model = fit(((x - mean) / std).astype(np.float32), train.label[rows], strength, 1000)
    return np.asarray(model.predict(((asked.x - mean) / std).astype(np.float32))) == asked.label
