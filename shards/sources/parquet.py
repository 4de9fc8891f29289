"""Parquet tables, row group by row group, and the GeoTIFFs that their cells hold as bytes."""

from pathlib import Path
from typing import Any

import numpy as np

from swath.shards.codec import MAX_VALUES, DecodeError
from swath.shards.errors import InputError
from swath.shards.sources.scene import DTYPES, load_rasterio, raster_errors

MAX_GROUP = 1 << 30  # bytes of the columns of one row group, decompressed
MAX_TIFF = 1 << 28  # bytes of one cell
_MAX_FOOTER = 1 << 28


class Table:
    """One Parquet file; row groups are read when asked for. Raises InputError where it cannot be opened."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise InputError("reading Parquet needs pyarrow: pip install 'swath[tables]'") from None
        self.path, self._errors = path, (pyarrow.ArrowException, OSError, ValueError)
        try:
            self._file = pyarrow.parquet.ParquetFile(path, thrift_string_size_limit=_MAX_FOOTER, memory_map=False)
        except self._errors as error:
            raise InputError(f"{path} cannot be read as Parquet ({error})") from None
        self.columns = tuple(self._file.schema_arrow.names)
        binary = (pyarrow.types.is_binary, pyarrow.types.is_large_binary)
        self.binary = tuple(f.name for f in self._file.schema_arrow if any(kind(f.type) for kind in binary))
        counts = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self.rows = sum(counts)
        self._ends = np.cumsum(counts)

    def row(self, number: int, columns: list[str]) -> dict[str, Any]:
        """The cells of one row, `number` counted over all row groups. Raises DecodeError."""
        if not 0 <= number < self.rows:
            raise DecodeError(f"{self.path.name} has {self.rows} rows, none of number {number}")
        group = int(np.searchsorted(self._ends, number, side="right"))
        read = self._group(group, columns)
        place = number - (int(self._ends[group - 1]) if group else 0)
        return {name: read.column(name)[place].as_py() for name in columns}

    def all(self, columns: list[str]) -> list[dict[str, Any]]:
        """Every row of a table of metadata. Raises InputError."""
        try:
            return [row for group in range(len(self._ends)) for row in self._group(group, columns).to_pylist()]
        except DecodeError as error:
            raise InputError(str(error)) from None

    def _group(self, group: int, columns: list[str]) -> Any:
        about = self._file.metadata.row_group(group)
        wanted = [about.column(i) for i in range(about.num_columns)]
        if sum(c.total_uncompressed_size for c in wanted if c.path_in_schema.split(".")[0] in columns) > MAX_GROUP:
            raise DecodeError(f"{self.path.name}: row group {group} declares more than the limit of {MAX_GROUP} bytes")
        try:
            return self._file.read_row_group(group, columns=columns, use_threads=False)
        except self._errors as error:
            raise DecodeError(f"{self.path.name}: row group {group} is damaged ({error})") from None


def geotiff(data: bytes | None, where: str) -> np.ndarray:
    """(C, H, W) of a GeoTIFF's bytes. Raises DecodeError: what it declares is held against the limits before it is read."""
    if not isinstance(data, bytes) or len(data) > MAX_TIFF:
        raise DecodeError(f"{where} is no GeoTIFF of at most {MAX_TIFF} bytes")
    load_rasterio()
    import warnings

    from rasterio.errors import NotGeoreferencedWarning
    from rasterio.io import MemoryFile

    try:
        with warnings.catch_warnings(), MemoryFile(data) as memory, memory.open(driver="GTiff") as file:
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            if file.count * file.height * file.width > MAX_VALUES or any(d not in DTYPES for d in file.dtypes):
                shown = f"{file.count}×{file.height}×{file.width} of {file.dtypes[0]}"
                raise DecodeError(f"{where} declares {shown}, beyond the limits")
            return file.read()
    except raster_errors() as error:
        raise DecodeError(f"{where}: {error.__cause__ or error}") from None
