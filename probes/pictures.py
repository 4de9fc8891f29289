"""What a person wants to see of a probe: its confusions, what the backbone finds alike, what its patches are sorted by."""

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from swath.pretrain.precision import autocast
from swath.probes.features import Features, known, require_contract
from swath.probes.knn import neighbours
from swath.probes.task import Bench
from swath.shards.inspection.view import limits, painted, picture, view_of
from swath.shards.prepare import prepare
from swath.shards.reader import ShardReader

SAMPLES, NEAREST, SIDE, GAP = 6, 5, 96, 4
_RIGHT, _WRONG, _PLAIN = (30, 140, 60), (200, 40, 40), (90, 100, 110)


def of(bench: Bench, parts: dict[str, Features], details: dict[str, Any]) -> dict[str, Image.Image]:
    """By file name without its ending: "confusion" where there is one, "neighbours", and "pca" where the backbone has maps."""
    made = {"neighbours": nearest(bench, parts["train"], parts["test"])}
    if "confusion" in details:
        made["confusion"] = confusion(np.array(details["confusion"]), details["classes"])
    if (shown := pca(bench, parts["test"])) is not None:
        made["pca"] = shown
    return made


def confusion(counts_cc: np.ndarray, classes: Sequence[str]) -> Image.Image:
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


def nearest(bench: Bench, train: Features, test: Features) -> Image.Image:
    """A row for each of a few test samples: itself, and the training samples most like it, framed by whether the class is its."""
    rows = spread(len(test.x))
    asked = replace(test, x=test.x[rows], label=test.label[rows], block=test.block[rows], id=test.id[rows])
    near_mk, _ = neighbours(train, asked, NEAREST)
    modality = require_contract(bench.loaded, bench.readers["train"]).modality
    columns = 1 + near_mk.shape[1]
    cell = SIDE + 2 * GAP
    sheet = Image.new("RGB", (columns * cell, len(rows) * (cell + 12)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, found in enumerate(near_mk):
        cells = [("test", asked, row), *(("train", train, int(number)) for number in found)]
        for column, (part, features, number) in enumerate(cells):
            left, top = column * cell, row * (cell + 12)
            label = int(features.label[number])
            colour = _PLAIN
            if column and label >= 0:
                colour = _RIGHT if label == asked.label[row] else _WRONG
            draw.rectangle((left, top, left + cell - 2, top + cell - 2), fill=colour)
            reader = bench.readers[part]
            sheet.paste(chip(reader, modality, number_of(reader, int(features.id[number]))), (left + GAP - 1, top + GAP - 1))
            if label >= 0:
                draw.text((left + 2, top + cell - 2), features.classes[label][:16], fill=colour)
    return sheet


def pca(bench: Bench, test: Features) -> Image.Image | None:
    """Chips above, and below them the three directions in which patch features of all of them vary most, as red, green, blue."""
    loaded, reader = bench.loaded, bench.readers["test"]
    contract = require_contract(loaded, reader)
    numbers = np.array([number_of(reader, int(one)) for one in test.id[spread(len(test.x))]])
    device = next(loaded.backbone.parameters()).device
    made = prepare(reader.chips(numbers).to(device), {contract.modality: contract}, loaded.size)
    with torch.inference_mode(), autocast(bench.precision, device):
        maps = loaded.backbone(made.images[contract.modality], known(loaded, made, contract.modality, bench.context)).maps
    if not maps:
        return None
    map_bdhw = maps[max(maps)].float().cpu()
    x_nd = map_bdhw.permute(0, 2, 3, 1).flatten(0, 2).double()
    x_nd = x_nd - x_nd.mean(dim=0)
    _, vectors_dk = torch.linalg.eigh(x_nd.T @ x_nd)
    vectors_dk = vectors_dk.flip(1)[:, :3]
    vectors_dk = vectors_dk * vectors_dk.gather(0, vectors_dk.abs().argmax(dim=0, keepdim=True)).sign()
    colour_nk = F.pad(x_nd @ vectors_dk, (0, 3 - vectors_dk.shape[1]))
    low, high = torch.quantile(colour_nk, torch.tensor([0.02, 0.98]).double(), dim=0)
    colour_nk = ((colour_nk - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    shown = (colour_nk.view(*map_bdhw[:, 0].shape, 3) * 255).byte().numpy()
    cell = SIDE + GAP
    sheet = Image.new("RGB", (len(numbers) * cell, 2 * cell), "white")
    for column, (number, colours) in enumerate(zip(numbers, shown, strict=True)):
        sheet.paste(chip(reader, contract.modality, int(number)), (column * cell, 0))
        sheet.paste(Image.fromarray(colours).resize((SIDE, SIDE), Image.Resampling.NEAREST), (column * cell, cell))
    return sheet


def spread(count: int) -> np.ndarray:
    """A few rows of `count`, evenly over them."""
    return np.unique(np.linspace(0, count - 1, min(count, SAMPLES)).astype(np.int64))


def number_of(reader: ShardReader, identity: int) -> int:
    """The sample of this id."""
    return int(np.flatnonzero(reader.index.samples["id"] == identity)[0])


def chip(reader: ShardReader, modality: str, number: int) -> Image.Image:
    """The first date of a sample in its colours, SIDE × SIDE pixels; grey where it lacks the modality."""
    contract = reader.contracts[modality]
    if not reader.has(number, modality):
        return Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
    member = reader.index.members[number, reader.index.columns.index(modality)]
    codes = reader.valid(number, modality)
    view = view_of(contract)
    stored_chw = reader.pixels(number, modality)[: len(contract.bands)]
    scale, add = float(member["scale"]), float(member["add"])
    one = picture(stored_chw, None if codes is None else codes[0], scale, add, contract, view)
    return Image.fromarray(painted(one, *limits([one], view), view)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
