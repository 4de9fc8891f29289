"""Published files through the whole ingest. They lie in $SWATH_DATA (default: ../shared/data beside the repository)."""

import csv
import io
import json
import os
import zipfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from swath.shards.ingest import shard
from swath.shards.loader import Loader
from swath.shards.manifest import Manifest
from swath.shards.order import SampleOrder
from swath.shards.prepare import prepare
from swath.shards.reader import ShardReader
from swath.shards.sources.source import Options

DATA = Path(os.environ.get("SWATH_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")
pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning", "ignore::UserWarning")


def need(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not here; set SWATH_DATA to the folder that holds {name}")
    if not name.endswith(".zip") and not name.endswith(".csv"):
        pytest.importorskip("rasterio")
    return path


def left_out(manifest: Manifest) -> int:
    return sum(reason["samples"] for reason in manifest.source["left_out"].values())


def test_bigearthnet_sentinel2(tmp_path: Path):
    rasterio = pytest.importorskip("rasterio")
    source = need("bigearthnet_samples/S2")
    manifest = shard(source, tmp_path / "out", progress=False)[""]
    contract, reader = manifest.contract(), ShardReader(tmp_path / "out")
    assert manifest.samples == len(list(source.iterdir()))
    assert contract.names == ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
    assert [b.gsd_m for b in contract.bands] == [60, 10, 10, 10, 20, 20, 20, 10, 20, 60, 20, 20]
    assert (contract.height, contract.width, contract.dtype, contract.level, contract.unit) == (
        120,
        120,
        "uint16",
        "L2A",
        "reflectance",
    )
    for number in range(len(reader)):
        meta, pixels = reader.meta(number), reader.pixels(number)
        patch = Path(meta["key"]).name
        assert meta["labels"] == json.loads((source / patch / f"{patch}_labels_metadata.json").read_text())["labels"]
        assert meta["radiometry"]["sentinel2"]["scale"] == 1e-4
        assert meta["radiometry"]["sentinel2"]["scale_source"].startswith("sensor default")
        assert -32 < meta["lon"] < 35 < meta["lat"] < 71
        for band, name in zip(pixels, contract.names, strict=True):
            with rasterio.open(source / patch / f"{patch}_{name}.tif") as file:
                stored = file.read(1)
            times = 120 // len(stored)
            assert np.array_equal(band, stored.repeat(times, 0).repeat(times, 1))
    mean = dict(zip(contract.names, contract.normalisation.mean, strict=True))
    assert 0.005 < mean["B02"] < mean["B08"] < 0.6  # land: near infrared is bright
    batch = prepare(reader.chips(range(len(reader))), reader.contracts, (56, 56))
    pixels = batch.images["sentinel2"]
    assert pixels.shape == (len(reader), 12, 56, 56)
    assert torch.isfinite(pixels).all()
    assert pixels.mean((0, 2, 3)).abs().max() < 0.1


def test_bigearthnet_sentinel1(tmp_path: Path):
    manifest = shard(need("bigearthnet_samples/S1"), tmp_path / "out", progress=False)[""]
    contract = manifest.contract()
    assert (contract.names, contract.sensor, contract.unit, contract.dtype) == (("VV", "VH"), "sentinel1", "dB", "float32")
    assert all(band.wavelength_nm is None for band in contract.bands)
    vv, vh = contract.normalisation.mean
    assert -35 < vh < vv < 0
    meta = ShardReader(tmp_path / "out").meta(0)
    assert meta["radiometry"] == {"sentinel1": {"scale": 1, "add": 0, "scale_source": "none: values as stored"}}
    assert meta["labels"]


def test_raw_sentinel2_scene(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    source = need("scenes/s2_scene_aquileia")
    with caplog.at_level("INFO"):
        manifest = shard(source, tmp_path / "out", options=Options(chip=128), progress=False)[""]
    contract, reader = manifest.contract(), ShardReader(tmp_path / "out")
    assert (contract.sensor, contract.level, len(contract.bands)) == ("sentinel2", "L2A", 12)
    assert "guessed from the file name: (Raw) means reflectance · 65535" in caplog.text
    assert manifest.samples + left_out(manifest) == (689 // 128) * (1200 // 128)
    meta = reader.meta(0)
    assert meta["radiometry"]["sentinel2"]["scale"] == pytest.approx(1 / 65535)
    assert (meta["time"], meta["lat"]) == ("2019-04-16", pytest.approx(45.75, abs=0.3))
    assert 10 <= (contract.gsd_m or 0) <= 20
    mean = dict(zip(contract.names, contract.normalisation.mean, strict=True))
    assert 0.02 < mean["B02"] < mean["B08"] < 0.5  # plausible reflectances: the guess holds


def test_landsat8_scene(tmp_path: Path):
    source = need("scenes/landsat8_LC81210442015044LGN00")
    manifest = shard(source, tmp_path / "out", options=Options(chip=96), progress=False)[""]
    contract, reader = manifest.contract(), ShardReader(tmp_path / "out")
    assert [b.common_name for b in contract.bands] == ["blue", "green", "red"]
    assert [b.wavelength_nm for b in contract.bands] == [480, 560, 655]
    assert (contract.sensor, contract.unit, contract.nodata, contract.bands[0].gsd_m) == ("landsat8", "digital number", 0, 150.02)
    assert left_out(manifest) > 0  # the corners of a scene are empty
    assert manifest.samples + left_out(manifest) == (1570 // 96) * (1536 // 96)
    masks = [mask for mask in map(reader.valid, range(len(reader))) if mask is not None]
    assert masks
    assert min(float((mask == 0).mean()) for mask in masks) > 0
    assert contract.normalisation.minimum[0] > 0


def test_eurosat_by_its_split(tmp_path: Path):
    """The first images of each class, with the published split's blocks; JPEGs stay as they came."""
    source, listed = need("EuroSAT_RGB.zip"), need("eurosat_rgb_split.csv")
    with listed.open() as file:
        rows = list(csv.DictReader(file))
    some = [row for row in rows if int(row["file"].split("_")[-1].removesuffix(".jpg")) <= 20]
    with (tmp_path / "split.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(some)
    made = shard(source, tmp_path / "out", split=tmp_path / "split.csv", progress=False)
    assert {name: m.samples for name, m in made.items()} == {
        n: sum(r["split"] == n for r in some) for n in ("train", "val", "test")
    }
    assert len(made["train"].classes) == 10
    assert left_out(made["train"]) == 27_000 - 200
    by_name = {row["file"]: row for row in some}
    with zipfile.ZipFile(source) as archive:
        for name in made:
            reader = ShardReader(tmp_path / "out" / name)
            for number in range(len(reader)):
                meta = reader.meta(number)
                row = by_name["/".join(meta["source"].split("/")[-2:])]
                assert (meta["label"], meta["block"], name) == (row["class"], int(row["block"]), row["split"])
                stored = archive.read(meta["source"])
                member = reader.index.members[number, 0]
                tar = tmp_path / "out" / name / reader.manifest.shards[member["shard"]].name
                assert tar.read_bytes()[int(member["offset"]) :][: int(member["length"])] == stored
                if number % 10 == 0:
                    expected = np.moveaxis(np.asarray(Image.open(io.BytesIO(stored))), 2, 0)
                    assert np.abs(reader.pixels(number).astype(int) - expected).mean() < 2
    reader = ShardReader(tmp_path / "out" / "train")
    loader = Loader(reader, SampleOrder(reader.shard_sizes, seed=0), global_batch=16, micro_batch=8, workers=2)
    for _, batch in islice(loader, 6):
        assert prepare(batch, reader.contracts, (64, 64)).images["rgb"].shape == (8, 3, 64, 64)
