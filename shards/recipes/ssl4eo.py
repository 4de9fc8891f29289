"""SSL4EO-S12 v1 (Wang et al. 2023): four seasons of Sentinel-1, Sentinel-2 L1C and L2A at 251,079 places."""

import json
from typing import Any

from swath.shards.layouts.layout import ANYWHERE, NEAREST, Facts, Layer, Layout, Sidecar, Size
from swath.shards.layouts.tree import declare

_L1C = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12")
_SIZE = Size("crop", 256)  # they are 263 to 265


def _properties(data: bytes) -> Facts:
    """Earth Engine's, flat. The set is published without the offset of newer baselines; where one is named, it counts."""
    said: dict[str, Any] = json.loads(data)
    meta = {"product": said.get("PRODUCT_ID") or said.get("system:index"), "cloud_percent": said.get("CLOUDY_PIXEL_PERCENTAGE")}
    meta = {name: value for name, value in meta.items() if value is not None}
    baseline = said.get("PROCESSING_BASELINE")
    if baseline is None:
        return Facts(meta=meta)
    add = -0.1 if float(baseline) >= 4 else 0.0
    return Facts(add=add, add_source="offset by the metadata's PROCESSING_BASELINE", meta=meta)


def _files(folder: str, band: str) -> str:
    """The scene's folder is a short Sentinel-2 index or a whole Sentinel-1 product id; its first time is the date."""
    return ANYWHERE + rf"{folder}/(?P<key>\d{{7}})/[^/]*?(?P<date>\d{{8}}T\d{{6}})[^/]*/(?P<band>{band})\.tif"


def _sentinel2(folder: str, level: str, bands: tuple[str, ...]) -> Layer:
    nodata, void = (None, 0) if level == "L1C" else (0, None)
    return Layer(
        _files(folder, r"B\d{1,2}A?"), bands, "uint16", "sentinel2", level, "reflectance", nodata, void, 1e-4, gsd_m=10,
        scale_source="recipe ssl4eo_s12: DN / 10000, no offset", resampling=NEAREST, dates=4, size=_SIZE, required=False,
        sidecar=Sidecar("{folder}/metadata.json", _properties),
    )  # fmt: skip


declare(
    Layout(
        "ssl4eo_s12", "SSL4EO-S12 v1: Sentinel-1, Sentinel-2 L1C and L2A of 251,079 places in four seasons", "CC-BY-4.0",
        "s2c/0000000/20200318T142719_20200318T143654_T20LMH/B1.tif",
        {
            "sentinel2_l1c": _sentinel2("s2c", "L1C", _L1C),
            "sentinel2_l2a": _sentinel2("s2a", "L2A", tuple(name for name in _L1C if name != "B10")),
            "sentinel1": Layer(
                _files("s1", "VV|VH"), ("VV", "VH"), "float32", "sentinel1", "sigma0", "dB", gsd_m=10, dates=4, size=_SIZE,
                scale_source="recipe ssl4eo_s12: dB as published", required=False,
                sidecar=Sidecar("{folder}/metadata.json", _properties),
            ),
        },
    )
)  # fmt: skip
