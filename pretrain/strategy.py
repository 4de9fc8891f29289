"""How a model's weights and gradients lie on the ranks: copies everywhere (`ddp`), shards of each (`fsdp`), or parts by DeepSpeed
(`deepspeed`, zero.py).

Under each, gradients of a step are the mean over the ranks; weights are fp32, and autocast, clipping, skipping and recomputation
are the trainer's own. One process needs none of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from swath.pretrain import checkpoint
from swath.pretrain.config import Train
from swath.pretrain.objective import Objective, Outcome
from swath.pretrain.optimizer import adamw
from swath.pretrain.pieces import Held
from swath.pretrain.world import World


class Strategy:
    """One process: the model as it is. `forward` is what a training step calls."""

    def __init__(self, model: Objective, train: Train) -> None:
        self.model = model
        self.forward: Callable[..., Outcome] = model
        self.optimizer = adamw(model, weight_decay=train.weight_decay, betas=train.betas)

    def __str__(self) -> str:
        return type(self).__name__

    @contextmanager
    def exchange(self, last: bool) -> Iterator[None]:
        """Around a micro-step, forward and backward; gradients are exchanged in the `last` one of a step."""
        yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, parts of the model may be called by themselves, without gradients."""
        yield

    def norm(self) -> Tensor:
        """Of all gradients."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def update(self, lr: float, divisor: Tensor, skipped: Tensor) -> None:
        """The optimiser's step with the gradients divided by `divisor`; nothing moves where `skipped`, scalars on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.grad_scale = divisor.float()  # type: ignore[attr-defined]
        self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self.step()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def idle(self) -> None:
        """A step that moves nothing; after it the optimiser has its state, and all copies of a weight are what `tensors` says."""
        checkpoint.start_optimizer(self.optimizer)

    def tensors(self) -> dict[str, Held]:
        """All that a run must remember, as it lies here: what is written into them counts after `idle`."""
        return checkpoint.tensors_of(self.model, self.optimizer)


class DDP(Strategy):
    """A copy on each rank. `unused`: some weights get no gradient in some steps."""

    def __init__(self, model: Objective, train: Train, device: torch.device, *, unused: bool) -> None:
        super().__init__(model, train)
        places = None if device.type == "cpu" else [device]
        self.forward = self.copies = DistributedDataParallel(
            model, device_ids=places, find_unused_parameters=unused, gradient_as_bucket_view=True
        )

    @contextmanager
    def exchange(self, last: bool) -> Iterator[None]:
        if last:
            yield
        else:
            with self.copies.no_sync():
                yield


def shard(model: Objective, world: World, device: torch.device) -> FSDPModule:
    """The model, of which every rank now has its shards."""
    mesh = init_device_mesh(device.type, (world.size,))
    for block in model.blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model, FSDPModule)
    return model


class FSDP(Strategy):
    """Every block's weights, and all others as one more, are sharded over the ranks and gathered where they are used."""

    def __init__(self, model: Objective, train: Train, world: World, device: torch.device) -> None:
        self.shards = shard(model, world, device)
        super().__init__(model, train)

    @contextmanager
    def exchange(self, last: bool) -> Iterator[None]:
        self.shards.set_requires_gradient_sync(last)
        yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        yield
        self.shards.reshard()  # after a forward pass without a backward one the root's weights stay gathered, and grow old


def strategy(model: Objective, train: Train, world: World, device: torch.device, precision: str, *, unused: bool) -> Strategy:
    """The strategy of a run: `ddp`, `fsdp` or `deepspeed`."""
    if world.size == 1:
        return Strategy(model, train)
    if train.strategy == "deepspeed":
        from swath.pretrain.zero import Zero

        return Zero(model, train, world, device, precision, unused=unused)
    return FSDP(model, train, world, device) if train.strategy == "fsdp" else DDP(model, train, device, unused=unused)
