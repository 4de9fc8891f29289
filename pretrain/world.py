"""The processes of a run: who this one is, and the few things that all of them agree on (torch.distributed).

`torchrun` starts them and says by environment variables who is who; a process that it did not start is a world of its own.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from swath.shards.errors import Elsewhere, InputError

T = TypeVar("T")
START = timedelta(minutes=60)  # that a collective may last until the first step is done: compilation, remote shards


@dataclass(frozen=True)
class World:
    """`rank` of `size` processes, `local` of those of its node; everything below is done by all of them together, but for
    `begun`. `store` is where they meet: keys and values that each may read and write at any time."""

    rank: int = 0
    size: int = 1
    local: int = 0
    nodes: int = 1
    store: dist.Store | None = field(default=None, compare=False)
    groups: list[dist.ProcessGroup] = field(default_factory=list, compare=False)

    @classmethod
    def join(cls, device: str) -> Self:
        """The world that torchrun made, or this process alone. `device` is cpu or cuda."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        store, rank, size = next(dist.rendezvous("env://", timeout=START))
        groups = dist.PrefixStore("groups", store)
        dist.init_process_group(backend, store=groups, rank=rank, world_size=size, timeout=START)
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        own = dist.PrefixStore("swath", store)
        return cls(rank, size, int(os.environ.get("LOCAL_RANK", "0")), size // local_size, own)

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    def group(self) -> dist.ProcessGroup | None:
        """One more group of all, for a thread whose exchanges must not meet those of another; None in a world of one."""
        if self.size == 1:
            return None
        self.groups.append(cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=START)))
        return self.groups[-1]

    def allow(self, seconds: float) -> None:
        """How long a collective, in any group, that begins from now on may last."""
        if self.size > 1:
            for group in (cast(dist.ProcessGroup, dist.group.WORLD), *self.groups):
                group.set_timeout(timedelta(seconds=seconds))

    def begun(self) -> int:
        """How many collectives this rank has begun: where all wait for one rank, it is one behind."""
        group: Any = dist.group.WORLD
        if group is None or self.size == 1:
            return 0
        # of each backend: a group with several has no number of its own, and torch tells it nowhere in public
        return sum(group._get_backend(kind)._get_sequence_number_for_group() for kind in group._device_types)

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


def is_echo(error: BaseException) -> bool:
    """Whether this is what a collective raises because another rank is gone or late; gloo's have no class of their own."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


ALONE = World()
