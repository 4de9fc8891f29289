"""Pictures of dense probes: samples beside their labels and what was predicted."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from PIL import Image

from swath.pretrain.pictures import display_bands
from swath.probes.confusion import IGNORE
from swath.shards.bands import InputContract

_SIDE, _GAP = 160, 4  # px of a tile, between tiles


def overlays(
    contract: InputContract, columns: Sequence[np.ndarray], classes: Sequence[np.ndarray], samples: int = 6
) -> Image.Image:
    """A row for each of the first samples: the images of `columns` (N, C, h, w), normalised, in their colours, then the class
    numbers of `classes` (N, h, w), IGNORE black."""
    pick, rows = display_bands(contract.bands), []
    for number in range(min(samples, len(columns[0]))):
        shown = [_stretched(images[number][pick]) for images in columns]
        shown += [coloured(numbers[number]) for numbers in classes]
        rows.append(shown)
    return picture(rows)


def picture(rows: Sequence[Sequence[np.ndarray]]) -> Image.Image:
    """Tiles (h, w, 3) uint8 in rows, each as many pixels wide."""
    made = []
    for tiles in rows:
        wide = [
            Image.fromarray(t).resize((_SIDE, max(1, _SIDE * t.shape[0] // t.shape[1])), Image.Resampling.NEAREST) for t in tiles
        ]
        made.append(_joined([np.asarray(tile) for tile in wide], 1))
    return Image.fromarray(_joined(made, 0))


def _joined(tiles: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Side by side (1) or below each other (0), with white between."""
    shape = list(tiles[0].shape)
    shape[axis] = _GAP
    white = np.full(shape, 255, np.uint8)
    return np.concatenate([part for tile in tiles for part in (tile, white)][:-1], axis=axis)


def _stretched(image_chw: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 between the 2nd and the 98th percentile."""
    low, high = np.percentile(image_chw, (2, 98))
    return np.moveaxis((np.clip((image_chw - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8), 0, 2)


def coloured(numbers_hw: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8: a colour for each class."""
    made = (colormaps["tab20"](numbers_hw.astype(np.int64) % 20)[..., :3] * 255).astype(np.uint8)
    made[numbers_hw == IGNORE] = 0
    return made


def grey(shares_hw: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 of numbers between 0 and 1."""
    return (np.clip(shares_hw, 0, 1) * 255).astype(np.uint8)[..., None].repeat(3, axis=2)
