"""Heads that turn feature maps into a score for every pixel, and how they are trained: the same way for every backbone.

Maps are resized by matrix products, whose gradients are the same in every run. Letters: b sample, d width, k class, h w places.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BINS = (1, 2, 3, 6)  # of the pyramid pooling
SCALES = (4.0, 2.0, 1.0, 0.5)  # of maps that all have one stride, as ViTs' are set apart (Bao et al. 2022, BEiT)
Loss = Callable[[Tensor, Tensor], Tensor]


def resize(x_bdhw: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners not aligned; to fewer places, means over them."""
    rows, columns = (_weights(old, new, x_bdhw) for old, new in zip(x_bdhw.shape[2:], size, strict=True))
    if rows is not None:
        x_bdhw = rows @ x_bdhw
    return x_bdhw if columns is None else x_bdhw @ columns.T


def _weights(old: int, new: int, like: Tensor) -> Tensor | None:
    """(new, old), rows sum to 1; None where nothing changes."""
    if old == new:
        return None
    eye = torch.eye(old)[None]
    made = F.interpolate(eye, new, mode="linear", align_corners=False) if new > old else F.adaptive_avg_pool1d(eye, new)
    return made[0].T.to(like)


class LinearHead(nn.Module):
    """One linear map for each place of every level, summed after resizing to the pixels: nothing else is learned."""

    def __init__(self, widths: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.scale = Standardise(len(widths))
        layers = [nn.Conv2d(width, outputs, 1, bias=number == 0) for number, width in enumerate(widths)]
        for layer in layers:  # starts from no opinion, so that features of any scale start alike
            nn.init.zeros_(layer.weight)
        self.each = nn.ModuleList(layers)

    def forward(self, levels: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """(B, outputs, *size)."""
        made = [resize(layer(x), size) for layer, x in zip(self.each, self.scale(levels), strict=True)]
        return torch.stack(made).sum(dim=0)


class UPerHead(nn.Module):
    """UPerNet (Xiao et al. 2018): pyramid pooling of the coarsest level, a feature pyramid over all, fused at the finest.

    Levels of one stride are first resized by SCALES. Normalisation is by groups: batches are small.
    """

    def __init__(self, widths: Sequence[int], outputs: int, channels: int = 64) -> None:
        super().__init__()
        self.scale = Standardise(len(widths))
        self.pooled = nn.ModuleList(_conv(widths[-1], channels, 1) for _ in BINS)
        self.top = _conv(widths[-1] + len(BINS) * channels, channels, 3)
        self.lateral = nn.ModuleList(_conv(width, channels, 1) for width in widths[:-1])
        self.smooth = nn.ModuleList(_conv(channels, channels, 3) for _ in widths[:-1])
        self.fuse = _conv(len(widths) * channels, channels, 3)
        self.score = nn.Conv2d(channels, outputs, 1)

    def forward(self, levels: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """(B, outputs, *size)."""
        given = self.scale(levels)
        if len({x.shape[2:] for x in given}) == 1 and len(given) == len(SCALES):
            given = [
                resize(x, (max(1, int(x.shape[2] * s)), max(1, int(x.shape[3] * s)))) for x, s in zip(given, SCALES, strict=True)
            ]
        last = given[-1]
        places = (last.shape[2], last.shape[3])
        context = [resize(layer(_pool(last, side)), places) for layer, side in zip(self.pooled, BINS, strict=True)]
        coarse = self.top(torch.cat([last, *context], dim=1))
        path = [coarse]
        for layer, x in zip(reversed(self.lateral), reversed(given[:-1]), strict=True):
            path.append(layer(x) + resize(path[-1], (x.shape[2], x.shape[3])))
        finest = (path[-1].shape[2], path[-1].shape[3])
        smoothed = [layer(x) for layer, x in zip(self.smooth, reversed(path[1:]), strict=True)]
        return resize(self.score(self.fuse(torch.cat([resize(x, finest) for x in (*smoothed, coarse)], dim=1))), size)


def _conv(given: int, made: int, side: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(given, made, side, padding=side // 2, bias=False), nn.GroupNorm(8, made), nn.GELU())


def _pool(x: Tensor, bins: int) -> Tensor:
    """Means over bins × bins parts, as many as there are places."""
    return resize(x, (min(bins, x.shape[2]), min(bins, x.shape[3])))


class Standardise(nn.Module):
    """Maps minus their mean over std, by channel, with the statistics of what `fit_to` was given; until then as they are."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.statistics: list[tuple[Tensor, Tensor] | None] = [None] * levels

    def fit_to(self, levels: Sequence[Tensor]) -> None:
        for number, x in enumerate(levels):
            std, mean = torch.std_mean(x.double(), dim=(0, 2, 3), correction=0, keepdim=True)
            self.statistics[number] = mean[0].float(), torch.where(std[0] > 0, std[0], 1.0).float()

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(levels, self.statistics, strict=True)
        return [x if known is None else (x - known[0].to(x)) / known[1].to(x) for x, known in pairs]


class FromScratch(nn.Module):
    """An encoder and a head that are trained together."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, inputs: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        return self.head(self.encoder(inputs), size)


def fit(
    model: nn.Module, inputs: Sequence[Tensor], target: Tensor, loss: Loss, *, steps: int, rate: float, seed: int,
    batch: int = 16, flip: int = 0,
) -> nn.Module:  # fmt: skip
    """Train `model(inputs, size)` on `target` (N, h, w) by AdamW (weight decay 1e-4), the rate falling by a cosine to 0.

    Batches are random permutations of the samples. Of the first `flip` inputs, and of the target, half are mirrored in each axis.
    """
    random = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    size = (target.shape[1], target.shape[2])
    waiting = torch.empty(0, dtype=torch.int64)
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of a backbone's own dropout
        for _ in range(steps):
            while len(waiting) < min(batch, len(target)):
                waiting = torch.cat([waiting, torch.randperm(len(target), generator=random)])
            rows, waiting = waiting[:batch], waiting[batch:]
            some, wanted = [x[rows] for x in inputs], target[rows]
            for axis in (-2, -1) if flip else ():
                turned = torch.rand(len(rows), generator=random) < 0.5
                mirrored = [_mirrored(x, axis, turned) for x in (*some[:flip], wanted)]
                some, wanted = [*mirrored[:flip], *some[flip:]], mirrored[-1]
            optimizer.zero_grad()
            loss(model([x.to(device) for x in some], size), wanted.to(device)).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _mirrored(x: Tensor, axis: int, turned_b: Tensor) -> Tensor:
    return torch.where(turned_b.reshape(-1, *[1] * (x.dim() - 1)), x.flip(axis), x)


def scores(
    model: nn.Module, inputs: Sequence[Tensor], size: tuple[int, int], make: Callable[[Tensor], Tensor], batch: int = 32
) -> Any:
    """`make` of the outputs (B, K, h, w) of every batch, put together, a NumPy array."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        made = [
            make(model([x[first : first + batch].to(device) for x in inputs], size)).cpu()
            for first in range(0, len(inputs[0]), batch)
        ]
    return torch.cat(made).numpy()


def seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """A module whose random weights depend on `seed` alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()
