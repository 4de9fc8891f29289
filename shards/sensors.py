"""What is known of sensors: their bands, and how files and tags name them (centres and widths in nm, GSD in m)."""

import re
from dataclasses import dataclass

from swath.shards.bands import Band, Unit


@dataclass(frozen=True)
class Sensor:
    """`bands` in spectral order; `unit` and `scale` hold for 16-bit DN unless the file's own metadata say otherwise."""

    name: str
    bands: dict[str, Band]
    unit: Unit
    scale: float
    nodata: float | None
    pattern: str


def _optical(rows: list[tuple[str, str | None, float, float, float]]) -> dict[str, Band]:
    return {r[0]: Band(name=r[0], common_name=r[1], wavelength_nm=r[2], width_nm=r[3], gsd_m=r[4]) for r in rows}


def _ranges(rows: list[tuple[str, str, float, float, float]]) -> dict[str, Band]:
    return _optical([(name, common, (low + high) / 2, high - low, gsd) for name, common, low, high, gsd in rows])


SENTINEL2 = Sensor(
    "sentinel2",
    _optical([
        ("B01", "coastal", 442.7, 20, 60), ("B02", "blue", 492.4, 65, 10), ("B03", "green", 559.8, 35, 10),
        ("B04", "red", 664.6, 30, 10), ("B05", "rededge071", 704.1, 14, 20), ("B06", "rededge075", 740.5, 14, 20),
        ("B07", "rededge078", 782.8, 19, 20), ("B08", "nir", 832.8, 105, 10), ("B8A", "nir08", 864.7, 21, 20),
        ("B09", "nir09", 945.1, 19, 60), ("B10", "cirrus", 1373.5, 29, 60), ("B11", "swir16", 1613.7, 90, 20),
        ("B12", "swir22", 2202.4, 174, 20),
    ]),
    "reflectance", 1e-4, 0.0, r"(?<![A-Z0-9])(S2[ABC]?|SENTINEL[-_ ]?2[ABC]?)(?![A-Z0-9])",
)  # fmt: skip
LANDSAT8 = Sensor(
    "landsat8",
    _ranges([
        ("B1", "coastal", 430, 450, 30), ("B2", "blue", 450, 510, 30), ("B3", "green", 530, 590, 30),
        ("B4", "red", 640, 670, 30), ("B5", "nir08", 850, 880, 30), ("B6", "swir16", 1570, 1650, 30),
        ("B7", "swir22", 2110, 2290, 30), ("B8", "pan", 500, 680, 15), ("B9", "cirrus", 1360, 1380, 30),
        ("B10", "lwir11", 10600, 11190, 100), ("B11", "lwir12", 11500, 12510, 100),
    ]),
    "digital number", 1.0, 0.0, r"(?<![A-Z0-9])(L[CO]0?[89](?=[\d ])|LANDSAT[-_ ]?[89](?!\d))",
)  # fmt: skip
LANDSAT7 = Sensor(
    "landsat7",
    _ranges([
        ("B1", "blue", 450, 520, 30), ("B2", "green", 520, 600, 30), ("B3", "red", 630, 690, 30), ("B4", "nir", 770, 900, 30),
        ("B5", "swir16", 1550, 1750, 30), ("B6", "lwir", 10400, 12500, 60), ("B7", "swir22", 2090, 2350, 30),
        ("B8", "pan", 520, 900, 15),
    ]),
    "digital number", 1.0, 0.0, r"(?<![A-Z0-9])(LE0?7(?=[\d ])|LANDSAT[-_ ]?7(?!\d))",
)  # fmt: skip
LANDSAT5 = Sensor(
    "landsat5",
    _ranges([
        ("B1", "blue", 450, 520, 30), ("B2", "green", 520, 600, 30), ("B3", "red", 630, 690, 30), ("B4", "nir", 760, 900, 30),
        ("B5", "swir16", 1550, 1750, 30), ("B6", "lwir", 10400, 12500, 120), ("B7", "swir22", 2080, 2350, 30),
    ]),
    "digital number", 1.0, 0.0, r"(?<![A-Z0-9])(LT0?[45](?=[\d ])|LANDSAT[-_ ]?[45](?!\d))",
)  # fmt: skip
SENTINEL1 = Sensor(  # no wavelength: it is no optical band, and 55 mm would only mislead an embedding of wavelengths
    "sentinel1",
    {name: Band(name=name, gsd_m=10) for name in ("VV", "VH", "HH", "HV")},
    "dB", 1.0, None, r"(?<![A-Z0-9])(S1[ABC]?|SENTINEL[-_ ]?1[ABC]?)(?![A-Z0-9])",
)  # fmt: skip
SENSORS = {sensor.name: sensor for sensor in (SENTINEL2, LANDSAT8, LANDSAT7, LANDSAT5, SENTINEL1)}

_BAND = re.compile(r"^(?P<scene>.+?)[_.-](?P<band>(?:SR_)?B\d{1,2}A?|VV|VH|HH|HV)(?P<raw>_\(Raw\))?$", re.IGNORECASE)


def sensor_of(text: str) -> Sensor | None:
    """The sensor that a file name or a tag speaks of."""
    folded = text.upper().replace("_", " ")
    return next((s for s in SENSORS.values() if re.search(s.pattern, folded)), None)


def level_of(text: str) -> str | None:
    found = re.search(r"L(1C|2A|1TP|2SP|1GT)(?![A-Z0-9])", text.upper().replace("_", " "))
    return f"L{found[1]}" if found else None


def split_band(stem: str) -> tuple[str, str] | None:
    """(scene, band) of a file that holds one band by its name, as in `LC8…_B2` or `…_L2A_B01_(Raw)`."""
    found = _BAND.match(stem)
    return (found["scene"] + (found["raw"] or ""), found["band"].upper()) if found else None


def band(name: str, sensor: Sensor | None) -> Band:
    """The band as the sensor knows it (`b1` is `B01` for Sentinel-2), or one of which only the name is known."""
    if sensor is not None:
        plain = name.upper().removeprefix("SR_")
        found = re.fullmatch(r"B0?(\d{1,2})(A?)", plain)
        padded = f"B{int(found[1]):02d}" if found and not found[2] else plain.replace("B08A", "B8A")
        short = f"B{int(found[1])}" if found and not found[2] else plain
        for candidate in (plain, padded, short):
            if candidate in sensor.bands:
                return sensor.bands[candidate]
        for known in sensor.bands.values():
            if known.common_name == name.lower():
                return known
    common = name.lower() if name.lower() in ("red", "green", "blue", "nir", "pan") else None
    return Band(name=name, common_name=common)
