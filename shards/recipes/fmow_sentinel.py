"""fMoW-Sentinel (Cong et al. 2022, SatMAE): Sentinel-2 L1C images of the places of Functional Map of the World."""

import re
from typing import Any

from swath.shards.layouts.layout import ANYWHERE, BY_PUBLISHER, Facts, Layer, Layout, Table, iso_time
from swath.shards.layouts.tree import declare

_COMPOSITE = 100  # image ids from here on are composites of 90 days


def _row(row: dict[str, Any], groups: dict[str, str]) -> tuple[str, Facts]:
    folder = "test_gt" if groups["split"].startswith("test") else groups["split"]
    category, place, image = row["category"], int(row["location_id"]), int(row["image_id"])
    points = re.findall(r"(-?[\d.]+(?:e-?\d+)?) (-?[\d.]+(?:e-?\d+)?)", row["polygon"])
    if not points:
        raise ValueError(f"polygon {row['polygon'][:40]!r} has no points")
    lon, lat = ([float(point[axis]) for point in points] for axis in (0, 1))
    facts = Facts(
        category, "test" if folder == "test_gt" else folder, iso_time(row["timestamp"]),
        lat=(min(lat) + max(lat)) / 2, lon=(min(lon) + max(lon)) / 2,
        meta={"location_id": place, "image_id": image} | ({"composite_days": 90} if image >= _COMPOSITE else {}),
    )  # fmt: skip
    return f"{folder}/{category}/{category}_{place}/{category}_{place}_{image}", facts


declare(
    Layout(
        "fmow_sentinel", "fMoW-Sentinel: 882,779 Sentinel-2 L1C images, 13 bands, 62 classes", "fMoW challenge licence",
        "fmow-sentinel/train/airport/airport_0/airport_0_0.tif, with train.csv beside train",
        {
            "sentinel2": Layer(
                ANYWHERE + r"(?P<key>(?P<split>train|val|test_gt)/[^/]+/[^/]+/[^/]+)\.tif",
                ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12"),
                None, "sentinel2", "L1C", "reflectance", void=0, scale=1e-4, gsd_m=10, resampling=BY_PUBLISHER,
                scale_source="recipe fmow_sentinel: DN / 10000, no offset (images of 2015 to 2019)",
            )
        },
        (Table(ANYWHERE + r"(?P<split>train|val|test|test_gt)\.csv", _row, selects=True),),
    )
)  # fmt: skip
