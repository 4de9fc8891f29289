"""Reading: any member is one checked slice, and damage is one line that names shard and sample."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swath.shards.errors import InputError
from swath.shards.index import MEMBER, SAMPLE
from swath.shards.ingest import shard
from swath.shards.reader import ShardReader
from swath.shards.reindex import reindex
from tests.shard_folders import make_sensor_shards, make_shards, sensor


def refused(folder: Path, match: str, number: int | None = None) -> None:
    """On opening, or on reading sample `number`."""
    with pytest.raises(InputError, match=match) as caught:
        reader = ShardReader(folder)
        if number is not None:
            reader.chips([number])
    assert "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_shards(tmp_path / "shards", samples=20, per_shard=8)


def test_batches_are_the_samples(folder: Path):
    reader = ShardReader(folder)
    numbers = [19, 0, 8, 7, 0]
    chips = reader.chips(numbers, np.arange(5))
    for row, number in enumerate(numbers):
        assert np.array_equal(chips.stored["image"].pixels[row].numpy(), reader.pixels(number))
    assert chips.id.tolist() == [int(reader.index.samples["id"][n]) for n in numbers]
    assert chips.label.tolist() == [n % 2 for n in numbers]
    assert chips.visit.tolist() == list(range(5))
    assert chips.stored["image"].valid is None
    assert reader.index.key(19) == "chip19"


def test_flipped_byte_names_shard_and_sample(folder: Path):
    reader = ShardReader(folder)
    row = reader.index.members[9, 0]
    path = folder / "shard-000001.tar"
    raw = bytearray(path.read_bytes())
    raw[int(row["offset"]) + int(row["length"]) // 2] ^= 1
    path.write_bytes(raw)
    refused(folder, r"sample chip9 in shard .*shard-000001.tar is damaged: its bytes do not match the checksum", 9)
    assert np.array_equal(ShardReader(folder).pixels(8), reader.pixels(8))


def test_flipped_byte_in_a_jpeg_shard(tmp_path: Path):
    (tmp_path / "set" / "A").mkdir(parents=True)
    for n in range(4):
        pixels = np.random.default_rng(n).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "set" / "A" / f"{n}.jpg")
    shard(tmp_path / "set", tmp_path / "out", progress=False)
    row = ShardReader(tmp_path / "out").index.members[2, 0]
    path = tmp_path / "out" / "shard-000000.tar"
    raw = bytearray(path.read_bytes())
    raw[int(row["offset"]) + 200] ^= 4
    path.write_bytes(raw)
    key = ShardReader(tmp_path / "out").index.key(2)
    refused(tmp_path / "out", f"sample {key} in shard .*shard-000000.tar is damaged", 2)


def test_truncated_missing_or_emptied_shard(folder: Path):
    path = folder / "shard-000002.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    refused(folder, f"shard-000002.tar has {len(whole) - 1000} bytes instead of {len(whole)}", 17)
    path.write_bytes(b"")
    refused(folder, "shard-000002.tar cannot be opened", 17)
    path.unlink()
    refused(folder, "shard-000002.tar cannot be opened", 17)
    assert ShardReader(folder).pixels(0).shape == (3, 32, 32)


@pytest.mark.parametrize("name", ["index.bin", "keys.bin"])
@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_index_that_is_not_there(folder: Path, name: str, damage: str):
    (folder / name).unlink()
    if damage == "empty":
        (folder / name).touch()
    refused(folder, "the index of .* cannot be opened .*`swath index .*` rebuilds it")


@pytest.mark.parametrize("keep", [10, 64, 700, -1])
def test_cut_index(folder: Path, keep: int):
    (folder / "index.bin").write_bytes((folder / "index.bin").read_bytes()[:keep])
    refused(folder, "index.bin is (cut short|damaged).*`swath index .*` rebuilds it")


def test_damaged_or_foreign_index(folder: Path, tmp_path: Path):
    raw = bytearray((folder / "index.bin").read_bytes())
    raw[0] ^= 1
    (folder / "index.bin").write_bytes(raw)
    refused(folder, "index.bin is damaged or does not belong")
    other = make_shards(tmp_path / "other", samples=12, per_shard=4)
    for name in ("index.bin", "keys.bin"):
        (folder / name).write_bytes((other / name).read_bytes())
    refused(folder, "the index has 12 samples, the manifest 20")
    more = make_shards(tmp_path / "more", samples=20, per_shard=4, size=8)
    for name in ("index.bin", "keys.bin"):
        (folder / name).write_bytes((more / name).read_bytes())
    refused(folder, "sample chip9 in shard .* is damaged", 9)
    refused(folder, "index has sample chip19 in shard number 4, the manifest has 3 shards; `swath index .*` rebuilds it", 19)


@pytest.mark.parametrize("field", ["id", "label", "lat", "check"])
def test_a_flipped_bit_in_an_index_row(tmp_path: Path, field: str):
    folder = make_sensor_shards(tmp_path / "set", sensor("sentinel2", 4))
    place = next(entry[1] for name, entry in (SAMPLE.fields or {}).items() if name == field)
    where = 64 + 7 * SAMPLE.itemsize + place
    raw = bytearray((folder / "index.bin").read_bytes())
    raw[where] ^= 2
    (folder / "index.bin").write_bytes(raw)
    refused(folder, r"the index row of sample s0007 is damaged; `swath index .*` rebuilds it", 7)
    reindex(folder)
    ShardReader(folder).chips([7])


def test_a_flipped_bit_in_a_member_row(tmp_path: Path):
    folder = make_sensor_shards(tmp_path / "set", sensor("sentinel2", 4), samples=8)
    raw = bytearray((folder / "index.bin").read_bytes())
    raw[64 + 8 * SAMPLE.itemsize + 5 * 3 * MEMBER.itemsize + (MEMBER.fields or {})["scale"][1] + 6] ^= 8
    (folder / "index.bin").write_bytes(raw)
    refused(folder, "the index row of sample s0005 is damaged", 5)


def test_missing_manifest(folder: Path, tmp_path: Path):
    (folder / "manifest.json").unlink()
    refused(folder, "is not a folder of shards")
    refused(tmp_path / "nowhere", "is not a folder of shards")
    make_shards(tmp_path / "both" / "train")
    refused(tmp_path / "both", "it has train inside: name one of them")


def test_unknown_key_in_the_manifest(folder: Path):
    value = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(value | {"colour": "red"}))
    refused(folder, r"manifest.json is damaged \(colour: Extra inputs")


def test_a_shard_path_cannot_lead_outside(folder: Path):
    value = json.loads((folder / "manifest.json").read_text())
    value["shards"][0]["name"] = "../other.tar"
    (folder / "manifest.json").write_text(json.dumps(value))
    refused(folder, "manifest.json is damaged")
