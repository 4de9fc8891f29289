"""What a person wants to see of a probe."""

import io
from typing import Any

import numpy as np
from PIL import Image

from swath.probes.features import Features
from swath.probes.task import Bench


def of(bench: Bench, parts: dict[str, Features], details: dict[str, Any]) -> dict[str, Image.Image]:
    """By file name without its ending."""
    made = {}
    if "confusion" in details:
        made["confusion"] = confusion(np.array(details["confusion"]), details["classes"])
    return made


def confusion(counts_cc: np.ndarray, classes: list[str]) -> Image.Image:
    """Shares of each true class, by row, with the counts written in."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    share_cc = counts_cc / np.maximum(counts_cc.sum(axis=1, keepdims=True), 1)
    side = 2.5 + 0.45 * len(classes)
    figure, axes = pyplot.subplots(figsize=(side + 1, side))
    axes.imshow(share_cc, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=8)
    axes.set_yticks(range(len(classes)), classes, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(classes) <= 30:
        for row, column in np.argwhere(counts_cc > 0):
            colour = "white" if share_cc[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts_cc[row, column]), ha="center", va="center", fontsize=7, color=colour)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
