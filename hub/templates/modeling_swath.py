"""A backbone that swath exported, as transformers models. The backbone's own code lies beside this file, unchanged."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling

from swath.backbones.base import Context, Features, create
from swath.backbones.vit import ViT as Encoder  # export puts the backbone's module and class here

from .configuration_swath import STRIDES, SwathConfig


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

    def features(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, context: dict[str, Tensor] | None = None
    ) -> tuple[Features, tuple[Tensor, ...] | None]:
        """The backbone's features, and its hidden states where they are asked for.

        `context` says what is known besides the pixels, if the backbone was trained with it: wavelength_nm (C,), by default those
        of the input contract, and per image gsd_m, lat, lon (degrees) and time (seconds since 1970, UTC), each (B,).
        """
        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        taps = range(-1, self.backbone.depth) if asked else ()
        bands = self.config.input_contract.get("bands", [])
        nanometres = [math.nan if band["wavelength_nm"] is None else band["wavelength_nm"] for band in bands]
        given = {"wavelength_nm": torch.tensor(nanometres, dtype=torch.float64, device=pixel_values.device)} if bands else {}
        tokens = self.backbone.tokenize(pixel_values.to(self.dtype), Context(**given | (context or {})))
        features = self.backbone.encode(tokens, taps=taps)
        return features, tuple(features.taps[number] for number in taps) if asked else None

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        context: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """last_hidden_state (B, P + T, D): P class and register tokens, then the (H/p)·(W/p) patch tokens, after the final norm.

        pooler_output (B, D). hidden_states: depth + 1 tensors (B, P + T, D), what enters the first block and what leaves
        each one. Any image size that the patch divides is taken; positions are interpolated.
        """
        features, hidden = self.features(pixel_values, output_hidden_states, context)
        output = BaseModelOutputWithPooling(
            last_hidden_state=torch.cat([features.prefix, features.tokens], dim=1),  # type: ignore[arg-type]
            pooler_output=features.pooled,  # type: ignore[arg-type]
            hidden_states=hidden,  # type: ignore[arg-type]
        )
        return output.to_tuple() if return_dict is False else output


class SwathBackbone(SwathModel):
    """The same weights, giving maps for dense heads: AutoBackbone's interface, stage1 … stage4 at strides 4, 8, 16 and 32.

    A pyramid gives its own maps; where a backbone has none of a stride, its nearest one is averaged or interpolated. Nothing is
    learned in that, so that a folder loads whole, and a head's own projections come next. `out_features` or `out_indices` of
    from_pretrained pick stages.
    """

    def __init__(self, config: SwathConfig) -> None:
        if unknown := [name for name in config.out_features if name not in STRIDES]:
            raise ValueError(f"out_features {', '.join(unknown)} are none of {', '.join(STRIDES)}")
        super().__init__(config)

    @property
    def stage_names(self) -> list[str]:
        return self.config.stage_names

    @property
    def out_features(self) -> list[str]:
        return self.config.out_features

    @property
    def out_indices(self) -> list[int]:
        return self.config.out_indices

    @property
    def out_feature_channels(self) -> dict[str, int]:
        """Of every stage, asked for or not."""
        return {name: self.config.map_channels[str(self.config.nearest(stride))] for name, stride in STRIDES.items()}

    @property
    def channels(self) -> list[int]:
        """Of each map that forward gives."""
        return [self.out_feature_channels[name] for name in self.out_features]

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        context: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> BackboneOutput | tuple[Any, ...]:
        """feature_maps: one (B, channels, ⌈H / stride⌉, ⌈W / stride⌉) of each stage of `out_features`."""
        features, hidden = self.features(pixel_values, output_hidden_states, context)
        strides = [STRIDES[name] for name in self.out_features]
        maps = tuple(_resized(features.maps[self.config.nearest(s)], s, pixel_values.shape[2:]) for s in strides)
        output = BackboneOutput(feature_maps=maps, hidden_states=hidden)  # type: ignore[arg-type]
        return output.to_tuple() if return_dict is False else output

    def forward_with_filtered_kwargs(self, *args: Any, **kwargs: Any) -> Any:
        """What UPerNet and others call."""
        return self(*args, **kwargs)


def _resized(map_bdhw: Tensor, stride: int, size: torch.Size) -> Tensor:
    """The map of an image of `size` pixels as one of `stride`."""
    rows, columns = (-(-side // stride) for side in size)
    if map_bdhw.shape[2:] == (rows, columns):
        return map_bdhw
    if map_bdhw.shape[2] > rows:
        return F.adaptive_avg_pool2d(map_bdhw, (rows, columns))
    return F.interpolate(map_bdhw, (rows, columns), mode="bilinear", align_corners=False)
