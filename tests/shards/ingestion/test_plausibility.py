"""Published means (datasets' own statistics files) as samples: what is right passes, what is wrong is stopped and named."""

import json

import numpy as np
import pytest

from swath.shards.bands import Band, InputContract, Normalisation, Unit
from swath.shards.ingestion.plausibility import Finding, Levels, check
from swath.shards.sensors import LANDSAT8, SENTINEL1, SENTINEL2
from swath.shards.statistics import Statistics

L1C = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
L2A = tuple(name for name in L1C if name != "B10")
EUROSAT = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A")
OLMO = ("B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12", "B01", "B09")
SO2SAT = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")

# (bands in file order, mean, standard deviation in stored DN, offset that the pixels have)
PUBLISHED: dict[str, tuple[tuple[str, ...], tuple[float, ...], tuple[float, ...], int]] = {
    "fMoW-Sentinel": (
        L1C,
        (1370.19, 1184.38, 1120.77, 1136.26, 1263.74, 1645.40, 1846.87, 1762.60, 1972.62, 582.73, 14.77, 1732.16, 1247.92),
        (633.15, 650.28, 712.13, 965.23, 948.98, 1108.07, 1258.36, 1233.15, 1364.39, 472.38, 14.31, 1310.37, 1087.60),
        0,
    ),
    "SSL4EO-S12 v1 L1C": (
        L1C,
        (1605.6, 1390.8, 1314.9, 1363.5, 1549.4, 2091.7, 2371.7, 2299.9, 2560.3, 830.1, 22.1, 2177.1, 1524.1),
        (786.8, 850.3, 875.1, 1138.8, 1122.2, 1161.6, 1274.4, 1248.4, 1345.5, 577.3, 51.2, 1336.1, 1136.5),
        0,
    ),
    "SSL4EO-S12 v1.1 L1C": (
        L1C,
        (2607.3, 2393.1, 2320.2, 2374.0, 2562.5, 3110.1, 3392.8, 3321.2, 3583.8, 1838.7, 1021.8, 3205.1, 2545.8),
        (786.8, 850.3, 875.1, 1138.8, 1122.2, 1161.6, 1274.4, 1248.4, 1345.5, 577.3, 51.2, 1336.1, 1136.5),
        1000,
    ),
    "SSL4EO-S12 v1 L2A": (
        L2A,
        (752.4, 884.3, 1144.2, 1297.5, 1624.9, 2194.6, 2422.2, 2517.8, 2581.6, 2645.5, 2368.5, 1805.1),
        (1108.0, 1155.2, 1183.6, 1368.1, 1370.3, 1355.6, 1416.5, 1474.8, 1439.3, 1582.3, 1455.5, 1343.5),
        0,
    ),
    "SSL4EO-S12 v1.1 L2A": (
        L2A,
        (1793.2, 1924.9, 2184.6, 2340.9, 2671.4, 3240.1, 3468.4, 3563.2, 3627.7, 3711.1, 3416.7, 2849.6),
        (1160.1, 1201.1, 1219.9, 1397.2, 1400.0, 1373.1, 1429.2, 1485.0, 1447.8, 1652.7, 1471.0, 1365.3),
        1000,
    ),
    "TerraMesh L2A": (
        L2A,
        (1390.5, 1503.3, 1718.2, 1853.9, 2199.1, 2780.0, 2987.0, 3083.2, 3132.2, 3163.0, 2424.9, 1857.7),
        (2131.2, 2163.7, 2059.3, 2152.5, 2105.2, 1912.8, 1842.3, 1893.6, 1775.7, 1814.9, 1436.3, 1336.2),
        0,
    ),
    "OlmoEarth L2A": (
        OLMO,
        (1188.9, 1407.8, 1513.1, 2755.5, 1891.0, 2483.8, 2722.7, 2885.6, 2562.9, 1914.1, 1115.9, 3269.8),
        (1859.2, 1727.7, 1740.8, 1612.3, 1754.7, 1622.1, 1621.8, 1611.4, 1441.6, 1328.9, 1955.7, 2651.1),
        0,
    ),
    "EuroSAT": (
        EUROSAT,
        (1354.4, 1118.2, 1042.9, 947.6, 1199.5, 2000, 2369.2, 2296.8, 732.1, 12.1, 1819.0, 1118.9, 2594.1),
        (245, 333, 395, 594, 566, 860, 1087, 1117, 404, 4.8, 1002, 761, 1232),
        0,
    ),
    "So2Sat": (
        SO2SAT,
        tuple(1e4 * x for x in (0.1238, 0.1093, 0.1011, 0.1142, 0.1593, 0.1815, 0.1746, 0.1950, 0.1543, 0.1091)),
        (400, 480, 640, 620, 760, 880, 850, 950, 990, 850),
        0,
    ),
}


