"""What every objective is: a backbone and a loss around it (DESIGN §2.6)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from swath.backbones.base import Backbone, Context, Recomputed, Registry
from swath.backbones.base import registry as backbones
from swath.shards.prepare import Batch


class Draws(Protocol):
    """Per-sample random numbers by stream name; `swath.shards.draw.Draw`, or recorded ones in a test."""

    def uniform(self, stream: str, n: int) -> Tensor: ...

    def order(self, stream: str, n: int) -> Tensor: ...

    def choose(self, stream: str, scores: Tensor, k: int) -> Tensor: ...


@dataclass
class Outcome:
    """The loss is numerator / weight, both summed over the global batch by the trainer; scalars, float32.

    Of a loss with parts that are counted differently (tokens, pixels of several sizes) each part is a mean within its sample, so
    that samples are the weight of all of them. `terms` holds (sum, weight) of every named part; `picture()` gives
    {name: (B, C, H, W)} in normalised units.
    """

    numerator: Tensor
    weight: Tensor
    terms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    picture: Callable[[], dict[str, Tensor]] | None = None


def of_samples(
    parts: Mapping[str, tuple[float, Tensor]], weight_b: Tensor, modality: str, picture: Callable[[], dict[str, Tensor]]
) -> Outcome:
    """The outcome of a loss whose parts, name → (coefficient, mean (B,) within each sample), are weighted by samples."""
    weight = weight_b.sum()
    sums = {name: (error_b * weight_b).sum() for name, (_, error_b) in parts.items()}
    numerator = torch.stack([parts[name][0] * amount for name, amount in sums.items()]).sum()
    return Outcome(numerator, weight, {f"{name}/{modality}": (amount.detach(), weight) for name, amount in sums.items()}, picture)


class Objective(nn.Module):
    """Base of every objective. `needs` names the traits that its backbone must have.

    The trainer sets `progress`, the share of the run that is done, before each step, and gives images `scale` times as large as
    the backbone sees them.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    takes_pairs: ClassVar[bool] = False  # whether a sample may have several modalities, whose bands the backbone then sees as one
    scale: int = 1
    progress: float = 0.0
    backbone: Backbone

    @classmethod
    def refusal(cls, backbone: Backbone) -> str | None:
        """Why this objective cannot train `backbone`; None where it can."""
        missing = cls.needs - backbone.traits
        if not missing:
            return None
        return (
            f"it needs a backbone that is {', '.join(sorted(missing))}; this one is {', '.join(sorted(backbone.traits)) or 'not'}"
        )

    def forward(self, batch: Batch, draw: Draws) -> Outcome:
        raise NotImplementedError

    def look(self, batch: Batch, draw: Draws) -> tuple[Tensor, Context]:
        """(images (B, C, H, W), context): what the backbone sees of a batch, nothing masked."""
        modality = next(iter(batch.images))
        return batch.images[modality], context(batch, modality, self.backbone, draw)

    def after_step(self, skipped: Tensor) -> None:
        """Called after each step of the optimiser; `skipped`, a bool scalar on the device, says that it moved nothing."""

    def after_start(self) -> None:
        """Called once where the backbone, and nothing else, was given weights of another run."""

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
    if reason := entry.build.refusal(backbone):
        raise ValueError(f"objective {name} cannot train {type(backbone).__name__}: {reason}")
    if len(channels) > 1 and not entry.build.takes_pairs and "any_bands" not in backbone.traits:
        raise ValueError(
            f"{', '.join(channels)} need a backbone that takes any bands (wave_vit does); with {type(backbone).__name__} "
            "name one in data.modalities, or train on one data set"
        )
    return entry.build(registry.configure(name, **options), backbone, image_size, channels)


def refused(name: str, backbone: str, options: Mapping[str, Any]) -> str | None:
    """Why objective `name` cannot train `backbone` with these options, whatever the data; None where it can, or where their bands
    decide it, which `build` then says."""
    bands = [options["bands"]] if "bands" in options else [backbones.entry(backbone).build.tiny["bands"], *range(1, 17)]
    reason = None
    for count in bands:
        try:
            with torch.device("meta"):
                made = backbones.entry(backbone).build(backbones.configure(backbone, **{**options, "bands": count}))
        except ValueError:
            continue
        refusal = registry.entry(name).build.refusal(made)
        if refusal is None:
            return None
        reason = reason or refusal
    return reason


def pairs() -> dict[str, dict[str, str | None]]:
    """objective → backbone → why not, None where the pair can be trained: of every objective and one backbone of each family."""
    small: dict[str, Backbone] = {}
    with torch.device("meta"):
        for build_backbone, name in sorted(backbones.families().items(), key=lambda family: family[1]):
            small[name] = backbones.entry(name).build(backbones.configure(name, **build_backbone.tiny))
    return {
        name: {other: registry.entry(name).build.refusal(backbone) for other, backbone in small.items()}
        for name in registry.names()
    }


def context(batch: Batch, modality: str, backbone: Backbone, draw: Draws, scale: int = 1) -> Context:
    """What the batch tells a backbone besides its pixels, which are `scale` times as large as the batch's; with a context
    encoding, `draw` says from whom it is withheld."""
    encodes = backbone.training and getattr(backbone, "context", None) is not None
    known = {name: batch.meta.get(name) for name in ("gsd_m", "lat", "lon", "time")}
    if scale != 1 and known["gsd_m"] is not None:
        known["gsd_m"] = known["gsd_m"] * scale
    return Context(
        wavelength_nm=batch.wavelength_nm.get(modality), drop=draw.uniform("context", 1)[:, 0] if encodes else None, **known
    )


def seen_pixels(batch: Batch, modality: str) -> tuple[Tensor, Tensor | None]:
    """(images (B, C, H, W), valid (B, dates, H, W) or None) of a modality, invalid pixels 0 whatever stood there."""
    images_bchw, valid_bthw = batch.images[modality], batch.valid.get(modality)
    if valid_bthw is None:
        return images_bchw, None
    bands = images_bchw.shape[1] // valid_bthw.shape[1]
    each_bchw = valid_bthw if valid_bthw.shape[1] == 1 else valid_bthw.repeat_interleave(bands, dim=1)
    return torch.where(each_bchw, images_bchw, 0.0), valid_bthw
