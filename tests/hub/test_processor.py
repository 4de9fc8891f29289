"""The exported image processor and the engine's own preparation are the same function."""

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from swath.shards.bands import Band, InputContract
from swath.shards.prepare import View, prepare
from swath.shards.reader import Chips, Stored
from tests.hub.made import contract

pytest.importorskip("transformers")


def processor(bands: InputContract) -> Any:
    # the template itself: it imports nothing of ours
    module = importlib.import_module("swath.hub.templates.image_processing_swath")
    return module.SwathImageProcessor(bands.model_dump(mode="json"), {"height": 16, "width": 16})


def chips(pixels: np.ndarray, scale: float, add: float) -> Chips:
    count = torch.zeros(len(pixels), dtype=torch.int64)
    size = torch.tensor([pixels.shape[2:]] * len(pixels))
    each = torch.ones(len(pixels), dtype=torch.float64)
    stored = Stored(torch.from_numpy(pixels), None, size, scale * each, add * each)
    return Chips({"optical": stored}, count, count, count)


def random(side: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 6000, (3, 4, side, side)).astype(np.uint16)


def test_equals_prepare_bit_for_bit() -> None:
    pixels, bands = random(), contract()
    pixels[0, :, 2:5, 3:9] = 0  # nodata
    expected = prepare(chips(pixels, 1e-4, -0.1), {"optical": bands}, (16, 16)).images["optical"]
    made = processor(bands)(pixels, scale=1e-4, add=-0.1)["pixel_values"]
    assert torch.equal(made, expected) and made.dtype == torch.float32
    assert (made[0, :, 3, 4] == 0).all()


@pytest.mark.parametrize("side", [16, 37])
def test_a_series_is_normalised_date_by_date(side: int) -> None:
    """What is nodata at one date is seen at the other. Resizing, like that of one date, to 2e-5."""
    pixels = np.concatenate([random(side), random(side)[::-1]], axis=1).clip(1)  # two dates of four bands
    pixels[0, 4:, 2:9, 3:9] = 0
    bands = contract().model_copy(update={"dates": 2})
    expected = prepare(chips(pixels, 1e-4, 0), {"optical": bands}, (16, 16), View()).images["optical"]
    made = processor(bands)(list(pixels), scale=1e-4)["pixel_values"]
    torch.testing.assert_close(made, expected, rtol=0, atol=0 if side == 16 else 2e-5)
    assert made[0, :4, 1:4, 2:4].all() and not made[0, 4:, 2 * 16 // side + 1, 5 * 16 // side].any()
    with pytest.raises(ValueError, match=r"has 4 bands; the model takes 4 band\(s\) in this order at each of 2 dates: B02"):
        processor(bands)(pixels[0, :4], scale=1e-4)


@pytest.mark.parametrize("side", [10, 16, 37])
def test_resizing_agrees_with_prepare(side: int) -> None:
    pixels, bands = random(side), contract(nodata=None)
    source = chips(pixels, 1e-4, 0)
    expected = prepare(source, {"optical": bands}, (16, 16), View()).images["optical"]
    torch.testing.assert_close(processor(bands)(list(pixels), scale=1e-4)["pixel_values"], expected, rtol=0, atol=2e-5)


def test_layouts() -> None:
    pixels, make = random()[0], processor(contract())
    first = make(pixels, scale=1e-4)["pixel_values"]
    assert torch.equal(first, make(np.moveaxis(pixels, 0, 2), scale=1e-4)["pixel_values"])
    assert torch.equal(first, make(torch.from_numpy(pixels), scale=1e-4)["pixel_values"])
    both_ways = pixels[:, :, :4]  # (4, 16, 4): either end could be bands
    kept = make(both_ways, scale=1e-4, do_resize=False)["pixel_values"]
    assert kept.shape == (1, 4, 16, 4)
    turned = make(both_ways, scale=1e-4, do_resize=False, input_data_format="channels_last")["pixel_values"]
    assert turned.shape == (1, 4, 4, 16)


def test_wrong_input_is_refused_with_the_bands() -> None:
    make = processor(contract())
    for bad in (random()[0, :3], random()[0, 0], np.zeros((2, 2, 2, 2, 2), np.float32)):
        with pytest.raises(ValueError, match="B02, B03, B04, B08"):
            make(bad, scale=1e-4)
    with pytest.raises(ValueError, match="pass scale="):
        make(random()[0])
    with pytest.raises(ValueError, match="differ in size"):
        make([random()[0], random(24)[0]], scale=1e-4, do_resize=False)
    with pytest.raises(ValueError, match="no images"):
        make([])


def test_pil_images_only_where_the_bands_are_red_green_blue() -> None:
    image = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
    common = ("red", "green", "blue")
    named = contract("B04", "B03", "B02", unit="digital number", nodata=None)
    named = named.model_copy(
        update={"bands": tuple(Band(name=b.name, common_name=c) for b, c in zip(named.bands, common, strict=True))}
    )
    assert torch.equal(processor(named)(image)["pixel_values"], processor(named)(np.array(image))["pixel_values"])
    with pytest.raises(ValueError, match="red, green, blue"):
        processor(contract("B02", "B03", "B04", unit="digital number"))(image)
