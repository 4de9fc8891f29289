"""Scenes read on the grid of another, so that pixel lies on pixel; what is not there is a mask."""

import hashlib
from collections.abc import Sequence
from typing import TypeGuard

import numpy as np

from swath.shards.bands import InputContract
from swath.shards.codec import MAX_VALUES
from swath.shards.errors import InputError
from swath.shards.sources.cut import Scenes, decoded
from swath.shards.sources.match import (
    read_onto,
)
from swath.shards.sources.scene import Grid, Stack
from swath.shards.sources.source import Part, Source


def on_ground(source: Source) -> TypeGuard[Scenes]:
    """Whether all of `source` are scenes that know where they lie."""
    return isinstance(source, Scenes) and all(grid.crs is not None for grid in source.grids if grid is not None)


def grid_of(source: Scenes, number: int) -> Grid:
    grid = source.grids[number]
    assert grid is not None
    return grid


def told(contract: InputContract, more: str | None) -> str | None:
    return ", ".join(text for text in (contract.resampling, more) if text) or None


def check_size(source: Scenes, contracts: dict[str, InputContract]) -> None:
    chip = max((item.place[3] * item.place[4] for item in source.items), default=0)
    channels = max(contract.channels for contract in contracts.values())
    if chip * channels > MAX_VALUES:
        raise InputError(f"chips of {chip} pixels in {channels} channels are beyond {MAX_VALUES} values; give a smaller --chip")


def mark(*said: object) -> str:
    return hashlib.sha256(repr(said).encode()).hexdigest()


def part_on(source: Scenes, stack: Stack, grid: Grid, window: Sequence[int], resampling: str) -> Part:
    """A stack of `source` in a window of another grid; what lies beyond it is nodata."""
    nodata = source.contracts[stack.modality].nodata
    read = [read_onto(path, source.fingerprint, grid, window, resampling, nodata) for path in stack.paths]
    pixels = np.concatenate([values for values, _ in read])
    seen = np.logical_and.reduce([inside for _, inside in read])
    if pixels.dtype.kind == "f":
        seen &= np.isfinite(pixels).all(axis=0)
    if nodata is not None:
        seen &= (pixels != nodata).all(axis=0)
    codes = seen.astype(np.uint8)
    if stack.mask is not None:
        mask, inside = read_onto(stack.mask.path, source.fingerprint, grid, window, "nearest", None)
        codes *= decoded(mask[0], stack.mask) * inside
    scale = 1.0 if stack.scale is None else stack.scale
    return Part(pixels, valid=None if (codes == 1).all() else codes, scale=scale, add=stack.add, scale_source=stack.said)
