"""Bytes ↔ arrays: what comes back, and that no damaged byte ends in a traceback."""

import io

import numpy as np
import pytest
from PIL import Image

from swath.shards.codec import MAX_VALUES, DecodeError, decode, encode_npy


def encoded(kind: str, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 12, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(3, 5, 7), (13, 4, 4), (6, 6), (1, 1, 1)])
def test_npy_comes_back_and_numpy_reads_it(dtype: str, shape: tuple[int, ...]):
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    data = encode_npy(array)
    assert np.array_equal(decode(data, "npy"), array if array.ndim == 3 else array[None])
    assert decode(data, "npy").dtype == array.dtype
    assert np.array_equal(np.load(io.BytesIO(data)), array)


def test_each_npy_is_read_by_its_own_header():
    """Headers that were seen before are not parsed again: other shapes and dtypes between them must not matter."""
    kinds = [(dtype, shape) for dtype in ("uint8", "int16", "uint16", "float32") for shape in ((2, 3, 4), (4, 3, 2), (1, 4, 6))]
    arrays = [np.arange(24, dtype=dtype).reshape(shape) for dtype, shape in kinds]
    whole = [encode_npy(array) for array in arrays]
    for array, data in zip(arrays * 2, whole * 2, strict=True):
        made = decode(data, "npy")
        assert (made.dtype, made.tolist()) == (array.dtype, array.tolist())
        with pytest.raises(DecodeError, match="cut short"):
            decode(data[:-1], "npy")


def test_big_endian_is_written_little_endian():
    array = np.arange(12, dtype=">i2").reshape(1, 3, 4)
    made = decode(encode_npy(array), "npy")
    assert (made.dtype.str, made.tolist()) == ("<i2", array.tolist())


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_are_channels_first(mode: str):
    expected = np.asarray(Image.open(io.BytesIO(encoded("PNG", mode))))
    expected = expected[None] if mode == "L" else np.moveaxis(expected, 2, 0)
    assert np.array_equal(decode(encoded("PNG", mode), "png"), expected)
    assert decode(encoded("JPEG", mode), "jpg").shape == expected.shape


@pytest.mark.parametrize(
    "array", [np.zeros(4), np.zeros((2, 2, 2, 2)), np.zeros((2, 2), complex), np.asfortranarray(np.zeros((3, 4)))]
)
def test_npy_of_another_kind_is_refused(array: np.ndarray):
    buffer = io.BytesIO()
    np.save(buffer, array)
    with pytest.raises(DecodeError):
        decode(buffer.getvalue(), "npy")


def test_npy_that_declares_too_much_is_refused_unread():
    side = int(MAX_VALUES**0.5) + 1
    data = encode_npy(np.zeros((1, 1), np.uint8)).replace(b"(1, 1)", b"(%d, %d)" % (side, side))
    with pytest.raises(DecodeError):
        decode(data, "npy")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "npy"])
def test_damaged_bytes_are_decoded_or_refused(kind: str):
    """Bits flipped anywhere, and every length cut: an array or a DecodeError, nothing else."""
    good = encode_npy(np.zeros((3, 8, 8), np.uint16))
    if kind != "npy":
        good = encoded({"png": "PNG", "jpg": "JPEG", "tif": "TIFF"}[kind])
    rng = np.random.default_rng(1)
    damaged = [good[:length] for length in range(0, len(good), max(len(good) // 60, 1))]
    for _ in range(200):
        flipped = bytearray(good)
        for place in rng.integers(0, len(good), rng.integers(1, 6)):
            flipped[place] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    refused = 0
    for data in damaged:
        try:
            assert decode(data, "png" if kind == "tif" else kind).ndim == 3
        except DecodeError as error:
            refused += 1
            assert "object at 0x" not in str(error)
    assert refused >= 50
