"""EuroSAT, RGB and multi-spectral: Sentinel-2 L1C patches of 64 × 64 pixels by class (Helber et al. 2019)."""

import re
from typing import Any

from swath.shards.layouts.layout import ANYWHERE, BY_PUBLISHER, RGB, Facts, Layer, Layout, Size, Table
from swath.shards.layouts.tree import declare

_KEY = ANYWHERE + r"(?P<key>(?P<label>[A-Za-z]+)/[A-Za-z]+_\d+)"


def _row(row: dict[str, Any], groups: dict[str, str]) -> tuple[str, Facts]:
    """The lists name `AnnualCrop_1.jpg` for the TIFFs too."""
    name = re.sub(r"\.\w+$", "", row["name"])
    return f"{name.rsplit('_', 1)[0]}/{name}", Facts(split=groups["split"])


_SPLITS = Table(ANYWHERE + r"eurosat-(?P<split>train|val|test)\.txt", _row)

declare(
    Layout(
        "eurosat_rgb", "EuroSAT RGB: 27,000 land-use patches, Sentinel-2, 10 classes", "MIT",
        "EuroSAT_RGB/AnnualCrop/AnnualCrop_1.jpg",
        {"rgb": Layer(_KEY + r"\.jpg", RGB, "uint8", gsd_m=10, size=Size("reject", 64))},
        (_SPLITS,),
    )
)  # fmt: skip
declare(
    Layout(
        "eurosat_ms", "EuroSAT multi-spectral: 27,000 land-use patches, Sentinel-2 L1C, 13 bands, 10 classes", "MIT",
        "EuroSAT_MS/AnnualCrop/AnnualCrop_1.tif",
        {
            "sentinel2": Layer(
                _KEY + r"\.tif",
                # B8A stands last: the means of the bands prove it
                ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A"),
                "uint16", "sentinel2", "L1C", "reflectance", void=0, scale=1e-4, gsd_m=10, resampling=BY_PUBLISHER,
                scale_source="recipe eurosat_ms: DN / 10000, no offset (products before baseline 04.00)",
                size=Size("reject", 64),
            )
        },
        (_SPLITS,),
    )
)  # fmt: skip
