"""Synthetic Sentinel-2 scenes: GeoTIFFs that the demo, the documentation and the tests use instead of a download.

Material shares (`terrain`) times spectra give reflectance at the ground; relief, haze, clouds and noise turn that into
what a sensor would deliver, each band at its native 10, 20 or 60 m. Every value is a function of (seed, scene, date).
Shapes: H, W pixels of 10 m; M materials; row 0 is north.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date as Day
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swath.shards.errors import InputError
from swath.shards.terrain import COVERS, MATERIALS, Floats, Ground, changed, footprint, generator, ground, mixed, noise

BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
_NATIVE = (6, 1, 1, 1, 2, 2, 2, 1, 2, 6, 6, 2, 2)  # pixels of 10 m per native pixel
_WAVELENGTH_NM = np.array((443, 490, 560, 665, 705, 740, 783, 842, 865, 945, 1375, 1610, 2190))

# Reflectance in percent, bands as above; B10 sees cirrus only, so its column is idle.
_SPECTRA = {
    "clear water": (4.5, 4.0, 3.5, 2.0, 1.8, 1.2, 1.1, 0.9, 0.8, 0.7, 0, 0.4, 0.3),
    "turbid water": (5.5, 6.5, 8.5, 7.5, 7.0, 4.0, 3.8, 3.0, 2.8, 2.0, 0, 0.9, 0.6),
    "leaf": (2.5, 3.0, 6.0, 3.2, 8.5, 27, 36, 39, 41, 40, 0, 21, 10),
    "needle": (1.9, 2.2, 4.0, 2.6, 5.5, 18, 23, 25, 26, 26, 0, 12, 5.5),
    "grass": (3.0, 4.2, 8.0, 5.0, 12, 31, 39, 42, 43, 43, 0, 25, 13),
    "straw": (6.0, 8.0, 12, 16, 19, 23, 26, 28, 30, 31, 0, 36, 25),
    "light soil": (9.0, 12, 17, 22, 25, 27, 29, 31, 33, 34, 0, 40, 34),
    "dark soil": (4.0, 5.5, 8.0, 10.5, 12, 13.5, 15, 16.5, 17.5, 18, 0, 22, 18),
    "asphalt": (9.0, 10, 11.5, 13, 14, 14.5, 15, 15.5, 16, 16.5, 0, 19, 17),
    "tile": (7.0, 9.0, 13, 21, 24, 25.5, 27, 28.5, 29.5, 30, 0, 35, 31),
    "metal": (22, 25, 28, 30, 31, 32, 33, 34, 35, 35, 0, 37, 33),
    "shade": (1.2, 1.2, 1.4, 1.0, 1.6, 4.0, 5.0, 5.5, 5.6, 5.5, 0, 3.0, 1.4),
}
# What the air adds when it is clean, how much of the ground it lets through, and how a cloud looks; top of atmosphere.
_PATH = np.array((10.0, 7.5, 4.3, 2.3, 1.9, 1.5, 1.2, 0.9, 0.8, 0.3, 0.18, 0.15, 0.08)) / 100
_THROUGH = np.array((0.78, 0.82, 0.87, 0.91, 0.90, 0.90, 0.94, 0.95, 0.96, 0.42, 0.0, 0.95, 0.94))
_CLOUD = np.array((0.66, 0.66, 0.66, 0.67, 0.68, 0.68, 0.69, 0.70, 0.70, 0.36, 0.02, 0.45, 0.32))

# Mean backscatter in dB (VV, VH).
_BACKSCATTER_DB = {
    "clear water": (-21, -28),
    "turbid water": (-19.5, -27.5),
    "leaf": (-9.5, -15),
    "needle": (-9, -15),
    "grass": (-11.5, -18),
    "straw": (-12, -19.5),
    "light soil": (-13.5, -22.5),
    "dark soil": (-12.5, -21.5),
    "asphalt": (-16, -24),
    "tile": (-4, -12),
    "metal": (-1, -10),
    "shade": (-9.5, -15.5),
}
_LOOKS = 4.4  # equivalent number of looks of a Sentinel-1 IW ground-range product

CLEAR, CLOUD, SHADOW = 1, 2, 3  # coding of `valid`; 0 is nodata
UNCHANGED, CHANGED = 1, 2

_COLOURS = (
    (40, 90, 180),
    (60, 140, 50),
    (20, 80, 50),
    (230, 200, 90),
    (150, 210, 100),
    (190, 130, 60),
    (220, 70, 70),
    (150, 60, 150),
    (170, 160, 150),
    (90, 190, 180),
)


def write_scenes(
    out: Path,
    *,
    count: int = 4,
    size: int = 512,
    seed: int = 0,
    dates: int = 1,
    sar: bool = False,
    clouds: bool = False,
    progress: Callable[[str], None] | None = None,
) -> list[Path]:
    """Write `count` scenes of `size` x `size` pixels (10 m) and `scenes.json` into `out`; return the 13-band rasters.

    Per scene and date, with `_d1`, `_d2`, ... after the stem for later dates:
    `scene_0000.tif` (uint16, top-of-atmosphere reflectance x 10000, nodata 0), `scene_0000_landcover.tif` (uint8, codes
    from 1 in the order of `terrain.COVERS`, 0 nodata), with `sar` `scene_0000_sar.tif` (float32 VV, VH in dB, nodata
    NaN), with `clouds` `scene_0000_valid.tif` (uint8: 0 nodata, 1 clear, 2 cloud, 3 shadow). With `dates` > 1, per
    scene, `scene_0000_change.tif` between the first and the last date (uint8: 0 nodata, 1 unchanged, 2 changed).

    The same arguments give the same bytes. Raises InputError for sizes and counts that make no scene, and where
    rasterio is missing.
    """
    for name, value, least in (("count", count, 1), ("size", size, 64), ("dates", dates, 1), ("seed", seed, 0)):
        if value < least:
            raise InputError(f"{name} is {value}; it must be at least {least}")
    try:
        import rasterio  # noqa: F401
    except ImportError:
        raise InputError("writing scenes needs rasterio: pip install 'swath[geo]'") from None

    out.mkdir(parents=True, exist_ok=True)
    listing = out / "scenes.json"
    listing.unlink(missing_ok=True)  # it must not describe files that are about to be replaced
    written: list[Path] = []
    entries = []
    for scene in range(count):
        start = time.perf_counter()
        entry = _write_scene(out, scene, size, seed, dates, sar, clouds)
        entries.append(entry)
        written += [out / each["image"] for each in entry["dates"]]
        if progress:
            progress(f"{entry['name']}: {size} x {size} px, {dates} date(s), {time.perf_counter() - start:.1f} s")
    described = {
        "seed": seed,
        "size": size,
        "gsd_m": 10,
        "bands": BANDS,
        "classes": {str(code): name for code, name in enumerate(COVERS, 1)},
        "sar": sar,
        "clouds": clouds,
        "scenes": entries,
    }
    _replace(listing, lambda part: part.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8"))
    return written


def _write_scene(out: Path, scene: int, size: int, seed: int, dates: int, sar: bool, clouds: bool) -> dict[str, Any]:
    rng = generator(seed, scene, 0, "place")
    zone = int(rng.integers(31, 35))
    # Origins on multiples of 60 m, as Sentinel-2 tiles have them, so that coarse bands line up.
    west, north = 60 * int(rng.integers(5_000, 11_000)), 60 * int(rng.integers(75_000, 95_000))
    first_day = Day(2021, 1, 1) + timedelta(days=int(rng.integers(100, 285)))
    grid = {"crs": f"EPSG:{32600 + zone}", "west": west, "north": north}
    here, first_cover = ground(seed, scene, size)
    name = f"scene_{scene:04d}"
    entry: dict[str, Any] = {"name": name, **grid, "dates": []}

    cover = first_cover
    seen_at_ends = np.ones((size, size), dtype=bool)
    for date in range(dates):
        if date:
            cover = changed(cover, seed, scene, date)
        drift = int(generator(seed, scene, date, "day").integers(-45, 46)) if date else 0
        acquired = first_day + timedelta(days=365 * date + drift)
        seen = footprint(generator(seed, scene, date, "footprint"), size)
        if date in (0, dates - 1):
            seen_at_ends &= seen
        sky = _sky(seed, scene, date, size, acquired, clouds)
        shares = mixed(here, cover, seed, scene, date, sky.green)
        image = _optical(generator(seed, scene, date, "sensor"), shares, here, sky)

        stem = f"{name}_d{date}" if date else name
        tags = {"SYNTHETIC": "yes", "ACQUIRED": acquired.isoformat()}
        files = {"image": f"{stem}.tif", "landcover": f"{stem}_landcover.tif"}
        optical = {"SENSOR": "sentinel2", "LEVEL": "L1C", **tags}
        _write_raster(out / files["image"], np.where(seen, image, 0), grid, 0, optical, names=BANDS, scale=1e-4)
        names = {"CLASSES": ",".join(f"{code}={label}" for code, label in enumerate(COVERS, 1))}
        colours = dict(enumerate(_COLOURS, 1))
        _write_raster(out / files["landcover"], (cover * seen)[None], grid, 0, tags | names, colours=colours)
        if sar:
            files["sar"] = f"{stem}_sar.tif"
            echo = np.where(seen, _backscatter(generator(seed, scene, date, "sar"), shares, here), np.float32(np.nan))
            radar = {"SENSOR": "sentinel1", "UNITS": "dB", **tags}
            _write_raster(out / files["sar"], echo, grid, float("nan"), radar, names=("VV", "VH"))
        if clouds:
            files["valid"] = f"{stem}_valid.tif"
            coding = {"CLASSES": f"{CLEAR}=clear,{CLOUD}=cloud,{SHADOW}=shadow"}
            _write_raster(out / files["valid"], (sky.valid * seen)[None], grid, 0, tags | coding)
        entry["dates"].append({"acquired": acquired.isoformat(), **files})
    if dates > 1:
        entry["change"] = f"{name}_change.tif"
        change = np.where(cover != first_cover, CHANGED, UNCHANGED).astype(np.uint8) * seen_at_ends
        coding = {"CLASSES": f"{UNCHANGED}=unchanged,{CHANGED}=changed", "SYNTHETIC": "yes"}
        _write_raster(out / entry["change"], change[None], grid, 0, coding)
    return entry


@dataclass(frozen=True)
class _Sky:
    """Sun and air of one date."""

    green: float  # season, 0 to 1
    sun: tuple[float, float]  # elevation and azimuth, degrees
    haze: Floats  # (H, W), reflectance added at 490 nm
    cloud: Floats  # (H, W), opacity 0 to 1
    shadow: Floats  # (H, W), share of the light taken away

    @property
    def valid(self) -> NDArray[np.uint8]:
        return np.select([self.cloud > 0.2, self.shadow > 0.25], [CLOUD, SHADOW], CLEAR).astype(np.uint8)


def _sky(seed: int, scene: int, date: int, size: int, acquired: Day, clouds: bool) -> _Sky:
    rng = generator(seed, scene, date, "sky")
    year = 2 * np.pi * (acquired.timetuple().tm_yday - 81) / 365  # 0 at the spring equinox
    # Plants lag a month behind the sun; the sun stands as at 46 degrees north, before noon.
    green = float(np.clip(0.42 + 0.16 * np.sin(year - 0.5) + rng.uniform(-0.06, 0.06), 0.1, 0.7))
    elevation, azimuth = 42 + 22 * np.sin(year) + rng.uniform(-3, 3), rng.uniform(140, 170)
    amount = min(rng.exponential(0.02), 0.08)
    haze = np.maximum(amount * (1 + 0.5 * noise(rng, size, 150, 3.0)), 0).astype(np.float32)
    cloud = shadow = np.zeros((size, size), np.float32)
    if clouds:
        rng = generator(seed, scene, date, "clouds")
        shape = noise(rng, size, 70, 2.2)
        shape -= np.quantile(shape, 1 - rng.uniform(0.1, 0.3))
        cloud = np.clip(1 - np.exp(-1.6 * np.maximum(shape, 0)), 0, 0.97).astype(np.float32)
        # The field is periodic, so a rolled copy is the shadow of clouds inside and just outside the scene.
        length = rng.uniform(8, 18) / np.tan(np.radians(elevation))
        north, west = -length * np.cos(np.radians(azimuth)), length * np.sin(np.radians(azimuth))
        shadow = 0.7 * np.sqrt(np.roll(cloud, (-round(north), -round(west)), (0, 1)))
    return _Sky(green, (float(elevation), float(azimuth)), haze, cloud, shadow)


def _optical(rng: np.random.Generator, shares: Floats, here: Ground, sky: _Sky) -> NDArray[np.uint16]:
    """Top-of-atmosphere reflectance x 10000, (13, H, W), at least 1 everywhere."""
    size = shares.shape[-1]
    spectra = np.array([_SPECTRA[name] for name in MATERIALS], np.float32) / 100
    # Materials differ a little between scenes, as soils and species do.
    spectra *= np.exp(rng.normal(0, 0.06, (len(MATERIALS), 1)) + rng.normal(0, 0.04, spectra.shape)).astype(np.float32)
    haze_bands = (_WAVELENGTH_NM / 490.0) ** -1.6
    haze_bands[BANDS.index("B10")] = 0  # haze lies below the vapour that absorbs this band
    light = _shading(_slopes(here, shares), sky.sun) * (1 - sky.shadow) * np.exp(0.06 * here.broad)
    lit = shares * light
    image = np.empty((len(BANDS), size, size), np.uint16)
    for factor in sorted(set(_NATIVE)):
        ground_mix, haze, cloud = _pooled(lit, factor), _pooled(sky.haze, factor), _pooled(sky.cloud, factor)
        for band in (b for b, native in enumerate(_NATIVE) if native == factor):
            through = _THROUGH[band] * (1 - 1.5 * haze_bands[band] * haze)
            value = _PATH[band] + haze_bands[band] * haze + through * np.tensordot(spectra[:, band], ground_mix, 1)
            value += cloud * (_CLOUD[band] - value)
            spread = 0.0006 + 0.012 * value if BANDS[band] != "B10" else 0.0002
            value += spread * rng.standard_normal(value.shape, dtype=np.float32)
            counts = np.clip(np.rint(value * 10_000), 1, 65_535).astype(np.uint16)
            image[band] = counts.repeat(factor, -2).repeat(factor, -1)[:size, :size]
    return image


def _slopes(here: Ground, shares: Floats) -> tuple[Floats, Floats]:
    """Rise per metre southward and eastward, (H, W) each; water lies level."""
    land = 1 - shares[MATERIALS.index("clear water")] - shares[MATERIALS.index("turbid water")]
    down, east = np.gradient(here.elevation, 10.0)
    return down * land, east * land


def _shading(slopes: tuple[Floats, Floats], sun: tuple[float, float]) -> Floats:
    """Sunlight on the slope over sunlight on level ground, (H, W); `sun` is elevation and azimuth in degrees."""
    down, east = slopes
    height, azimuth = np.radians(sun)
    facing = 1 - (east * np.sin(azimuth) - down * np.cos(azimuth)) / np.tan(height)
    return (0.2 + 0.8 * np.clip(facing / np.sqrt(1 + east**2 + down**2), 0, 2)).astype(np.float32)


def _pooled(field: Floats, factor: int) -> Floats:
    """Means over blocks of factor x factor pixels of (..., H, W), the border repeated to fill the last block."""
    if factor == 1:
        return field
    size = field.shape[-1]
    rest = -size % factor
    full = np.pad(field, [(0, 0)] * (field.ndim - 2) + [(0, rest), (0, rest)], mode="edge")
    blocks = (size + rest) // factor
    return full.reshape(*field.shape[:-2], blocks, factor, blocks, factor).mean((-3, -1), dtype=np.float32)


def _backscatter(rng: np.random.Generator, shares: Floats, here: Ground) -> Floats:
    """Backscatter (2, H, W) of VV and VH in dB, -40 to 10: mixed in power, speckled, brighter on west slopes."""
    power = 10 ** (np.array([_BACKSCATTER_DB[name] for name in MATERIALS], np.float32) / 10)
    mean = np.tensordot(power.T, shares, 1)
    facing = np.clip(1 + 1.5 * _slopes(here, shares)[1], 0.3, 3)
    moisture = 10 ** (0.08 * here.broad)
    speckle = rng.gamma(_LOOKS, 1 / _LOOKS, mean.shape)
    return np.clip(10 * np.log10(mean * facing * moisture * speckle + 1e-5), -40, 10).astype(np.float32)


def _write_raster(
    path: Path,
    data: NDArray,
    grid: dict[str, Any],
    nodata: float,
    tags: dict[str, str],
    *,
    names: tuple[str, ...] = (),
    scale: float | None = None,
    colours: dict[int, tuple[int, int, int]] | None = None,
) -> None:
    """A deflated GeoTIFF of (bands, H, W), in tiles where a tile fits."""
    import rasterio
    from rasterio.transform import from_origin

    bands, height, width = data.shape
    profile: dict[str, Any] = {"driver": "GTiff", "count": bands, "height": height, "width": width, "nodata": nodata}
    profile |= {"dtype": data.dtype.name, "crs": grid["crs"], "compress": "deflate", "interleave": "pixel"}
    profile["transform"] = from_origin(grid["west"], grid["north"], 10, 10)
    if min(height, width) >= 256:
        profile |= {"tiled": True, "blockxsize": 256, "blockysize": 256}

    def write(part: Path) -> None:
        with rasterio.open(part, "w", **profile) as raster:
            raster.update_tags(**tags)
            if names:
                raster.descriptions = names
            if scale is not None:
                raster.scales, raster.offsets = (scale,) * bands, (0.0,) * bands
            if colours:
                raster.write_colormap(1, colours)
            raster.write(data)

    _replace(path, write)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in place whole: a reader never meets half a file."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
