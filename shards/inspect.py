"""`swath inspect`: what a folder of shards holds, as text, as contact sheets and as a map.

What comes from a manifest or a sample is shown without its control characters, and cut where it is long.
"""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from swath.shards.files import disk_errors, write_bytes
from swath.shards.inspection.describe import describe
from swath.shards.inspection.map import draw_map
from swath.shards.inspection.sheet import capacity, contact_sheet
from swath.shards.inspection.survey import Survey, survey
from swath.shards.manifest import NAME
from swath.shards.reader import ShardReader

_FIRST = ("train", "val", "test")  # the order in which splits are told
_DAMAGED = 5  # lines on samples that cannot be read
_WIDE = 400  # characters of a line


@dataclass(frozen=True)
class Report:
    """`text` for the terminal; where the contact sheets and the map (None: no sample has a position) were written."""

    text: str
    sheets: tuple[Path, ...]
    map: Path | None

    def __str__(self) -> str:
        return self.text


def inspect(folder: Path, out: Path | None = None) -> Report:
    """Describe the shards in `folder`, or those of all splits inside it, and write pictures into `out` (by default `folder`).

    `contact_sheet.png`, with the split and the modality in its name where there are several, and `map.png`. Raises InputError
    where there are no shards, they are damaged, or `out` cannot be written; single damaged samples are told and left out.
    """
    readers, place = _readers(folder), out or folder
    surveys = {split: survey(reader) for split, reader in readers.items()}
    lines = []
    if len(readers) > 1:
        lines += [f"{folder}: splits " + ", ".join(f"{split} ({len(reader)} samples)" for split, reader in readers.items()), ""]
    sheets: dict[Path, Image.Image] = {}
    for split, reader in readers.items():
        lines += [f"== {split} =="] if split else []
        lines += describe(reader, surveys[split])
        made, damaged = _sheets(split, reader, surveys[split])
        sheets |= {place / name: image for name, image in made.items()}
        lines += [*damaged, *(f"contact sheet: {place / name}" for name in made), ""]
    picture = draw_map(readers, surveys)
    drawn = {} if picture is None else {place / "map.png": picture}
    lines += [f"map: {path}" for path in drawn] or ["no map: no sample has a position"]
    with disk_errors("writing the contact sheet and the map", place):
        place.mkdir(parents=True, exist_ok=True)
        for path, image in (*sheets.items(), *drawn.items()):
            _write(path, image)
    return Report("\n".join(_plain(line) for line in lines), tuple(sheets), next(iter(drawn), None))


def _readers(folder: Path) -> dict[str, ShardReader]:
    """By split; the split of a folder that is not cut into splits is ""."""
    inside = [] if (folder / NAME).exists() or not folder.is_dir() else [path.parent.name for path in folder.glob(f"*/{NAME}")]
    splits = [name for name in inside if not name.startswith(".")]  # an unfinished ingest is hidden
    splits.sort(key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name))
    return {split: ShardReader(folder / split) for split in splits} or {"": ShardReader(folder)}


def _sheets(split: str, reader: ShardReader, found: Survey) -> tuple[dict[str, Image.Image], list[str]]:
    """File names and contact sheets of the modalities that there are samples of, and lines on samples that cannot be read."""
    made, damaged = {}, []
    for modality, stored in found.stored.items():
        if not stored.samples:
            continue
        numbers = stored.chosen(capacity(reader.contracts[modality]))
        title = " · ".join(part for part in (reader.manifest.dataset, split, modality) if part)
        sheet = contact_sheet(reader, modality, numbers, f"{title} · {len(numbers)} of {stored.samples} samples")
        name = "_".join(part for part in ("contact_sheet", split, modality if len(found.stored) > 1 else "") if part)
        made[f"{name}.png"] = sheet.image
        if sheet.damaged:
            damaged.append(f"{len(sheet.damaged)} of the {len(numbers)} samples on {name}.png cannot be read")
            damaged += [f"  {line}" for line in sheet.damaged[:_DAMAGED]]
    return made, damaged


def _write(path: Path, picture: Image.Image | Figure) -> None:
    data = io.BytesIO()
    if isinstance(picture, Figure):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name may have letters that the font lacks
            picture.savefig(data, format="png", bbox_inches="tight", pad_inches=0.15)
    else:
        picture.save(data, "PNG")
    write_bytes(path, data.getvalue())


def _plain(line: str) -> str:
    """One line that a terminal can be shown."""
    short = line if len(line) <= _WIDE else line[:_WIDE] + "…"
    return "".join(c if c.isprintable() else "?" for c in short)
