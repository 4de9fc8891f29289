"""Stored chips → what a backbone sees: exact where nothing is asked, torch's own resize else, and invalid pixels never seen."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swath.pretrain.augment import view
from swath.pretrain.config import Augment
from swath.shards.bands import Band, InputContract, Normalisation
from swath.shards.draw import Draw
from swath.shards.errors import InputError
from swath.shards.prepare import Batch, View, prepare
from swath.shards.reader import Chips, Stored

BANDS, SIDE = 2, 24
MEAN, STD = (0.7, -0.3), (2.0, 0.5)


def contract(dtype: str = "float32", nodata: float | None = None, dates: int = 1) -> dict[str, InputContract]:
    made = InputContract(
        modality="made", sensor="none", level="none", unit="reflectance", dtype=dtype, nodata=nodata, dates=dates,
        bands=tuple(Band(name=f"b{n}") for n in range(BANDS)),
        normalisation=Normalisation(mean=MEAN, std=STD, pixels=(1, 1)),
    )  # fmt: skip
    return {"made": made}


def chips(pixels: Tensor, valid: Tensor | None = None, size: Tensor | None = None, scale: float = 1.0, add: float = 0.0) -> Chips:
    count = len(pixels)
    whole = torch.tensor(pixels.shape[2:]).expand(count, 2)
    numbers = torch.arange(count)
    stored = Stored(
        pixels, valid, whole if size is None else size,
        scale=torch.full((count,), scale, dtype=torch.float64), add=torch.full((count,), add, dtype=torch.float64),
    )  # fmt: skip
    return Chips({"made": stored}, id=numbers, visit=numbers * 0, label=numbers)


def noise(count: int = 4, height: int = SIDE, width: int = SIDE, seed: int = 0) -> Tensor:
    return torch.randn(count, BANDS, height, width, generator=torch.Generator().manual_seed(seed))


def normalised(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (x - mean) / std


def resized(x: Tensor, out: tuple[int, int]) -> Tensor:
    """torch's own, in double precision: in single it rounds its weights."""
    return F.interpolate(x.double(), size=out, mode="bilinear", antialias=True, align_corners=False).float()


def image(batch: Batch) -> Tensor:
    return batch.images["made"]


def boxes(*rows: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16])
def test_nothing_asked_is_only_normalised(dtype: torch.dtype):
    pixels = (noise().abs() * 30).to(torch.int32).to(dtype)
    made = prepare(chips(pixels), contract(str(dtype).removeprefix("torch.")), (SIDE, SIDE))
    torch.testing.assert_close(image(made), normalised(pixels.float()), rtol=1e-6, atol=1e-6)
    assert made.valid == {}
    assert made.weight.tolist() == [1.0] * 4
    assert made.id.tolist() == [0, 1, 2, 3]


def test_identity_box_is_bit_for_bit():
    source = chips(noise())
    whole = boxes(*[(0, 0, SIDE, SIDE)] * 4)
    plain = prepare(source, contract(), (SIDE, SIDE))
    assert torch.equal(image(prepare(source, contract(), (SIDE, SIDE), View(box=whole))), image(plain))


