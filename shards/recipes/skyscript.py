"""SkyScript: captions made from OpenStreetMap tags. Its meta zips hold pickles, which are never read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swath.shards.layouts.layout import Facts, Table
from swath.shards.recipes.captioned import Captioned, Pile, Record, captioned, named, texts
from swath.shards.recipes.registry import register
from swath.shards.sources.source import Options

_LISTS = r"SkyScript_.*\.csv"


def _row(row: dict[str, Any], groups: dict[str, str]) -> tuple[str, Facts]:
    return row["filepath"], Facts(meta={"captions": texts([row["title"], row.get("title_multi_objects")])})


def _records(pile: Pile) -> Iterator[Record]:
    for name in named(pile, _LISTS, "SkyScript_train_top30pct_filtered_by_CLIP_openai.csv"):
        split = next((s for s in ("train", "val", "test") if f"_{s}" in name.rpartition("/")[2].lower()), None)
        for image, facts in pile.rows(name, Table("", _row)):
            yield Record(image, facts.meta["captions"], split)


@register("skyscript", "SkyScript: 5.2 million images with captions from OpenStreetMap, 0.1 to 30 m", "MIT")
def skyscript(path: Path, options: Options) -> Captioned:
    """`images2.zip` to `images7.zip` or their folders, with any of its CSVs; what stands in no CSV is left out."""
    notes = ("its meta zips hold pickles and are not read, so places and times are not known",)
    looks = "SkyScript_train_….csv and images2/a198234555_CH_19.jpg"
    return captioned(path, options, name="skyscript", looks=looks, records=_records, notes=notes, unread=r"meta\d*\.zip")
