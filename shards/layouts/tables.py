"""Rows of the CSV and Parquet files of a data set."""

import csv
import io
from collections.abc import Iterator
from typing import Any

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.layouts.layout import Facts, Table
from swath.shards.layouts.store import Store
from swath.shards.sources.archive import BROKEN


def read_table(store: Store, name: str, table: Table, groups: dict[str, str]) -> Iterator[tuple[str, Facts]]:
    """(key, facts) of each row; InputError names the file and the row that cannot be used."""
    number = 0
    try:
        for row in _rows(store, name, table.columns):
            number += 1
            yield table.row(row, groups)
    except KeyError as error:
        raise InputError(f"{name} has no column {error}; the recipe reads the table as published") from None
    except (DecodeError, ValueError, TypeError, AttributeError, csv.Error, *BROKEN) as error:
        raise InputError(f"{name}, near row {number}: {error}; the recipe reads the table as published") from None


def _rows(store: Store, name: str, columns: tuple[str, ...] | None) -> Iterator[dict[str, Any]]:
    if name.lower().endswith(".parquet"):
        return _parquet(store, name)
    return _list(store, name) if name.lower().endswith(".txt") else _csv(store, name, columns)


def _list(store: Store, name: str) -> Iterator[dict[str, Any]]:
    with io.TextIOWrapper(store.open(name), encoding="utf-8-sig") as text:
        for line in text:
            yield from ({"name": entry.strip()} for entry in line.split(",") if entry.strip())


def _csv(store: Store, name: str, columns: tuple[str, ...] | None) -> Iterator[dict[str, Any]]:
    with io.TextIOWrapper(store.open(name), encoding="utf-8-sig", newline="") as text:
        for row in csv.DictReader(text, columns):
            if None in row or None in row.values():
                raise ValueError("it has not as many fields as there are columns")
            yield row


def _parquet(store: Store, name: str) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(f"reading {name} needs pyarrow: pip install 'swath[tables]'") from None
    try:
        with store.open(name) as file:
            for batch in pq.ParquetFile(file).iter_batches(1 << 14):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise ValueError(str(error).splitlines()[0]) from None
