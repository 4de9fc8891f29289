"""The processes of a run: who this one is, and the few things that all of them agree on (torch.distributed).

`torchrun` starts them and says by environment variables who is who; a process that it did not start is a world of its own.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from swath.shards.errors import Elsewhere, InputError

T = TypeVar("T")
START = timedelta(minutes=60)  # until the first step is done: compilation, remote shards, a slow file system


@dataclass(frozen=True)
class World:
    """`rank` of `size` processes, `local` of those of its node; everything below is done by all of them together."""

    rank: int = 0
    size: int = 1
    local: int = 0
    nodes: int = 1

    @classmethod
    def join(cls, device: str) -> Self:
        """The world that torchrun made, or this process alone. `device` is cpu or cuda."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=START)
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        return cls(dist.get_rank(), size, int(os.environ.get("LOCAL_RANK", "0")), size // local_size)

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def first(self, make: Callable[[], T]) -> T:
        """What `make`, called by rank 0 alone, gives; where it raises, the others raise Elsewhere."""
        if self.size == 1:
            return make()
        told: list[Any] = [None, None]
        error: Exception | None = None
        if self.rank == 0:
            try:
                told[0] = make()
            except Exception as raised:  # raised again below, once the others know
                error, told[1] = raised, f"rank 0: {raised}"
        dist.broadcast_object_list(told, src=0)
        if error is not None:
            raise error
        if told[1] is not None:
            raise Elsewhere(told[1])
        return told[0]

    def gather(self, value: T) -> list[T]:
        """Everybody's `value`, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def refuse(self, message: str) -> InputError:
        """The error by which all ranks end for a reason that all know."""
        return InputError(message) if self.rank == 0 else Elsewhere(message)

    def together(self) -> None:
        """Wait for all."""
        if self.size > 1:
            dist.barrier()

    def device(self, kind: str) -> torch.device:
        """This rank's own device."""
        if kind == "cpu":
            return torch.device("cpu")
        torch.cuda.set_device(self.local)
        return torch.device("cuda", self.local)


ALONE = World()
