"""RGB images in class folders: scene classification sets, and the unlabelled ones to pretrain on."""

import re
from typing import Any

from swath.shards.layouts.layout import ANYWHERE, RGB, Facts, Layer, Layout, Size, Table
from swath.shards.layouts.tree import declare

_BY_CLASS = ANYWHERE + r"(?P<key>(?P<label>[^/]+)/[^/]+)"
_JPEG, _ANY = r"\.(?i:jpe?g)", r"\.(?i:jpe?g|png)"


def _rgb(files: str, size: Size = Size(), gsd_m: float | None = None) -> dict[str, Layer]:  # noqa: B008 - frozen
    return {"rgb": Layer(files, RGB, "uint8", size=size, gsd_m=gsd_m)}


def _listed(row: dict[str, Any], groups: dict[str, str]) -> tuple[str, Facts]:
    """`golf_course_001.jpg` or `agricultural00.tif`, the class before the number."""
    name = re.sub(r"\.\w+$", "", row["name"])
    return f"{re.sub(r'_?[0-9]+$', '', name)}/{name}", Facts(split=groups["split"])


declare(
    Layout(
        "resisc45", "NWPU-RESISC45: 31,500 scenes in 45 classes, 256 px", "non-commercial research",
        "NWPU-RESISC45/airplane/airplane_001.jpg", _rgb(_BY_CLASS + _JPEG),
        (Table(ANYWHERE + r"resisc45-(?P<split>train|val|test)\.txt", _listed),),
    )
)  # fmt: skip
declare(
    Layout(
        "ucmerced", "UC Merced Land Use: 2,100 aerial images in 21 classes, 0.3 m", "public domain",
        "UCMerced_LandUse/Images/agricultural/agricultural00.tif",
        # 44 of them are a few pixels off
        _rgb(_BY_CLASS + r"\.tif", Size("pad", 256), 0.3),
        (Table(ANYWHERE + r"uc_merced-(?P<split>train|val|test)\.txt", _listed),),
    )
)  # fmt: skip
declare(
    Layout(
        "aid", "AID: 10,000 aerial scenes in 30 classes, 600 px, 0.5 to 8 m", "not stated; research use",
        "AID/Airport/airport_1.jpg", _rgb(_BY_CLASS + _JPEG),
    )
)  # fmt: skip
declare(
    Layout(
        "whu_rs19", "WHU-RS19: 1,005 scenes in 19 classes, about 600 px", "not stated; research use",
        "WHU-RS19/Airport/airport_01.jpg", _rgb(_BY_CLASS + _JPEG),
    )
)  # fmt: skip
declare(
    Layout(
        "patternnet", "PatternNet: 30,400 images in 38 classes, 256 px", "CC-BY-4.0",
        "PatternNet/images/airplane/airplane001.jpg", _rgb(_BY_CLASS + _JPEG),
    )
)  # fmt: skip
declare(
    Layout(
        "firerisk", "FireRisk: 91,872 NAIP images in 7 classes of fire risk, 320 px, 1 m", "CC-BY-NC-4.0",
        "FireRisk/train/High/27032281_4_-103.430441201095_44.2804260315038.png",
        _rgb(ANYWHERE + r"(?P<key>(?P<split>train|val)/(?P<label>[^/]+)/[^/]+)\.png", gsd_m=1),
    )
)  # fmt: skip
declare(
    Layout(
        "millionaid", "Million-AID: a million aerial scenes, 10,000 of them labelled by 51 leaves of a tree", "not stated",
        "train/agriculture_land/grassland/meadow/P0115918.jpg",
        _rgb(ANYWHERE + r"(?P<key>(?P<split>train|test)(?:/(?P<label>[^/]+/[^/]+(?:/[^/]+)?))?/P\d+)" + _JPEG),
    )
)  # fmt: skip
declare(
    Layout(
        "opticalrs", "OpticalRS-4M and -13M: unlabelled optical images of many sources", "mixed, by source",
        "OpticalRS/<source>/<name>.jpg",
        _rgb(r"(?P<key>(?:(?:.*/)?(?P<source_set>[^/]+)/)?[^/]+)" + _ANY),
    )
)  # fmt: skip
