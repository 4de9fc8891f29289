"""From arrays of any number of bands to what an exported backbone sees: check, scale, normalise, resize."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ImageProcessingMixin


class SwathImageProcessor(ImageProcessingMixin):
    """Normalises by the statistics that the backbone was trained with, and refuses bands that are not its own.

    `input_contract` holds the ordered bands, their unit and statistics; `size` {"height", "width"} is in pixels.
    """

    model_input_names = ("pixel_values",)

    def __init__(
        self,
        input_contract: dict[str, Any],
        size: dict[str, int],
        do_resize: bool = True,
        scale: float | None = None,
        add: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.input_contract = input_contract
        self.size = size
        self.do_resize = do_resize
        self.scale = scale
        self.add = add

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, **kwargs)

    def preprocess(
        self,
        images: Any,
        do_resize: bool | None = None,
        size: dict[str, int] | None = None,
        scale: float | None = None,
        add: float | None = None,
        input_data_format: str | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """pixel_values (B, C, H, W) float32 of one image or a list: arrays (C, H, W) or (H, W, C), or PIL images.

        Values times `scale` plus `add` must be in the contract's unit: stored Sentinel-2 integers need scale=1e-4 (and
        add=-0.1 from processing baseline 04.00 on) where the unit is reflectance. Images of another size are resized to
        `size` unless `do_resize` is False. `input_data_format` ("channels_first", "channels_last") settles shapes where both
        ends could be bands. Pixels that are nodata or not finite become 0. Raises ValueError for other bands.
        """
        scale = self.scale if scale is None else scale
        add = self.add if add is None else add
        size = size or self.size
        resize = (size["height"], size["width"]) if (self.do_resize if do_resize is None else do_resize) else None
        made = [self._one(image, scale, add, input_data_format, resize) for image in _listed(images)]
        if len({tuple(x.shape) for x in made}) > 1:
            raise ValueError(f"images differ in size ({', '.join(sorted({str(tuple(x.shape[1:])) for x in made}))}): resize them")
        return BatchFeature({"pixel_values": torch.stack(made)}, tensor_type=return_tensors)

    def _one(self, image: Any, scale: float | None, add: float, layout: str | None, resize: tuple[int, int] | None) -> Tensor:
        stored = self._bands_first(image, layout)
        if scale is None and not stored.is_floating_point() and self.input_contract["unit"] != "digital number":
            raise ValueError(
                f"integers given where the model was trained on {self.input_contract['unit']}: "
                "pass scale= (and add=), such as scale=1e-4 for Sentinel-2"
            )
        x_chw, valid_1hw = self._normalise(stored, 1.0 if scale is None else scale, add)
        if resize is not None and tuple(x_chw.shape[1:]) != resize:
            return _resize(x_chw, valid_1hw, resize)
        return x_chw

    def _normalise(self, stored_chw: Tensor, scale: float, add: float) -> tuple[Tensor, Tensor]:
        """As in training: one multiplication and one addition per pixel, 0 where a pixel is invalid."""
        statistics = self.input_contract["normalisation"]
        mean, std = (torch.tensor(statistics[key], dtype=torch.float32) for key in ("mean", "std"))
        std = torch.where(std > 0, std, torch.ones_like(std))
        x_chw = stored_chw.to(torch.float32)
        valid_1hw = torch.isfinite(x_chw).all(dim=0, keepdim=True)
        if self.input_contract["nodata"] is not None:
            valid_1hw &= (x_chw != self.input_contract["nodata"]).all(dim=0, keepdim=True)
        factor, shift = torch.tensor(scale, dtype=torch.float32) / std, (torch.tensor(add, dtype=torch.float32) - mean) / std
        x_chw = x_chw * factor[:, None, None] + shift[:, None, None]
        if statistics.get("clip") is not None:
            x_chw = x_chw.clamp(*statistics["clip"])
        return torch.where(valid_1hw, x_chw, 0.0), valid_1hw

    def _bands_first(self, image: Any, layout: str | None) -> Tensor:
        """(C, H, W) in the stored dtype; ValueError names the bands that are expected."""
        bands = [band["name"] for band in self.input_contract["bands"]]
        expected = f"{len(bands)} band(s) in this order: {', '.join(bands)}"
        if isinstance(image, Image.Image):
            if len(bands) == 3 and image.mode in ("RGB", "RGBA", "P"):
                self._require_rgb(expected)
                image, layout = image.convert("RGB"), "channels_last"
            elif len(bands) != 1 or image.mode not in ("L", "I;16", "I", "F"):
                raise ValueError(f"a PIL image of mode {image.mode} does not hold {expected}")
            image = np.array(image)
        array = image if isinstance(image, Tensor) else torch.from_numpy(np.ascontiguousarray(image))
        if array.ndim == 2 and len(bands) == 1:
            array, layout = array[None], "channels_first"
        if array.ndim != 3:
            raise ValueError(f"an image must be (C, H, W) or (H, W, C), not {tuple(array.shape)}; the model takes {expected}")
        if layout is None:
            layout = "channels_last" if array.shape[0] != len(bands) and array.shape[2] == len(bands) else "channels_first"
        if layout == "channels_last":
            array = array.permute(2, 0, 1).contiguous()
        if array.shape[0] != len(bands):
            raise ValueError(f"an image has {array.shape[0]} bands; the model takes {expected}")
        return array

    def _require_rgb(self, expected: str) -> None:
        names = [(band.get("common_name") or band["name"]).lower() for band in self.input_contract["bands"]]
        if names not in (["red", "green", "blue"], ["r", "g", "b"]):
            raise ValueError(f"a PIL image holds red, green, blue; the model takes {expected}: give an array instead")


def _listed(images: Any) -> Sequence[Any]:
    """A list of images from one image, a list of them, or an array (B, C, H, W)."""
    if isinstance(images, (list, tuple)) or getattr(images, "ndim", 3) == 4:
        if len(images) == 0:
            raise ValueError("no images given")
        return images
    return [images]


def _resize(x_chw: Tensor, valid_1hw: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with anti-aliasing, over valid pixels only."""
    both = torch.cat([x_chw, valid_1hw.float()])[None]
    made_chw, share_1hw = F.interpolate(both, size, mode="bilinear", antialias=True)[0].split([len(x_chw), 1])
    return torch.where(share_1hw >= 0.5, made_chw / share_1hw.clamp_min(1e-6), 0.0)
