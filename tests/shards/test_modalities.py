"""Samples of several modalities and dates, from the shards to the batch."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from swath.shards.errors import InputError
from swath.shards.prepare import View, prepare
from swath.shards.reader import ShardReader
from swath.shards.reindex import reindex
from swath.shards.skips import Skips
from tests.shard_folders import make_sensor_shards, sensor

S2, S1 = sensor("sentinel2", 13), sensor("sentinel1", 2, wavelengths=False)


def pairs(folder: Path) -> ShardReader:
    return ShardReader(make_sensor_shards(folder / "pairs", S2, S1, missing={3: "sentinel1", 5: "sentinel2"}))


def test_a_missing_modality_is_a_mask_and_never_zeros(tmp_path: Path):
    reader = pairs(tmp_path)
    batch = prepare(reader.chips([2, 3, 5]), reader.contracts, (16, 16))
    assert {name: image.shape for name, image in batch.images.items()} == {
        "sentinel2": (3, 13, 16, 16), "sentinel1": (3, 2, 16, 16),
    }  # fmt: skip
    for name, present in (("sentinel2", [True, True, False]), ("sentinel1", [True, False, True])):
        assert batch.valid[name].flatten(1).all(dim=1).tolist() == present
        assert batch.valid[name].flatten(1).any(dim=1).tolist() == present
        assert (batch.images[name].flatten(1).abs().sum(1) > 0).tolist() == present  # 0 is the mean, after normalisation
    assert batch.weight.tolist() == [1, 1, 1]
    one = ShardReader(reader.place, ["sentinel1"])
    assert prepare(one.chips([2, 3]), one.contracts, (16, 16)).weight.tolist() == [1, 0]


def test_one_modality_or_all(tmp_path: Path):
    reader = pairs(tmp_path)
    with pytest.raises(InputError, match="modalities sentinel2, sentinel1; name one"):
        _ = reader.contract
    with pytest.raises(InputError, match="has modalities sentinel2, sentinel1"):
        ShardReader(reader.place, ["landsat8"])
    assert not reader.has(3, "sentinel1")
    assert reader.has(3, "sentinel2")
    assert np.array_equal(reader.pixels(2, "sentinel1"), reader.chips([2]).stored["sentinel1"].pixels[0].numpy())


def test_a_crop_is_of_the_same_ground_in_every_modality(tmp_path: Path):
    coarse = sensor("coarse", 1, size=8)
    reader = ShardReader(make_sensor_shards(tmp_path / "set", S2, coarse))
    box = torch.tensor([[4.0, 8.0, 8.0, 8.0]], dtype=torch.float64)  # of the first modality's 16 pixels
    batch = prepare(reader.chips([1]), reader.contracts, (4, 4), View(box=box))
    stored = torch.from_numpy(reader.pixels(1, "coarse").astype(np.float32))[None]
    norm = coarse.normalisation
    assert torch.allclose(batch.images["coarse"], (stored[:, :, 2:6, 4:8] - norm.mean[0]) / norm.std[0])


def test_place_and_pixel_size_follow_the_crop(tmp_path: Path):
    reader = ShardReader(make_sensor_shards(tmp_path / "set", S2))
    whole = prepare(reader.chips([1]), reader.contracts, (16, 16)).meta
    assert [whole[name].item() for name in ("lat", "lon", "gsd_m")] == [10.0, 20.0, 10.0]
    assert datetime.fromtimestamp(whole["time"].item(), UTC) == datetime(2020, 1, 1, tzinfo=UTC)
    box = torch.tensor([[8.0, 0.0, 8.0, 8.0]], dtype=torch.float64)  # the south-west quarter, seen at 16 pixels
    crop = prepare(reader.chips([1]), reader.contracts, (16, 16), View(box=box)).meta
    assert crop["gsd_m"].item() == 5.0
    assert crop["lat"].item() == pytest.approx(10 - 40 / 111_320)
    assert crop["lon"].item() == pytest.approx(20 - 40 / 111_320 / np.cos(np.radians(10)))


def test_a_series_has_a_mask_and_a_time_for_each_date(tmp_path: Path):
    series = sensor("optical", 4, dates=3)
    reader = ShardReader(make_sensor_shards(tmp_path / "set", series))
    batch = prepare(reader.chips([0, 1]), reader.contracts, (16, 16))
    assert batch.images["optical"].shape == (2, 12, 16, 16)
    assert batch.valid["optical"].shape == (2, 3, 16, 16)
    assert not batch.valid["optical"][0, :, 0].any()
    assert [datetime.fromtimestamp(t, UTC).month for t in batch.meta["time"][1].tolist()] == [1, 2, 3]
    pixels = torch.from_numpy(reader.pixels(1).astype(np.float32))
    assert torch.allclose(batch.images["optical"][1], (pixels - 100) / 50)
    smaller = prepare(reader.chips([0]), reader.contracts, (8, 8))
    assert smaller.valid["optical"].shape == (1, 3, 8, 8)


def test_clouds_count_by_choice(tmp_path: Path):
    reader = ShardReader(make_sensor_shards(tmp_path / "set", S2))
    chips = reader.chips([0])
    assert chips.stored["sentinel2"].valid is not None
    chips.stored["sentinel2"].valid[0, 0, 1] = 2  # a row of cloud below the row of nodata
    assert prepare(chips, reader.contracts, (16, 16)).valid["sentinel2"].sum() == 14 * 16
    assert prepare(chips, reader.contracts, (16, 16), clear=(1, 2, 3)).valid["sentinel2"].sum() == 15 * 16


def test_the_index_of_several_modalities_can_be_rebuilt(tmp_path: Path):
    reader = pairs(tmp_path)
    folder = Path(reader.place)
    kept = (folder / "index.bin").read_bytes()
    (folder / "index.bin").unlink()
    again = reindex(folder)
    rebuilt = ShardReader(folder)
    before, after = (r.chips(range(24)) for r in (reader, rebuilt))
    for name in ("sentinel2", "sentinel1"):
        assert torch.equal(before.stored[name].pixels, after.stored[name].pixels)
    assert again.files["index.bin"].bytes == len(kept)


def damage(folder: Path, *numbers: int) -> None:
    reader = ShardReader(folder)
    for number in numbers:
        row = reader.index.members[number, 0]
        path = folder / reader.manifest.shards[int(row["shard"])].name
        raw = bytearray(path.read_bytes())
        raw[int(row["offset"]) + 200] ^= 1
        path.write_bytes(raw)


def test_damaged_samples_are_gone_past_by_choice(tmp_path: Path):
    folder = make_sensor_shards(tmp_path / "set", S2)
    damage(folder, 4, 11)
    with pytest.raises(InputError, match=r"sample s0004 in shard .*/shard-000000.tar is damaged: its bytes .* copy the"):
        ShardReader(folder).chips([3, 4, 5])
    skips = Skips(2)
    reader = ShardReader(folder, skips=skips)
    for _ in range(2):
        batch = prepare(reader.chips([3, 4, 5, 11]), reader.contracts, (16, 16))
        assert batch.weight.tolist() == [1, 0, 1, 0]
        assert batch.images["sentinel2"][1].abs().sum() == 0
    assert skips.report() == {f"{folder}/shard-000000.tar": 1, f"{folder}/shard-000001.tar": 1}
    with pytest.raises(InputError, match=r"sample s0011 .*and 1 others were skipped before"):
        ShardReader(folder, skips=Skips(1)).chips([4, 11])
