"""Procedural ground for the synthetic scenes: relief, regions of one land cover, parcels, roads, and what changes.

A region is a cell of a domain-warped Voronoi diagram, 100 to 200 pixels wide, and has one land cover; each has its own
rotated grid of parcels, with coordinates along and across its rows. Copses and rivers are drawn over the regions.
Lengths are in pixels; every array of a `Ground` is (H, W), or (N,) after `Ground.at`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.spatial import cKDTree  # pyright: ignore[reportAttributeAccessIssue]

Floats = NDArray[np.floating[Any]]  # float32 wherever it is large
Keys = NDArray[np.uint64]

COVERS = (
    "water",
    "broadleaf forest",
    "conifer forest",
    "cropland",
    "grassland",
    "orchard",
    "residential",
    "industrial",
    "bare ground",
    "wetland",
)
"""Land-cover names; the code in a raster is the position here plus one, and 0 is nodata."""

WATER, BROADLEAF, CONIFER, CROP, GRASS, ORCHARD, RESIDENTIAL, INDUSTRIAL, BARE, WETLAND = range(1, 11)

# How a region's log-odds of each cover answer to height and wetness (both standard normal), with a constant.
_AFFINITY = np.array(
    [
        (-0.9, 0.4, -0.2),
        (0.2, 0.1, 0.0),
        (0.7, 0.0, 0.0),
        (-0.3, 0.0, 0.3),
        (0.2, 0.1, 0.2),
        (-0.1, -0.3, 0.0),
        (-0.4, -0.1, 0.2),
        (-0.5, -0.1, -0.1),
        (0.4, -0.4, -0.1),
        (-0.6, 0.7, -0.1),
    ]
)

# What a piece of land may turn into; water, housing and industry stay.
_BECOMES = {
    BROADLEAF: (BARE, CROP),
    CONIFER: (BARE, GRASS),
    CROP: (RESIDENTIAL, INDUSTRIAL),
    GRASS: (CROP, RESIDENTIAL),
    ORCHARD: (CROP, INDUSTRIAL),
    BARE: (GRASS, INDUSTRIAL),
    WETLAND: (WATER, CROP),
}


def generator(seed: int, scene: int, date: int, stream: str) -> np.random.Generator:
    """A generator of its own for each named use: switching one on (clouds, SAR) leaves the others as they were."""
    return np.random.default_rng([seed, scene, date, int.from_bytes(stream.encode(), "little")])


def unit(key: Keys, salt: int) -> Floats:
    """Uniform numbers in [0, 1) that depend on `key` and `salt` alone (SplitMix64's finaliser)."""
    z = key + np.uint64((salt * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & 0xFFFFFFFFFFFFFFFF)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def cell_key(*parts: NDArray) -> Keys:
    """One 64-bit key from integer-valued arrays of one shape."""
    key = np.zeros(parts[0].shape, np.uint64)
    for part in parts:
        key = (key ^ part.astype(np.int64).view(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    return key


def noise(rng: np.random.Generator, size: int, scale: float, slope: float) -> Floats:
    """Random field (size, size), mean 0, deviation 1: flat spectrum above `scale` pixels, falling as k^-slope below."""
    white = rng.standard_normal((size, size), dtype=np.float32)
    ky = fft.fftfreq(size).astype(np.float32)[:, None]
    kx = fft.rfftfreq(size).astype(np.float32)[None]
    spectrum = np.asarray(fft.rfft2(white)) * (1 + (ky**2 + kx**2) * np.float32(scale**2)) ** np.float32(-slope / 2)
    spectrum[0, 0] = 0
    field = np.asarray(fft.irfft2(spectrum, s=(size, size)), dtype=np.float32)
    return field / field.std()


def _from_contour(rng: np.random.Generator, size: int) -> Floats:
    """Pixels to a winding line across the scene, (H, W): the contour of a smooth field, to first order."""
    field = noise(rng, size, 250, 4.0)
    down, east = np.gradient(field)
    return np.abs(field - rng.uniform(-0.6, 0.6)) / (np.hypot(down, east) + 1e-3)


@dataclass(frozen=True)
class Ground:
    """What lies where, the same on every date."""

    elevation: Floats  # metres
    region: Keys
    parcel: Keys
    along: Floats  # pixels, in the rotated grid of the region
    across: Floats
    edge: Floats  # pixels to the parcel's border
    road: Floats  # share of the pixel, 0 to 1
    fine: Floats  # noise fields, mean 0, deviation 1, with grains of about 1, 3, 9 and 50 pixels
    lumpy: Floats
    mottled: Floats
    broad: Floats

    def at(self, index: NDArray[np.intp]) -> "Ground":
        """The same ground at N flat pixel indices, every array (N,)."""
        return Ground(**{f.name: getattr(self, f.name).reshape(-1)[index] for f in fields(self)})


def ground(seed: int, scene: int, size: int) -> tuple[Ground, NDArray[np.uint8]]:
    """The ground of a scene, and its land cover (H, W) on date 0."""
    rng = generator(seed, scene, 0, "ground")
    height, wetness = noise(rng, size, 180, 3.0), noise(rng, size, 180, 3.0)
    yx = np.moveaxis(np.mgrid[:size, :size], 0, -1).astype(np.float32)
    warp = 16 * np.stack([noise(rng, size, 70, 3.6), noise(rng, size, 70, 3.6)], -1)

    # One seed point per square of a jittered grid that reaches a cell beyond the scene on every side.
    pitch = rng.uniform(105, 140)
    n = int(np.ceil(size / pitch)) + 2
    squares = np.moveaxis(np.mgrid[:n, :n], 0, -1).reshape(-1, 2)
    points = (squares - 1 + rng.uniform(0, 1, squares.shape)) * pitch + rng.uniform(-0.5, 0.5, 2) * pitch
    distance, nearest = cKDTree(points).query((yx + warp).reshape(-1, 2), k=2)
    region = nearest[:, 0].reshape(size, size)
    gap = (distance[:, 1] - distance[:, 0]).astype(np.float32).reshape(size, size)

    inside = np.clip(points, 0, size - 1).astype(np.intp)
    y, x = inside[:, 0], inside[:, 1]
    odds = np.stack([height[y, x], wetness[y, x], np.ones(len(points))], -1) @ _AFFINITY.T
    kind = (odds + rng.gumbel(0, 0.8, odds.shape)).argmax(-1).astype(np.uint8) + 1
    cover = kind[region].astype(np.uint8)

    open_land = np.isin(cover, (CROP, GRASS, ORCHARD, BARE))
    cover[open_land & (noise(rng, size, 30, 2.6) > 2.1)] = BROADLEAF
    cover[open_land & (noise(rng, size, 30, 2.6) > 2.3)] = CONIFER
    cover[open_land & (noise(rng, size, 25, 3.0) > 2.3)] = RESIDENTIAL
    if rng.random() < 0.6:
        cover[_from_contour(rng, size) < rng.uniform(1.5, 4)] = WATER
    highway = np.minimum(_from_contour(rng, size), _from_contour(rng, size))
    road = np.clip(np.maximum(0.9 - 0.6 * gap, 1.2 - highway), 0, 0.9) * ~np.isin(cover, (WATER, WETLAND))

    turn = rng.uniform(0, np.pi, len(points)).astype(np.float32)[region]
    across = yx[..., 1] * np.cos(turn) + yx[..., 0] * np.sin(turn)
    along = yx[..., 0] * np.cos(turn) - yx[..., 1] * np.sin(turn)
    width = rng.uniform(11, 30, len(points)).astype(np.float32)[region]
    length = rng.uniform(22, 55, len(points)).astype(np.float32)[region]
    strip = np.floor(across / width)
    shifted = along / length + unit(cell_key(region, strip), 1)
    block = np.floor(shifted)
    to_side = (0.5 - np.abs(across / width - strip - 0.5)) * width
    to_end = (0.5 - np.abs(shifted - block - 0.5)) * length
    here = Ground(
        elevation=(np.exp(0.4 * height) * rng.uniform(40, 150)).astype(np.float32),
        region=cell_key(region, np.full_like(region, scene)) ^ rng.integers(2**63, dtype=np.uint64),
        parcel=cell_key(region, strip, block) ^ rng.integers(2**63, dtype=np.uint64),
        along=along.astype(np.float32),
        across=across.astype(np.float32),
        edge=np.minimum(to_side, to_end).astype(np.float32),
        road=road.astype(np.float32),
        fine=rng.standard_normal((size, size), dtype=np.float32),
        lumpy=noise(rng, size, 6, 4.0),
        mottled=noise(rng, size, 25, 4.0),
        broad=noise(rng, size, 90, 3.0),
    )
    return here, cover


def changed(cover: NDArray[np.uint8], seed: int, scene: int, date: int) -> NDArray[np.uint8]:
    """Land cover (H, W) one date later: up to a twelfth is cleared, built on, drained or flooded."""
    rng = generator(seed, scene, date, "change")
    size = len(cover)
    place, choice = noise(rng, size, 40, 3.0), noise(rng, size, 120, 3.0) > 0
    struck = place > np.quantile(place, 0.92)
    after = cover.copy()
    for kind, (one, other) in _BECOMES.items():
        after[struck & (cover == kind)] = one
        after[struck & (cover == kind) & choice] = other
    return after


def footprint(rng: np.random.Generator, size: int) -> NDArray[np.bool_]:
    """Where the sensor saw anything (H, W): a swath with slanting sides that cuts off up to two opposite corners."""
    y, x = np.mgrid[:size, :size] + 0.5
    if rng.random() < 0.5:
        x = size - x
    wide, high = size * rng.uniform(0.12, 0.4), size * rng.uniform(0.3, 0.9)
    cuts = rng.choice(3, p=(0.25, 0.5, 0.25))
    seen = np.ones((size, size), dtype=bool)
    if cuts >= 1:
        seen &= x / wide + y / high >= 1
    if cuts == 2:
        seen &= (size - x) / wide + (size - y) / high >= rng.uniform(0.5, 1.0)
    return seen


MATERIALS = (
    "clear water",
    "turbid water",
    "leaf",
    "needle",
    "grass",
    "straw",
    "light soil",
    "dark soil",
    "asphalt",
    "tile",
    "metal",
    "shade",
)
"""What a pixel is mixed from; `scenes` holds their spectra and backscatter."""

Mix = Mapping[str, Floats | float]


def mixed(here: Ground, cover: NDArray[np.uint8], seed: int, scene: int, date: int, green: float) -> Floats:
    """Share of each material in each pixel, (len(MATERIALS), H, W), summing to 1; `green` in [0, 1] is the season."""
    salt = int(generator(seed, scene, date, "season").integers(2**31))
    share = np.zeros((len(MATERIALS), cover.size), np.float32)
    for code, paint in _PAINTERS.items():
        index = np.flatnonzero(cover == code)
        if index.size:
            for name, value in paint(here.at(index), green, salt).items():
                share[MATERIALS.index(name), index] = value
    share = np.maximum(share, 0) * (1 - here.road.reshape(-1))
    share /= np.maximum(share.sum(0) + here.road.reshape(-1), 1e-6)
    share[MATERIALS.index("asphalt")] += 1 - share.sum(0)
    return share.reshape(-1, *cover.shape)


def _field(here: Ground, green: float, salt: int, pattern: Floats) -> Mix:
    """Plants over soil. Every farmed cover draws greenness, contrast and soil alike, and differs by `pattern` alone."""
    level = green + 0.65 * (unit(here.region, salt) - 0.5) + 0.6 * (unit(here.parcel, salt) - 0.5)
    contrast = 0.05 + 0.15 * unit(here.region, 3) + 0.12 * unit(here.parcel, 3)
    plants = np.clip(level + contrast * pattern + 0.04 * here.fine, 0.02, 0.98)
    bare = 1 - plants
    dry = bare * (0.7 * unit(here.region, salt + 1) + 0.3 * unit(here.parcel, salt + 1))
    tone = 0.7 * unit(here.region, 4) + 0.3 * unit(here.parcel, 4)
    leafy = 0.8 * unit(here.region, 5)
    return {
        "grass": plants * (1 - leafy),
        "leaf": plants * leafy,
        "straw": dry,
        "light soil": (bare - dry) * tone,
        "dark soil": (bare - dry) * (1 - tone),
    }


def _crop(here: Ground, green: float, salt: int) -> Mix:
    rows = np.where(unit(here.parcel, 7) < 0.3, here.along, here.across)
    return _field(here, green, salt, 1.41 * np.cos(2 * np.pi * rows / (3.2 + 4 * unit(here.parcel, 6))))


def _grass(here: Ground, green: float, salt: int) -> Mix:
    return _field(here, green, salt, 0.8 * here.mottled + 0.6 * here.lumpy)


def _orchard(here: Ground, green: float, salt: int) -> Mix:
    turn = 2 * np.pi / (3.2 + 4 * unit(here.parcel, 6))
    return _field(here, green, salt, 2 * np.cos(turn * here.across) * np.cos(turn * here.along))


def _stand(here: Ground, green: float, needles: Floats, crowns: Floats) -> Mix:
    """Trees: crowns and the shade between them; broadleaved ones are bare when it is not `green`."""
    shade = np.clip(0.22 + 0.22 * (unit(here.region, 3) - 0.5) - 0.13 * crowns, 0.02, 0.8)
    lit = 1 - shade
    leaves = lit * (1 - needles)
    fresh = leaves * np.clip(green + 0.35 + 0.3 * (unit(here.region, 7) - 0.5), 0.1, 1)
    return {
        "needle": lit * needles,
        "leaf": fresh,
        "dark soil": 0.6 * (leaves - fresh),
        "straw": 0.4 * (leaves - fresh),
        "shade": shade,
    }


def _broadleaf(here: Ground, green: float, salt: int) -> Mix:
    needles = np.clip(0.75 * unit(here.region, 8) + 0.1 * here.mottled, 0, 1)
    return _stand(here, green, needles, here.lumpy + 0.3 * here.fine)


def _conifer(here: Ground, green: float, salt: int) -> Mix:
    """Planted in compartments of one age, with rides between them."""
    needles = np.clip(0.25 + 0.75 * unit(here.region, 8) + 0.1 * here.mottled, 0, 1)
    mix = _stand(here, green, needles, 0.9 * here.fine + 1.2 * (unit(here.parcel, 9) - 0.5))
    return _over(mix, "grass", np.where(here.edge < 0.5, 0.3, 0.0))


def _residential(here: Ground, green: float, salt: int) -> Mix:
    """Streets every 8 to 12 pixels, and between them houses of one to two pixels in gardens."""
    spacing = 8 + 4 * unit(here.region, 9)
    street = (here.across % spacing < 1.2) | (here.along % (2 * spacing) < 1.2)
    lot = cell_key(here.region.view(np.int64), np.floor(here.across / 3), np.floor(here.along / 3))
    built = (here.across % 3 < 2) & (here.along % 3 < 2) & (unit(lot, 1) < 0.3 + 0.5 * unit(here.region, 10))
    mix = _field(here, green, salt, 0.5 * here.fine)
    roof = np.where(built & ~street, 0.35 + 0.45 * unit(lot, 2), 0.0)
    red = unit(here.region, 11) * 0.6 + 0.4 * unit(lot, 3)
    mix = _over(mix, "asphalt", np.where(street, 0.7, 0.0))
    return _over(_over(mix, "tile", roof * red), "metal", 0.6 * roof * (1 - red))


def _industrial(here: Ground, green: float, salt: int) -> Mix:
    """Halls of 10 to 20 pixels, each under one roof, with yards between them."""
    wide, long = 9 + 6 * unit(here.region, 9), 13 + 9 * unit(here.region, 10)
    hall = cell_key(here.region.view(np.int64), np.floor(here.across / wide), np.floor(here.along / long))
    inside = here.across % wide < (0.4 + 0.5 * unit(hall, 5)) * wide
    inside &= here.along % long < (0.4 + 0.5 * unit(hall, 6)) * long
    built = inside & (unit(hall, 1) < 0.5 + 0.4 * unit(here.region, 12))
    mix = _over(_field(here, green, salt, 0.5 * here.fine), "asphalt", 0.2 + 0.4 * unit(hall, 4))
    roof = np.where(built, 0.3 + 0.5 * unit(hall, 2), 0.0)
    red = unit(here.region, 11) * 0.6 + 0.4 * unit(hall, 3)
    return _over(_over(mix, "tile", roof * red), "metal", 0.7 * roof * (1 - red))


def _bare(here: Ground, green: float, salt: int) -> Mix:
    """Quarries, scree and building land: rough at every scale, with some stone and a little growth."""
    rough = 0.7 * here.mottled + 0.5 * here.lumpy + 0.5 * here.fine
    mix = _field(here, green - 0.35, salt, 0.7 * here.mottled + 0.5 * here.fine)
    stone = 0.3 * unit(here.region, 11) + 0.10 * rough
    return _over(_over(mix, "metal", np.clip(0.6 * stone, 0, 0.7)), "asphalt", np.clip(0.3 - 0.15 * rough, 0, 0.6))


def _water(here: Ground, green: float, salt: int) -> Mix:
    turbid = np.clip(salt / 2**31 + 0.15 * here.broad, 0, 1)  # by date, and across regions without a seam
    weed = np.clip(0.10 * unit(here.region, 3) + 0.03 * here.mottled, 0, 1)
    return {"clear water": (1 - turbid) * (1 - weed), "turbid water": turbid * (1 - weed), "leaf": weed}


def _wetland(here: Ground, green: float, salt: int) -> Mix:
    """Reeds and bushes, threaded by open water."""
    mix = _over(_field(here, green, salt, here.lumpy), "needle", np.clip(0.25 + 0.2 * here.lumpy, 0, 0.8))
    level = 0.25 + 0.9 * unit(here.region, salt + 2)
    return _over(mix, "turbid water", np.clip(1.2 - 2.2 * np.abs(here.mottled) + 0.5 * level, 0.05, 0.9) * level)


def _over(mix: Mix, name: str, share: Floats) -> Mix:
    """`mix` with `share` of each pixel covered by one material."""
    covered = {key: value * (1 - share) for key, value in mix.items()}
    covered[name] = covered.get(name, 0.0) + share
    return covered


_PAINTERS: dict[int, Callable[[Ground, float, int], Mix]] = {
    WATER: _water,
    BROADLEAF: _broadleaf,
    CONIFER: _conifer,
    CROP: _crop,
    GRASS: _grass,
    ORCHARD: _orchard,
    RESIDENTIAL: _residential,
    INDUSTRIAL: _industrial,
    BARE: _bare,
    WETLAND: _wetland,
}
