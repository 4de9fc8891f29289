"""What segmentation and change have in common: rows of one table, each a head on features of its own, chosen alike.

A rate is chosen on val, or on a fixed fifth of train, and then the head is trained on all of train; test is read once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from swath.probes.confusion import IGNORE
from swath.probes.heads import FromScratch, LinearHead, Loss, Standardise, UPerHead, fit, scores, seeded
from swath.probes.maps import Encoder, Tiles, held
from swath.shards.errors import InputError

RATES = (3e-3, 3e-2)  # of heads; a head of few weights takes large ones
SCRATCH_RATES = (1e-3,)


@dataclass
class Model:
    """What a row is: `inputs` of each part, what they are trained by, and a new model each time."""

    inputs: dict[str, list[Tensor]]
    make: Callable[[], nn.Module]
    rates: tuple[float, ...]
    steps: int
    flip: int = 0


@dataclass
class Fitted:
    """Outputs for test, as `Judge.read` makes them; what was chosen."""

    test: Any
    settings: dict[str, Any]


@dataclass
class Judge:
    """The loss that is trained by, what is kept of the outputs (B, K, h, w), and how good that is on samples, the more the
    better, with what follows from it (a threshold)."""

    loss: Loss
    read: Callable[[Tensor], Tensor]
    measure: Callable[[Any, np.ndarray], tuple[float, dict[str, Any]]]


def fitted(model: Model, tiles: dict[str, Tiles], judge: Judge, seed: int) -> Fitted:
    """Choose, train and read test."""
    train, target = model.inputs["train"], tiles["train"].target
    size = (target.shape[1], target.shape[2])
    chosen_on = "val" if "val" in tiles else "a fifth of train"
    if "val" in tiles:
        kept, inputs, truth = np.ones(len(target), bool), model.inputs["val"], tiles["val"].target
    else:
        kept = ~held(tiles["train"])
        inputs, truth = [x[torch.from_numpy(~kept)] for x in train], target[torch.from_numpy(~kept)]
    if not kept.any() or not bool((truth != IGNORE).any()):
        raise InputError("too few training samples to choose settings on a part of them; give --val")
    rows = torch.from_numpy(kept)
    part, wanted = [x[rows] for x in train], target[rows]
    tried = []
    for rate in model.rates:
        made = _trained(model, part, wanted, judge.loss, rate, seed)
        value, more = judge.measure(scores(made, inputs, (truth.shape[1], truth.shape[2]), judge.read), truth.numpy())
        tried.append(({"rate": rate, "value": value, **more}, made))
    best, made = max(tried, key=lambda one: one[0]["value"])
    if not kept.all():
        made = _trained(model, train, target, judge.loss, best["rate"], seed)
    settings = {**best, "chosen_on": chosen_on, "n_chosen_on": len(truth), "tried": [one for one, _ in tried]}
    shape = tiles["test"].target.shape
    test = scores(made, model.inputs["test"], (shape[1], shape[2]), judge.read)
    return Fitted(test, settings | {"steps": model.steps, "size": list(size)})


def _trained(model: Model, inputs: Sequence[Tensor], target: Tensor, loss: Loss, rate: float, seed: int) -> nn.Module:
    made = seeded(seed, model.make)
    for layer in made.modules():
        if isinstance(layer, Standardise) and not isinstance(made, FromScratch):
            layer.fit_to(inputs)
    return fit(made, inputs, target, loss, steps=model.steps, rate=rate, seed=seed, flip=model.flip)


def head_of(kind: str, widths: Sequence[int], outputs: int) -> nn.Module:
    """A new head: linear or upernet."""
    return (UPerHead if kind == "upernet" else LinearHead)(widths, outputs)


def frozen(levels: dict[str, list[Tensor]], kind: str, outputs: int, steps: int, device: torch.device) -> Model:
    """A head on feature maps that are there."""
    widths = [level.shape[1] for level in levels["train"]]
    return Model(levels, lambda: head_of(kind, widths, outputs).to(device), RATES, steps)


def from_scratch(
    inputs: dict[str, list[Tensor]], make: Callable[[], Encoder], widths: Sequence[int], kind: str, outputs: int, steps: int
) -> Model:  # fmt: skip
    """An encoder that is trained with its head; `make` gives it with random weights."""

    def build() -> nn.Module:
        encoder = make()
        return FromScratch(encoder, head_of(kind, widths, outputs).to(encoder.wavelength_nm.device))

    return Model(inputs, build, SCRATCH_RATES, steps, flip=sum(x.dim() == 4 for x in inputs["train"]))
