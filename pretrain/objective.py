"""What every objective is: a backbone and a loss around it (DESIGN §2.6)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from swath.backbones.base import Backbone, Context, Recomputed, Registry
from swath.shards.prepare import Batch


class Draws(Protocol):
    """Per-sample random numbers by stream name; `swath.shards.draw.Draw`, or recorded ones in a test."""

    def uniform(self, stream: str, n: int) -> Tensor: ...

    def order(self, stream: str, n: int) -> Tensor: ...


@dataclass
class Outcome:
    """The loss is numerator / weight, both summed over the global batch by the trainer; scalars, float32.

    `terms` holds (sum, weight) of every named part; `picture()` gives {name: (B, C, H, W)} in normalised units.
    """

    numerator: Tensor
    weight: Tensor
    terms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    picture: Callable[[], dict[str, Tensor]] | None = None


class Objective(nn.Module):
    """Base of every objective. `needs` names the traits that its backbone must have."""

    needs: ClassVar[frozenset[str]] = frozenset()
    takes_pairs: ClassVar[bool] = False  # whether a sample may have several modalities
    backbone: Backbone

    def forward(self, batch: Batch, draw: Draws) -> Outcome:
        raise NotImplementedError

    def blocks(self) -> list[Recomputed]:
        """The blocks that activation checkpointing and per-block compilation apply to."""
        return [m for m in self.modules() if isinstance(m, Recomputed)]


registry = Registry("objective")
register = registry.register


def build(name: str, backbone: Backbone, image_size: tuple[int, int], channels: Mapping[str, int], **options: Any) -> Objective:
    """A registered objective around `backbone`, for modalities of so many `channels` (bands × dates) each.

    ValueError says why a pair is not possible.
    """
    entry = registry.entry(name)
    missing = entry.build.needs - backbone.traits
    if missing:
        raise ValueError(
            f"objective {name} needs a backbone that is {', '.join(sorted(missing))}; {type(backbone).__name__} is "
            f"{', '.join(sorted(backbone.traits)) or 'none of these'}"
        )
    if len(channels) > 1 and "any_bands" not in backbone.traits:
        raise ValueError(
            f"{', '.join(channels)} need a backbone that takes any bands (wave_vit does); with {type(backbone).__name__} "
            "name one in data.modalities, or train on one data set"
        )
    return entry.build(registry.configure(name, **options), backbone, image_size, channels)


def context(batch: Batch, modality: str, backbone: Backbone, draw: Draws) -> Context:
    """What the batch tells a backbone besides its pixels; with a context encoding, `draw` says from whom it is withheld."""
    encodes = backbone.training and getattr(backbone, "context", None) is not None
    return Context(
        wavelength_nm=batch.wavelength_nm.get(modality), drop=draw.uniform("context", 1)[:, 0] if encodes else None,
        **{name: batch.meta.get(name) for name in ("gsd_m", "lat", "lon", "time")},
    )  # fmt: skip


def token_validity(valid_b1hw: Tensor, patch: int) -> Tensor:
    """(B, N) bool: tokens of which at least half the pixels are valid."""
    return torch.nn.functional.avg_pool2d(valid_b1hw.float(), patch).flatten(1) >= 0.5
