"""Are the numbers what the contract says they are? Said before anybody trains on them, with what was seen.

The Sentinel-2 offset (+1000 DN from processing baseline 04.00 on, and in reprocessed older scenes) is told from B10, whose
light hardly ever reaches the ground (published means are 12 to 22 DN without the offset and 1022 with it), or, where there
is no B10, from the darkest pixels. Both are judged per sample, since one data set may hold both kinds.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from swath.shards.bands import InputContract
from swath.shards.statistics import CLEAR, Statistics

_PIXELS = 1024  # of a sample, evenly spread, that tell its level
_STEP = 0.01  # of reflectance: how finely levels are kept
_HIGH = {"B10": 8, "dark": 9}  # steps from which on a level is too bright for data without an offset
# times: red between green and red edge is darker by 2.5 in dense forest, and no band is more of an extreme; a band in another
# scale (10, 65535 / 10000) is
_UNLIKE = 3.5
_FEW = 5  # samples that are no pattern yet
# nm where the air lets little light through, and where sunlight ends: no band is like its neighbours there
_ABSORBED = ((925, 965), (1340, 1480), (1780, 1980), (2450, np.inf))


@dataclass(frozen=True)
class Finding:
    """`stop`: the numbers mean something else than the contract says. `warn`: a person should look. `text` is one line."""

    severity: Literal["stop", "warn"]
    modality: str
    text: str


class Levels:
    """How dark Sentinel-2 samples are: how many by the offset they claim (DN), what was looked at, and steps of 1 % reflectance.

    Nothing is kept for other contracts. Merging is addition, so it does not matter how the work was divided.
    """

    def __init__(self, contract: InputContract) -> None:
        wanted = contract.sensor == "sentinel2" and contract.unit == "reflectance"
        self.bands = len(contract.bands)
        self.cirrus = contract.names.index("B10") if wanted and "B10" in contract.names else None
        # the bands that water, shade or dense vegetation make dark; B01 is bright by the air alone
        dark = [
            i for i, b in enumerate(contract.bands) if b.wavelength_nm and (480 < b.wavelength_nm < 710 or b.wavelength_nm > 2000)
        ]
        self.dark = dark if wanted else []
        self.seen: Counter[tuple[int, str, int]] = Counter()

    def add(self, stored_chw: np.ndarray, valid_hw: np.ndarray | None, scale: float, add: float) -> None:
        """Take in one sample as stored, with the codes of its `Part`; each date of a series counts as one."""
        if self.cirrus is None and not self.dark:
            return
        dates = len(stored_chw) // self.bands
        flat_tcn = stored_chw.reshape(dates, self.bands, -1)
        codes_tn = (
            None if valid_hw is None else np.broadcast_to(valid_hw.reshape(-1, flat_tcn.shape[2]), (dates, flat_tcn.shape[2]))
        )
        for date, flat_cn in enumerate(flat_tcn):
            some_cn = flat_cn if codes_tn is None else flat_cn[:, codes_tn[date] == CLEAR]
            some_cn = some_cn[:, :: max(1, some_cn.shape[1] // _PIXELS)]
            some_cn = some_cn[:, some_cn.any(axis=0)]  # 0 in all bands is no darkness, also where nobody has named a nodata value
            if not some_cn.shape[1]:
                continue
            if self.cirrus is not None and some_cn[self.cirrus].any():  # all 0: a product without B10 that fills its place
                kind, level = "B10", float(np.median(some_cn[self.cirrus]))
            elif self.dark:
                place = some_cn.shape[1] // 100
                kind, level = "dark", float(np.partition(some_cn[self.dark], place, axis=1)[:, place].min())
            else:
                continue
            if np.isfinite(level):
                step = int(np.clip(np.floor((level * scale + add) / _STEP + 1e-6), -100, 100))
                self.seen[round(add * 1e4), kind, step] += 1

    def merge(self, other: "Levels") -> None:
        self.seen.update(other.seen)

    def state(self) -> list[list[Any]]:
        """JSON; ordered, so that equal levels give equal bytes."""
        return [[*key, count] for key, count in sorted(self.seen.items())]

    def restore(self, state: list[list[Any]]) -> Self:
        """Take what `state` of the same contract gave; ValueError or TypeError where it is not one."""
        self.seen = Counter({(int(offset), str(kind), int(step)): int(count) for offset, kind, step, count in state})
        return self


def check(
    contract: InputContract, statistics: Statistics, levels: Levels | None = None, given: Collection[str] = ()
) -> list[Finding]:
    """What is wrong or odd, stops first. `given` names the options (`add`, `scale`, `unit`) that a person has set: what they
    answer does not stop any more. `statistics` are in the contract's unit."""
    remarks = list(_every(contract, statistics))
    present = statistics.count > 0
    if present.any():
        seen = _Seen(
            np.array(contract.names)[present], statistics.minimum[present], *statistics.percentiles([1, 50, 99])[:, present]
        )
        if contract.unit == "reflectance":
            remarks += [*_reflectance(seen), *_unlike_neighbours(contract, statistics)]
        elif contract.unit == "dB":
            remarks += _decibel(seen)
        elif contract.unit == "linear power":
            remarks += _linear(seen)
    if levels is not None:
        remarks += _offset(levels)
    made = [
        Finding("warn" if r.answer in given else r.severity, contract.modality, f"{contract.modality}: {r.text}") for r in remarks
    ]
    return sorted(made, key=lambda finding: finding.severity)  # stable, and "stop" comes before "warn"


