"""Thinning and splits by place over random points, at the poles and the date line too, against distances one by one."""

import math

import numpy as np
import pytest

from swath.shards.errors import InputError
from swath.shards.identity import hash_text
from swath.shards.ingestion.blocks import RADIUS_KM, assign_blocks, cells, thin
from swath.shards.sources.source import Item

THREE = {"train": 0.7, "val": 0.1, "test": 0.2}


def haversine(a: Item, b: Item) -> float:
    """Great-circle km by another formula than the code's."""
    assert a.lat is not None
    assert a.lon is not None
    assert b.lat is not None
    assert b.lon is not None
    p, q = math.radians(a.lat), math.radians(b.lat)
    x = math.sin((q - p) / 2) ** 2 + math.cos(p) * math.cos(q) * math.sin(math.radians(b.lon - a.lon) / 2) ** 2
    return 2 * RADIUS_KM * math.asin(math.sqrt(min(1.0, x)))


def points(where: str, count: int, seed: int) -> list[Item]:
    """Points within some 300 km of a place, or on the whole earth."""
    g = np.random.default_rng(seed)
    if where == "earth":
        lat, lon = np.degrees(np.arcsin(g.uniform(-1, 1, count))), g.uniform(-180, 180, count)
    elif where in ("north", "south"):
        away, lon = 3 * np.sqrt(g.random(count)), g.uniform(-180, 180, count)
        lat = (90 - away) * (1 if where == "north" else -1)
        lat[0] = round(lat[0] / 90) * 90  # the pole itself
    else:
        lat, lon = g.uniform(-2, 2, count) + {"date line": -17, "temperate": 52}[where], g.uniform(-3, 3, count)
        if where == "date line":
            lon = np.where(lon < 0, lon + 180, lon - 180)
            lon[:2] = 180, -180
            lat[:2] = -17.2
    return [Item(f"k{n}", f"k{n}", lat=float(y), lon=float(x)) for n, (y, x) in enumerate(zip(lat, lon, strict=True))]


PLACES = ("earth", "north", "south", "date line", "temperate")


