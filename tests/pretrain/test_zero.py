"""What train.strategy deepspeed refuses, in one line. That it trains what the others do: test_ranks.py."""

import sys
from typing import Any, cast

import pytest
import torch
from torch import nn

from swath.pretrain.config import Train
from swath.pretrain.world import World
from swath.pretrain.zero import Zero
from swath.shards.errors import Elsewhere, InputError


def made(stage: int, rank: int = 0, *, frozen: bool = False, unused: bool = False) -> Zero:
    model: Any = nn.Linear(2, 2).requires_grad_(not frozen)
    train = Train(strategy="deepspeed", zero=cast(Any, stage))
    return Zero(model, train, World(rank, 2), torch.device("cpu"), "fp32", unused=unused)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_without_gradients(stage: int) -> None:
    """DeepSpeed gives them a gradient of zero, or the one of the step before, and AdamW decays them."""
    with pytest.raises(InputError, match=f"zero {stage} cannot train a model with weights without a gradient in every step"):
        made(stage, unused=True)
    with pytest.raises(Elsewhere):
        made(stage, rank=1, unused=True)


def test_frozen_weights_in_parts() -> None:
    with pytest.raises(InputError, match="zero 3 cannot train a model with frozen weights; fsdp would"):
        made(3, frozen=True)


def test_a_missing_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(InputError, match=r"needs DeepSpeed: pip install 'swath\[deepspeed\]'"):
        made(2)
