"""How a model's weights and gradients lie on the ranks: copies everywhere (`ddp`), or shards of each (`fsdp`).

Under either, gradients of a step are the mean over the ranks, exchanged once, with the last micro-step; weights are fp32 and
autocast, clipping, skipping and recomputation are the trainer's own. One process needs neither.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from swath.pretrain.objective import Objective
from swath.pretrain.world import World


class Strategy:
    """One process: the model as it is. `forward` is what a training step calls."""

    def __init__(self, model: Objective) -> None:
        self.model = model
        self.forward: nn.Module = model

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


class DDP(Strategy):
    """A copy on each rank. `unused`: some weights get no gradient in some steps."""

    def __init__(self, model: Objective, device: torch.device, unused: bool) -> None:
        super().__init__(model)
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


class FSDP(Strategy):
    """Every block's weights, and all others as one more, are sharded over the ranks and gathered where they are used."""

    def __init__(self, model: Objective, world: World, device: torch.device) -> None:
        super().__init__(model)
        mesh = init_device_mesh(device.type, (world.size,))
        for block in model.blocks():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert isinstance(model, FSDPModule)
        self.shards: FSDPModule = model

    @contextmanager
    def exchange(self, last: bool) -> Iterator[None]:
        self.shards.set_requires_gradient_sync(last)
        yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        yield
        self.shards.reshard()  # after a forward pass without a backward one the root's weights stay gathered, and grow old


def strategy(name: str, model: Objective, world: World, device: torch.device, *, unused: bool) -> Strategy:
    """The strategy of a run: `ddp` or `fsdp`."""
    if world.size == 1:
        return Strategy(model)
    return FSDP(model, world, device) if name == "fsdp" else DDP(model, device, unused)