class _Remark(NamedTuple):
    severity: Literal["stop", "warn"]
    text: str
    answer: str = ""  # the option by which a person says that it is meant so


class _Seen(NamedTuple):
    """(C,) each, of the bands that have values: smallest value, 1st, 50th and 99th percentile."""

    names: np.ndarray
    minimum: np.ndarray
    low: np.ndarray
    median: np.ndarray
    high: np.ndarray


def _every(contract: InputContract, statistics: Statistics) -> Iterator[_Remark]:
    names, present = np.array(contract.names), statistics.count > 0
    if len(empty := names[~present]):
        seen = int(statistics.pixels.max())
        yield _Remark("stop", f"{_list(empty)}: none of {seen} pixels is valid; leave such bands out with --bands")
    for value in np.unique(statistics.minimum[present & (statistics.minimum == statistics.maximum)]):
        same = names[present & (statistics.minimum == value) & (statistics.maximum == value)]
        yield _Remark(
            "warn",
            f"{_list(same)}: every valid pixel is {value:g}; --nodata says that it is no value, --bands leaves the band out",
        )


def _reflectance(seen: _Seen) -> Iterator[_Remark]:
    top, bright = int(np.argmax(seen.median)), int(np.argmax(seen.high))
    if seen.median[top] > 2:
        yield _Remark(
            "stop",
            f"half of {seen.names[top]} lies above {seen.median[top]:.4g}, and reflectance rarely above 1: "
            "these look like stored numbers; give their factor with --scale, such as 1e-4",
            "scale",
        )
    elif seen.high[bright] > 2:
        yield _Remark(
            "warn",
            f"1 % of {seen.names[bright]} lies above {seen.high[bright]:.4g}, and reflectance rarely above 1.5: "
            "is the scale right (--scale)?",
        )
    elif seen.high[bright] < 0.005:
        yield _Remark(
            "warn",
            f"99 % of every band lie below {seen.high[bright]:.2g}, darker than water: was the scale applied twice (--scale)?",
        )


def _decibel(seen: _Seen) -> Iterator[_Remark]:
    if len(linear := np.flatnonzero(seen.minimum >= 0)):
        like = "linear power" if seen.high[linear].max() < 10 else "amplitudes that are not calibrated"
        yield _Remark(
            "stop",
            f"{_list(seen.names[linear])}: said to be decibel, and no value is negative "
            f"(median {seen.median[linear[0]]:.4g}): these look like {like}; --unit says what they are",
            "unit",
        )
    elif (seen.median > 10).any():
        names = _list(seen.names[seen.median > 10])
        yield _Remark(
            "warn", f"{names}: half of the values lie above 10 dB, brighter than nearly all ground: is it decibel (--unit)?"
        )
    if (seen.low < -60).any():
        names = _list(seen.names[seen.low < -60])
        yield _Remark(
            "warn", f"{names}: 1 % of the values lie below -60 dB, under any sensor's noise; --nodata names a fill value"
        )


