"""Filters on decoded samples: shares by hand, duplicates in any number of stretches, reports that add up."""

import json

import numpy as np
import pytest

from swath.shards.ingestion.quality import DIGEST, Duplicates, LeftOut, cloud_share, digest, nodata_share, unfit
from swath.shards.sources.source import Part, Sample


def part(codes: list[int] | None = None, seed: int = 0, dtype: str = "uint16") -> Part:
    pixels = np.random.default_rng(seed).integers(1, 200, (2, 5, 2)).astype(dtype)
    return Part(pixels, valid=None if codes is None else np.array(codes, np.uint8).reshape(5, 2))


CODES = [0, 0, 0, 1, 1, 1, 1, 2, 2, 3]


def test_shares():
    assert nodata_share(part(CODES)) == 0.3
    assert cloud_share(part(CODES)) == pytest.approx(3 / 7)
    assert (nodata_share(part()), cloud_share(part())) == (0, 0)
    assert (nodata_share(part([0] * 10)), cloud_share(part([0] * 10))) == (1, 0)
    series = Part(np.ones((4, 5, 1), np.uint16), valid=np.array([[1] * 5, [2, 2, 0, 0, 3]], np.uint8).reshape(2, 5, 1))
    assert (nodata_share(series), cloud_share(series)) == (0.2, 3 / 8)


def test_unfit_says_why():
    sample = Sample({"s2": part(CODES)})
    assert unfit(sample, 0.3, 0.5) is None  # the limits themselves are allowed
    assert unfit(sample, 0.25, 0.5) == "more than 25% nodata"
    assert unfit(sample, 0.3, 0.4) == "more than 40% cloud or shadow"
    both = Sample({"s1": part(), "s2": part(CODES)})
    assert unfit(both, 0.0, 1.0) is None  # radar shows what the optical part lacks
    assert unfit(both, 0.0, 0.4) == "more than 40% cloud or shadow"
    assert unfit(Sample({}), 1.0, 1.0) == "no modality is there"


def test_a_digest_is_of_pixels_and_nothing_else():
    first = Sample({"s2": part(), "s1": part(seed=1)}, "forest", {"lat": 1})
    again = Sample({"s1": part(CODES, seed=1), "s2": part(dtype=">u2")})
    assert digest(first) == digest(again)
    assert len(digest(first)) == DIGEST
    view = Sample({"s2": Part(np.asfortranarray(part().pixels)), "s1": part(seed=1)})
    assert digest(view) == digest(first)
    changed = part()
    changed.pixels[1, 4, 1] += 1
    others = [
        Sample({"s2": part(), "s1": changed}),
        Sample({"s2": part()}),
        Sample({"s2": part(seed=1), "s1": part()}),
        Sample({"s2": part(dtype="int16"), "s1": part(seed=1)}),
        Sample({"s2": Part(part().pixels.reshape(2, 2, 5)), "s1": part(seed=1)}),
    ]
    assert len({digest(sample) for sample in [first, *others]}) == 6


@pytest.mark.parametrize("seed", range(10))
def test_the_first_of_equal_samples_stays_wherever_a_run_was_cut(seed: int):
    generator = np.random.default_rng(seed)
    shown = [(f"key{n}", bytes(generator.integers(0, 40, 1, np.uint8)) * DIGEST) for n in range(120)]
    whole = Duplicates()
    expected = [whole.earlier(key, made) for key, made in shown]
    first = {made: key for key, made in reversed(shown)}
    assert expected == [None if first[made] == key else first[made] for key, made in shown]
    cut = int(generator.integers(0, 121))
    kept = [one for one, earlier in zip(shown[:cut], expected, strict=False) if earlier is None]
    continued = Duplicates()
    continued.restore([key for key, _ in kept], b"".join(made for _, made in kept))
    assert [continued.earlier(key, made) for key, made in shown[cut:]] == expected[cut:]


@pytest.mark.parametrize("seed", range(5))
def test_reports_add_up_in_any_order(seed: int):
    generator = np.random.default_rng(seed)
    entries = [(f"reason {generator.integers(3)}", f"key {n}") for n in generator.permutation(60)]
    whole, merged = LeftOut(), LeftOut()
    for reason, key in entries:
        whole.add(reason, key)
    parts = []
    for chunk in np.array_split(np.array(entries), 7):
        parts.append(LeftOut())
        for reason, key in chunk.tolist():
            parts[-1].add(reason, key)
    for one in generator.permutation(7):
        merged.merge(LeftOut.from_state(json.loads(json.dumps(parts[one].state()))))
    assert merged.state() == whole.state()
    assert sum(entry["samples"] for entry in whole.state().values()) == 60
    for reason, entry in whole.state().items():
        assert entry["examples"] == sorted(key for why, key in entries if why == reason)[:5]
