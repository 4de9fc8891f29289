"""`swath probe finetune`: the backbone and a linear head trained end to end."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from swath.hub.load import Loaded
from swath.probes import pictures
from swath.probes.features import features, labelled, match_classes, require_classes, require_contract, with_labels
from swath.probes.linear import held_out, linear
from swath.probes.metrics import interval_of_draws, score
from swath.probes.statistics import colour_statistics
from swath.probes.task import Bench, Result, Row, task
from swath.probes.tune import Tuning
from swath.probes.tuned import Tuned, fresh


@dataclass(frozen=True)
class Options(Tuning):
    seeds: int = field(default=3, metadata={"help": "how many times it is trained (3)"})
    lr: tuple[float, ...] = field(
        default=(5e-4,),
        metadata={"help": "learning rate per 256 samples (5e-4); of several, the best on --val or a fifth of train"},
    )
    from_scratch: bool = field(default=True, metadata={"help": "train from random weights too, as long and as often"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds < 1 or not self.lr or min(self.lr) <= 0:
            raise ValueError("--seeds must be at least 1, --lr above 0")


@task("finetune", Options, "backbone and linear head trained end to end, three seeds")
def run(bench: Bench, options: Options) -> Result:
    """Rows of random initialisation and of statistics are linear probes. From scratch has no layer-wise decay: there is nothing
    to keep. The interval is of seeds and of blocks of test; what a seed predicted is kept, as features are."""
    numbers = {part: labelled(reader) for part, reader in bench.readers.items()}
    empty = {part: with_labels(np.zeros((len(n), 0), np.float32), bench.readers[part], n) for part, n in numbers.items()}
    parts = {part: one if part == "train" else match_classes(empty["train"], one) for part, one in empty.items()}
    train, test = parts["train"], parts["test"]
    require_classes(train)
    target_nc = train.label[:, None] == np.arange(len(train.classes))

    def predicted(
        loaded: Loaded, lr: float, seed: int, tuning: Tuning, fit: np.ndarray, asked: str, rows: np.ndarray
    ) -> np.ndarray:
        """Predicted classes of the rows of a part by a model that was trained on the rows `fit` of train."""
        model = Tuned(bench, loaded, numbers["train"][fit], target_nc[fit], tuning, lr, seed)
        return model.logits(asked, numbers[asked][rows]).argmax(axis=1)

    tuning = Tuning(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Tuning)})
    everything, all_test = np.arange(len(train.label)), np.arange(len(test.label))
    lr, path = options.lr[0], []
    if len(options.lr) > 1:
        held = held_out(train)
        fit, asked, rows = (everything, "val", np.arange(len(numbers["val"]))) if "val" in parts else (
            np.flatnonzero(~held), "train", np.flatnonzero(held))  # fmt: skip
        for rate in options.lr:
            found = predicted(bench.loaded, rate, bench.seed, tuning, fit, asked, rows)
            path.append({"lr": rate, "val_accuracy": float(np.mean(found == parts[asked].label[rows]))})
        lr = max(path, key=lambda step: step["val_accuracy"])["lr"]

    seeds = [bench.seed + number for number in range(options.seeds)]
    predicted_sn = np.stack([predicted(bench.loaded, lr, seed, tuning, everything, "test", all_test) for seed in seeds])
    rows_made = [_row("backbone", predicted_sn == test.label, test.block), *_frozen_rows(bench)]
    if options.from_scratch:
        flat = dataclasses.replace(tuning, layer_decay=1.0)
        scratch_sn = np.stack(
            [predicted(fresh(bench.loaded, seed), lr, seed, flat, everything, "test", all_test) for seed in seeds]
        )
        rows_made.append(_row("from scratch", scratch_sn == test.label, test.block))
    accuracies = (predicted_sn == test.label).mean(axis=1)
    first = score(test.label, predicted_sn[0], test.block, len(train.classes), {})
    details: dict[str, Any] = {
        "classes": list(train.classes),
        "recall": {name: None if r != r else float(r) for name, r in zip(train.classes, first.recall, strict=True)},
        "confusion": first.confusion.tolist(),
        "seeds": dict(zip(map(str, seeds), accuracies.tolist(), strict=True)),
        **{f"n_{part}": len(one.label) for part, one in parts.items()},
        "unlabelled": {part: one.unlabelled for part, one in parts.items()},
    }
    chosen = {
        "lr": lr,
        "lr_tried": path,
        "chosen_on": ("val" if "val" in parts else "a fifth of train") if path else "nothing: given",
    }
    return Result(rows_made, chosen, details, {"confusion": pictures.confusion(first.confusion, list(train.classes))})


def _row(name: str, correct_sn: np.ndarray, block: np.ndarray) -> Row:
    """Mean over seeds."""
    each = correct_sn.mean(axis=1)
    spread = float(each.std(ddof=1)) if len(each) > 1 else None
    return Row(
        name, {"accuracy": float(each.mean()), "deviation of seeds": spread}, {"accuracy": interval_of_draws(correct_sn, block)}
    )


def _frozen_rows(bench: Bench) -> list[Row]:
    rows = []
    contract = require_contract(bench.loaded, bench.readers["train"])
    random = fresh(bench.loaded, bench.seed)
    for name, make in {
        "random initialisation, linear": lambda part: features(bench, part, loaded=random),
        "statistics, linear": lambda part: colour_statistics(bench.readers[part], contract),
    }.items():
        parts = {part: make(part) for part in bench.readers}
        train = parts["train"]
        found = linear(train, match_classes(train, parts["test"]), match_classes(train, parts["val"]) if "val" in parts else None)
        rows.append(Row(name, {"accuracy": found.accuracy}, {"accuracy": found.interval}))
    return rows