def contract(bands: tuple[Band, ...], unit: Unit = "reflectance", sensor: str = "sentinel2") -> InputContract:
    none = tuple(0.0 for _ in bands)
    return InputContract(
        modality="image", sensor=sensor, level="unknown", unit=unit, bands=bands, dtype="uint16",
        normalisation=Normalisation(mean=none, std=none, pixels=tuple(0 for _ in bands)),
    )  # fmt: skip


def scattered(generator: np.random.Generator, mean: np.ndarray, std: np.ndarray, samples: int, pixels: int) -> np.ndarray:
    """(samples, bands, pixels): that mean and about that deviation, two thirds of the variance between samples."""

    def factor(share: float, shape: tuple[int, ...]) -> np.ndarray:
        variance = (std / mean) ** 2 * share
        sigma = np.sqrt(np.log1p(variance))[:, None]  # a lognormal of mean 1
        normal = generator.standard_normal(shape)  # one for all bands: a bright place is bright in all
        return np.exp(sigma * normal - sigma**2 / 2)

    return mean[:, None] * factor(2 / 3, (samples, 1, 1)) * factor(1 / 3, (samples, 1, pixels))


def published(name: str, offset: int, samples: int = 200) -> np.ndarray:
    """(samples, bands, 16, 16) uint16 in stored DN as if the pixels had `offset`."""
    _, mean, std, had = PUBLISHED[name]
    pixels = scattered(np.random.default_rng(1), np.array(mean) - had, np.array(std), samples, 256)
    return np.clip(pixels + offset, 1, 65535).astype(np.uint16).reshape(samples, len(mean), 16, 16)


def judged(made: InputContract, samples: list[tuple[np.ndarray, float, float]], given: tuple[str, ...] = ()) -> list[Finding]:
    """The findings after samples of (pixels, scale, add)."""
    statistics, levels = Statistics(len(made.bands)), Levels(made)
    for pixels, scale, add in samples:
        statistics.add(pixels, scale=scale, add=add)
        levels.add(pixels, None, scale, add)
    found = check(made, statistics, levels, given)
    assert all("\n" not in finding.text and finding.text.startswith("image: ") for finding in found)
    return found


def stops(found: list[Finding]) -> list[str]:
    return [finding.text for finding in found if finding.severity == "stop"]


def sentinel2(names: tuple[str, ...]) -> InputContract:
    return contract(tuple(SENTINEL2.bands[name] for name in names))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sets_pass_with_their_offset_and_stop_with_the_other(name: str):
    names, _, _, had = PUBLISHED[name]
    made = sentinel2(names)
    stored = published(name, had)
    assert judged(made, [(chip, 1e-4, -had * 1e-4) for chip in stored]) == []
    unexplained = judged(made, [(chip, 1e-4, 0.0) for chip in published(name, 1000)])
    (text,) = stops(unexplained)
    assert "200 samples that claim no offset" in text
    assert "--add -0.1" in text
    unfounded = judged(made, [(chip, 1e-4, -0.1) for chip in published(name, 0)])
    if name == "So2Sat":  # too bright for its own half to be negative
        assert any("claim an offset of -1000 DN" in finding.text for finding in unfounded)
    else:
        (text,) = stops(unfounded)
        assert "claim an offset of -1000 DN" in text
        assert "--add 0" in text
    for add in (0.0, -0.1):  # who gives the offset knows it
        wrong = [(chip, 1e-4, add) for chip in published(name, 0 if add else 1000)]
        assert not stops(judged(made, wrong, given=("add",)))


@pytest.mark.parametrize("share", [0.05, 0.5, 0.52, 0.9])
def test_a_mixture_as_in_terramesh_l1c_is_recognised(share: float):
    plain, moved = published("SSL4EO-S12 v1 L1C", 0), published("SSL4EO-S12 v1 L1C", 1000)
    mixed = [moved[i] if i < share * 200 else plain[i] for i in range(200)]
    made = sentinel2(L1C)
    if share == 0.5:
        means = np.mean([chip[10].astype(float) for chip in mixed])
        assert 480 < means < 540  # the published mean is 506
    (text,) = stops(judged(made, [(chip, 1e-4, 0.0) for chip in mixed]))
    assert f"{int(share * 200)} have the median of B10" in text
    explained = [(chip, 1e-4, -0.1 if i < share * 200 else 0.0) for i, chip in enumerate(mixed)]
    assert judged(made, explained) == []
    # all said to have it, some do not
    assert stops(judged(made, [(chip, 1e-4, -0.1) for chip in mixed]))


