"""Hyperspectral scenes as pixel-wise protocols want them: put together from chips, split by blocks, seen through patches.

Letters: c band, h w pixels of the scene, n pixels that are looked at, s share or class.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swath.backbones.base import Backbone, Context
from swath.hub.load import Loaded
from swath.pretrain.precision import Precision, autocast
from swath.probes.features import kept, key_of
from swath.probes.maps import contract_of
from swath.probes.task import Bench
from swath.shards.draw import hashes
from swath.shards.errors import InputError
from swath.shards.manifest import LabelMap
from swath.shards.prepare import prepare
from swath.shards.reader import ShardReader
from swath.shards.sources.cube import MAX_PIXELS

BLOCK, TRAIN, TEST = 16, 50, 20  # px; least labelled pixels of every class in a split that counts
_BATCH = 256  # patches
_ATTEMPTS = 200  # random halves that are tried for each split


@dataclass
class Scene:
    """`pixels` (C, H, W) float32 normalised by the backbone, 0 where there is none; `labels` (H, W) int64 class numbers, -1 where
    unknown, or `shares` (S, H, W) float32, nan where unknown; gsd_m nan where unknown."""

    pixels: Tensor
    labels: np.ndarray
    shares: np.ndarray | None
    classes: tuple[str, ...]
    gsd_m: float


@dataclass
class Split:
    """Pixels of a scene as (H, W) bool: those of train blocks, and those of test blocks outside the guard."""

    train: np.ndarray
    test: np.ndarray


def read_scene(loaded: Loaded, reader: ShardReader) -> Scene:
    """The one scene that the chips of `reader` were cut from, as far as they cover it.

    Chips know their window and the file they come from. InputError for several scenes, and for chips that know no window, or
    have no map of labels or of shares.
    """
    contract, dataset = contract_of(loaded, reader), reader.manifest.dataset
    modality = contract.modality
    name = next((n for n, m in reader.manifest.maps.items() if m.shares), next(iter(reader.manifest.maps), None))
    if name is None:
        raise InputError(
            f"data set {dataset} has no label map; make its shards again from a scene with one (docs/dense-probes.md)"
        )
    found = reader.manifest.maps[name]
    metas = [reader.meta(n) for n in range(len(reader))]
    windows = [_window(meta.get("window"), dataset) for meta in metas]
    scenes = sorted({re.sub(r"/y\d+_x\d+$", "", str(meta.get("source"))) for meta in metas})
    if len(scenes) > 1:
        raise InputError(f"data set {dataset} is of {len(scenes)} scenes; a pixel probe takes one (such as of recipe salinas_a)")
    height, width = (max(w[axis] + w[axis + 2] for w in windows) for axis in (0, 1))
    if height * width > MAX_PIXELS or height * width > 64 * sum(w[2] * w[3] for w in windows):
        raise InputError(f"the windows of {dataset} span {height}×{width} pixels, and cover hardly any of them")
    pixels = torch.zeros(len(contract.bands), height, width)
    labels = np.full((height, width), -1, dtype=np.int64)
    shares = np.full((len(found.shares), height, width), np.nan, dtype=np.float32) if found.shares else None
    codes = {code: number for number, code in enumerate(sorted(found.classes))}
    for number, (top, left, high, wide) in enumerate(windows):
        if not reader.has(number, modality):
            continue
        place = (slice(top, top + high), slice(left, left + wide))
        chips = reader.chips([number])
        pixels[:, *place] = prepare(chips, {modality: contract}, (high, wide)).images[modality][0]
        told = reader.label_map(number, name)
        if told is None or told.shape != (max(1, len(found.shares)), high, wide):
            raise InputError(f"sample {reader.index.key(number)}: its map {name} is not of its chip's size")
        if shares is not None:
            shares[:, *place] = told
        else:
            _paint(labels[place], told[0], codes)
    gsd_m = next((float(m["gsd_m"]) for m in metas if isinstance(m.get("gsd_m"), int | float)), float("nan"))
    return Scene(pixels, labels, shares, _names(found), gsd_m)


def _window(told: object, dataset: str) -> tuple[int, int, int, int]:
    if not isinstance(told, list) or len(told) != 4 or not all(isinstance(n, int) and 0 <= n < 1 << 24 for n in told):
        raise InputError(
            f"samples of {dataset} do not say which window of a scene they are; shards of a scene do (docs/dense-probes.md)"
        )
    return told[0], told[1], told[2], told[3]


def _paint(labels_hw: np.ndarray, codes_hw: np.ndarray, numbers: dict[int, int]) -> None:
    for code, number in numbers.items():
        labels_hw[codes_hw == code] = number


def _names(found: LabelMap) -> tuple[str, ...]:
    return found.shares or tuple(name for _, name in sorted(found.classes.items()))


def splits(labels_hw: np.ndarray, guard: int, count: int, seed: int, *, first: int = 0) -> list[Split]:
    """Splits number `first` to `first + count - 1` of the scene into blocks of 16 × 16 px, half of them for train.

    A pixel of test is further than `guard` pixels, along either axis, from all train blocks. A split counts only with at least
    50 train and 20 test pixels of every class that the scene has; the next random half is taken instead. Raises InputError where
    hardly any half counts.
    """
    height, width = labels_hw.shape
    block_hw = (np.arange(height) // BLOCK)[:, None] * -(-width // BLOCK) + np.arange(width) // BLOCK
    blocks = int(block_hw.max()) + 1
    classes = np.unique(labels_hw[labels_hw >= 0])
    made: list[Split] = []
    attempt = 0
    while attempt < _ATTEMPTS * (1 + len(made)):
        order = np.argsort(hashes(seed, "pixel blocks", attempt * blocks, blocks).numpy(), kind="stable")
        attempt += 1
        train_hw = np.isin(block_hw, order[: blocks // 2])
        split = Split(train_hw, ~_within(train_hw, guard))
        if all(
            (labels_hw[split.train] == k).sum() >= TRAIN and (labels_hw[split.test] == k).sum() >= TEST for k in classes
        ):  # fmt: skip
            made.append(split)
            if len(made) == first + count:
                return made[first:]
    raise InputError(
        f"of {attempt} random halves of the scene's blocks of {BLOCK} px, {len(made)} leave {TRAIN} train "
        f"and {TEST} test pixels of each of {len(classes)} classes with a guard of {guard} px; a smaller --size has a smaller one"
    )


def _within(mask_hw: np.ndarray, reach: int) -> np.ndarray:
    """Where a pixel of `mask` is at most `reach` rows and columns away."""
    given = torch.from_numpy(mask_hw)[None, None].float()
    side = 2 * reach + 1
    near = F.max_pool2d(F.max_pool2d(given, (side, 1), 1, (reach, 0)), (1, side), 1, (0, reach))
    return near[0, 0].numpy() > 0


def patches(scene: Scene, rows: np.ndarray, columns: np.ndarray, size: tuple[int, int]) -> Callable[[slice], Tensor]:
    """A function of a slice of the pixels → (n, C, *size) patches around them, mirrored at the scene's edges. Pixel (h // 2,
    w // 2) of a patch is the one that it is of. Raises InputError for a scene that is smaller than half a patch."""
    half = (size[0] // 2, size[1] // 2)
    if half[0] >= scene.pixels.shape[1] or half[1] >= scene.pixels.shape[2]:
        raise InputError(
            f"patches of {size[0]}×{size[1]} px are too large for a scene of {tuple(scene.pixels.shape[1:])}; give --size"
        )
    wide = F.pad(scene.pixels[None], (half[1], half[1], half[0], half[0]), mode="reflect")[0]
    windows = wide.unfold(1, size[0], 1).unfold(2, size[1], 1)
    return lambda some: windows[:, rows[some], columns[some]].transpose(0, 1)


class Pooled(nn.Module):
    """Images of one scene → their pooled features as maps of one place, (B, D, 1, 1)."""

    wavelength_nm: Tensor

    def __init__(self, backbone: Backbone, wavelength_nm: Sequence[float | None], gsd_m: float) -> None:
        super().__init__()
        self.backbone, self.gsd_m = backbone, gsd_m
        known = torch.tensor([float("nan") if w is None else w for w in wavelength_nm], dtype=torch.float64)
        self.register_buffer("wavelength_nm", known)

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        (images_bchw,) = inputs
        gsd_m = torch.full((len(images_bchw),), self.gsd_m, dtype=torch.float64, device=images_bchw.device)
        unknown = torch.full_like(gsd_m, float("nan"))
        context = Context(self.wavelength_nm, gsd_m, unknown, unknown, unknown, torch.zeros_like(gsd_m).float())
        return [self.backbone(images_bchw, context).pooled[:, :, None, None]]


def pooled(loaded: Loaded, backbone: Backbone, scene: Scene, wavelength_nm: Sequence[float | None]) -> Pooled:
    return Pooled(backbone, wavelength_nm, scene.gsd_m).to(next(loaded.backbone.parameters()).device)


def features(of: Pooled, patch: Callable[[slice], Tensor], count: int, precision: Precision = "fp32") -> np.ndarray:
    """(count, D) float32 of the patches of pixels, computed in `precision`. InputError where they are not finite."""
    made = []
    with torch.inference_mode(), autocast(precision, of.wavelength_nm.device):
        for first in range(0, count, _BATCH):
            images = patch(slice(first, first + _BATCH)).contiguous().to(of.wavelength_nm.device)
            made.append(of([images])[0][:, :, 0, 0].float().cpu().numpy())
    found = np.concatenate(made)
    if not np.isfinite(found).all():
        raise InputError("the backbone gives features that are not finite; its run has diverged")
    return found


def features_of(bench: Bench, part: str, backbone: Backbone, scene: Scene, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """As `features`, of the patches around pixels of the scene that a part of the bench is; computed once, see `kept`."""
    loaded, reader = replace(bench.loaded, backbone=backbone), bench.readers[part]
    wavelengths = [band.wavelength_nm for band in contract_of(loaded, reader).bands]
    asked = hashlib.sha256(np.stack([rows, columns]).astype(np.int64).tobytes()).hexdigest()
    patch = patches(scene, rows, columns, loaded.size)
    return kept(
        bench,
        key_of(loaded, reader, np.arange(len(reader)), bench, "pixels", asked),
        (len(rows), backbone.pooled_width),
        lambda: features(pooled(loaded, backbone, scene, wavelengths), patch, len(rows), bench.precision),
    )


def patch_statistics(patch: Callable[[slice], Tensor], count: int) -> np.ndarray:
    """(count, 2·C) float32: mean and standard deviation of each band over a patch."""
    made = []
    for first in range(0, count, _BATCH):
        std, mean = torch.std_mean(patch(slice(first, first + _BATCH)), dim=(2, 3), correction=0)
        made.append(torch.cat([mean, std], dim=1).numpy())
    return np.concatenate(made)
