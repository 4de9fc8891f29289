"""A backbone in the form that other benchmarks ask for; theirs are tested where they are installed."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from swath.probes.adapters import Maps, Plain, register_terratorch, torchgeo_bench
from swath.probes.features import extract
from swath.shards.errors import InputError
from swath.shards.reader import ShardReader
from tests.hub.made import loaded, save_run, write_shards


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_run(loaded(), tmp_path / "run")


BANDS = ("B02", "b03", "B04", "B08")


def test_features_are_those_of_a_probe(run: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(1000, 3000, (3, 4, 16, 16)).astype(np.uint16)
    probed = extract(loaded(), ShardReader(write_shards(tmp_path / "s", pixels, [0, 1, 0])), progress=False).x
    model = Plain(run, BANDS, scale=1e-4)
    assert model(torch.from_numpy(pixels.astype(np.float32))).numpy() == pytest.approx(probed, abs=1e-5)
    assert model.num_features == 24 and not any(p.requires_grad for p in model.parameters())
    assert Plain(run, size=32)(torch.rand(2, 4, 20, 20)).shape == (2, 24)
    (only,) = Maps(run)(torch.rand(2, 4, 16, 24))
    assert only.shape == (2, 24, 2, 3) and Maps(run).out_channels == [24]


def test_other_bands_are_refused(run: Path) -> None:
    for bands in (("B03", "B02", "B04", "B08"), ("B02", "B03", "B04")):
        with pytest.raises(InputError, match="takes B02, B03, B04, B08, in this order"):
            Plain(run, bands)


def test_in_torchgeo_bench(run: Path) -> None:
    pytest.importorskip("torchgeo_bench")
    model = torchgeo_bench([SimpleNamespace(name=name, mean=0.0, std=1.0) for name in BANDS], run, scale=1e-4)
    images = torch.rand(2, 4, 16, 16) * 3000
    assert torch.equal(model(images), Plain(run, scale=1e-4)(images))


def test_in_terratorch(run: Path) -> None:
    pytest.importorskip("terratorch")
    from terratorch.registry import BACKBONE_REGISTRY  # type: ignore[import-not-found]

    register_terratorch()
    made = BACKBONE_REGISTRY.build("swath_backbone", backbone=str(run))
    assert made.out_channels == [24] and made(torch.rand(1, 4, 16, 16))[0].shape == (1, 24, 2, 2)
