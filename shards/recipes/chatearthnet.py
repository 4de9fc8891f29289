"""ChatEarthNet: Sentinel-2 in true colour with long captions by two language models."""

from collections.abc import Iterator
from pathlib import Path

from swath.shards.recipes.captioned import Captioned, Pile, Record, captioned, named, texts
from swath.shards.recipes.registry import register
from swath.shards.sources.source import Options

_LISTS = r"ChatEarthNet_caps_(35|4v)_(train|val|test)\.json"


def _records(pile: Pile) -> Iterator[Record]:
    for name in named(pile, _LISTS, "json_files/ChatEarthNet_caps_35_train.json"):
        split = name.rpartition("_")[2].removesuffix(".json").lower()
        for entry in pile.json(name):
            yield Record(entry["image"] if "image" in entry else entry["image_id"], texts(entry["caption"]), split)


@register("chatearthnet", "ChatEarthNet: 163,488 Sentinel-2 images with captions by language models, 256 px, 10 m", "CC-BY-4.0")
def chatearthnet(path: Path, options: Options) -> Captioned:
    """`json_files.zip` and `s2_rgb_images.zip`, or their folders.

    Names and fields are as others read them; nobody here has opened the archives, so images are looked for by name anywhere below
    `path`, and a list's `image` may be called `image_id`. Of images with more than three bands --bands names them.
    """
    notes = (
        "ChatEarthNet is read as others describe it; compare a few captions with their images before a long run",
        "8-bit display colours, no reflectance",
    )
    looks = "json_files/ChatEarthNet_caps_35_train.json and s2_rgb_images/s2_images/….png"
    return captioned(
        path,
        options,
        name="chatearthnet",
        looks=looks,
        records=_records,
        sensor="sentinel2",
        level="L2A",
        gsd_m=10.0,
        notes=notes,
    )