@pytest.mark.parametrize("km", [1.0, 25.0, 700.0, 6000.0])
def test_cells_are_about_equal_and_as_large_as_said(km: float):
    """Areas by counting even points on the sphere: by rows for the smallest cells, which hold none otherwise."""
    g = np.random.default_rng(0)
    rows = round(math.pi * RADIUS_KM / km)
    for row in {0, 1, rows // 3, rows // 2, rows - 1} & set(range(rows)):
        bottom, top = (-90 + 180 * r / rows for r in (row, row + 1))
        lat = np.degrees(np.arcsin(g.uniform(math.sin(math.radians(bottom)), math.sin(math.radians(top)), 50)))
        lat = lat.clip(bottom + 1e-9, top - 1e-9)
        fine = cells(np.full(400_000, lat[0]), np.linspace(-180, 180, 400_000, endpoint=False), km)
        area = (
            2 * math.pi * RADIUS_KM**2 * (math.sin(math.radians(top)) - math.sin(math.radians(bottom))) / len(set(fine.tolist()))
        )
        assert 0.6 * km**2 < area < 1.7 * km**2
        assert len({c >> 32 for c in cells(lat, g.uniform(-180, 180, 50), km).tolist()}) == 1


def test_longitudes_go_round():
    lat = np.random.default_rng(1).uniform(-90, 90, 500)
    for a, b in ((-180.0, 180.0), (10.0, 370.0 - 360), (-90.0, 270.0)):
        assert (cells(lat, np.full(500, a), 30) == cells(lat, np.full(500, b), 30)).all()
    assert (cells(np.array([-90.0, 90.0]), np.array([180.0, -180.0]), 30) >= 0).all()


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("km", [5.0, 60.0, 20_000.0])
def test_thinning_keeps_one_of_each_cell_the_one_of_the_smallest_hash(where: str, km: float):
    items = points(where, 300, 2)
    kept, left_out = thin(items, "set", km)
    cell = dict(zip([i.key for i in items], cells(*_columns(items), km).tolist(), strict=True))
    assert len({cell[i.key] for i in kept}) == len(kept) == len(set(cell.values()))
    assert sum(left_out.counts.values()) == 300 - len(kept)
    for item in kept:
        assert item.key == min((i.key for i in items if cell[i.key] == cell[item.key]), key=lambda key: hash_text("set", key))
    shuffled = [items[i] for i in np.random.default_rng(3).permutation(300)]
    assert {i.key for i in thin(shuffled, "set", km)[0]} == {i.key for i in kept}
    assert [i.key for i in kept] == [i.key for i in items if i in kept]  # the order given


def _columns(items: list[Item]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([i.lat for i in items]), np.array([i.lon for i in items])


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("buffer_km", [0.0, 8.0, 40.0])
@pytest.mark.parametrize("seed", range(3))
def test_no_sample_lies_within_the_buffer_of_another_split(where: str, buffer_km: float, seed: int):
    items = points(where, 350, seed)
    made = assign_blocks(items, THREE, block_km=60, buffer_km=buffer_km, seed=seed)
    before = assign_blocks(items, THREE, block_km=60, seed=seed)
    assert all(row is not None for row in before.rows)
    by_split = {name: [i for i, row in zip(items, made.rows, strict=True) if row and row.split == name] for name in THREE}
    assert all(by_split.values())
    assert sum(map(len, by_split.values())) + sum(made.left_out.counts.values()) == 350
    for name, other in (("train", "test"), ("train", "val"), ("val", "test")):
        least = min(haversine(a, b) for a in by_split[name] for b in by_split[other])
        assert least > buffer_km
    # a block is of one split, and nothing else was left out than what was near a sample that stays in a smaller split
    blocks: dict[int, set[str]] = {}
    for item, row, was in zip(items, made.rows, before.rows, strict=True):
        assert was is not None
        blocks.setdefault(was.block, set()).add(was.split)
        if row is not None:
            assert row == was
            continue
        smaller = {"train": ("val", "test"), "test": ("val",), "val": ()}[was.split]
        assert any(haversine(item, near) <= buffer_km * (1 + 1e-6) for name in smaller for near in by_split[name])
    assert all(len(names) == 1 for names in blocks.values())
    for name in THREE:
        assert made.blocks[name] == len({row.block for row in made.rows if row and row.split == name})


def test_a_split_depends_on_place_and_seed_only():
    items = points("earth", 400, 4)
    rows = dict(zip([i.key for i in items], assign_blocks(items, THREE, block_km=200).rows, strict=True))
    some = [items[i] for i in np.random.default_rng(5).permutation(400)[:300]]
    assert [rows[i.key] for i in some] == assign_blocks(some, THREE, block_km=200).rows
    assert list(rows.values()) != assign_blocks(items, THREE, block_km=200, seed=1).rows


def test_fractions_are_met_over_many_blocks():
    items = points("earth", 4000, 6)
    rows = assign_blocks(items, {"none": 0.0, **THREE}, block_km=100).rows
    for name, fraction in {"none": 0.0, **THREE}.items():
        got = sum(row is not None and row.split == name for row in rows) / 4000
        assert abs(got - fraction) <= 4 * math.sqrt(fraction * (1 - fraction) / 4000)


def test_samples_without_a_place():
    items = [*points("earth", 200, 7), Item("lost", "lost"), Item("half", "half", lat=1.0)]
    kept, left_out = thin(items, "set", 10)
    assert {"lost", "half"}.isdisjoint(i.key for i in kept)
    assert left_out.state()["no location"] == {"samples": 2, "examples": ["half", "lost"]}
    made = assign_blocks(items, THREE, block_km=100)
    assert made.rows[-2:] == [None, None]
    assert made.left_out.counts["no location"] == 2
    for call in (
        lambda: thin(items[-2:], "set", 10),
        lambda: assign_blocks(items[-2:], THREE, block_km=100),
        lambda: thin([], "", 1),
    ):
        with pytest.raises(InputError, match="none has one before it is decoded"):
            call()


def test_what_cannot_be_is_one_line():
    items = points("earth", 50, 8)
    for fractions, said in (
        ({"train": 0.5}, "sum to 1, not 0.5"),
        ({"train": 1.5, "test": -0.5}, "between 0 and 1, not 1.5"),
        ({"../x": 1.0}, "cannot be the name of a split"),
        ({"journal": 1.0}, "cannot be the name of a split"),
    ):
        with pytest.raises(InputError, match=said):
            assign_blocks(items, fractions, block_km=10)
    for block_km, buffer_km in ((0.0, 0.0), (float("nan"), 0.0), (10.0, -1.0), (10.0, float("inf"))):
        with pytest.raises(InputError, match="are possible"):
            assign_blocks(items, THREE, block_km=block_km, buffer_km=buffer_km)
    with pytest.raises(InputError, match="cells of 0 km"):
        thin(items, "set", 0)
    with pytest.raises(InputError, match=r"leaves nothing for .* 2 blocks of 20000 km"):
        assign_blocks(points("temperate", 50, 8), THREE, block_km=20_000)
    with pytest.raises(InputError, match=r"latitude 95\.0, longitude 3\.0 are no degrees"):
        thin([Item("a", "a", lat=95.0, lon=3.0)], "set", 1)
