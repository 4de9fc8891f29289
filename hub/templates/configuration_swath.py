"""Configuration of a backbone that swath exported: which one, its options, and the input contract."""

import math
from typing import Any

from transformers import PretrainedConfig

STRIDES = {"stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}


class SwathConfig(PretrainedConfig):
    """`backbone_name` and `backbone_options` rebuild the backbone; `input_contract` says which bands, in which order and
    unit, normalised how; `image_size` is what it was trained at in pixels, a side or [height, width]; `origin` its history.

    For what is put behind the model: `hidden_size`, `num_hidden_layers`, `num_channels`, `patch_size` (of a pyramid the total
    stride), `num_prefix_tokens` (before the patch tokens in last_hidden_state). For SwathBackbone: `map_channels` {stride: number
    of channels} of the backbone's own maps, and `out_features`, those of stage1 … stage4 (strides 4 to 32) that are asked for.
    """

    model_type = "swath"

    def __init__(
        self,
        backbone_name: str = "",
        backbone_options: dict[str, Any] | None = None,
        input_contract: dict[str, Any] | None = None,
        image_size: int | list[int] | None = None,
        origin: dict[str, Any] | None = None,
        map_channels: dict[str, int] | None = None,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.backbone_name = backbone_name
        self.backbone_options = backbone_options or {}
        self.input_contract = input_contract or {}
        self.image_size = image_size or []
        self.origin = origin or {}
        self.map_channels = map_channels or {}
        self.out_features = out_features or self.stage_names
        if out_indices is not None:
            self.out_indices = out_indices
        super().__init__(**kwargs)

    @property
    def stage_names(self) -> list[str]:
        return list(STRIDES)

    @property
    def out_indices(self) -> list[int]:
        """Places of `out_features` in `stage_names`; can be set instead of them."""
        return [self.stage_names.index(name) for name in self.out_features]

    @out_indices.setter
    def out_indices(self, numbers: list[int]) -> None:
        self.out_features = [self.stage_names[number] for number in numbers]

    def nearest(self, stride: int) -> int:
        """The stride of the backbone's own maps that is nearest to `stride`, the finer one of two."""
        return min(map(int, self.map_channels), key=lambda own: (abs(math.log2(own / stride)), own))
