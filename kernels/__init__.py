"""Operators on tensors, each with a plain reference beside every fast one (DESIGN §2.7)."""

from swath.kernels.axial import axial_attention
from swath.kernels.conv import causal_conv1d
from swath.kernels.dispatch import use
from swath.kernels.embed import visible_patch_embedding
from swath.kernels.hog import hog_descriptor, hog_energy
from swath.kernels.joint import joint_attention
from swath.kernels.kronecker import kronecker_attention
from swath.kernels.linear import Linear
from swath.kernels.patch_loss import masked_patch_loss
from swath.kernels.scan import selective_scan

__all__ = [
    "Linear", "axial_attention", "causal_conv1d", "hog_descriptor", "hog_energy", "joint_attention", "kronecker_attention",
    "masked_patch_loss", "selective_scan", "use", "visible_patch_embedding",
]  # fmt: skip
