"""Training a backbone and a linear head end to end, as masked autoencoders are fine-tuned (He et al. 2022, appendix A.2).

Order, views, mixing and dropped paths are pure functions of (seed, sample, visit), so that a second run is the same bits.
Letters: b sample, c class.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import beta
from torch import Tensor, nn
from tqdm import tqdm

from swath.backbones.base import Backbone, Context, Recomputed
from swath.hub.load import Loaded
from swath.pretrain import augment
from swath.pretrain.config import Augment
from swath.pretrain.optimizer import Schedule
from swath.pretrain.precision import Precision, autocast
from swath.probes.features import decoded_ahead, known, over, require_contract
from swath.shards.draw import Draw
from swath.shards.errors import InputError
from swath.shards.order import SampleOrder
from swath.shards.prepare import Batch, prepare
from swath.shards.reader import ShardReader

_SMALLEST_CROP = 0.3  # share of the area, as SatMAE++ fine-tunes


@dataclass(frozen=True)
class Tuning:
    """How to train; the defaults are those that masked autoencoders of remote sensing were fine-tuned with."""

    epochs: int = field(default=30, metadata={"help": "over train (30)"})
    batch: int = field(default=256, metadata={"help": "samples per step, at most a quarter of train (256)"})
    layer_decay: float = field(default=0.75, metadata={"help": "each layer's learning rate over that of the one above (0.75)"})
    weight_decay: float = field(default=0.05, metadata={"help": "of AdamW (0.05)"})
    warmup: float = field(default=0.1, metadata={"help": "share of the steps in which the learning rate rises (0.1)"})
    mixup: float = field(default=0.8, metadata={"help": "alpha of mixup, 0 for none (0.8)"})
    cutmix: float = field(default=1.0, metadata={"help": "alpha of cutmix, 0 for none (1); with both, each half of the time"})
    smoothing: float = field(default=0.1, metadata={"help": "of labels (0.1)"})
    drop_path: float = field(
        default=0.1, metadata={"help": "share of samples that skip the last block, of earlier ones less (0.1)"}
    )
    ema: float = field(default=0.9999, metadata={"help": "of weights, less in the first steps; 0 for none (0.9999)"})

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1:
            raise ValueError("--epochs and --batch must be at least 1")
        shares = {"layer-decay": self.layer_decay, "warmup": self.warmup, "smoothing": self.smoothing, "ema": self.ema}
        for name, value in (shares | {"drop-path": self.drop_path}).items():
            if not 0 <= value <= 1 or (name != "layer-decay" and value == 1):
                raise ValueError(f"--{name} must be between 0 and 1, not {value:g}")
        if min(self.mixup, self.cutmix, self.weight_decay) < 0:
            raise ValueError("--mixup, --cutmix and --weight-decay must not be negative")


class Classifier(nn.Module):
    """Pooled features, a layer norm, one linear layer."""

    def __init__(self, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.norm = nn.LayerNorm(backbone.pooled_width, eps=1e-6)
        self.head = nn.Linear(backbone.pooled_width, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images_bchw: Tensor, ctx: Context) -> Tensor:
        """(B, classes)."""
        return self.head(self.norm(self.backbone(images_bchw, ctx).pooled))


def tune(
    loaded: Loaded,
    reader: ShardReader,
    numbers: np.ndarray,
    target_nc: np.ndarray,
    tuning: Tuning,
    *,
    lr_per_256: float,
    seed: int,
    precision: Precision,
    progress: bool = True,
) -> Classifier:
    """A copy of the backbone, trained on the samples `numbers` (N,) of `reader`, in eval mode; with an EMA, that of the weights.

    `target_nc` (N, C): bool, one of each row for cross-entropy, any number for binary cross-entropy of each class. Raises
    InputError where the loss is not finite.
    """  # fmt: skip
    contract = require_contract(loaded, reader)
    device = next(loaded.backbone.parameters()).device
    torch.manual_seed(seed)
    model = Classifier(copy.deepcopy(loaded.backbone), target_nc.shape[1]).to(device).train().requires_grad_(True)
    batch = batch_of(tuning, len(numbers))
    steps = max(1, tuning.epochs * len(numbers) // batch)
    schedule = Schedule(lr_per_256 * batch / 256, 1e-3 * lr_per_256 * batch / 256, tuning.warmup * steps, steps)
    optimizer = torch.optim.AdamW(groups(model, tuning), lr=0.0, betas=(0.9, 0.999), fused=True)
    drop = DropPath(model.backbone, tuning.drop_path)
    average = copy.deepcopy(model) if tuning.ema else None
    order = SampleOrder([len(numbers)], seed=seed)
    target = torch.from_numpy(target_nc.astype(np.float32)).to(device)
    single = bool((target_nc.sum(axis=1) == 1).all())
    views = Augment(crop=(_SMALLEST_CROP, 1.0), flip="both", quarter_turns=loaded.size[0] == loaded.size[1])
    drawn = [order.at(step * batch, batch) for step in range(steps)]
    ahead = decoded_ahead(reader, ((numbers[rows], visits) for rows, visits in drawn))
    with drop, tqdm(total=steps, desc=f"fine-tuning, seed {seed}", unit="step", disable=not progress) as bar:
        for step, ((rows, _), stored) in enumerate(zip(drawn, ahead, strict=True)):
            chips = stored.to(device)
            draw = Draw(seed, chips.id, chips.visit)
            seen = augment.view(views, draw, chips.stored[contract.modality].size)
            made = prepare(chips, {contract.modality: contract}, loaded.size, seen)
            images, wanted_bc = mixed(made.images[contract.modality], target[torch.from_numpy(rows).to(device)], tuning, draw)
            drop.draw(draw)
            with autocast(precision, device):
                logits_bc = model(images, known(loaded, made, contract.modality, told=False)).float()
            loss = _loss(logits_bc, wanted_bc, tuning.smoothing, single)
            loss = (loss * made.weight).sum() / made.weight.sum().clamp_min(1)
            loss.backward()
            if not torch.isfinite(loss):
                raise InputError(
                    f"fine-tuning diverged at step {step + 1} with lr {lr_per_256:g}; a lower --lr would be next to try"
                )
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr(step + 1) * group["scale"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if average is not None:
                _follow(average, model, min(tuning.ema, (1 + step) / (10 + step)))
            bar.update(1)
    return (average or model).eval().requires_grad_(False)


def batch_of(tuning: Tuning, count: int) -> int:
    """Samples per step, of `count` in all."""
    return min(tuning.batch, max(1, count // 4))


def _loss(logits_bc: Tensor, wanted_bc: Tensor, smoothing: float, single: bool) -> Tensor:
    """(B,)."""
    if not single:
        return F.binary_cross_entropy_with_logits(logits_bc, wanted_bc, reduction="none").mean(dim=1)
    wanted_bc = wanted_bc * (1 - smoothing) + smoothing / wanted_bc.shape[1]
    return -(wanted_bc * logits_bc.log_softmax(dim=1)).sum(dim=1)


def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        for ours, theirs in zip(average.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)


def predict(
    model: Classifier, loaded: Loaded, reader: ShardReader, numbers: np.ndarray, precision: Precision, *, progress: bool = True
) -> np.ndarray:
    """(N, C) float32 logits of the samples `numbers`."""
    contract = require_contract(loaded, reader)
    device = next(model.parameters()).device

    def logits(made: Batch) -> Tensor:
        return model(made.images[contract.modality], known(loaded, made, contract.modality, told=False))

    with autocast(precision, device):
        return over(reader, numbers, contract, loaded.size, device, logits, progress=progress)


# --- what is published of it ---


def groups(model: Classifier, tuning: Tuning) -> list[dict[str, Any]]:
    """Parameter groups: what comes before the first block is layer 0, block i layer i + 1, what lies between two blocks goes with
    the first of them, and what comes after the last, with the head, is on top. Vectors do not decay."""
    blocks = {id(p): n + 1 for n, block in enumerate(blocks_of(model.backbone)) for p in block.parameters()}
    top = len(blocks_of(model.backbone)) + 1
    inside = list(model.backbone.parameters())
    last = max((place for place, p in enumerate(inside) if id(p) in blocks), default=-1)
    layer, found = 0, []
    for place, p in enumerate(inside):
        layer = top if place > last else blocks.get(id(p), layer)
        found.append((p, layer))
    found += [(p, top) for part in (model.norm, model.head) for p in part.parameters()]
    made: dict[tuple[int, bool], dict[str, Any]] = {}
    for p, number in found:
        decays = p.ndim > 1
        group = made.setdefault((number, decays), {
            "params": [], "weight_decay": tuning.weight_decay if decays else 0.0, "scale": tuning.layer_decay ** (top - number),
        })  # fmt: skip
        group["params"].append(p)
    return list(made.values())


def blocks_of(backbone: Backbone) -> list[Recomputed]:
    return [module for module in backbone.modules() if isinstance(module, Recomputed)]


class DropPath:
    """Stochastic depth (Huang et al. 2016): a sample goes past whole blocks, past the last with probability `rate`, past earlier
    ones with less. Of blocks that keep the shape of what enters them; undone at the end of the `with`."""

    def __init__(self, backbone: Backbone, rate: float) -> None:
        self.blocks = blocks_of(backbone) if rate else []
        last = max(1, len(self.blocks) - 1)
        self.rates = [rate * number / last for number in range(len(self.blocks))]
        self.kept: Tensor | None = None

    def draw(self, draw: Draw) -> None:
        """Decide for the next batch."""
        if self.blocks:
            uniform = draw.uniform("drop_path", len(self.blocks))
            self.kept = uniform >= torch.tensor(self.rates, device=uniform.device)

    def __enter__(self) -> "DropPath":
        self.hooks = [block.register_forward_hook(self._hook(number)) for number, block in enumerate(self.blocks)]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _hook(self, number: int) -> Callable[..., Tensor | None]:
        def hook(block: nn.Module, given: tuple[Any, ...], made: Any) -> Tensor | None:
            x: Any = given[0] if given else None
            if self.kept is None or not isinstance(x, Tensor) or not isinstance(made, Tensor) or x.shape != made.shape:
                return None
            if len(x) != len(self.kept):
                return None
            share = self.kept[:, number].to(made.dtype) / (1 - self.rates[number])
            return x + share.view(-1, *[1] * (x.ndim - 1)) * (made - x)

        return hook


def mixed(images_bchw: Tensor, target_bc: Tensor, tuning: Tuning, draw: Draw) -> tuple[Tensor, Tensor]:
    """Each image with that at its mirrored place in the batch: their sum (mixup, Zhang et al. 2018) or a box of the other one
    (CutMix, Yun et al. 2019), and targets in the same shares. Drawn for each sample."""
    if not tuning.mixup and not tuning.cutmix:
        return images_bchw, target_bc
    u = draw.uniform("mix", 5)
    cuts_b = (u[:, 0] < 0.5) if tuning.mixup and tuning.cutmix else torch.full_like(u[:, 0], bool(tuning.cutmix)).bool()
    shares = [_beta(u[:, 1], alpha) if alpha else torch.ones_like(u[:, 1]) for alpha in (tuning.mixup, tuning.cutmix)]
    height, width = images_bchw.shape[2:]
    side_b = (1 - shares[1]).sqrt()
    edges = []  # rows and columns of the box
    for centre_b, half_b, length in ((u[:, 2], side_b / 2, height), (u[:, 3], side_b / 2, width)):
        low, high = (((centre_b + sign * half_b) * length).round().clamp(0, length)[:, None] for sign in (-1, 1))
        place = torch.arange(length, device=u.device)
        edges.append((place >= low) & (place < high))
    box_b1hw = (edges[0][:, :, None] & edges[1][:, None, :])[:, None]
    left_b = torch.where(cuts_b, 1 - box_b1hw.float().mean(dim=(1, 2, 3)), shares[0])
    other_bchw = images_bchw.flip(0)
    lam = left_b[:, None, None, None]
    made = torch.where(
        cuts_b[:, None, None, None], torch.where(box_b1hw, other_bchw, images_bchw), lam * images_bchw + (1 - lam) * other_bchw
    )
    return made, left_b[:, None] * target_bc + (1 - left_b[:, None]) * target_bc.flip(0)


def _beta(uniform_b: Tensor, alpha: float) -> Tensor:
    """(B,) of a beta distribution with both parameters `alpha`."""
    made = beta.ppf(uniform_b.double().cpu().numpy() + 2.0**-25, alpha, alpha)
    return torch.from_numpy(made).to(uniform_b.device, torch.float32)
