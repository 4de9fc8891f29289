"""What ranks hold of a tensor that was flattened and cut into runs, told to torch.distributed.checkpoint, which knows boxes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


@dataclass
class Piece:
    """The elements `values` (n,) of a tensor of `shape`, from its element `first` on, in the order of its rows."""

    values: Tensor
    shape: torch.Size
    first: int

    def boxes(self) -> Iterator[tuple[ChunkStorageMetadata, Tensor]]:
        """Where each box lies in the whole, and its values, a view."""
        at = 0
        for offsets, sizes in boxes(self.shape, self.first, self.first + len(self.values)):
            values = self.values[at : at + math.prod(sizes)].view(sizes)
            yield ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)), values
            at += values.numel()

    def box(self, index: MetadataIndex) -> Tensor:
        """The values of the box that begins there."""
        return next(values for box, values in self.boxes() if box.offsets == index.offset)

    # what the checkpoint asks of whatever is not a tensor

    def size(self) -> torch.Size:
        return self.shape

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        kind = TensorProperties.create_from_tensor(self.values)
        return [
            WriteItem(MetadataIndex(name, box.offsets), WriteItemType.SHARD, tensor_data=TensorWriteData(box, kind, self.shape))
            for box, _ in self.boxes()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [box for box, _ in self.boxes()]


Held = Tensor | Piece  # what a rank has of a tensor: all of it, rows of it (a DTensor), or a run of its elements


def boxes(shape: tuple[int, ...], first: int, last: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of the fewest boxes that elements `first` to `last`, exclusive, of a tensor of `shape` fill, in order."""
    if first == last:
        return []
    if len(shape) < 2:
        return [((first,) * len(shape), (last - first,) * len(shape))]
    inner = math.prod(shape[1:])
    row, end = first // inner, last // inner
    found = []
    if first % inner:  # in a row whose begin is another's
        stop = min(last, (row + 1) * inner)
        found += [((row, *o), (1, *s)) for o, s in boxes(shape[1:], first - row * inner, stop - row * inner)]
        row += 1
    if row < end:
        found.append(((row, *[0] * (len(shape) - 1)), (end - row, *shape[1:])))
    if last % inner and row <= end:
        found += [((end, *o), (1, *s)) for o, s in boxes(shape[1:], 0, last - end * inner)]
    return found


class WritePlanner(dcp.DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        held = self.state_dict[index.fqn]
        return held.box(index) if isinstance(held, Piece) else super().lookup_object(index)


class LoadPlanner(dcp.DefaultLoadPlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)  # a flat dictionary it is

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Without the default's look into every value, which would take a piece apart."""
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        held = self.state_dict[index.fqn]
        return held.box(index) if isinstance(held, Piece) else super().lookup_tensor(index)
