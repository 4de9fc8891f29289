"""Pictures of dense probes: samples beside their labels and what was predicted."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw

from swath.pretrain.pictures import display_bands
from swath.probes.confusion import IGNORE
from swath.shards.bands import InputContract

_SIDE, _GAP = 160, 4  # px of a tile, between tiles
_OPACITY = 0.6  # of classes over an image


def overlays(
    contract: InputContract,
    columns: Sequence[np.ndarray],
    classes: Mapping[str, np.ndarray],
    names: Sequence[str],
    samples: int = 6,
) -> Image.Image:
    """A row for each of the first samples: the images of `columns` (N, C, h, w), normalised, in their colours, then each of
    `classes`, class numbers (N, h, w), laid over the last image, which shows through where they are IGNORE. Below, what the
    columns are and which colour is which of `names`."""
    pick, rows = display_bands(contract.bands), []
    for number in range(min(samples, len(columns[0]))):
        shown = [_stretched(images[number][pick]) for images in columns]
        rows.append(shown + [_over(shown[-1], numbers[number]) for numbers in classes.values()])
    titles = [f"date {n + 1}" if len(columns) > 1 else "image" for n in range(len(columns))] + list(classes)
    return _with_legend(picture(rows), titles, names)


def _over(image_hw3: np.ndarray, numbers_hw: np.ndarray) -> np.ndarray:
    mixed = image_hw3 * (1 - _OPACITY) + coloured(numbers_hw) * _OPACITY
    return np.where((numbers_hw == IGNORE)[..., None], image_hw3, mixed).astype(np.uint8)


def _with_legend(sheet: Image.Image, titles: Sequence[str], names: Sequence[str]) -> Image.Image:
    line, wide = 14, sheet.width // 2
    made = Image.new("RGB", (sheet.width, sheet.height + line * (2 + (len(names) + 1) // 2)), "white")
    made.paste(sheet, (0, 0))
    draw = ImageDraw.Draw(made)
    for column, title in enumerate(titles):
        draw.text((column * (_SIDE + _GAP) + 2, sheet.height + 1), title, fill="black")
    for number, name in enumerate(names):
        left, top = number % 2 * wide + 2, sheet.height + line * (1 + number // 2) + 4
        red, green, blue = coloured(np.array([[number]]))[0, 0].tolist()
        draw.rectangle((left, top, left + 10, top + 10), fill=(red, green, blue))
        draw.text((left + 15, top), name[: wide // 7], fill="black")
    return made


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
