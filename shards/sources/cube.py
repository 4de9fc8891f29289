"""Cutting arrays of any axis order into samples, without reading more than is asked for.

Axes are letters in the array's own order: n sample, t date, c band, h row, w column. `hwc` is what `.mat` scenes hold.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from swath.shards.codec import MAX_VALUES, DecodeError
from swath.shards.errors import InputError

CHIP = 64  # px, where nobody says otherwise
# float16 to float64 and integers; text, records, references and objects are not pixels
_KINDS = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "b1")

MAX_PIXELS = 1 << 34  # of a scene, 131,072 × 131,072: what declares more is a bomb or wants to be cut before
MAX_SAMPLES = 1 << 26  # of one array

Window = tuple[int, int, int, int]


def windows(height: int, width: int, side: int | None, stride: int | None) -> Iterator[Window]:
    """(top, left, height, width) of chips that lie wholly inside; what is smaller than a chip is one, as it is."""
    side = side or CHIP
    high, wide = min(side, height), min(side, width)
    for top in range(0, height - high + 1, stride or side):
        for left in range(0, width - wide + 1, stride or side):
            yield top, left, high, wide


def sizes(shape: tuple[int, ...], axes: str) -> dict[str, int]:
    """The length of each axis; InputError unless every axis has a letter."""
    if len(shape) != len(axes) or len(set(axes)) != len(axes) or not set("hw") <= set(axes) <= set("ntchw"):
        raise InputError(f"an array of shape {shape} cannot have the axes {axes!r}: n sample, t date, c band, h row, w column")
    length = dict(zip(axes, shape, strict=True))
    if length["h"] * length["w"] > MAX_PIXELS or length.get("n", 0) > MAX_SAMPLES:
        raise InputError(f"an array of shape {shape} is beyond the limits of {MAX_PIXELS} pixels and {MAX_SAMPLES} samples")
    return length


def take(array: Any, axes: str, *, n: int = 0, window: Window | None = None) -> np.ndarray:
    """(C, h, w), of a series (T·C, h, w) date after date, of sample `n`, in native byte order and the array's own dtype.

    `array` is whatever has shape, dtype and slices (NumPy, HDF5, Zarr). Raises DecodeError beyond MAX_VALUES, unread.
    """
    length = sizes(tuple(array.shape), axes)
    top, left, height, width = window or (0, 0, length["h"], length["w"])
    if top + height > length["h"] or left + width > length["w"]:
        raise DecodeError(f"has {length['h']}×{length['w']} px, the chip reaches {top + height}×{left + width}")
    values = length.get("t", 1) * length.get("c", 1) * height * width
    if values > MAX_VALUES:
        raise DecodeError(f"{values} values are beyond the limit of {MAX_VALUES}; cut smaller chips")
    check_dtype(array.dtype)
    cut = {"n": n, "h": slice(top, top + height), "w": slice(left, left + width)}
    taken = np.asarray(array[tuple(cut.get(axis, slice(None)) for axis in axes)])
    left_axes = axes.replace("n", "")
    taken = taken.transpose([left_axes.index(axis) for axis in "tchw" if axis in left_axes]).reshape(-1, height, width)
    kind = np.dtype(np.uint8) if taken.dtype.kind == "b" else taken.dtype.newbyteorder("=")
    return np.ascontiguousarray(taken, dtype=kind)


def check_dtype(dtype: Any) -> None:
    """DecodeError for anything but plain numbers."""
    if np.dtype(dtype).str[1:] not in _KINDS:
        raise DecodeError(f"holds {dtype}, not plain numbers")


def check_size(shape: tuple[int, ...], limit: int, what: str) -> None:
    if any(n < 0 for n in shape) or math.prod(shape) > limit:
        raise InputError(f"{what} declares the shape {shape}, beyond the limit of {limit} values")


def clear(pixels: np.ndarray, nodata: float | None, dates: int = 1) -> np.ndarray | None:
    """uint8 codes (1 clear, 0 nodata) (H, W), of a series (dates, H, W), or None where every pixel is clear.

    A pixel with nodata or a number that is not finite in any band is nodata in all.
    """
    by_date = pixels.reshape(dates, -1, *pixels.shape[1:])
    valid: np.ndarray = np.ones((dates, *pixels.shape[1:]), bool)
    if pixels.dtype.kind == "f":
        valid &= np.isfinite(by_date).all(axis=1)
    if nodata is not None:
        valid &= (by_date != nodata).all(axis=1)
    if valid.all():
        return None
    codes = valid.astype(np.uint8)
    return codes if dates > 1 else codes.reshape(pixels.shape[1:])


def majority(labels: np.ndarray, names: dict[int, str]) -> tuple[str | None, dict[str, Any]]:
    """(class with most labelled pixels, meta): `labels` in the order of their codes, `label_pixels`, `label_share` of the chip.

    Codes without a name count as unlabelled; a chip without labelled pixels has no label.
    """
    codes, counts = np.unique(labels, return_counts=True)
    pixels = {names[int(code)]: int(count) for code, count in zip(codes, counts, strict=True) if int(code) in names}
    if not pixels:
        return None, {}
    first = max(pixels, key=lambda name: pixels[name])
    return first, {"labels": list(pixels), "label_pixels": pixels, "label_share": round(pixels[first] / labels.size, 4)}
