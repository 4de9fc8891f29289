"""Per-band statistics in one streaming pass: exact counts, and moments merged as in Chan, Golub and LeVeque (1979)."""

from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np


@dataclass
class Statistics:
    """count, mean, m2 (sum of squared deviations), minimum and maximum per band; (C,) each, float64 and int64."""

    bands: int
    count: np.ndarray = field(init=False)
    mean: np.ndarray = field(init=False)
    m2: np.ndarray = field(init=False)
    minimum: np.ndarray = field(init=False)
    maximum: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.count = np.zeros(self.bands, dtype=np.int64)
        self.mean = np.zeros(self.bands)
        self.m2 = np.zeros(self.bands)
        self.minimum = np.full(self.bands, np.inf)
        self.maximum = np.full(self.bands, -np.inf)

    def add(self, values_chw: np.ndarray, valid_hw: np.ndarray | None = None) -> None:
        """Take in one array of physical values; only where `valid_hw` is true, if given."""
        part = Statistics(self.bands)
        flat_cn = values_chw.reshape(self.bands, -1).astype(np.float64)
        if valid_hw is not None:
            flat_cn = flat_cn[:, valid_hw.reshape(-1)]
        if flat_cn.shape[1] == 0:
            return
        part.count[:] = flat_cn.shape[1]
        part.mean = flat_cn.mean(axis=1)
        deviation = flat_cn - part.mean[:, None]
        part.m2 = np.einsum("cn,cn->c", deviation, deviation)
        part.minimum, part.maximum = flat_cn.min(axis=1), flat_cn.max(axis=1)
        self.merge(part)

    def merge(self, other: "Statistics") -> None:
        """Add what `other` has seen."""
        total = self.count + other.count
        share = np.divide(other.count, total, out=np.zeros(self.bands), where=total > 0)
        delta = other.mean - self.mean
        self.mean = self.mean + delta * share
        self.m2 = self.m2 + other.m2 + delta**2 * self.count * share
        self.minimum = np.minimum(self.minimum, other.minimum)
        self.maximum = np.maximum(self.maximum, other.maximum)
        self.count = total

    @property
    def std(self) -> np.ndarray:
        """Population standard deviation per band."""
        return np.sqrt(np.divide(self.m2, self.count, out=np.zeros(self.bands), where=self.count > 0))

    def state(self) -> dict[str, Any]:
        """JSON without loss: floats as hexadecimal text."""
        rows = {name: [float(x).hex() for x in getattr(self, name)] for name in ("mean", "m2", "minimum", "maximum")}
        return {"count": self.count.tolist(), **rows}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        made = cls(len(state["count"]))
        made.count = np.array(state["count"], dtype=np.int64)
        for name in ("mean", "m2", "minimum", "maximum"):
            setattr(made, name, np.array([float.fromhex(x) for x in state[name]]))
        return made
