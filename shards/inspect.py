"""`swath inspect`: what a folder of shards holds, as text and as a contact sheet."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from swath.shards.bands import InputContract
from swath.shards.files import disk_errors, write_bytes
from swath.shards.reader import VALID_CLEAR, ShardReader

SIDE, CELL = 8, 96  # samples per row and column, pixels per sample
DIMMED = 0.35  # brightness of what is not clear


@dataclass(frozen=True)
class Report:
    """`text` for the terminal; `sheet` is where the picture was written."""

    text: str
    sheet: Path

    def __str__(self) -> str:
        return self.text


def inspect(folder: Path, sheet: Path | None = None) -> Report:
    """Describe `folder`, and write 8×8 of its samples to `sheet` (by default contact_sheet.png inside it)."""
    reader = ShardReader(folder)
    manifest = reader.manifest
    lines = [f"{manifest.dataset}: {manifest.samples} samples"]
    for contract in reader.contracts.values():
        lines += _modality(contract, sum(reader.has(n, contract.modality) for n in range(len(reader))))
    counts = np.bincount(reader.labels + 1, minlength=len(manifest.classes) + 1)
    lines += [f"class {name}: {count}" for name, count in zip(("(none)", *manifest.classes), counts, strict=False) if count]
    lines += [f"{s.name}: {s.samples} samples, {s.bytes} bytes" for s in manifest.shards]
    lines.append(f"{sum(s.bytes for s in manifest.shards)} bytes in {len(manifest.shards)} shards")
    lines.append(f"{len(manifest.skipped)} could not be decoded")
    lines += [f"  {key}: {reason}" for key, reason in manifest.skipped[:10]]
    place = sheet or folder / "contact_sheet.png"
    with disk_errors("writing the contact sheet", place.parent):
        picture = io.BytesIO()
        _sheet(reader).save(picture, "PNG")
        write_bytes(place, picture.getvalue())
    return Report("\n".join(lines), place)


def _modality(contract: InputContract, samples: int) -> list[str]:
    """A modality's head line and its table of bands."""
    size = f"{contract.height}×{contract.width}" if contract.height else "of several sizes"
    dates = f", {contract.dates} dates" if contract.dates > 1 else ""
    lines = [
        f"{contract.modality}: in {samples} samples {size}{dates}, {contract.sensor} {contract.level}, {contract.unit}, "
        f"stored as {contract.dtype}, nodata {contract.nodata}",
        f"{'band':<12}{'nm':>9}{'gsd m':>9}{'mean':>12}{'std':>12}{'min':>12}{'max':>12}",
    ]
    norm = contract.normalisation
    for row, band in enumerate(contract.bands):
        known = "".join("        –" if v is None else f"{v:9g}" for v in (band.wavelength_nm, band.gsd_m))
        values = (norm.mean, norm.std, norm.minimum, norm.maximum)
        lines.append(f"{band.name:<12}{known}" + "".join(f"{v[row]:12.5g}" if v else f"{'–':>12}" for v in values))
    return lines


def _sheet(reader: ShardReader) -> Image.Image:
    """Samples spread evenly over the folder, stretched together between the 2nd and 98th percentile of their clear pixels.

    Pixels that are not clear (nodata, clouds, shadows) are dimmed.
    """
    contract = next(iter(reader.contracts.values()))
    having = np.flatnonzero([reader.has(number, contract.modality) for number in range(len(reader))])
    numbers = having[np.unique(np.linspace(0, len(having) - 1, SIDE * SIDE).round().astype(int))]
    chips = [_chip(reader, int(number), contract) for number in numbers]
    flat = np.concatenate([values[:, clear] for values, clear in chips], axis=1)
    if not flat.shape[1]:
        flat = np.array([[0.0, 1.0]] * 3)
    low, high = np.percentile(flat, (2, 98), axis=1)[..., None, None]
    columns = min(len(numbers), SIDE)
    sheet = Image.new("RGB", (columns * CELL, -(-len(numbers) // columns) * CELL))
    for place, (values, clear) in enumerate(chips):
        shown = np.nan_to_num(np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1)) * np.where(clear, 1, DIMMED)
        image = Image.fromarray((255 * np.moveaxis(shown, 0, 2)).astype(np.uint8)).resize((CELL, CELL), Image.Resampling.BILINEAR)
        sheet.paste(image, (place % columns * CELL, place // columns * CELL))
    return sheet


def _chip(reader: ShardReader, number: int, contract: InputContract) -> tuple[np.ndarray, np.ndarray]:
    """(3, H, W) physical values of the first date, and (H, W) where they are clear."""
    row = reader.index.members[number, reader.index.columns.index(contract.modality)]
    stored = reader.pixels(number, contract.modality)[_picture_bands(contract)]
    values = stored.astype(np.float64) * float(row["scale"]) + float(row["add"])
    clear = np.ones(values.shape[1:], bool)
    clear &= np.isfinite(values).all(axis=0)
    if (codes := reader.valid(number, contract.modality)) is not None:
        clear &= codes[0] == VALID_CLEAR
    return values, clear


def _picture_bands(contract: InputContract) -> list[int]:
    """Red, green, blue by common name; else the first bands, the last one repeated where there are fewer."""
    common = [band.common_name for band in contract.bands]
    if all(colour in common for colour in ("red", "green", "blue")):
        return [common.index(colour) for colour in ("red", "green", "blue")]
    return [min(n, len(common) - 1) for n in range(3)]
