"""A split file: CSV with columns file, class, split and, for block bootstraps, block; others are ignored."""

import csv
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from swath.shards.errors import InputError
from swath.shards.sources.source import Item


@dataclass(frozen=True)
class Row:
    split: str
    label: str | None
    block: int


def assign(path: Path, items: list[Item]) -> list[Row | None]:
    """The row of each item, by the longest suffix of its path that the file names, or None. Every row must be met."""
    rows = _read(path)
    met: dict[str, str] = {}
    found: list[Row | None] = []
    for item in items:
        parts = PurePosixPath(item.lookup).parts
        name = next((n for n in ("/".join(parts[i:]) for i in range(len(parts))) if n in rows), None)
        if name is not None and met.setdefault(name, item.lookup) != item.lookup:
            raise InputError(f"{path}: {name} could be {met[name]} or {item.lookup}; write more of the path")
        found.append(None if name is None else rows[name])
    missing = [name for name in rows if name not in met]
    if missing:
        raise InputError(f"{path} names {len(missing)} files that the source does not have, such as {', '.join(missing[:3])}")
    return found


def _read(path: Path) -> dict[str, Row]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            lacking = [c for c in ("file", "class", "split") if c not in (reader.fieldnames or ())]
            if lacking:
                raise InputError(f"{path} has no column {', '.join(lacking)}; a split file has file,class,split")
            rows: dict[str, Row] = {}
            for line in reader:
                name, split = line["file"] or "", line["split"] or ""
                if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", split) or split == "journal" or not name:
                    raise InputError(f"{path} line {reader.line_num}: file {name!r} and split {split!r} are not usable names")
                row = Row(split, line["class"] or None, int(line.get("block") or -1))
                if rows.setdefault(name, row) != row:
                    raise InputError(f"{path} line {reader.line_num}: {name} stands twice, in different ways")
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"split file {path} cannot be read ({error})") from None
    if not rows:
        raise InputError(f"split file {path} has no rows")
    return rows