def test_scale_and_offset_are_each_samples_own():
    source = chips(noise())
    made = source.stored["made"]
    made.scale, made.add = torch.tensor([1.0, 0.5, 1e-4, 2.0]).double(), torch.tensor([0.0, -1.0, 0.3, 7.0]).double()
    physical = made.pixels * made.scale[:, None, None, None] + made.add[:, None, None, None]
    made = image(prepare(source, contract(), (SIDE, SIDE)))
    torch.testing.assert_close(made, normalised(physical).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("out", [(24, 24), (48, 48), (8, 8), (7, 31), (1, 1), (23, 25), (97, 5)])
def test_whole_image_is_torchs_antialiased_bilinear(out: tuple[int, int]):
    pixels = noise(3, SIDE, 30)
    expected = resized(normalised(pixels), out)
    torch.testing.assert_close(image(prepare(chips(pixels), contract(), out)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("out", [(8, 8), (24, 24), (5, 17)])
def test_whole_pixel_crops_away_from_the_edges_of_the_crop(out: tuple[int, int]):
    """A crop may look at what lies beyond its box but in the chip; an enlarged one at half a pixel, which is compared inside."""
    pixels, box = noise(2), (4, 6, 12, 10)
    top, left, height, width = box
    made = image(prepare(chips(pixels), contract(), out, View(box=boxes(box, box))))
    cut = normalised(pixels)[:, :, top : top + height, left : left + width]
    expected = resized(cut, out)
    rows = slice(math.ceil(out[0] / height), -math.ceil(out[0] / height))
    columns = slice(math.ceil(out[1] / width), -math.ceil(out[1] / width))
    torch.testing.assert_close(made[..., rows, columns], expected[..., rows, columns], rtol=0, atol=1e-5)


def test_each_sample_has_its_own_box():
    pixels = noise(3)
    rows = [(0.0, 0.0, 10.0, 10.0), (3.5, 2.25, 7.0, 20.0), (14.0, 14.0, 10.0, 10.0)]
    together = image(prepare(chips(pixels), contract(), (9, 9), View(box=boxes(*rows))))
    for n, row in enumerate(rows):
        alone = image(prepare(chips(pixels[n : n + 1]), contract(), (9, 9), View(box=boxes(row))))
        torch.testing.assert_close(together[n : n + 1], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_transposed_then_flipped(transpose: bool, rows: bool, columns: bool):
    pixels = noise(2)
    turns = View(
        **{
            name: torch.tensor([on, False])
            for name, on in (("transpose", transpose), ("flip_rows", rows), ("flip_columns", columns))
        }
    )
    made = image(prepare(chips(pixels), contract(), (SIDE, SIDE), turns))
    expected = normalised(pixels)
    first = expected[0].transpose(1, 2) if transpose else expected[0]
    first = first.flip([axis for axis, on in ((1, rows), (2, columns)) if on])
    torch.testing.assert_close(made[0], first)
    torch.testing.assert_close(made[1], expected[1])


def test_quarter_turns_need_squares():
    with pytest.raises(InputError, match="need square images, not 8×9"):
        prepare(chips(noise()), contract(), (8, 9), View(transpose=torch.ones(4, dtype=torch.bool)))


class Recorded:
    """Draws that are given."""

    def __init__(self, **values: list[list[float]]) -> None:
        self.values = {name.replace("__", "/"): torch.tensor(v) for name, v in values.items()}

    def uniform(self, stream: str, n: int) -> Tensor:
        assert self.values[stream].shape[1] == n
        return self.values[stream]

    def order(self, stream: str, n: int) -> Tensor:
        return self.uniform(stream, n).argsort(dim=1, stable=True)


@pytest.mark.parametrize("flip", ["none", "horizontal", "both"])
def test_quarter_turns_are_rot90_of_the_flipped(flip: str):
    """All turns with all flips, the validity with the pixels."""
    cases = [(turn, a, b) for turn in range(4) for a in (0, 1) for b in (0, 1)]
    pixels = noise(len(cases))
    valid = (noise(len(cases), seed=1)[:, :1] > -1).to(torch.uint8)
    drawn = Recorded(turn=[[turn / 4 + 0.1] for turn, *_ in cases], flip=[[0.9 - 0.8 * a, 0.9 - 0.8 * b] for _, a, b in cases])
    augment = Augment.model_validate({"crop": None, "flip": flip, "quarter_turns": True})
    turns = view(augment, drawn, torch.full((len(cases), 2), SIDE))  # pyright: ignore[reportArgumentType]
    made = prepare(chips(pixels, valid), contract(), (SIDE, SIDE), turns)
    seen = set()
    for n, (turn, columns, rows) in enumerate(cases):
        axes = [axis for axis, on in ((2, columns and flip != "none"), (1, rows and flip == "both")) if on]
        expected = torch.rot90(torch.where(valid[n] == 1, normalised(pixels[n]), 0.0).flip(axes), turn, (1, 2))
        torch.testing.assert_close(image(made)[n], expected, rtol=0, atol=1e-6)
        assert torch.equal(made.valid["made"][n], torch.rot90(valid[n].flip(axes), turn, (1, 2)) == 1)
        seen.add((turn, tuple(axes)))
    assert len(seen) == 4 * {"none": 1, "horizontal": 2, "both": 4}[flip]


@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf, 1e30, 0.0])
@pytest.mark.parametrize("out", [(SIDE, SIDE), (10, 10), (50, 50)])
def test_what_stands_in_invalid_pixels_is_never_seen(fill: float, out: tuple[int, int]):
    pixels = noise()
    valid = (torch.rand(4, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(2)) > 0.3).to(torch.uint8)
    valid[0, 0, :12] = 3
    some = View(box=boxes(*[(1.5, 2.0, 20.0, 17.0)] * 4), flip_rows=torch.tensor([True, False, True, False]))
    filled = torch.where(valid == 1, pixels, torch.tensor(fill))
    expected = prepare(chips(pixels, valid), contract(), out, some)
    made = prepare(chips(filled, valid), contract(), out, some)
    assert torch.equal(image(made), image(expected))
    assert torch.equal(made.valid["made"], expected.valid["made"])
    assert torch.isfinite(image(made)).all()
    assert (image(made)[~made.valid["made"].expand_as(image(made))] == 0).all()


def test_what_is_invalid():
    """Codes other than clear, nodata in any band, and what is not finite."""
    pixels = noise(1)
    valid = torch.ones(1, 1, SIDE, SIDE, dtype=torch.uint8)
    valid[..., 0, :4] = torch.tensor([0, 1, 2, 3], dtype=torch.uint8)
    pixels[0, 1, 1, 0], pixels[0, 0, 2, 0] = -999, math.nan
    made = prepare(chips(pixels, valid), contract(nodata=-999), (SIDE, SIDE)).valid["made"][0, 0]
    expected = torch.ones(SIDE, SIDE, dtype=torch.bool)
    for row, column in ((0, 0), (0, 2), (0, 3), (1, 0), (2, 0)):
        expected[row, column] = False
    assert torch.equal(made, expected)


@pytest.mark.parametrize("out", [(12, 12), (8, 8), (48, 48), (17, 29)])
def test_validity_is_by_nearest_neighbour(out: tuple[int, int]):
    """The nearest pixel's own; between two that are equally near, either."""
    valid = (torch.rand(3, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(4)) > 0.4).to(torch.uint8)
    made = prepare(chips(noise(3), valid), contract(), out).valid["made"]
    for y in range(out[0]):
        for x in range(out[1]):
            centre = [(p + 0.5) * SIDE / n - 0.5 for p, n in ((y, out[0]), (x, out[1]))]
            near = [{math.floor(c), math.ceil(c)} if c % 1 == 0.5 else {round(c)} for c in centre]
            for n in range(3):
                allowed = {bool(valid[n, 0, r, c]) for r in near[0] for c in near[1] if 0 <= r < SIDE and 0 <= c < SIDE}
                assert bool(made[n, 0, y, x]) in allowed


def test_resampling_averages_the_valid_ones_only():
    """Around an invalid pixel the weights of the others fill up, so that a flat image stays flat."""
    pixels, valid = torch.full((1, BANDS, 6, 6), 5.0), torch.ones(1, 1, 6, 6, dtype=torch.uint8)
    pixels[..., 0, 0], valid[..., 0, 0] = 1e9, 0
    made = prepare(chips(pixels, valid), contract(), (2, 2))
    assert made.valid["made"].all()
    torch.testing.assert_close(image(made), normalised(torch.full((1, BANDS, 2, 2), 5.0)))


@pytest.mark.parametrize("out", [(16, 16), (5, 5), (40, 40)])
def test_padding_is_never_seen(out: tuple[int, int]):
    """Chips of several sizes are padded at the right and the bottom; the result is that of each alone."""
    sizes = [(24, 24), (10, 24), (17, 9)]
    pixels, valid = noise(3), torch.zeros(3, 1, SIDE, SIDE, dtype=torch.uint8)
    for n, (height, width) in enumerate(sizes):
        valid[n, 0, :height, :width] = 1
    for fill in (0.0, 1e9, math.nan):
        padded = torch.where(valid == 1, pixels, torch.tensor(fill))
        made = prepare(chips(padded, valid, torch.tensor(sizes)), contract(), out)
        assert made.valid["made"].all()
        for n, (height, width) in enumerate(sizes):
            alone = resized(normalised(pixels[n : n + 1, :, :height, :width]), out)
            torch.testing.assert_close(image(made)[n : n + 1], alone, rtol=0, atol=1e-5)


def test_crops_lie_in_the_chip_and_follow_the_sample():
    augment = Augment.model_validate({"crop": (0.2, 1.0), "flip": "both", "quarter_turns": True})
    ids = torch.arange(500)
    size = torch.tensor([[24, 24], [10, 24], [24, 9], [64, 64], [7, 7]]).repeat(100, 1)
    made = view(augment, Draw(1, ids, ids * 0), size)
    assert made.box is not None
    top, left, height, width = made.box.unbind(1)
    assert (made.box >= 0).all()
    assert (top + height <= size[:, 0] + 1e-9).all()
    assert (left + width <= size[:, 1] + 1e-9).all()
    share = height * width / size.prod(1)
    assert 0.19 < share.min() < 0.3
    assert 0.9 < share.max() <= 1 + 1e-9
    some = view(augment, Draw(1, ids[7:9], ids[7:9] * 0), size[7:9])
    assert some.box is not None
    assert torch.equal(some.box, made.box[7:9])


def test_other_bands_are_refused():
    with pytest.raises(InputError, match="chips have 1 bands, the contract 2"):
        prepare(chips(noise()[:, :1]), contract(), (8, 8))


def test_wavelengths_are_those_of_the_contract_to_the_last_bit():
    """An export reads them from JSON: one that were rounded to single precision here would give other features there."""
    (ours,) = contract().values()
    ours = ours.model_copy(update={"bands": (ours.bands[0].model_copy(update={"wavelength_nm": 442.7}), *ours.bands[1:])})
    made = prepare(chips(noise()), {ours.modality: ours}, (SIDE, SIDE)).wavelength_nm[ours.modality]
    assert made.dtype == torch.float64 and made[0].item() == 442.7 and made[1:].isnan().all()
