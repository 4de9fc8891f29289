"""RSICD, RSITMD and UCM-Captions: five sentences for each image, in Karpathy's JSON beside the images."""

from pathlib import Path

from swath.shards.recipes.captioned import Captioned, captioned, karpathy
from swath.shards.recipes.registry import register
from swath.shards.sources.source import Options


@register("rsicd", "RSICD: 10,921 aerial images with five sentences each, 224 px", "not stated; research use")
def rsicd(path: Path, options: Options) -> Captioned:
    """`dataset_rsicd.json` beside `RSICD_images.zip` or its folder."""
    looks = "dataset_rsicd.json and RSICD_images/airport_1.jpg"
    return captioned(path, options, name="rsicd", looks=looks, records=karpathy("dataset_rsicd.json"))


@register("rsitmd", "RSITMD: 4,743 aerial images with five sentences each and keywords, 256 px", "not stated; research use")
def rsitmd(path: Path, options: Options) -> Captioned:
    """`dataset_RSITMD.json` beside `images/*.tif`."""
    looks = "dataset_RSITMD.json and images/airport_1.tif"
    return captioned(path, options, name="rsitmd", looks=looks, records=karpathy("dataset_RSITMD.json"))


@register(
    "ucm_captions", "UCM-Captions: the 2,100 images of UC Merced with five sentences each, 256 px", "not stated; research use"
)
def ucm_captions(path: Path, options: Options) -> Captioned:
    """`dataset.json` beside `imgs/*.tif`; some images are a few pixels off."""
    looks = "dataset.json and imgs/1.tif"
    return captioned(path, options, name="ucm_captions", looks=looks, records=karpathy("dataset.json"), gsd_m=0.3)
