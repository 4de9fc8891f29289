"""ZeRO, by DeepSpeed: a rank keeps and updates its part of the optimiser's state (stage 1), of the gradients too (2), of the
weights too (3). DeepSpeed cuts, exchanges and gathers; what a step means stays ours: the norm, the clipping and the skipping of a
step are handed to our AdamW, which steps on the rank's part, and precision is autocast over fp32 weights, as everywhere.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swath.pretrain.config import Train
from swath.pretrain.objective import Objective, Outcome
from swath.pretrain.pieces import Held, Piece
from swath.pretrain.strategy import Strategy
from swath.pretrain.world import World

BUCKET = 50_000_000  # gradients, and weights, that are exchanged at once


class _Told(nn.Module):
    """DeepSpeed's hooks look for tensors in tuples, and not in an Outcome."""

    def __init__(self, model: Objective) -> None:
        super().__init__()
        self.model = model

    def forward(self, *given: Any) -> tuple[Tensor, Outcome]:
        outcome = self.model(*given)
        return outcome.numerator, outcome


class Zero(Strategy):
    """`unused`: some weights get no gradient in some steps; DeepSpeed would give them one."""

    def __init__(
        self, model: Objective, train: Train, world: World, device: torch.device, precision: str, *, unused: bool
    ) -> None:
        frozen = train.zero == 3 and not all(p.requires_grad for p in model.parameters())
        if unused or frozen:
            which = "frozen weights" if frozen else "weights without a gradient in every step"
            raise world.refuse(
                f"train.strategy deepspeed with train.zero {train.zero} cannot train a model with {which}; fsdp would"
            )
        super().__init__(model, train)
        self.world, self.stage = world, train.zero
        shapes = {parameter: (name, parameter.shape) for name, parameter in model.named_parameters()}
        self.engine = _engine(_Told(model), self.optimizer, world, self.stage, device, precision)
        self.zero: Any = self.engine.optimizer
        self.forward = self._forward
        self.outside = self._outside() if self.stage == 3 else []
        if self.stage == 3:
            groups, self.parts = self.zero.fp16_groups, self.zero.fp32_partitioned_groups_flat
            # it would have the host wait for a norm of its own; ours is in the optimiser already
            self.zero._get_norm_groups = lambda: [torch.ones(())]
        else:
            groups, self.parts = self.zero.bit16_groups, self.zero.single_partition_of_fp32_groups
        # name → shape, the flat part that this rank has some of it in, where there, and the element that it begins with
        self.places: dict[str, tuple[torch.Size, Tensor, slice, int]] = {}
        for group, part in zip(groups, self.parts, strict=True):
            at = 0
            for parameter in group:
                name, shape = shapes[parameter]
                begin, first, count, at = self._place(shape.numel(), len(part), at)
                self.places[name] = shape, part, slice(begin, begin + count), first

    def _place(self, size: int, part: int, at: int) -> tuple[int, int, int, int]:
        """(where in this rank's part, first element, elements, where the next one is) of a weight of `size` at `at`."""
        rank = self.world.rank
        if self.stage == 3:  # every weight is dealt out to all ranks
            each = -(-size // self.world.size)
            first = min(rank * each, size)
            return at, first, min(each, size - first), at + each
        first, last = (min(max(edge - at, 0), size) for edge in (rank * part, (rank + 1) * part))
        return max(at - rank * part, 0), first, last - first, at + size

    def _outside(self) -> list[Any]:
        """Weights outside blocks are read without their module being called; they stay whole, as under fsdp within a step."""
        inside = {id(parameter) for block in self.model.blocks() for parameter in block.parameters()}
        outside: list[Any] = [parameter for parameter in self.model.parameters() if id(parameter) not in inside]
        for parameter in outside:
            parameter.ds_persist = True
        self.zero.persistent_parameters.extend(outside)  # gathered after each step
        return outside

    def __str__(self) -> str:
        return f"DeepSpeed's ZeRO {self.stage}"

    def _forward(self, *given: Any) -> Outcome:
        numerator, outcome = self.engine(*given)
        return replace(outcome, numerator=numerator)

    @contextmanager
    def exchange(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def norm(self) -> Tensor:
        mine = torch.nn.utils.get_total_norm([grad for part in self.zero.averaged_gradients.values() for grad in part])
        return self.world.sum(mine.square()).sqrt()

    def step(self) -> None:
        self.zero.step()
        self.zero.zero_grad()
        for parameter in self.outside:
            parameter.ds_active_sub_modules.add(-1)  # always in use: hooks would give it back after some steps, and after looks

    def idle(self) -> None:
        for number, part in enumerate(self.parts):
            self.zero.averaged_gradients[number] = [torch.zeros_like(part)]
        one = torch.ones((), device=self.parts[0].device)
        self.update(0.0, one, one)

    def tensors(self) -> dict[str, Held]:
        made: dict[str, Held] = {f"model.{name}": tensor.detach() for name, tensor in self.model.state_dict().items()}
        for name, (shape, part, where, first) in self.places.items():
            made[f"model.{name}"] = Piece(part.detach()[where], shape, first)
            for key, value in self.optimizer.state[part].items():
                made[f"optimizer.{name}.{key}"] = Piece(value[where], shape, first) if value.ndim else value
        return made


def _engine(
    module: _Told, optimizer: torch.optim.Optimizer, world: World, stage: int, device: torch.device, precision: str
) -> Any:
    """DeepSpeed's, in the groups and on the device that we are in already."""
    os.environ["DS_ACCELERATOR"] = device.type
    try:
        import deepspeed
        from deepspeed.runtime.zero import parameter_offload
        from deepspeed.utils import groups, set_z3_leaf_modules
    except ImportError:
        raise world.refuse("train.strategy deepspeed needs DeepSpeed: pip install 'swath[deepspeed]'") from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # it calls what torch has new names for
    deepspeed.ops.__dict__["__compatible_ops__"] = {}  # it would compile an exchange of its own for CPUs
    groups._WORLD_GROUP = dist.group.WORLD  # and make groups that neither our time-outs nor the watch know of
    deepspeed.init_distributed(dist_backend=dist.get_backend())
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if stage == 3:
        parameter_offload.FWD_MODULE_STACK.clear()  # a run that has gone back would keep its first model
        zero |= {"stage3_param_persistence_threshold": 0, "memory_efficient_linear": False}
        set_z3_leaf_modules(module, list({type(block) for block in module.model.blocks()}))
    else:
        zero["compute_grad_norm"] = False
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # of its own; we say which micro-step is the last one
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]
