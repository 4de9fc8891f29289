"""Statistics against float64 of all values at once: any dtype, mask, grouping and way of coming back from JSON."""

import json
import pickle

import numpy as np
import pytest

from swath.shards.statistics import Statistics

QS = (0, 0.1, 1, 5, 25, 50, 75, 99, 99.9, 100)
SKETCH = 2.0**-8  # what the docstring promises, relative to the value
BESIDE = 2.0**-23  # that the reference computes a value in float64, the sketch in float32


def check(statistics: Statistics, rows: list[np.ndarray]) -> None:
    """`rows`: per band all physical values in float64."""
    for band, row in enumerate(rows):
        assert statistics.count[band] == len(row)
        if not len(row):
            assert np.isnan(statistics.percentiles(QS)[:, band]).all()
            continue
        np.testing.assert_allclose(statistics.mean[band], row.mean(), rtol=1e-6)
        centred = row - row.mean()
        np.testing.assert_allclose(statistics.std[band], np.sqrt(np.mean(centred**2) - centred.mean() ** 2), rtol=1e-6)
        assert statistics.minimum[band] == row.min()
        assert statistics.maximum[band] == row.max()
        exact = np.percentile(row, QS, method="inverted_cdf")
        np.testing.assert_allclose(statistics.percentiles(QS)[:, band], exact, rtol=SKETCH + BESIDE, atol=1e-37)


