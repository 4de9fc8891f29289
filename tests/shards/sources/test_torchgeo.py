"""TorchGeo's protocol, by a stand-in module: TorchGeo itself needs a torchvision that fits torch."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.ingest import shard
from swath.shards.reader import ShardReader
from swath.shards.sources.source import Options
from swath.shards.sources.torchgeo import open_torchgeo
from tests.shards.recipes.published import samples

ORDER = ("B01", "B04", "B8A", "B02")


class Base:
    def __getitem__(self, index: int) -> dict[str, Any]:
        raise NotImplementedError


class EuroSAT(Base):
    """As TorchGeo's: three splits, float32 images, class numbers, names of bands in file order."""

    splits = ("train", "val", "test")
    all_band_names = ORDER
    rgb_bands = ("B04", "B03", "B02")
    BAND_SETS: ClassVar[dict[str, tuple[str, ...]]] = {"all": all_band_names, "rgb": rgb_bands}
    classes: ClassVar[list[str]] = ["Forest", "River"]

    def __init__(
        self, root: str, split: str = "train", bands: Any = None, transforms: Any = None, download: bool = False
    ) -> None:
        assert not download
        assert transforms is None
        if not (Path(root) / split).is_dir():
            raise FileNotFoundError(f"no {split}\nin the folder")
        self.split = split

    def __len__(self) -> int:
        return {"train": 3, "val": 2, "test": 1}[self.split]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self):
            raise IndexError
        if (self.split, index) == ("train", 2):
            raise ValueError("broken\nfile")
        image = torch.stack([torch.full((5, 7), 100.0 * k + index) for k in range(4)])
        return {"image": image, "label": torch.tensor(index % 2)}


class Segmented(Base):
    def __init__(self, root: str) -> None: ...

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.arange(3 * 4 * 4, dtype=torch.int32).reshape(3, 4, 4)
        return {"image": image, "mask": torch.ones(4, 4, dtype=torch.bool), "label": torch.tensor([0, 1, 1]), "caption": "a lake"}


class Nameless(Segmented):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.zeros(5, 4, 4)}


class Pair(Segmented):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image1": torch.zeros(3, 4, 4), "image2": torch.zeros(3, 4, 4)}


class GeoDataset(Base): ...


class NAIP(GeoDataset):
    def __init__(self, root: str) -> None: ...

    def __len__(self) -> int:
        return 1


@pytest.fixture
def torchgeo(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = ModuleType("torchgeo.datasets")
    for each in (EuroSAT, Segmented, Nameless, Pair, NAIP):
        setattr(datasets, each.__name__, each)
    datasets.unpack = print  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchgeo", ModuleType("torchgeo"))
    monkeypatch.setitem(sys.modules, "torchgeo.datasets", datasets)


@pytest.fixture
def root(tmp_path: Path, torchgeo: None) -> Path:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "file").write_text(split)
    return tmp_path


def test_splits_labels_and_bands_in_their_order(root: Path):
    source = open_torchgeo("EuroSAT", root, Options(sensor="sentinel2"))
    made = source.contracts["image"]
    assert (made.names, made.dtype, source.classes, source.dataset) == (ORDER, "float32", ("Forest", "River"), "torchgeo_eurosat")
    assert made.bands[2].wavelength_nm == 864.7
    assert [(item.key, item.split) for item in source.items] == [
        ("train/00000000", "train"), ("train/00000001", "train"), ("train/00000002", "train"),
        ("val/00000000", "val"), ("val/00000001", "val"),
    ]  # fmt: skip
    for item in source.items[:2]:
        sample = source.read(item)
        n = item.place[1]
        assert np.array_equal(sample.parts["image"].pixels[:, 0, 0], [0 + n, 100 + n, 200 + n, 300 + n])
        assert sample.label == ("Forest", "River")[n]
    with pytest.raises(DecodeError, match="train/00000002: ValueError: broken file"):
        source.read(source.items[2])
    (root / "val" / "file").write_text("another")
    assert open_torchgeo("EuroSAT", root, Options(sensor="sentinel2")).fingerprint != source.fingerprint


def test_masks_several_labels_and_captions(root: Path):
    source = open_torchgeo("Segmented", root, Options(scale=0.5))
    ((item, sample),) = samples(source).values()
    assert item.split is None
    assert {name: (c.names, c.unit, c.dtype) for name, c in source.contracts.items()} == {
        "image": (("red", "green", "blue"), "digital number", "int32"), "mask": (("mask",), "class", "uint8"),
    }  # fmt: skip
    assert (sample.parts["image"].scale, sample.parts["mask"].scale) == (0.5, 1.0)
    assert (sample.meta["labels"], sample.meta["captions"], sample.label) == ([1, 2], ["a lake"], None)


def test_bands_that_nobody_names(root: Path):
    with pytest.raises(InputError, match="has 5 bands and does not say which; give --bands"):
        open_torchgeo("Nameless", root, Options())
    assert open_torchgeo("Nameless", root, Options(bands=tuple("abcde"))).contracts["image"].names == tuple("abcde")
    with pytest.raises(InputError, match="has 5 bands, --bands names 2"):
        open_torchgeo("Nameless", root, Options(bands=("a", "b")))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("EuroSet", "has no 'EuroSet'; did you mean EuroSAT"),
        ("unpack", "has no 'unpack'"),
        ("__loader__", "has no '__loader__'"),
        ("NAIP", "is cut by place"),
        ("Pair", "has image1, image2, but no 'image'"),
    ],
)
def test_what_is_refused(root: Path, name: str, match: str):
    with pytest.raises(InputError, match=match) as caught:
        open_torchgeo(name, root, Options())
    assert "\n" not in str(caught.value)


def test_nothing_there(tmp_path: Path, torchgeo: None):
    with pytest.raises(InputError, match=r"finds nothing in .*FileNotFoundError: no train in the folder") as caught:
        open_torchgeo("EuroSAT", tmp_path, Options())
    assert "\n" not in str(caught.value)


def test_torchgeo_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchgeo", None)
    with pytest.raises(InputError, match="pip install torchgeo torchvision") as caught:
        open_torchgeo("EuroSAT", tmp_path, Options())
    assert "\n" not in str(caught.value)


def test_from_the_recipe_name_to_shards(root: Path, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("made") / "out"
    manifests = shard(root, out, recipe="torchgeo:EuroSAT", max_failed=0.2, implausible_ok=True, progress=False)
    assert {name: manifest.samples for name, manifest in manifests.items()} == {"train": 2, "val": 2}
    assert manifests["train"].skipped == (("train/00000002", "train/00000002: ValueError: broken file"),)
    reader = ShardReader(out / "val")
    for n in range(2):
        number = int(reader.meta(n)["key"][-1])
        assert reader.pixels(n)[:, 0, 0].tolist() == [number, 100 + number, 200 + number, 300 + number]
        assert manifests["val"].classes[reader.labels[n]] == ("Forest", "River")[number]
