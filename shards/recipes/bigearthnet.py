"""BigEarthNet v1 (Sumbul et al. 2019, 2021) and v2, "reBEN" (Clasen et al. 2024): Sentinel-2 L2A with Sentinel-1 partners.

They were made by different versions of sen2cor, so their DN differ.
"""

import json
from dataclasses import replace
from typing import Any

from swath.shards.layouts.layout import ANYWHERE, NEAREST, Facts, Layer, Layout, Sidecar, Size, Table, iso_time
from swath.shards.layouts.tree import declare

_BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
_S1 = r"(?P<key>S1[AB]_IW_GRDH_1SDV_(?P<time>\d{8}T\d{5,6})_[^/]+)/(?P=key)_(?P<band>VV|VH)\.tif"


def _json(data: bytes) -> Facts:
    said: dict[str, Any] = json.loads(data)
    time = said.get("acquisition_date") or said.get("acquisition_time") or ""
    labels = [str(label) for label in said["labels"]]
    return Facts(time=iso_time(time), partner=said.get("corresponding_s2_patch"), meta={"labels": labels})


def _listed(row: dict[str, Any], groups: dict[str, str]) -> tuple[str, Facts]:
    return row["s2"], Facts(split=groups["split"], joins={"sentinel1": row["s1"]})


def _row(row: dict[str, Any], groups: dict[str, str]) -> tuple[str, Facts]:
    """Cloud is told by yes or no, so its share is 1 or 0."""
    meta = {"labels": list(row["labels"]), "country": row["country"], "snow": bool(row["contains_seasonal_snow"])}
    return row["patch_id"], Facts(
        split=row["split"], cloud=float(row["contains_cloud_or_shadow"]), joins={"sentinel1": row["s1_name"]}, meta=meta
    )


_SIZE = Size("reject", 120)
_SIDECAR = Sidecar("{folder}/{key}_labels_metadata.json", _json)
_V1_S2 = Layer(
    ANYWHERE + r"(?P<key>S2[AB]_MSIL2A_(?P<time>\d{8}T\d{5,6})_\d+_\d+)/(?P=key)_(?P<band>B\w{2})\.tif",
    _BANDS, "uint16", "sentinel2", "L2A", "reflectance", nodata=0, scale=1e-4, gsd_m=10, resampling=NEAREST, size=_SIZE,
    scale_source="recipe bigearthnet_v1: DN / 10000, no offset (products of 2017 and 2018, before baseline 04.00)",
    sidecar=_SIDECAR,
)  # fmt: skip
_V1_S1 = Layer(
    ANYWHERE + _S1, ("VV", "VH"), "float32", "sentinel1", "sigma0", "dB", gsd_m=10, size=_SIZE, required=False, joined=True,
    scale_source="recipe bigearthnet: dB as published", sidecar=_SIDECAR,
)  # fmt: skip
_V2_S2 = replace(
    _V1_S2,
    files=ANYWHERE + r"(?P<key>S2[AB]_MSIL2A_(?P<time>\d{8}T\d{6})_N\d{4}_R\d{3}_T\w{5}_\d+_\d+)/(?P=key)_(?P<band>B\w{2})\.tif",
    scale_source="recipe reben: DN / 10000, no offset (its N9999 names no baseline)",
    sidecar=None,
)
_REBEN = Layout(
    "reben", "reBEN (BigEarthNet v2): 480,038 Sentinel-2 patches with Sentinel-1 partners, 19 labels", "CDLA-Permissive-1.0",
    "BigEarthNet-S2/<tile>/<patch>/<patch>_B01.tif, with metadata.parquet beside BigEarthNet-S2",
    {"sentinel2": _V2_S2, "sentinel1": replace(_V1_S1, sidecar=None)},
    (Table(ANYWHERE + r"metadata\.parquet", _row, selects=True),),
    {ANYWHERE + r"[^/]+_reference_map\.tif": "reference maps"},
)  # fmt: skip

declare(
    Layout(
        "bigearthnet_v1", "BigEarthNet v1: 590,326 Sentinel-2 patches, with Sentinel-1 partners as in BigEarthNet-MM, 43 labels",
        "CDLA-Permissive-1.0", "BigEarthNet-v1.0/<patch>/<patch>_B01.tif",
        {"sentinel2": _V1_S2, "sentinel1": _V1_S1},
        (Table(ANYWHERE + r"(?:bigearthnet-)?(?P<split>train|val|test)\.csv", _listed, ("s2", "s1")),),
    )
)  # fmt: skip
declare(_REBEN)
declare(
    replace(
        _REBEN,
        name="reben_all",
        title="reBEN with its 69,450 patches under snow, cloud or shadow, which say so",
        tables=(
            *_REBEN.tables,
            Table(ANYWHERE + r"metadata_for_patches_with_snow_cloud_or_shadow\.parquet", _row, selects=True),
        ),
    )
)
