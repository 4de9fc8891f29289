"""Runs of a flattened tensor as boxes, and through a checkpoint."""

from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest
import torch

from swath.pretrain import checkpoint
from swath.pretrain.pieces import Held, Piece, boxes


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (1, 4), (4, 1), (2, 3, 4), (3, 1, 2, 2)])
def test_boxes_hold_a_run_of_elements_in_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for first in range(whole.numel() + 1):
        for last in range(first, whole.numel() + 1):
            made = boxes(shape, first, last)
            parts = [whole[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].flatten() for box in made]
            assert torch.cat([*parts, torch.zeros(0, dtype=torch.int64)]).tolist() == list(range(first, last))
            assert len(made) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize("cuts", [[0, 60], [0, 1, 13, 60], [0, 20, 40, 60], [0, 0, 29, 31, 60]])
def test_pieces_are_read_from_any_checkpoint(cuts: list[int], tmp_path: Path) -> None:
    """What a run of another strategy wrote whole, or in rows, comes in runs of elements."""
    whole = torch.randn(3, 4, 5)
    checkpoint.save(tmp_path, 1, {"a": whole}, {}, keep=1, permanent_every=None)
    for first, last in pairwise(cuts):
        piece = Piece(torch.zeros(last - first), whole.shape, first)
        checkpoint.load_into(tmp_path / checkpoint.FOLDER / checkpoint.name_of(1), {"a": piece})
        assert torch.equal(piece.values, whole.flatten()[first:last])


def test_a_piece_is_written_where_it_belongs(tmp_path: Path) -> None:
    whole = torch.randn(6, 5)
    held: dict[str, Held] = {"a": Piece(whole.flatten().clone(), whole.shape, 0)}
    with checkpoint.Saver(tmp_path, keep=1, permanent_every=None) as saver:
        saver.save(1, held, {})
        cast(Piece, held["a"]).values.zero_()  # training goes on
    assert torch.equal(checkpoint.read_checkpoint(tmp_path)[1]["a"], whole)
