"""Adaptive rotation: texture scores, the choice of a window, turning it."""

import math

import pytest
import torch
from torch import Tensor

from swath.pretrain.rotation import TOLERANCE, richest_window, rotate, texture, turn
from swath.shards.draw import Draw

SIDES = (6, 4, 2)


def ids(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def scattered(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def test_texture_from_its_definition() -> None:
    """Codes, histogram and norm of every patch by loops over pixels."""
    images = scattered(2, 3, 8, 12)
    got = texture(images, 4)
    for b, image in enumerate(images):
        grey = image.mean(0)
        step = TOLERANCE * grey.std(correction=0)
        for r in range(2):
            for q in range(3):
                codes: dict[tuple[bool, ...], int] = {}
                for y in range(4 * r, 4 * r + 4):
                    for x in range(4 * q, 4 * q + 4):
                        around = [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]
                        inside = [(min(max(i, 0), 7), min(max(j, 0), 11)) for i, j in around]
                        code = tuple(bool(grey[i, j] > grey[y, x] + step) for i, j in inside)
                        codes[code] = codes.get(code, 0) + 1
                norm = math.sqrt(sum((count / 16) ** 2 for count in codes.values()))
                assert abs(got[b, r, q].item() - (1 - norm)) < 1e-6


def test_flat_patches_score_least() -> None:
    """The published score is greatest for flat patches, of which it should find none."""
    images = torch.zeros(1, 1, 16, 64)
    images[..., 16:32] = 3 + 0.001 * scattered(1, 1, 16, 16)  # sensor noise
    images[..., 32:48] = torch.arange(16.0).div(4).round()  # broad stripes
    images[..., 48:] = 3 * scattered(1, 1, 16, 16)
    flat, noise, stripes, rich = texture(images, 16)[0, 0].tolist()
    assert flat < 0.15 and noise < 0.15  # edges to the next patch are in two of sixteen columns
    assert stripes > noise + 0.1 and rich > stripes + 0.3
    assert texture(torch.full((1, 2, 16, 16), 7.0), 8).abs().max() < 1e-6


def test_texture_of_valid_pixels_only() -> None:
    images, valid = scattered(1, 2, 16, 32), torch.ones(1, 1, 16, 32, dtype=torch.bool)
    valid[..., 8:] = False
    with_edge = texture(torch.where(valid, images, 0.0), 8, valid)
    assert with_edge[0, :, 0].min() > 0 and not with_edge[0, :, 1:].any()
    valid[:] = True
    assert torch.equal(texture(images, 8, valid), texture(images, 8))
    assert not texture(images, 8, torch.zeros_like(valid)).any()


def test_windows_of_every_side_are_chosen() -> None:
    """The largest whose mean is the image's; then smaller ones; the smallest whatever it holds."""
    score = torch.full((4, 24, 24), 0.5)
    score[1:, :12, :12] = 0.0  # poor surroundings, wider than any window
    score[1, 2:6, 3:7] = 0.8  # in which four patches a side are rich
    score[2, 5:7, 6:8] = 0.8  # two patches a side
    score[0, 3, 4] = score[1, 4, 4] = score[2:, 5, 6] = 0.9  # the best
    top, left, side = richest_window(score, SIDES)
    assert side.tolist() == [6, 4, 2, 2]
    assert (top[1], left[1]) == (2, 3) and (top[2], left[2]) == (5, 6)
    assert ((top <= ids(3, 4, 5, 5)) & (ids(3, 4, 5, 5) < top + side)).all()
    assert ((left <= ids(4, 4, 6, 6)) & (ids(4, 4, 6, 6) < left + side)).all()


@pytest.mark.parametrize(("rows", "columns", "sides"), [(1, 1, (6, 4, 2)), (2, 5, (6, 4, 2)), (3, 3, (5,)), (12, 7, (6, 4, 2))])
def test_windows_lie_in_any_image(rows: int, columns: int, sides: tuple[int, ...]) -> None:
    top, left, side = richest_window(scattered(16, rows, columns).abs(), sides)
    assert (side <= min(rows, columns)).all() and (side >= 1).all()
    assert (top >= 0).all() and (left >= 0).all() and (top + side <= rows).all() and (left + side <= columns).all()


def test_the_window_lies_where_the_texture_is() -> None:
    images = torch.zeros(3, 2, 48, 48)
    for b, (y, x) in enumerate([(4, 4), (24, 12), (16, 32)]):
        images[b, :, y : y + 16, x : x + 16] = scattered(2, 16, 16)
    turned = rotate(images, None, Draw(0, ids(0, 1, 2), ids(0, 0, 0)), 4, (4,), 45.0)
    assert turned.top.tolist() == [1, 6, 4] and turned.left.tolist() == [1, 3, 8] and turned.side.tolist() == [4, 4, 4]
    window = turned.window(12, 12).unflatten(1, (12, 12))
    for b, (r, q) in enumerate([(1, 1), (6, 3), (4, 8)]):
        expected = torch.zeros(12, 12, dtype=torch.bool)
        expected[r : r + 4, q : q + 4] = True
        assert torch.equal(window[b], expected)
        changed = (turned.images[b] != images[b]).any(0)
        assert changed.any() and not changed[~expected.repeat_interleave(4, 0).repeat_interleave(4, 1)].any()
    # the published one: the diagonal of the image's corner
    released = turned.released_window(12, 12, 4).unflatten(1, (12, 12))
    assert released[0].nonzero().tolist() == [[i, i] for i in range(4)]
    assert released[1].nonzero().tolist() == [[1 + i, i] for i in range(4)]


@pytest.mark.parametrize("side", SIDES)
def test_every_side_is_turned(side: int) -> None:
    """The published code raises, and goes on to the next image, where the window is not of the largest side."""
    images = scattered(1, 2, 64, 96)
    turned = turn(images, None, ids(1), ids(3), ids(side), torch.tensor([0.5]), 8)
    changed = (turned.images != images).any(1)[0]
    inside = turned.window(8, 12).view(8, 12).repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert not changed[~inside].any() and 0.7 < changed[inside].float().mean() < 0.95


def test_quarter_turns_are_exact() -> None:
    images = scattered(3, 2, 24, 32)
    angle = torch.tensor([0.0, math.pi / 2, -math.pi / 2])
    turned = turn(images, None, ids(1, 1, 0), ids(2, 0, 1), ids(4, 4, 5), angle, 4).images
    expected = images.clone()
    expected[1, :, 4:20, :16] = images[1, :, 4:20, :16].rot90(1, (1, 2))
    expected[2, :, :20, 4:24] = images[2, :, :20, 4:24].rot90(-1, (1, 2))
    assert torch.allclose(turned, expected, atol=1e-4)  # interpolated in fp32


def test_corners_stay_and_nothing_comes_from_outside() -> None:
    images = torch.full((1, 1, 32, 32), 100.0)
    images[:, :, 8:24, 8:24] = 1.0
    images[:, :, 8, 8] = 2.0
    turned = turn(images, None, ids(1), ids(1), ids(2), torch.tensor([math.pi / 4]), 8).images
    assert turned[0, 0, 8, 8] == 2.0
    assert (turned[:, :, 8:24, 8:24] - 1).abs().max() <= 1 + 1e-6


def test_what_is_interpolated_from_invalid_pixels_is_invalid() -> None:
    images, valid = scattered(1, 2, 16, 16), torch.ones(1, 1, 16, 16, dtype=torch.bool)
    valid[..., 2:7, 3:9] = False
    images = torch.where(valid, images, 0.0)
    whole = turn(images, torch.ones_like(valid), ids(0), ids(0), ids(2), torch.tensor([0.6]), 8)
    holed = turn(images, valid, ids(0), ids(0), ids(2), torch.tensor([0.6]), 8)
    other = turn(torch.where(valid, images, 50.0), valid, ids(0), ids(0), ids(2), torch.tensor([0.6]), 8)
    assert whole.valid is not None and holed.valid is not None
    assert whole.valid.all() and not holed.valid.all()
    assert torch.equal(holed.images, other.images)
    assert torch.equal(holed.images, torch.where(holed.valid, whole.images, 0.0))


def test_angles_are_the_samples_own() -> None:
    images, many = scattered(2, 1, 16, 16), torch.arange(4096)
    draw = Draw(1, many, torch.zeros_like(many))
    drawn = (draw.uniform("angle", 1)[:, 0] * 2 - 1) * 45
    assert abs(drawn.mean()) < 1.5 and drawn.min() < -44.9 and drawn.max() > 44.9
    turned = rotate(images, None, Draw(1, many[:2], many[:2] * 0), 8, SIDES, 45.0)
    assert torch.allclose(turned.angle.rad2deg(), drawn[:2], atol=1e-4)
    swapped = rotate(images.flip(0), None, Draw(1, many[:2].flip(0), many[:2] * 0), 8, SIDES, 45.0)
    assert torch.equal(swapped.images.flip(0), turned.images)
