"""The same backbone in other people's benchmarks: torchgeo-bench, TerraTorch, TorchGeo. Each is imported where it is asked for.

They hand over numbers as their data sets store them; `scale` and `add` bring those to the contract's unit (value · scale + add),
and the contract's own normalisation follows, whatever theirs would be.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swath.backbones.base import Context
from swath.hub.load import load_backbone
from swath.shards.errors import InputError


class Plain(nn.Module):
    """An image in, a vector out: what TorchGeo calls a model, frozen unless its parameters are asked to learn.

    `bands`, names or common names in the order of the images' channels, must be those of the contract. `size`, a side in pixels,
    is what images are resized to; by default they are taken as they are. `num_features` is the width of what comes out.
    """

    mean: Tensor
    std: Tensor
    nanometres: Tensor

    def __init__(
        self,
        backbone: Path | str,
        bands: Sequence[str] | None = None,
        *,
        scale: float = 1.0,
        add: float = 0.0,
        size: int | None = None,
    ) -> None:
        super().__init__()
        loaded = load_backbone(backbone)
        contract = loaded.contract
        if bands is not None:
            known = [(band.name.lower(), (band.common_name or "").lower()) for band in contract.bands]
            wrong = len(bands) != len(known) or any(one.lower() not in names for one, names in zip(bands, known, strict=True))
            if wrong:
                wanted = ", ".join(contract.names)
                raise InputError(f"backbone {loaded.name} takes {wanted}, in this order; these are {', '.join(bands)}")
        self.backbone = loaded.backbone.requires_grad_(False)
        self.size, self.scale, self.add = size, scale, add
        self.num_features = loaded.backbone.pooled_width
        normalisation = contract.normalisation
        std = torch.tensor(normalisation.std * contract.dates)
        self.register_buffer("mean", torch.tensor(normalisation.mean * contract.dates)[:, None, None], persistent=False)
        self.register_buffer("std", torch.where(std > 0, std, 1.0)[:, None, None], persistent=False)
        nanometres = [band.wavelength_nm or float("nan") for band in contract.bands]
        self.register_buffer("nanometres", torch.tensor(nanometres, dtype=torch.float64), persistent=False)

    def prepared(self, images_bchw: Tensor) -> Tensor:
        """(B, C, H, W) normalised, 0 where a value is not finite."""
        x_bchw = (images_bchw.float() * self.scale + self.add - self.mean) / self.std
        x_bchw = torch.nan_to_num(x_bchw, nan=0.0, posinf=0.0, neginf=0.0)
        if self.size is None or x_bchw.shape[-2:] == (self.size, self.size):
            return x_bchw
        return F.interpolate(x_bchw, size=(self.size, self.size), mode="bilinear", antialias=True, align_corners=False)

    def features(self, images_bchw: Tensor) -> Any:
        """What the backbone makes of them, maps too."""
        return self.backbone(self.prepared(images_bchw), Context(wavelength_nm=self.nanometres))

    def forward(self, images_bchw: Tensor) -> Tensor:
        """(B, num_features)."""
        return self.features(images_bchw).pooled


class Maps(Plain):
    """TerraTorch's form: a list of maps (B, D, H, W), the finest first, and their widths as `out_channels`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        side = self.size or getattr(self.backbone.config, "image_size", 224)
        with torch.inference_mode():
            found = self(torch.zeros(1, len(self.mean), side, side))
        if not found:
            raise InputError("this backbone has no maps; TerraTorch's decoders need them")
        self.out_channels = [one.shape[1] for one in found]

    def forward(self, images_bchw: Tensor) -> list[Tensor]:  # type: ignore[override]
        maps = self.features(images_bchw).maps
        return [maps[stride] for stride in sorted(maps)]


def torchgeo_bench(bands: Sequence[Any], backbone: Path | str, **options: Any) -> nn.Module:
    """A `BenchModel` of torchgeo-bench: `_target_: swath.probes.adapters.torchgeo_bench` in its model's YAML, `backbone:` and the
    options of `Plain` beside it. ImportError where torchgeo-bench is not installed (pip install torchgeo-bench)."""
    from torchgeo_bench.models.interface import BenchModel  # type: ignore[import-not-found]

    own = {name: options.pop(name) for name in ("scale", "add", "size") if name in options}

    class SwathBench(BenchModel):
        handles_own_normalization = True

        def __init__(self) -> None:
            super().__init__(bands=list(bands), **options)
            self.plain = Plain(backbone, [band.name for band in bands], **own)

        def normalize_inputs(self, images: Tensor) -> Tensor:
            return images  # by the contract, in Plain

        def _forward_patch_features(self, images: Tensor, bboxes: Tensor | None = None) -> Tensor:
            with torch.no_grad():
                return self.plain(images)

    return SwathBench()


def register_terratorch() -> None:
    """Make `swath_backbone` known to TerraTorch: `backbone: swath_backbone`, `backbone_backbone: FOLDER` and the options of
    `Plain`. ImportError where TerraTorch is not installed (pip install terratorch)."""
    from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY  # type: ignore[import-not-found]

    def swath_backbone(backbone: str, pretrained: bool = True, **options: Any) -> Maps:
        return Maps(backbone, **options)

    TERRATORCH_BACKBONE_REGISTRY.register(swath_backbone)
