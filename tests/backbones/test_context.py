"""Context encoding: dates from seconds, no seam in longitude, absent parts, drops."""

import datetime

import pytest
import torch

from swath.backbones.base import Context
from swath.backbones.context import ContextEncoding, civil


def encoding() -> ContextEncoding:
    torch.manual_seed(0)
    return ContextEncoding(16).eval()


def test_dates_are_the_calendars() -> None:
    edges = [(2000, 2, 29), (2001, 3, 1), (1999, 12, 31), (1970, 1, 1), (1900, 2, 28), (1900, 3, 1), (2100, 3, 1), (2024, 12, 31)]
    days = [datetime.datetime(*edge, hour, 59, 59, tzinfo=datetime.UTC) for edge in edges for hour in (0, 11, 23)]
    days += [datetime.datetime(1969, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(hours=1009 * n) for n in range(800)]
    year, month, of_year, hour = civil(torch.tensor([round(day.timestamp()) for day in days]))
    expected = [(d.year, d.month, d.timetuple().tm_yday - 1, d.hour) for d in days]
    assert list(zip(year.tolist(), month.tolist(), of_year.tolist(), hour.tolist(), strict=True)) == expected


def test_each_part_counts_alone() -> None:
    encode = encoding()
    values = {"lat": [10.0, 10.0], "lon": [20.0, 20.0], "time": [1.2e9, 1.2e9], "gsd_m": [10.0, 10.0]}
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    of_all = encode(Context(**tensors), 2)
    assert of_all.shape == (2, 16) and of_all.dtype == torch.float32 and torch.equal(of_all[0], of_all[1])
    for name in values:
        missing = {n: t for n, t in tensors.items() if n != name}
        without = encode(Context(**missing), 2)
        nan = torch.tensor([values[name][0], float("nan")], dtype=torch.float64)
        half = encode(Context(**{**tensors, name: nan}), 2)
        assert torch.allclose(half[0], of_all[0], atol=1e-6) and torch.allclose(half[1], without[1], atol=1e-6)
        assert not torch.allclose(of_all, without, atol=1e-3)
    assert torch.allclose(encode(None, 2)[0], encode.absent.sum(dim=0), atol=1e-6)


def test_no_seam_and_no_crowding() -> None:
    encode = encoding()
    lon = torch.tensor([180.0, -180.0, 0.0], dtype=torch.float64)
    at = encode(Context(lat=torch.tensor([5.0, 5.0, 5.0]), lon=lon), 3)
    assert torch.allclose(at[0], at[1], atol=1e-5) and not torch.allclose(at[0], at[2], atol=1e-2)
    pole = encode(Context(lat=torch.full((3,), 90.0), lon=lon), 3)
    assert torch.allclose(pole[0], pole[2], atol=1e-4)


def test_dropped_samples_are_as_if_nothing_were_known() -> None:
    encode = encoding().train()
    lat, nan = torch.tensor([1.0, 2.0, 3.0]), float("nan")
    drawn = Context(lat=lat, lon=lat, gsd_m=torch.tensor([0.3, 10.0, nan]), drop=torch.tensor([0.49, 0.5, 0.9]))
    known = encode.eval()(drawn, 3)
    dropped = encode.train()(drawn, 3)
    assert torch.allclose(dropped[0], encode(None, 1)[0], atol=1e-6) and torch.equal(dropped[1:], known[1:])
    dropped.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encode.parameters() if p.grad is not None)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ctx.time must be \(2,\)"):
        encoding()(Context(time=torch.zeros(2, 3)), 2)
