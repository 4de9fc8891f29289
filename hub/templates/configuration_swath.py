"""Configuration of a backbone that swath exported: which one, its options, and the input contract."""

from typing import Any

from transformers import PretrainedConfig


class SwathConfig(PretrainedConfig):
    """`backbone_name` and `backbone_options` rebuild the backbone; `input_contract` says which bands, in which order and
    unit, normalised how; `image_size` is the [height, width] in pixels that it was trained at; `origin` its history."""

    model_type = "swath"

    def __init__(
        self,
        backbone_name: str = "",
        backbone_options: dict[str, Any] | None = None,
        input_contract: dict[str, Any] | None = None,
        image_size: list[int] | None = None,
        origin: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.backbone_name = backbone_name
        self.backbone_options = backbone_options or {}
        self.input_contract = input_contract or {}
        self.image_size = image_size or []
        self.origin = origin or {}
        super().__init__(**kwargs)
