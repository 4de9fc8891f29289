"""Objectives, masking, decoders, trainer, checkpoints, health."""

import swath.backbones
import swath.pretrain.objectives  # noqa: F401  (both register themselves)
