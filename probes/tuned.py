"""A backbone trained on labelled samples when first asked for, once: what it makes of others is kept, as features are."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from swath.hub.load import Loaded
from swath.probes.features import extract, kept, key_of
from swath.probes.maps import untrained
from swath.probes.task import Bench
from swath.probes.tune import Classifier, Tuning, batch_of, predict, tune

SCRATCH_RATE = 5e-4  # of AdamW, whatever the batch
SCRATCH_SAMPLES, SCRATCH_EPOCHS = 20_000, 30  # to see at least, where nobody says how long; at most so often


@dataclass
class Tuned:
    """`loaded` trained on the samples `rows` (N,) of train to tell `wanted` (N, C), as in `tune`."""

    bench: Bench
    loaded: Loaded
    rows: np.ndarray
    wanted: np.ndarray
    tuning: Tuning
    lr_per_256: float
    seed: int

    @cached_property
    def model(self) -> Classifier:
        """Trained now."""
        bench = self.bench
        return tune(
            self.loaded, bench.readers["train"], self.rows, self.wanted, self.tuning, lr_per_256=self.lr_per_256,
            seed=self.seed, precision=bench.precision, progress=bench.progress,
        )  # fmt: skip

    def features(self, part: str, numbers: np.ndarray) -> np.ndarray:
        """(M, D) pooled features of the samples `numbers` of a part."""
        bench, reader = self.bench, self.bench.readers[part]

        def make() -> np.ndarray:
            loaded = replace(self.loaded, backbone=self.model.backbone)
            return extract(loaded, reader, numbers=numbers, precision=bench.precision, progress=bench.progress).x

        return kept(
            bench, self._key("features", part, numbers), (len(numbers), self.loaded.backbone.pooled_width), make, "training"
        )

    def logits(self, part: str, numbers: np.ndarray) -> np.ndarray:
        """(M, C) of the samples `numbers` of a part."""
        bench, reader = self.bench, self.bench.readers[part]

        def make() -> np.ndarray:
            return predict(self.model, self.loaded, reader, numbers, bench.precision, progress=bench.progress)

        return kept(bench, self._key("logits", part, numbers), (len(numbers), self.wanted.shape[1]), make, "training")

    def _key(self, what: str, part: str, numbers: np.ndarray) -> str:
        readers = self.bench.readers
        said = [
            "tuned", what, key_of(self.loaded, readers["train"], self.rows, self.bench),
            key_of(self.loaded, readers[part], numbers, self.bench), dataclasses.asdict(self.tuning), self.lr_per_256, self.seed,
            hashlib.sha256(self.wanted.tobytes()).hexdigest(), list(self.wanted.shape),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def fresh(loaded: Loaded, seed: int) -> Loaded:
    """The same backbone with random weights, in eval mode, on the same device."""
    return replace(loaded, backbone=untrained(loaded, seed))


def scratch_epochs(asked: int | None, count: int) -> int:
    """Over `count` samples: what is asked for, else as many as see SCRATCH_SAMPLES, from 1 to SCRATCH_EPOCHS."""
    return max(1, min(SCRATCH_EPOCHS, -(-SCRATCH_SAMPLES // count))) if asked is None else asked


def from_scratch(bench: Bench, rows: np.ndarray, wanted_nc: np.ndarray, asked: int | None) -> Tuned:
    """The backbone of the bench trained from random weights; no layer-wise decay, as there is nothing to keep."""
    tuning = Tuning(epochs=scratch_epochs(asked, len(rows)), layer_decay=1.0)
    lr_per_256 = SCRATCH_RATE * 256 / batch_of(tuning, len(rows))
    return Tuned(bench, fresh(bench.loaded, bench.seed), rows, wanted_nc, tuning, lr_per_256, bench.seed)
