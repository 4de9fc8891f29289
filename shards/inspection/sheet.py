"""Contact sheets: samples of one modality side by side, each with its key, label and time."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from swath.shards.bands import InputContract
from swath.shards.errors import InputError
from swath.shards.index import NO_TIME
from swath.shards.inspection.view import Picture, limits, painted, picture, view_of
from swath.shards.reader import VALID_CLOUD, VALID_NODATA, VALID_SHADOW, ShardReader

COLUMNS, ROWS, CELL, GAP = 8, 8, 128, 10  # pictures in a row and a column; pixels of their side, and between samples
HEAD, CAPTION, BETWEEN = 44, 30, 2  # pixels of the title, of a caption, and between the dates of a sample
_PAPER, _INK, _PALE, _BAD = (255, 255, 255), (25, 25, 25), (110, 110, 110), (200, 40, 40)
_MARKS = {"black: nodata": {VALID_NODATA}, "dimmed: cloud, shadow": {VALID_CLOUD, VALID_SHADOW}}
_AGE = 3e11  # seconds, 9,500 years: what is beyond was no date
_LONGEST = 200  # characters of a text that are looked at


@dataclass
class Sheet:
    """The picture, and a line on each sample that could not be read."""

    image: Image.Image
    damaged: list[str] = field(default_factory=list)


def capacity(contract: InputContract) -> int:
    """Samples that a sheet holds."""
    return max(1, COLUMNS // contract.dates) * ROWS


def contact_sheet(reader: ShardReader, modality: str, numbers: list[int], title: str) -> Sheet:
    """The samples `numbers`; a series shows its dates side by side, at most as many as fit, spread evenly.

    All are stretched together between the 2nd and 98th percentile of their clear pixels, 8-bit photographs not at all. Clouds
    and shadows are dimmed, nodata is black. What cannot be read leaves a frame, and a line in `damaged`.
    """
    contract = reader.contracts[modality]
    view = view_of(contract)
    dates = np.unique(np.linspace(0, contract.dates - 1, min(contract.dates, COLUMNS)).round().astype(int)).tolist()
    damaged, cells = [], []
    for number in numbers:
        try:
            cells.append(_pictures(reader, number, contract, dates))
        except InputError as error:
            cells.append([])
            damaged.append(str(error))
    low, high = limits([one for cell in cells for one in cell], view)
    across = min(max(1, COLUMNS // len(dates)), len(numbers))
    wide, tall = len(dates) * (CELL + BETWEEN) - BETWEEN, CELL + CAPTION
    width = max(GAP + across * (wide + GAP), GAP + 4 * (CELL + GAP))
    sheet = Image.new("RGB", (width, HEAD + -(-len(numbers) // across) * (tall + GAP)), _PAPER)
    pen = _Pen(sheet)
    pen.write((GAP, GAP - 2), title, sheet.width - 2 * GAP, _INK, 14)
    span = "" if view.kind in ("as stored", "classes") else " · dark to bright " + ", ".join(
        f"{a:.5g} to {b:.5g}" for a, b in zip(low, high, strict=True)
    )  # fmt: skip
    unit = "dB" if contract.unit == "linear power" else contract.unit
    codes = {int(code) for cell in cells for one in cell for code in np.unique(one.codes)}
    marks = "".join(f" · {words}" for words, known in _MARKS.items() if codes & known)
    pen.write((GAP, GAP + 16), f"{view.words}{span} ({unit}){marks}", sheet.width - 2 * GAP, _PALE)
    for place, (number, cell) in enumerate(zip(numbers, cells, strict=True)):
        left, top = GAP + place % across * (wide + GAP), HEAD + place // across * (tall + GAP)
        for shown, one in enumerate(cell):
            image = _fitted(painted(one, low, high, view), smooth=view.kind != "classes")
            corner = left + shown * (CELL + BETWEEN) + (CELL - image.width) // 2, top + (CELL - image.height) // 2
            sheet.paste(image, corner)
        if not cell:
            pen.draw.rectangle((left, top, left + wide - 1, top + CELL - 1), outline=_BAD)
            pen.write((left + GAP, top + GAP), "cannot be read", wide - 2 * GAP, _BAD)
        label, times = _told(reader, number, contract, dates)
        lines = [reader.index.key(number), *([" · ".join(t for t in (label, *times) if t)] if len(dates) == 1 else [])]
        if len(dates) > 1:
            lines[0] += f" · {label}" if label else ""
            for shown, time in enumerate(times):
                pen.write((left + shown * (CELL + BETWEEN), top + CELL + 15), time, CELL, _PALE)
        for row, line in enumerate(lines):
            pen.write((left, top + CELL + 2 + 13 * row), line, wide, _PALE if row else _INK)
    return Sheet(sheet, damaged)


class _Pen:
    """Writes texts that are shortened in their middle until they fit."""

    def __init__(self, image: Image.Image) -> None:
        self.draw = ImageDraw.Draw(image)

    def write(self, place: tuple[int, int], text: str, width: int, colour: tuple[int, int, int], size: int = 11) -> None:
        font = ImageFont.load_default(size)
        text = "".join(c if c.isprintable() else "?" for c in text[:_LONGEST])
        keep = len(text)
        shown = text
        while keep > 4 and self.draw.textlength(shown, font) > width:
            keep -= 1
            shown = f"{text[: keep // 2]}…{text[len(text) - keep + keep // 2 :]}"
        self.draw.text(place, shown, colour, font)


def _pictures(reader: ShardReader, number: int, contract: InputContract, dates: list[int]) -> list[Picture]:
    """The shown dates of one sample, thinned to what a cell can show. Raises InputError where it is damaged."""
    name, bands = contract.modality, len(contract.bands)
    stored, codes = reader.pixels(number, name), reader.valid(number, name)
    masks = contract.dates if codes is None else len(codes)
    size = stored.shape[1:]
    if (
        len(stored) != contract.channels
        or 0 in size
        or masks != contract.dates
        or (codes is not None and codes.shape[1:] != size)
    ):
        mask = "" if codes is None else f" with a mask {codes.shape}"
        what = f"{name} of shape {stored.shape}{mask}, not {contract.channels} channels"
        raise InputError(f"sample {reader.index.key(number)} is damaged: {what}")
    step = max(1, max(size) // (2 * CELL))
    row = reader.index.members[number, reader.index.columns.index(name)]
    view = view_of(contract)
    return [
        picture(
            stored[date * bands : (date + 1) * bands, ::step, ::step], None if codes is None else codes[date, ::step, ::step],
            float(row["scale"]), float(row["add"]), contract, view,
        )
        for date in dates
    ]  # fmt: skip


def _fitted(pixels_hwc: np.ndarray, *, smooth: bool) -> Image.Image:
    """As large as fits into a cell. Few pixels stay squares, since a blurred chip looks like a bad one."""
    image = Image.fromarray(pixels_hwc)
    scale = CELL / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    how = Image.Resampling.NEAREST if not smooth or scale >= 2 else Image.Resampling.BILINEAR
    return image.resize(size, how)


def _told(reader: ShardReader, number: int, contract: InputContract, dates: list[int]) -> tuple[str, list[str]]:
    """Label or labels of a sample, and the day of each shown date ("" where unknown)."""
    meta = sample_json(reader, number)
    label = int(reader.labels[number])
    several = meta.get("labels")
    words = ", ".join(str(one) for one in several) if isinstance(several, list) else ""
    if 0 <= label < len(reader.manifest.classes):
        words = reader.manifest.classes[label]
    times = meta.get("times")
    listed = times.get(contract.modality) if isinstance(times, dict) else None
    if isinstance(listed, list) and len(listed) == contract.dates:
        return words, [str(listed[date])[:10] if listed[date] else "" for date in dates]
    time = int(reader.index.samples[number]["time"])
    return words, [] if time == NO_TIME else [day(time)]


def sample_json(reader: ShardReader, number: int) -> dict[str, Any]:
    """The sample's JSON; nothing where it has none or it cannot be read."""
    try:
        meta = reader.meta(number) if reader.has(number, "json") else {}
    except (InputError, ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def day(time: float) -> str:
    """YYYY-MM-DD of UTC seconds since 1970."""
    return str(np.datetime64(int(np.clip(time, -_AGE, _AGE)), "s"))[:10]
