"""GAIA: captions with addresses of images on the web, which img2dataset fetches beforehand."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from swath.shards.codec import DecodeError
from swath.shards.recipes.captioned import IMAGES, Captioned, Pile, Record, captioned, named, number, texts
from swath.shards.recipes.registry import register
from swath.shards.sources.source import Options
from swath.shards.sources.webdataset import plain_json

_META = ("id", "image_src", "image_alt", "credits", "location", "tag", "resolution", "satellite", "sensor", "modalities")
_SIDECAR_BYTES = 1 << 20


def _records(pile: Pile) -> Iterator[Record]:
    fetched = _fetched(pile)
    for name in named(pile, r"(train|val|test)_data\.json", "train_data.json"):
        split = name.rpartition("/")[2].partition("_")[0].lower()
        for entry in pile.json(name):
            image = fetched.get(("id", str(entry.get("id")))) or fetched.get(("url", entry["image_src"])) or entry["image_src"]
            meta = {f"gaia_{field}": entry[field] for field in _META if entry.get(field) not in (None, "", [])}
            yield Record(
                image, texts(entry["captions"]), split, number(entry.get("lat"), 90), number(entry.get("lon"), 180), meta
            )


def _fetched(pile: Pile) -> dict[tuple[str, str], str]:
    """What the JSON beside an image says of it, ("id" or "url", value) → the image."""
    images = {str(PurePosixPath(name).with_suffix("")): name for name in pile.names if name.lower().endswith(IMAGES)}
    found: dict[tuple[str, str], str] = {}
    for stem, image in images.items():
        if f"{stem}.json" in pile:
            told: Any = None
            try:
                told = plain_json(pile.read(f"{stem}.json", _SIDECAR_BYTES))
            except DecodeError:
                continue  # its record counts as one without an image
            if isinstance(told, dict):
                found |= {(field, str(told[field])): image for field in ("id", "url") if told.get(field) is not None}
    return found


@register(
    "gaia", "GAIA: 41,030 images of many sensors with five captions each, fetched by img2dataset", "MIT (images: their owners')"
)
def gaia(path: Path, options: Options) -> Captioned:
    """`{train,val,test}_data.json`, and beside them what img2dataset wrote: tars or folders, with a JSON for each image.

    Links rot: records whose image is not there are counted.
    """
    looks = "train_data.json and train/00000.tar by img2dataset"
    return captioned(path, options, name="gaia", looks=looks, records=_records)
