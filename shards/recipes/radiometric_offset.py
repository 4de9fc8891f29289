"""Sentinel-2's radiometric offset of 1000 DN (processing baseline 04.00 on): who says so, sample by sample.

reflectance = (DN − 1000) / 10000 with it, DN / 10000 without. Dates say nothing: old scenes were processed anew.
"""

import re
from typing import Literal

import numpy as np

from swath.shards.codec import DecodeError

SCALE = 1e-4
ADD = -0.1
Rule = Literal["added", "removed", "mixed"]


def darkest(dn: np.ndarray) -> float | None:
    """The 1st percentile of DN that are not fill (0), None where all are."""
    seen = dn[dn != 0]
    return float(np.percentile(seen, 1)) if seen.size else None


def by_cirrus(b10: np.ndarray) -> bool | None:
    """Whether (H, W) DN of B10 have the offset; None where they cannot tell.

    Water vapour swallows what comes from the ground at 1375 nm, so somewhere in a chip B10 is nearly 0: DN of a few tens, or of
    1000 and a few tens. Between, or much brighter everywhere (thick cirrus, high mountains), both are possible.
    """
    low = darkest(b10)
    if low is None or 800 <= low < 950 or low > 1500:
        return None
    return low >= 950


def by_baseline(product: str) -> bool | None:
    """Whether a product name such as S2B_MSIL2A_20200223T033739_N0400_… says so; None without a baseline in the name.

    N9999 is not a baseline of that order: it marks a reprocessing by others, without the offset.
    """
    found = re.search(r"_N(\d{4})_", product)
    return None if found is None else 400 <= int(found[1]) < 9999


def decide(rule: Rule, level: str, dn: np.ndarray, b10: np.ndarray | None) -> tuple[float, str]:
    """(add, who says so) of a sample's (T, C, H, W) DN at `level`, with (T, H, W) of B10 of its L1C where there is one.

    "added" and "removed" is what the publisher says of all samples; B10 may contradict, and then the sample is bad. "mixed"
    means that only the sample can tell. Raises DecodeError.
    """
    seen = {by_cirrus(date) for date in b10} if b10 is not None else {None}
    told = seen - {None}
    if len(told) > 1:
        raise DecodeError("B10 of some dates has the offset of 1000, of others not; give --add")
    verdict = told.pop() if told else None
    if rule != "mixed":
        has = rule == "added"
        if verdict is not None and verdict != has:
            raise DecodeError(f"the publisher says that the offset of 1000 is {rule}, B10 shows the contrary; give --add")
        return (ADD if has else 0.0), f"publisher: DN / 10000, radiometric offset {rule}"
    if level == "L2A":
        low = darkest(dn)
        if low is not None and low < 500:  # with the offset this would be a reflectance below −0.05
            return 0.0, f"decided by the darkest 1 % at DN {low:.0f}: no radiometric offset"
    if verdict is None:
        raise DecodeError("neither B10 nor dark pixels tell whether the radiometric offset of 1000 is in; give --add")
    whose = "its B10" if level == "L1C" else "B10 of the same sample's L1C"
    return (ADD if verdict else 0.0), f"decided by {whose}: radiometric offset of {1000 if verdict else 0}"
