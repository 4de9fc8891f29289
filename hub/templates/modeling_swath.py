"""A backbone that swath exported, as a transformers model. The backbone's own code lies beside this file, unchanged."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from swath.backbones.base import create
from swath.backbones.vit import ViT as Encoder  # export puts the backbone's module and class here

from .configuration_swath import SwathConfig


class SwathModel(PreTrainedModel):
    """pixel_values (B, C, H, W), as SwathImageProcessor makes them → features of the frozen or fine-tuned backbone."""

    config_class = SwathConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"

    def __init__(self, config: SwathConfig) -> None:
        super().__init__(config)
        self.backbone: Encoder = create(config.backbone_name, **config.backbone_options)  # type: ignore[assignment]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the backbone has initialised itself."""

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """last_hidden_state (B, P + T, D): P class and register tokens, then the (H/p)·(W/p) patch tokens, after the final norm.

        pooler_output (B, D). hidden_states: depth + 1 tensors (B, P + T, D), what enters the first block and what leaves
        each one. Any image size that the patch divides is taken; positions are interpolated.
        """
        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        taps = range(-1, self.backbone.depth) if asked else ()
        tokens = self.backbone.tokenize(pixel_values.to(self.dtype))
        features = self.backbone.encode(tokens, taps=taps)
        output = BaseModelOutputWithPooling(
            last_hidden_state=torch.cat([features.prefix, features.tokens], dim=1),  # type: ignore[arg-type]
            pooler_output=features.pooled,  # type: ignore[arg-type]
            hidden_states=tuple(features.taps[number] for number in taps) if asked else None,  # type: ignore[arg-type]
        )
        return output.to_tuple() if return_dict is False else output
