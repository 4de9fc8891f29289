"""PNG contact sheets of what an objective sees and makes."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from swath.shards.bands import Band, InputContract
from swath.shards.files import write_bytes


def display_bands(bands: Sequence[Band]) -> list[int]:
    """Which bands to show as red, green, blue: by common name, else the first three, else the first thrice."""
    common = [band.common_name for band in bands]
    if all(colour in common for colour in ("red", "green", "blue")):
        return [common.index(colour) for colour in ("red", "green", "blue")]
    return [0, 1, 2] if len(bands) >= 3 else [0, 0, 0]


def sheet(images: dict[str, Tensor], contract: InputContract, path: Path, *, samples: int = 6, zoom_to: int = 128) -> None:
    """One row per sample, one column per image of normalised values, in their colours: back in the contract's unit, each row
    stretched between the 2 and 98 percentiles of its first image, the three bands alike."""
    pick = display_bands(contract.bands)
    mean, std = (torch.tensor(v)[pick, None, None] for v in (contract.normalisation.mean, contract.normalisation.std))
    columns = [image[:samples, pick].float().cpu() * std + mean for image in images.values()]
    first = columns[0].flatten(1)
    low, high = (torch.nanquantile(first, q, dim=1)[:, None, None, None] for q in (0.02, 0.98))
    gap, rows = 4, len(columns[0])
    scale = max(1, zoom_to // columns[0].shape[-1])
    height, width = (side * scale for side in columns[0].shape[2:])
    canvas = np.full((rows * (height + gap) - gap, len(columns) * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for number, column in enumerate(columns):
        shown = ((column - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
        shown = torch.where(column.isnan(), 0.5, shown)
        pixels = (shown * 255).byte().permute(0, 2, 3, 1).numpy().repeat(scale, axis=1).repeat(scale, axis=2)
        for row in range(rows):
            top, left = row * (height + gap), number * (width + gap)
            canvas[top : top + height, left : left + width] = pixels[row]
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, format="PNG")
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, buffer.getvalue())
