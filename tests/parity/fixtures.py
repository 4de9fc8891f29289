"""Reading golden fixtures: numbers of published code, one folder each (tensors.safetensors and meta.json)."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(os.environ.get("SWATH_GOLDEN", Path(__file__).parents[2].resolve() / ".." / "shared" / "golden"))


@dataclass
class Fixture:
    """One run of published code. Keys: state., in., draw., out., grad. as described in the fixtures' README."""

    name: str
    kind: str
    config: dict[str, Any]
    scalars: dict[str, dict[str, float]]
    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) + 1 :]: v for k, v in self.tensors.items() if k.startswith(prefix + ".")}

    def check(self, got: dict[str, Tensor | float]) -> None:
        """Every out., grad. and scalar of the fixture is in `got` and within its tolerance; integers are equal."""
        expected = {k: v for k, v in self.tensors.items() if k.startswith(("out.", "grad."))}
        assert expected and set(expected) | set(self.scalars) == set(got), sorted(set(expected) ^ set(got))
        for name, value in expected.items():
            mine = got[name]
            assert isinstance(mine, Tensor) and mine.shape == value.shape, f"{self.name} {name}: {getattr(mine, 'shape', mine)}"
            if not value.is_floating_point():
                assert torch.equal(mine.long(), value.long()), f"{self.name} {name} differs"
                continue
            worst, atol = (mine - value).abs().max().item(), self.meta["tensors"][name]["atol"]
            assert worst <= atol, f"{self.name} {name}: off by {worst:.2e}, tolerance {atol:.2e}"
        for name, scalar in self.scalars.items():
            off = abs(float(got[name]) - scalar["value"])
            assert off <= scalar["atol"], f"{self.name} {name}: off by {off:.2e}, tolerance {scalar['atol']:.2e}"


def read(folder: Path) -> Fixture:
    meta = json.loads((folder / "meta.json").read_text())
    tensors = load_file(folder / "tensors.safetensors")
    return Fixture(folder.name, meta["kind"], meta["config"], meta["scalars"], tensors, meta)


def folders() -> list[Path]:
    return sorted(p.parent for p in ROOT.glob("*/meta.json"))


class Replay:
    """Draws from recorded tensors by stream name."""

    def __init__(self, **streams: Tensor) -> None:
        self.streams = streams

    def uniform(self, stream: str, n: int) -> Tensor:
        recorded = self.streams[stream]
        assert recorded.shape[1] == n, f"{stream}: {n} numbers asked for, {recorded.shape[1]} recorded"
        return recorded

    def order(self, stream: str, n: int) -> Tensor:
        return self.uniform(stream, n).argsort(dim=1, stable=True)

    def choose(self, stream: str, scores: Tensor, k: int) -> Tensor:
        recorded = self.streams[stream]
        assert recorded.shape == (len(scores), k), f"{stream}: {k} of {len(scores)} samples asked for, {recorded.shape} recorded"
        return recorded