def _linear(seen: _Seen) -> Iterator[_Remark]:
    if (seen.median < 0).any():
        at = int(np.argmin(seen.median))
        yield _Remark(
            "stop",
            f"{seen.names[at]}: said to be linear power, and half of the values lie below {seen.median[at]:.4g}: "
            "these look like decibel; --unit dB if they are",
            "unit",
        )


def _unlike_neighbours(contract: InputContract, statistics: Statistics) -> Iterator[_Remark]:
    """Bands whose mean and deviation are unlike those of both neighbours, in the same direction.

    At an end of the spectrum there is one neighbour, and only one within 20 % of the wavelength is asked.
    """
    rows = [
        (band.wavelength_nm, band.name, statistics.mean[i], statistics.std[i])
        for i, band in enumerate(contract.bands)
        if band.wavelength_nm and not any(a <= band.wavelength_nm < b for a, b in _ABSORBED)
        if statistics.mean[i] > 0.002 and statistics.std[i] > 0  # darker ones are noise and what was left of a correction
    ]
    rows.sort()
    for i, (wavelength, name, mean, std) in enumerate(rows):
        beside = [rows[j] for j in (i - 1, i + 1) if 0 <= j < len(rows)]
        if len(beside) == 1:
            beside = [row for row in beside if max(row[0], wavelength) < 1.2 * min(row[0], wavelength)]
        means, stds = [mean / row[2] for row in beside], [std / row[3] for row in beside]
        if beside and ((min(means) > _UNLIKE and min(stds) > 2) or (max(means) < 1 / _UNLIKE and max(stds) < 1 / 2)):
            ratio = float(np.exp(np.mean(np.log(means))))
            text = f"{ratio:.2g} times larger" if ratio > 1 else f"{1 / ratio:.2g} times smaller"
            names = " and ".join(row[1] for row in beside)
            yield _Remark("warn", f"{name} is {text} than {names} beside it in the spectrum: is it scaled as they are?")


def _offset(levels: Levels) -> Iterator[_Remark]:
    """The radiometric offset, for every group of samples that claim the same and are judged by the same."""
    groups: dict[tuple[int, str], Counter[int]] = {}
    for (offset, kind, step), count in sorted(levels.seen.items()):
        groups.setdefault((offset, kind), Counter())[step] += count
    for (offset, kind), steps in groups.items():
        total = steps.total()
        high = _HIGH[kind]
        where = {"B10": "the median of B10", "dark": "the darkest 1 % of their pixels"}[kind]
        claim = f"of {total} samples that {f'claim an offset of {offset} DN' if offset else 'claim no offset'}"
        bright, negative = _within(steps, high, np.inf), _within(steps, -np.inf, -5)
        onset, below = _within(steps, 10, 14), _within(steps, 6, 10)
        if bright > total * {"B10": 0.5, "dark": 0.95}[kind]:
            yield _Remark(
                "stop",
                f"{claim}, {bright} have {where} at {high * 100} DN or more: the offset of Sentinel-2 from baseline 04.00 on "
                "seems to be left in; --add -0.1 takes it out of all, --add 0 says that they are so bright",
                "add",
            )
        elif onset >= _FEW and onset > 0.02 * total and onset > 4 * below:
            yield _Remark(
                "stop" if kind == "B10" else "warn",
                f"{claim}, {onset} have {where} at 1000 to 1400 DN, {below} at 600 to 1000, {_within(steps, -np.inf, 6)} below: "
                "some seem to have the offset of Sentinel-2 from baseline 04.00 on and some not; "
                "separate them by their baseline, --add -0.1 for those that have it",
                "add",
            )
        if negative > total * {"B10": 0.02, "dark": 0.5}[kind]:
            yield _Remark(
                "stop",
                f"{claim}, {negative} have {where} below -500 DN with it: their pixels have none; --add 0 for those",
                "add",
            )
        elif negative >= _FEW and negative > 0.02 * total:
            yield _Remark("warn", f"{claim}, {negative} have {where} below -500 DN with it: do some have none?")


def _within(steps: Counter[int], least: float, end: float) -> int:
    return sum(count for step, count in steps.items() if least <= step < end)


def _list(names: np.ndarray) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
