"""AdamW groups and the learning-rate schedule, as published for masked autoencoders (He et al. 2022, §A)."""

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0, then half a cosine down to `final`, per step. Rates are absolute; lengths in steps."""

    peak: float
    final: float
    warmup: float
    steps: int

    def lr(self, step: int) -> float:
        """The rate of step `step`, counted from 0."""
        if step < self.warmup:
            return self.peak * step / self.warmup
        done = (step - self.warmup) / max(1e-9, self.steps - self.warmup)
        return self.final + (self.peak - self.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def adamw(module: nn.Module, *, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW without decay on vectors and biases. Fused: one pass over the weights, and it can skip a step on the device."""
    decayed = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
