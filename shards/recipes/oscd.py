"""OSCD, Onera Satellite Change Detection (Daudt et al. 2018): 24 cities at two dates, Sentinel-2 L1C, all bands on 10 m."""

import re
from typing import Any

from swath.shards.layouts.layout import ANYWHERE, BY_PUBLISHER, Facts, Layer, Layout, Sidecar, Table, iso_time
from swath.shards.layouts.tree import declare


def _dates(data: bytes) -> Facts:
    """`date_1: 20150825` and `date_2: …`, in whatever words around."""
    times = [time for text in re.findall(rb"\d{8}", data) if (time := iso_time(text.decode())) is not None]
    return Facts(times=tuple(times) if len(times) == 2 else ())


def _listed(row: dict[str, Any], groups: dict[str, str]) -> tuple[str, Facts]:
    return row["name"], Facts(split=groups["split"])


declare(
    Layout(
        "oscd", "OSCD: 24 cities at two dates, Sentinel-2 L1C, 13 bands", "not stated; Copernicus data",
        "Onera Satellite Change Detection dataset - Images/beirut/imgs_1_rect/B01.tif",
        {
            "sentinel2": Layer(
                r"(?P<root>" + ANYWHERE + r"(?P<key>[^/]+))/imgs_(?P<date>[12])_rect/(?P<band>B\w{2})\.tif",
                ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12"),
                "uint16", "sentinel2", "L1C", "reflectance", void=0, scale=1e-4, gsd_m=10, resampling=BY_PUBLISHER, dates=2,
                scale_source="recipe oscd: DN / 10000, no offset (images of 2015 to 2018)",
                sidecar=Sidecar("{root}/dates.txt", _dates),
            )
        },
        (Table(ANYWHERE + r"(?P<split>train|test)\.txt", _listed),),
        {
            ANYWHERE + r"imgs_[12]/[^/]+": "images before they were brought onto one grid",
            ANYWHERE + r"cm/[^/]+": "change masks",
            ANYWHERE + r"pair/[^/]+": "previews",
        },
    )
)  # fmt: skip
