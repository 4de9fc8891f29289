"""BigEarthNet patches as they are published, through the multi-label probe. They lie in $SWATH_DATA."""

import os
from pathlib import Path

import pytest
import torch

from swath.backbones.base import create
from swath.probes.run import probe, table
from swath.shards.ingest import shard
from swath.shards.reader import ShardReader
from tests.hub.made import loaded, save_run

DATA = Path(os.environ.get("SWATH_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")


def test_bigearthnet_patches_with_several_labels(tmp_path: Path) -> None:
    """Eleven patches: that labels are found and counted, not how good anything is."""
    pytest.importorskip("rasterio")
    folder = DATA / "bigearthnet_samples" / "S2"
    if not folder.exists():
        pytest.skip(f"{folder} is not here; set SWATH_DATA to the folder that holds bigearthnet_samples")
    shard(folder, tmp_path / "shards", recipe="bigearthnet_v1")
    reader = ShardReader(tmp_path / "shards")
    torch.manual_seed(0)
    options = {"bands": 12, "image_size": 120, "patch": 40, "width": 24, "depth": 1, "heads": 3}
    source = loaded(reader.contract)
    source.backbone, source.name, source.options = create("vit_tiny_patch8", **options).eval(), "vit_tiny_patch8", options
    run = save_run(source, tmp_path / "run")
    result = probe(
        "multilabel",
        run,
        tmp_path / "shards",
        tmp_path / "shards",
        c=(1.0,),
        size=120,
        cache=False,
        from_scratch=0,
        progress=False,
    )
    lists = [reader.meta(number)["labels"] for number in range(11)]
    assert result["n_test"] == 11 and result["classes"] == sorted({label for labels in lists for label in labels})
    assert result["classes_without_positives"] == []
    assert sum(result["positives"]["test"].values()) == sum(map(len, lists)) > 11
    assert 0 < result["micro_mAP"] <= 1 and result["macro_mAP"] == result["macro_mAP_of_present"]
    assert "11 samples of test are in train too" in table(result)
