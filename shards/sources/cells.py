"""Parquet without a recipe: every row is a sample, every column of GeoTIFF bytes a band."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from swath.shards.bands import Band
from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.sensors import SENSORS, band
from swath.shards.sources.cube import clear
from swath.shards.sources.folder import files_below
from swath.shards.sources.parquet import Table, geotiff
from swath.shards.sources.planned import Planned, contract, fingerprint
from swath.shards.sources.source import Item, Options, Part, Sample

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(kw_only=True)
class Cells(Planned):
    root: Path
    columns: tuple[str, ...]
    options: Options
    _tables: dict[str, Table] = field(default_factory=dict)

    def read(self, item: Item) -> Sample:
        name, row = item.place
        if name not in self._tables:
            self._tables[name] = Table(self.root / name)
        ((modality, made),) = self.contracts.items()
        pixels = _stack(self._tables[name], row, self.columns)
        if (len(pixels), str(pixels.dtype)) != (len(made.bands), made.dtype):
            raise DecodeError(f"has {len(pixels)} bands of {pixels.dtype}, the first row {len(made.bands)} of {made.dtype}")
        part = Part(pixels, valid=clear(pixels, made.nodata))
        if self.options.scale is not None or self.options.add is not None:
            part.scale = 1.0 if self.options.scale is None else self.options.scale
            part.add, part.scale_source = self.options.add or 0.0, "given by whoever made the shards"
        return Sample({modality: part}, meta={"source": item.lookup})


def open_parquet(path: Path, options: Options) -> Cells:
    """A `.parquet` file or a folder of them. Bands are the columns named by --bands, else all with GeoTIFFs, in file order.

    A single column of multi-band GeoTIFFs does too. Coarser bands are repeated onto the finest grid.
    """
    root = path if path.is_dir() else path.parent
    files = files_below(path).of(".parquet") if path.is_dir() else [path]
    tables = {p: Table(p) for p in files}
    holding = {p: t for p, t in tables.items() if _tiff_columns(t)}
    if not holding:
        raise InputError(f"{path} holds no Parquet files with columns of GeoTIFF bytes")
    first = next(iter(holding.values()))
    columns = tuple(_tiff_columns(first))
    if options.bands and len(columns) > 1:
        lacking = [b for b in options.bands if b not in columns]
        if lacking:
            raise InputError(f"{first.path} has no column {', '.join(lacking)} of GeoTIFFs; it has {', '.join(columns)}")
        columns = options.bands
    pixels = None
    for row in range(min(first.rows, 16)):
        try:
            pixels = _stack(first, row, columns)
            break
        except DecodeError:
            continue
    if pixels is None:
        raise InputError(f"{first.path}: none of its first rows can be read")
    names = columns if len(columns) > 1 else options.bands or tuple(f"b{k:03d}" for k in range(1, len(pixels) + 1))
    if len(names) != len(pixels):
        raise InputError(f"{first.path} has {len(pixels)} bands, {len(names)} are named")
    known = SENSORS.get(options.sensor or "")
    modality = known.name if known else "optical"
    made = contract(
        modality, [band(n, known) if known else Band(name=n) for n in names], str(pixels.dtype),
        sensor=options.sensor or "unknown", level=options.level or "unknown", unit=options.unit or "digital number",
        nodata=options.nodata, gsd_m=options.gsd_m, resampling="nearest to the finest grid" if len(columns) > 1 else None,
    )  # fmt: skip
    items = []
    for file, table in holding.items():
        lacking = [c for c in columns if c not in table.columns]
        if lacking:
            raise InputError(f"{file} has no column {', '.join(lacking)}, which {first.path.name} has")
        name = file.relative_to(root).as_posix()
        for row in range(table.rows):
            key = f"{name.removesuffix('.parquet')}/{row:07d}"
            items.append(Item(key, key, place=(name, row)))
    others = sorted(p.name for p in tables if p not in holding)
    notes = [f"bands are the columns {', '.join(columns)}"]
    notes += [f"{', '.join(others)} left out: no GeoTIFFs in it"] if others else []
    return Cells(
        dataset=path.stem, kind="parquet", contracts={modality: made}, items=items, notes=tuple(notes), root=root,
        columns=columns, options=options, fingerprint=fingerprint(root, holding, options),
    )  # fmt: skip


def _tiff_columns(table: Table) -> list[str]:
    """The columns whose first cell starts as a TIFF does; thumbnails (PNG) do not."""
    if not table.rows:
        return []
    try:
        cells = table.row(0, list(table.binary))
    except DecodeError:
        return []
    return [name for name, cell in cells.items() if isinstance(cell, bytes) and cell[:4] in _TIFF]


def _stack(table: Table, row: int, columns: Sequence[str]) -> np.ndarray:
    """(C, H, W) on the finest grid, by nearest neighbour. Raises DecodeError."""
    cells = table.row(row, list(columns))
    read = [geotiff(cells[c], f"{table.path.name} row {row} {c}") for c in columns]
    height, width = max(a.shape[1] for a in read), max(a.shape[2] for a in read)
    if len({a.dtype for a in read}) > 1 or (len(read) > 1 and any(len(a) != 1 for a in read)):
        raise DecodeError(f"{table.path.name} row {row}: its bands differ in dtype, or are several in one column")
    placed = []
    for array in read:
        rows = (2 * np.arange(height) + 1) * array.shape[1] // (2 * height)
        across = (2 * np.arange(width) + 1) * array.shape[2] // (2 * width)
        placed.append(array[:, rows][:, :, across])
    return np.concatenate(placed)