def test_a_mixture_without_b10_is_pointed_out():
    plain, moved = published("SSL4EO-S12 v1 L2A", 0), published("SSL4EO-S12 v1 L2A", 1000)
    found = judged(sentinel2(L2A), [((moved if i % 3 else plain)[i], 1e-4, 0.0) for i in range(200)])
    assert [finding.severity for finding in found] == ["warn"]
    assert "the darkest 1 % of their pixels at 1000 to 1400 DN" in found[0].text


def test_samples_that_fill_b10_with_zero_are_judged_by_their_dark_pixels():
    stored = published("SSL4EO-S12 v1 L1C", 1000)
    stored[:, 10] = 0
    found = judged(sentinel2(L1C), [(chip, 1e-4, 0.0) for chip in stored])
    assert any("darkest 1 %" in text for text in stops(found))
    assert any("B10: every valid pixel is 0" in finding.text for finding in found)


def test_levels_merge_in_any_order_and_come_back_from_json():
    made = sentinel2(L2A)
    parts = []
    for chips in np.array_split(published("SSL4EO-S12 v1 L2A", 0, 30), 7):
        parts.append(Levels(made))
        for chip in chips:
            parts[-1].add(chip, np.ones((16, 16), np.uint8), 1e-4, 0.0)
    forward, backward, whole = Levels(made), Levels(made), Levels(made)
    for part, other in zip(parts, reversed(parts), strict=True):
        forward.merge(Levels(made).restore(json.loads(json.dumps(part.state()))))
        backward.merge(other)
    for chip in published("SSL4EO-S12 v1 L2A", 0, 30):
        whole.add(chip, None, 1e-4, 0.0)
    assert forward.state() == backward.state() == whole.state()
    assert sum(row[-1] for row in whole.state()) == 30


def test_levels_see_clear_pixels_only_and_each_date_of_a_series():
    made = sentinel2(L2A)
    chip = published("SSL4EO-S12 v1 L2A", 1000, 2)
    valid = np.ones((2, 16, 16), np.uint8)
    valid[:, :4] = 2
    chip[:, :, :4] = 1  # dark, and covered
    levels = Levels(made)
    levels.add(chip.reshape(24, 16, 16), valid, 1e-4, 0.0)
    levels.add(chip[0], np.zeros((16, 16), np.uint8), 1e-4, 0.0)  # nothing to see
    chip[0, :, :4] = 0
    levels.add(chip[0], None, 1e-4, 0.0)
    assert sum(row[-1] for row in levels.state()) == 3
    assert all(row[2] >= 10 for row in levels.state())
    others = Levels(contract(tuple(SENTINEL1.bands[n] for n in ("VV", "VH")), "dB", "sentinel1"))
    others.add(np.ones((2, 4, 4)), None, 1.0, 0.0)
    assert others.state() == []


@pytest.mark.parametrize("name", ["SSL4EO-S12 v1 L1C", "SSL4EO-S12 v1 L2A", "EuroSAT"])
@pytest.mark.parametrize("factor", [10, 0.1, 65535 / 10000])
def test_a_band_scaled_unlike_the_others(name: str, factor: float):
    names = PUBLISHED[name][0]
    stored = published(name, 0).astype(np.float64)
    for band in ("B03", "B05", "B07", "B8A", "B11"):
        changed = stored.copy()
        changed[:, names.index(band)] *= factor
        found = judged(sentinel2(names), [(chip, 1e-4, 0.0) for chip in changed])
        named = [f.text for f in found if "beside it in the spectrum" in f.text]
        assert len(named) == 1, (band, found)
        assert f"image: {band} is" in named[0]
        assert ("larger" if factor > 1 else "smaller") in named[0]


def test_other_scenes_than_average_are_nothing_unusual():
    """Reflectance of dense forest, snow, desert, clear water: shapes of a spectrum far from the mean one."""
    spectra = {
        "forest": (0.015, 0.02, 0.04, 0.017, 0.06, 0.22, 0.29, 0.30, 0.32, 0.33, 0.13, 0.05),
        "snow": (0.85, 0.88, 0.88, 0.87, 0.86, 0.85, 0.83, 0.82, 0.80, 0.75, 0.09, 0.07),
        "desert": (0.11, 0.16, 0.24, 0.34, 0.37, 0.39, 0.41, 0.42, 0.44, 0.44, 0.53, 0.48),
        "water": (0.03, 0.025, 0.02, 0.01, 0.008, 0.005, 0.005, 0.004, 0.004, 0.004, 0.002, 0.002),
    }
    for kind, spectrum in spectra.items():
        mean = 1e4 * np.array(spectrum)
        stored = scattered(np.random.default_rng(2), mean, 0.3 * mean, 60, 256).reshape(60, 12, 16, 16)
        assert judged(sentinel2(L2A), [(chip.astype(np.uint16), 1e-4, 0.0) for chip in stored]) == [], kind


