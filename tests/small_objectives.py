"""Every registered objective around small backbones, and batches that it can learn from."""

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swath.backbones.base import Backbone, create
from swath.backbones.base import registry as backbones
from swath.pretrain.objective import Objective, build, registry
from swath.shards.draw import Draw
from swath.shards.prepare import Batch

# options that make any objective small, of those that it has
SMALL = {
    "decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2,
    "group_width": 8, "date_width": 4,
    "predictor_width": 24, "predictor_depth": 1, "predictor_heads": 2,
}  # fmt: skip
# what an objective needs besides on so few tokens
OWN: dict[str, dict[str, Any]] = {}


def small(name: str, backbone: str, **options: Any) -> Objective:
    """Objective `name` around the smallest of the family of `backbone`, on images of `side(backbone)` pixels."""
    torch.manual_seed(0)
    made = create(backbone, **backbones.entry(backbone).build.tiny)
    known = {field.name for field in fields(registry.entry(name).config)}
    given = {key: value for key, value in {**SMALL, **OWN.get(name, {}), **options}.items() if key in known}
    return build(name, made, (side(made), side(made)), {"image": made.config.bands}, **given)


def side(backbone: Backbone) -> int:
    """Pixels of an image with enough to mask."""
    return backbone.config.image_size if "sparse" in backbone.traits else 4 * backbone.mask_unit


def smooth_images(objective: Objective, samples: int) -> Tensor:
    """(B, C, H, W) of what `objective` is given: coarse noise, interpolated, different in each sample and band."""
    backbone = objective.backbone
    pixels = side(backbone) * objective.scale
    coarse = torch.randn(samples, backbone.config.bands, 6, 6, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, (pixels, pixels), mode="bilinear")


def batch_of(
    images: Tensor, valid: Tensor | None = None, ids: list[int] | None = None, visit: int = 0, seed: int = 3
) -> tuple[Batch, Draw]:
    """A batch, and its draws, of samples called `ids` (0, 1, … by default), all at the same visit."""
    id_b = torch.arange(len(images)) if ids is None else torch.tensor(ids)
    visit_b = torch.full_like(id_b, visit)
    masks = {} if valid is None else {"image": valid}
    return Batch({"image": images}, masks, id_b, visit_b, torch.ones(len(images))), Draw(seed, id_b, visit_b)