def made(generator: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values over much of the dtype's range, dark ones more often."""
    if np.dtype(dtype).kind == "f":
        signs = generator.choice([-1, 1], shape)
        return (signs * 10.0 ** generator.uniform(-4, 4, shape)).astype(dtype)
    info = np.iinfo(dtype)
    least, most = max(info.min, -(1 << 40)), min(info.max, 1 << 40)
    return (least + (most - least) * generator.random(shape) ** 3).astype(dtype)


@pytest.mark.parametrize("seed", range(40))
def test_any_dtype_mask_and_grouping(seed: int):
    generator = np.random.default_rng(seed)
    dtype = ["uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "float32", "float64", ">u2", ">i2"][seed % 11]
    bands = int(generator.integers(1, 6))
    scale, add = [(1.0, 0.0), (1e-4, 0.0), (1e-4, -0.1), (-2.0, 7.5)][seed // 11]
    rows: list[list[np.ndarray]] = [[] for _ in range(bands)]
    parts, pixels, invalid = [], 0, 0
    for _ in range(int(generator.integers(1, 9))):
        chip = made(generator, dtype, (bands, *generator.integers(1, 40, 2)))
        codes = None if generator.random() < 0.3 else generator.choice(4, chip.shape[1:], p=[0.2, 0.6, 0.1, 0.1]).astype(np.uint8)
        parts.append(Statistics(bands))
        parts[-1].add(chip, codes, scale=scale, add=add)
        clear = np.ones(chip.shape[1:], bool) if codes is None else codes == 1
        pixels, invalid = pixels + clear.size, invalid + (0 if codes is None else int((codes == 0).sum()))
        for row, band in zip(rows, chip, strict=True):
            row.append(band[clear].astype(np.float64) * scale + add)
    whole, pairs = Statistics(bands), [parts[i : i + 2] for i in range(0, len(parts), 2)]
    for part in parts:
        whole.merge(Statistics.from_state(json.loads(json.dumps(part.state()))))
    check(whole, [np.concatenate(row) for row in rows])
    assert (whole.pixels == pixels).all()
    np.testing.assert_array_equal(whole.nodata_share, invalid / pixels)
    grouped = Statistics(bands)
    for pair in reversed(pairs):
        group = Statistics(bands)
        for part in pair:
            group.merge(part)
        grouped.merge(group)
    check(grouped, [np.concatenate(row) for row in rows])
    np.testing.assert_array_equal(grouped.percentiles(QS), whole.percentiles(QS))  # not close: the same


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_statistics_of_single_samples_sum_up_and_stay_what_they_were(dtype: str):
    chips = made(np.random.default_rng(9), dtype, (7, 3, 13, 11))
    whole, singles = Statistics(3), []
    for chip in chips:
        singles.append(Statistics(3))
        singles[-1].add(chip, scale=0.5)
        whole.merge(pickle.loads(pickle.dumps(singles[-1])))
        whole.merge(Statistics(3))
    check(whole, [chips[:, band].astype(np.float64).ravel() * 0.5 for band in range(3)])
    for single, chip in zip(singles, chips, strict=True):
        check(single, [band.astype(np.float64).ravel() * 0.5 for band in chip])


def test_it_does_not_matter_whether_a_part_was_looked_at_written_or_sent_before_it_is_merged():
    generator = np.random.default_rng(10)
    chips = [made(generator, "uint16", (3, 17, 19)) for _ in range(12)]
    states = []
    for way in range(4):
        whole = Statistics(3)
        for some in (chips[:5], chips[5:6], chips[6:]):
            part = Statistics(3)
            for chip in some:
                part.add(chip, scale=1e-4)
            if way == 1:
                assert part.mean.all()
            part = Statistics.from_state(part.state()) if way == 2 else pickle.loads(pickle.dumps(part)) if way == 3 else part
            whole.merge(part)
        states.append(json.dumps(whole.state()))
    assert len(set(states)) == 1


def test_the_same_calls_give_the_same_bytes_and_states_come_back_whole():
    generator = np.random.default_rng(3)
    chips = [made(generator, "uint16", (3, 17, 19)) for _ in range(5)] + [made(generator, "float32", (3, 8, 8))]
    states = []
    for _ in range(2):
        statistics = Statistics(3)
        for chip in chips:
            statistics.add(chip)
        states.append(json.dumps(statistics.state()))
    assert states[0] == states[1]
    assert json.dumps(Statistics.from_state(json.loads(states[0])).state()) == states[0]


@pytest.mark.parametrize("dtype", ["float64", "int32"])
def test_small_spread_far_from_zero(dtype: str):
    generator = np.random.default_rng(4)
    base, spread = (1e6, 1e-2) if dtype == "float64" else (2**30, 3)
    chips = (base + spread * generator.standard_normal((50, 2, 31, 33))).astype(dtype)
    statistics = Statistics(2)
    for chip in chips:
        statistics.add(chip)
    check(statistics, [chips[:, band].astype(np.float64).ravel() for band in range(2)])


def test_huge_counts():
    one = Statistics(1)
    one.add(np.array([[[100, 200, 300, 65535]]], np.uint16))
    total = one
    for _ in range(44):  # 4 · 2^44 values
        double = Statistics(1)
        double.merge(total)
        double.merge(total)
        total = double
    assert total.count[0] == 4 << 44
    np.testing.assert_allclose(total.mean, one.mean, rtol=1e-12)
    np.testing.assert_allclose(total.std, one.std, rtol=1e-12)
    np.testing.assert_array_equal(total.percentiles(QS), one.percentiles(QS))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 100.3, -7e-5, 1e30, -3.4e38, 1e150, 5e-324])
@pytest.mark.parametrize("count", [1, 1000])
def test_one_value_and_all_equal(value: float, count: int):
    statistics = Statistics(1)
    statistics.add(np.full((1, count, 1), value))
    assert statistics.mean[0] == pytest.approx(value, rel=1e-12)
    assert statistics.std[0] == pytest.approx(0, abs=abs(value) * 1e-12)
    np.testing.assert_array_equal(statistics.percentiles(QS), np.full((len(QS), 1), value))  # exact: the extremes bound it


def test_nothing_seen():
    statistics = Statistics(2)
    statistics.add(np.zeros((2, 3, 3), np.uint16), np.zeros((3, 3), bool))
    statistics.merge(Statistics(2))
    assert (statistics.count == 0).all()
    assert (statistics.std == 0).all()
    assert (statistics.nodata_share == 1).all()
    assert np.isnan(statistics.percentiles([50])).all()
    assert (Statistics(2).nodata_share == 0).all()


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float16", "bool"])
def test_small_whole_numbers_have_exact_percentiles(dtype: str):
    values = np.random.default_rng(5).integers(0, 2 if dtype == "bool" else 120, (1, 63, 65)).astype(dtype)
    statistics = Statistics(1)
    statistics.add(values)
    np.testing.assert_array_equal(statistics.percentiles(QS)[:, 0], np.percentile(values, QS, method="inverted_cdf"))


def test_values_that_are_missing_in_one_band_are_missing_there_only():
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    values[0, 0] = np.nan
    values[1, 1, 0] = -32768
    values[1, 1, 1] = np.inf
    statistics = Statistics(2)
    statistics.add(values, nodata=-32768)
    assert statistics.invalid.tolist() == [4, 2]
    check(statistics, [np.arange(4, 12, dtype=float), np.array([12, 13, 14, 15, 18, 19, 20, 21, 22, 23], float)])
    integers = np.array([[[5, 0]], [[0, 0]]], np.uint16)
    statistics = Statistics(2)
    statistics.add(integers, nodata=0)
    assert statistics.invalid.tolist() == [1, 2]
    check(statistics, [np.array([5.0]), np.zeros(0)])
    for absent in (-1, 0.5, 1e9, float("nan")):  # no value that uint16 has
        statistics = Statistics(2)
        statistics.add(integers, nodata=absent)
        assert statistics.invalid.tolist() == [0, 0]


def test_series_are_counted_by_band_over_all_dates():
    generator = np.random.default_rng(6)
    values = generator.integers(1, 9000, (3, 2, 11, 7)).astype(np.uint16)  # dates, bands
    valid = generator.random((3, 11, 7)) < 0.7
    statistics = Statistics(2)
    statistics.add(values.reshape(6, 11, 7), valid)
    check(statistics, [values[:, band][valid].astype(float) for band in range(2)])
    statistics = Statistics(2)
    statistics.add(values.reshape(6, 11, 7), valid[0])
    check(statistics, [values[:, band][:, valid[0]].ravel().astype(float) for band in range(2)])
    with pytest.raises(ValueError, match="5 channels are no whole number of dates of 2 bands"):
        statistics.add(values.reshape(6, 11, 7)[:5])


def test_old_and_new_baseline_of_one_chip_give_the_same():
    stored = np.random.default_rng(7).integers(1, 9000, (2, 40, 40)).astype(np.uint16)
    old, new = Statistics(2), Statistics(2)
    old.add(stored, scale=1e-4)
    new.add(stored + 1000, scale=1e-4, add=-0.1)
    np.testing.assert_allclose(new.mean, old.mean, rtol=1e-12)
    np.testing.assert_allclose(new.std, old.std, rtol=1e-12)
    np.testing.assert_allclose(new.percentiles([1, 50, 99]), old.percentiles([1, 50, 99]), rtol=1e-12)


def test_what_was_added_may_be_overwritten_afterwards():
    buffer = np.full((1, 4, 4), 7, np.uint16)
    statistics = Statistics(1)
    statistics.add(buffer)
    buffer[:] = 9
    assert statistics.mean[0] == 7


def test_arrays_larger_than_what_is_worked_on_at_a_time():
    values = np.random.default_rng(8).integers(-3000, 16000, (2, 1700, 1900)).astype(np.int16)
    statistics = Statistics(2)
    statistics.add(values, scale=1e-4)
    check(statistics, [band.ravel() * 1e-4 for band in values.astype(np.float64)])


def test_damaged_states_are_refused():
    statistics = Statistics(2)
    statistics.add(np.ones((2, 3, 3), np.uint16))
    for change in ({"sketch": ["", ""]}, {"sketch": ["AAAA", "AAAA"]}, {"mean": ["0x0p0"]}, {"pixels": [1]}, {"sketch": []}):
        with pytest.raises((ValueError, KeyError)):
            Statistics.from_state(statistics.state() | change)
    with pytest.raises(KeyError):
        Statistics.from_state({"count": [1]})
    with pytest.raises(ValueError, match="between 0 and 100"):
        statistics.percentiles([101])