def test_units_of_reflectance():
    made = sentinel2(L2A)
    stored = published("SSL4EO-S12 v1 L2A", 0, 20)
    (text, *_) = stops(judged(made, [(chip, 1.0, 0.0) for chip in stored]))
    assert "these look like stored numbers; give their factor with --scale" in text
    assert not any(
        "stored numbers" in text for text in stops(judged(made, [(chip, 1.0, 0.0) for chip in stored], ("scale", "add")))
    )
    (finding,) = judged(made, [(chip, 1e-8, 0.0) for chip in stored])
    assert "was the scale applied twice" in finding.text
    bright = [(chip, 5e-4, 0.0) for chip in stored]
    assert any("is the scale right" in finding.text for finding in judged(made, bright))


def test_units_of_radar():
    generator = np.random.default_rng(3)
    decibel = np.array([-12.5, -20.2])[:, None, None] + np.array([5.2, 5.9])[:, None, None] * generator.standard_normal(
        (2, 64, 64)
    )
    bands = tuple(SENTINEL1.bands[n] for n in ("VV", "VH"))
    as_db, as_linear = contract(bands, "dB", "sentinel1"), contract(bands, "linear power", "sentinel1")
    linear = 10 ** (decibel / 10)
    assert judged(as_db, [(decibel, 1, 0)]) == []
    assert judged(as_linear, [(linear, 1, 0)]) == []
    (text,) = stops(judged(as_db, [(linear, 1, 0)]))
    assert "VV, VH: said to be decibel, and no value is negative" in text
    assert "linear power" in text
    (text,) = stops(judged(as_db, [((np.sqrt(linear) * 1000).astype(np.uint16), 1, 0)]))
    assert "amplitudes that are not calibrated" in text
    (text,) = stops(judged(as_linear, [(decibel, 1, 0)]))
    assert "VH: said to be linear power" in text
    assert "--unit dB" in text
    assert not stops(judged(as_linear, [(decibel, 1, 0)], given=("unit",)))
    decibel[:, :2] = -9999
    (finding,) = judged(as_db, [(decibel, 1, 0)])
    assert "below -60 dB" in finding.text
    assert "--nodata" in finding.text


def test_bands_without_values_and_with_one():
    made = contract(tuple(Band(name=f"B{n}", wavelength_nm=400 + 8 * n) for n in range(1, 30)), sensor="enmap")
    values = np.random.default_rng(4).uniform(500, 900, (29, 16, 16)).astype(np.int16)
    values[10:22] = -32768
    values[3] = 77
    statistics = Statistics(29)
    statistics.add(values, scale=1e-4, nodata=-32768)
    first, *rest = check(made, statistics)
    assert first.severity == "stop"
    assert "B11, B12, B13, B14, B15, B16, B17, B18 and 4 more: none of 256 pixels is valid" in first.text
    assert "--bands" in first.text
    assert any(f.severity == "warn" and "B4: every valid pixel is 0.0077" in f.text for f in rest)
    values[25] = 30_000  # in other bands the checks go on
    statistics = Statistics(29)
    statistics.add(values, nodata=-32768)
    assert len(stops(check(made, statistics))) == 2
    (finding,) = check(made, Statistics(29))  # nothing was seen at all
    assert finding.severity == "stop"


def test_thermal_and_cirrus_bands_of_landsat_are_no_neighbours():
    names = ("B2", "B3", "B4", "B5", "B6", "B7", "B9")
    made = contract(tuple(LANDSAT8.bands[n] for n in names), sensor="landsat8")
    mean = np.array([0.1, 0.1, 0.1, 0.25, 0.2, 0.12, 0.002])
    values = scattered(np.random.default_rng(5), mean, 0.5 * mean, 20, 256)
    assert judged(made, [(chip.reshape(7, 16, 16), 1.0, 0.0) for chip in values]) == []


def test_published_samples():
    from tests.shards.test_real_data import need

    rasterio = pytest.importorskip("rasterio")
    patches = sorted(path for path in need("bigearthnet_samples/S2").iterdir() if path.is_dir())
    names = ("B02", "B03", "B04", "B08")
    chips = []
    for patch in patches:
        bands = []
        for name in names:
            with rasterio.open(patch / f"{patch.name}_{name}.tif") as file:
                bands.append(file.read(1))
        chips.append(np.stack(bands))
    assert judged(sentinel2(names), [(chip, 1e-4, 0.0) for chip in chips]) == []
    assert stops(judged(sentinel2(names), [(chip + 1000, 1e-4, 0.0) for chip in chips]))
