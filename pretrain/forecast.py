"""What a run will be, before any of it: sizes, memory of a rank, steps and time, from the recipe, the manifests and a model
without storage (torch's meta device)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from swath.pretrain import build, config, cost
from swath.pretrain.config import Recipe
from swath.pretrain.data import Data
from swath.pretrain.objective import Objective
from swath.pretrain.stages import Stage, plan
from swath.pretrain.zero import BUCKET
from swath.shards.order import cut

FP32 = 4  # bytes; weights, gradients and both moments of AdamW are kept in it


@dataclass
class Forecast:
    """Bytes are of one rank, where nothing else is said; activations, in fp32, are of the stage that keeps most of them."""

    samples: int
    parameters: int
    frozen: int
    world_size: int
    micro_batch: int
    accumulate: int
    stages: tuple[Stage, ...]
    epochs: float
    gflop_per_sample: tuple[float, ...]
    weights: int
    gathered: int
    activations: int
    checkpoint: int

    @property
    def memory(self) -> int:
        return self.weights + self.gathered + self.activations

    def lines(self, samples_per_second: float | None = None) -> list[str]:
        """For a person."""
        steps = self.stages[-1].last
        share = f"{self.micro_batch} × {self.accumulate}" if self.accumulate > 1 else f"{self.micro_batch}"
        rows = [
            f"data         {self.samples} samples",
            f"model        {self.parameters / 1e6:.1f} M weights"
            + (f", {self.frozen / 1e6:.1f} M frozen" if self.frozen else ""),
            f"ranks        {self.world_size}, each {share} samples a step",
            *(
                f"steps        {stage.first} to {stage.last} at {stage.size[0]}×{stage.size[1]} pixels, "
                f"{flop:.1f} GFLOP a sample, lr {stage.schedule.peak:.3g}"
                for stage, flop in zip(self.stages, self.gflop_per_sample, strict=True)
            ),
            f"length       {steps} steps, {self.epochs:.2f} epochs",
            f"memory       {_size(self.memory)} a rank: {_size(self.weights)} weights, gradients and moments, "
            + (f"{_size(self.gathered)} gathered or exchanged at once, " if self.gathered else "")
            + f"{_size(self.activations)} activations in fp32 (bf16: about half); without what "
            "libraries and the allocator take",
            f"checkpoint   {_size(self.checkpoint)}",
        ]
        if samples_per_second:
            seconds = self.epochs * self.samples / samples_per_second
            rows.append(f"time         {seconds / 3600:.1f} h at {samples_per_second:g} samples/s of all ranks together")
        return rows


def forecast(recipe: Recipe, world_size: int, ranks_per_node: int | None = None) -> Forecast:
    """Of a recipe on so many ranks. Raises InputError for what would be refused when it runs, with the sizes that fit."""
    train = recipe.train
    nodes = max(1, world_size // (ranks_per_node or world_size))
    data = Data(recipe.data, recipe.run.seed)
    try:
        micro, accumulate = cut(train.global_batch, world_size, train.micro_batch, lanes=recipe.data.lanes, nodes=nodes)
        stages = plan(train, data)
        flops, activations, model = [], 0, None
        for stage in stages:
            with torch.device("meta"):
                model = build.model(recipe, data, stage.size, stages[-1].size)
                step = build.rehearsal(model, data, stage.size, micro, torch.device("meta"))
            with kept(model) as saved:
                flops.append(cost.flops(step) / micro / 1e9)
            activations = max(activations, sum(saved.values()))
    finally:
        data.close()
    assert model is not None
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held, gathered = _held(model, train, world_size)
    return Forecast(
        samples=data.samples,
        parameters=trained,
        frozen=sum(sizes.values()) - trained,
        world_size=world_size,
        micro_batch=micro,
        accumulate=accumulate,
        stages=stages,
        epochs=stages[-1].last * train.global_batch / data.samples,
        gflop_per_sample=tuple(flops),
        weights=held * FP32,
        gathered=gathered * FP32,
        activations=activations,
        checkpoint=(sum(sizes.values()) + 2 * trained) * FP32,
    )


def _held(model: Objective, train: config.Train, ranks: int) -> tuple[int, int]:
    """(numbers that a rank keeps of weights, gradients and both moments, those that it gathers or exchanges at once)."""
    everything = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks()]
    outside = everything - sum(blocks)
    if ranks == 1 or train.strategy == "ddp":
        return everything + 3 * trained, 0
    if train.strategy == "fsdp":  # rows are dealt out; the unit in use, and the one that is fetched meanwhile
        rows = [
            (math.ceil(p.shape[0] / ranks) * p[0].numel() if p.ndim else 1, 4 if p.requires_grad else 1)
            for p in model.parameters()
        ]
        return sum(size * copies for size, copies in rows), 2 * max([*blocks, outside])
    part = math.ceil(trained / ranks)  # DeepSpeed updates weights apart from those that it computes with
    if train.zero == 3:
        return 5 * part, outside + 2 * max(blocks, default=0)
    return everything + 3 * part + (trained if train.zero == 1 else part), min(trained, BUCKET)


@contextmanager
def kept(model: Objective) -> Iterator[dict[int, int]]:
    """Bytes that the backward pass of what runs inside keeps, by storage; weights are no part of it."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # a storage that is freed would lend its number to another

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in found:
            found[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.3g} {unit}" if count < 100 else f"{count:.0f} {unit}"
        count /= 1024
    raise AssertionError
