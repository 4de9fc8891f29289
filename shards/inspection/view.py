"""How a modality is shown as a picture: which bands in which colours, stretched how.

Shapes: K of the bands are shown; H, W; a picture is one date of one sample.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib import colormaps

from swath.shards.bands import InputContract
from swath.shards.reader import VALID_CLEAR, VALID_NODATA

DIMMED = 0.35  # brightness of what is not clear
_RGB_NM, _NEAR_NM = (665.0, 560.0, 490.0), 30.0
_ENOUGH = 500_000  # pixels that percentiles are taken from


@dataclass(frozen=True)
class View:
    """`bands` are shown as `kind` says, `words` says it to a person."""

    bands: tuple[int, ...]
    kind: Literal["colour", "as stored", "radar", "grey", "scale", "classes"]
    words: str


@dataclass
class Picture:
    """`values` (K, H, W) float64 in the unit shown, `codes` (H, W) as in validity masks."""

    values: np.ndarray
    codes: np.ndarray


def view_of(contract: InputContract) -> View:
    """Red, green, blue by common name or by wavelength, else near infrared, red, green; two polarisations and their ratio;
    a band alone in a colour map; of several that say nothing of themselves, three spread over them."""
    names, common = contract.names, [band.common_name for band in contract.bands]
    if contract.unit == "class":
        return View((0,), "classes", f"classes of {names[0]}")
    if contract.unit in ("dB", "linear power"):
        upper = [name.upper() for name in names]
        for co, cross in (("VV", "VH"), ("HH", "HV")):
            if co in upper and cross in upper:
                words = f"red {co}, green {cross}, blue {co} / {cross}"
                return View((upper.index(co), upper.index(cross)), "radar", words)
        return View((0,), "grey", names[0])
    if len(names) == 1:
        return View((0,), "scale", names[0])
    for colours in (("red", "green", "blue"), ("nir", "red", "green"), ("nir08", "red", "green")):
        if all(colour in common for colour in colours):
            bands = tuple(common.index(colour) for colour in colours)
            photograph = contract.dtype == "uint8" and contract.unit == "digital number" and len(names) == 3
            return View(bands, "as stored" if photograph else "colour", _said(names, bands))
    known = {number: band.wavelength_nm for number, band in enumerate(contract.bands) if band.wavelength_nm is not None}
    bands = tuple(min(known, key=lambda n: abs(known[n] - nm)) for nm in _RGB_NM) if known else ()
    if not bands or any(abs(known[n] - nm) > _NEAR_NM for n, nm in zip(bands, _RGB_NM, strict=True)):
        bands = (len(names) - 1, len(names) // 2, 0)
    if len(set(bands)) == 3:
        return View(bands, "colour", _said(names, bands))
    return View((0,), "scale", names[0])


def _said(names: tuple[str, ...], bands: tuple[int, ...]) -> str:
    return ", ".join(
        colour if colour == names[n] else f"{colour} {names[n]}"
        for colour, n in zip(("red", "green", "blue"), bands, strict=True)
    )


def picture(
    stored_chw: np.ndarray, codes_hw: np.ndarray | None, scale: float, add: float, contract: InputContract, view: View
) -> Picture:
    """One date as stored, all bands of `contract`, in physical values (radar in dB)."""
    stored = stored_chw[list(view.bands)]
    with np.errstate(all="ignore"):
        values = stored.astype(np.float64) * scale + add
        if contract.unit == "linear power":
            values = 10 * np.log10(np.where(values > 0, values, np.nan))
        if view.kind == "radar":
            values = np.concatenate([values, values[:1] - values[1:]])
    codes = np.full(stored.shape[1:], VALID_CLEAR, np.uint8) if codes_hw is None else codes_hw.copy()
    codes[~np.isfinite(values).all(axis=0)] = VALID_NODATA
    if contract.nodata is not None:
        codes[(stored == contract.nodata).all(axis=0)] = VALID_NODATA
    return Picture(values, codes)


def limits(pictures: list[Picture], view: View) -> tuple[np.ndarray, np.ndarray]:
    """(K,) values each that become dark and bright: 2nd and 98th percentile of all clear pixels, 0 to 255 as stored."""
    if view.kind == "as stored":
        return np.zeros(3), np.full(3, 255.0)
    flat = np.concatenate([one.values[:, one.codes == VALID_CLEAR] for one in pictures] or [np.zeros((1, 0))], axis=1)
    if not flat.shape[1]:
        return np.zeros(len(flat)), np.ones(len(flat))
    low, high = np.percentile(flat[:, :: -(-flat.shape[1] // _ENOUGH)], (2, 98), axis=1)
    return low, high


def painted(one: Picture, low: np.ndarray, high: np.ndarray, view: View) -> np.ndarray:
    """(H, W, 3) uint8; nodata is black, cloud and shadow are dimmed."""
    if view.kind == "classes":
        values = np.where(one.codes == VALID_NODATA, 0, one.values[0])
        shown = colormaps["tab20"]((values % 20).astype(np.int64))[..., :3]
    else:
        low, span = low[:, None, None], (high - low)[:, None, None]
        with np.errstate(all="ignore"):
            shown = np.where(span > 0, (one.values - low) / np.where(span > 0, span, 1), 0.5)
        shown = np.moveaxis(np.nan_to_num(np.clip(shown, 0, 1)), 0, 2)
        if view.kind == "scale":
            shown = colormaps["viridis"](shown[..., 0])[..., :3]
    light = np.where(one.codes == VALID_CLEAR, 1.0, np.where(one.codes == VALID_NODATA, 0.0, DIMMED))
    return (255 * np.broadcast_to(shown, (*light.shape, 3)) * light[..., None]).round().astype(np.uint8)
