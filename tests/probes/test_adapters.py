"""A backbone in the form that other benchmarks ask for; theirs are tested where they are installed (docs/probes.md says how)."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from swath.backbones.base import create, registry
from swath.hub.load import Loaded
from swath.probes.adapters import Classifier, Maps, Plain, register_terratorch, register_timm, torchgeo_bench
from swath.probes.features import extract
from swath.shards.bands import InputContract
from swath.shards.errors import InputError
from swath.shards.reader import ShardReader
from tests.hub.made import contract, loaded, save_run, write_shards

BANDS = ("B02", "b03", "B04", "B08")
MORE = ("coastal_aerosol", "nir", "red", "green", "blue", "red_edge_4")  # torchgeo-bench's names, its own order


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_run(loaded(), tmp_path / "run")


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[[Loaded], str]:
    """Have the adapters find a backbone under the name that is returned."""

    def give(source: Loaded) -> str:
        monkeypatch.setattr("swath.probes.adapters.load_backbone", lambda name: source)
        return "given"

    return give


def backbone(name: str, bands: InputContract) -> Loaded:
    """A tiny one."""
    torch.manual_seed(0)
    made = create(name, **registry.entry(name).build.tiny | {"bands": bands.channels}).eval()
    size, options = (made.config.image_size,) * 2, dataclasses.asdict(made.config)
    return dataclasses.replace(loaded(), backbone=made, contracts={bands.modality: bands}, size=size, name=name, options=options)


def clipped(bands: InputContract) -> InputContract:
    return bands.model_copy(update={"normalisation": bands.normalisation.model_copy(update={"clip": (-0.5, 0.5)})})


@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.parametrize("kind", ["vit", "clip", "waves"])
def test_features_are_those_of_a_probe(kind: str, size: int, given: Callable[[Loaded], str], tmp_path: Path) -> None:
    """Nodata, clip and wavelengths too."""
    bands = contract().model_copy(update={"gsd_m": None})  # as of these shards
    made = {
        "vit": loaded,
        "clip": lambda bands: loaded(clipped(bands)),
        "waves": lambda bands: backbone("less_base_patch16", bands),
    }
    source = made[kind](bands)
    pixels = np.random.default_rng(0).integers(1000, 3000, (3, 4, 16, 16)).astype(np.uint16)
    pixels[0, :, :5, :7] = 0
    probed = extract(source, ShardReader(write_shards(tmp_path / "s", pixels, [0, 1, 0])), size=(size, size), progress=False).x
    model = Plain(given(source), BANDS, scale=1e-4, size=size)
    assert model(torch.from_numpy(pixels.astype(np.float32))).detach().numpy() == pytest.approx(probed, abs=2e-5)
    assert model.num_features == probed.shape[1] and not model.backbone.training


def test_pixel_size_is_told(run: Path) -> None:
    images = torch.rand(2, 4, 16, 16)
    for size, metres, expected in ((None, None, 10), (32, None, 5), (32, 30, 15)):
        told = Plain(run, scale=1.0, size=size, gsd_m=metres).prepared(images)[1].gsd_m
        assert told is not None and told.tolist() == [expected] * 2


def test_picks_its_bands_by_name(run: Path) -> None:
    images = torch.rand(2, 6, 16, 16) * 3000
    own = Plain(run, scale=1e-4)(images[:, [4, 3, 2, 1]])
    assert torch.allclose(Plain(run, MORE, scale=1e-4)(images), own, atol=1e-5)
    each = [1e-4, 1.0, 1e-4, 1e-4, 1e-4, 1.0]
    images[:, 1] = images[:, 1] * 1e-4 - 0.1
    again = Plain(run, MORE, scale=each, add=torch.tensor([0, 0.1, 0, 0, 0, 5]))(images)
    assert torch.allclose(again, own, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bands": ("B02", "B03", "B04")}, "takes B02, B03, B04, B08; of B02, B03, B04 none, or several, is B08"),
        ({"bands": ("B02", "B03", "B04", "B08", "nir")}, "none, or several, is B08"),
        ({"bands": MORE, "scale": (1, 2, 3)}, "scale has 3 numbers; the images have the 6 bands"),
        ({"scale": 0}, "scale must be above 0"),
        ({"size": 20}, "size=20"),
    ],
)
def test_refusals(run: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Plain(run, **{"scale": 1.0, **options})


def test_other_numbers_of_channels_are_refused(run: Path) -> None:
    with pytest.raises(InputError, match="images have 3 channels; 6 were announced"):
        Plain(run, MORE, scale=1.0)(torch.rand(1, 3, 16, 16))


def test_maps_for_decoders(run: Path, given: Callable[[Loaded], str]) -> None:
    """Four levels, the last the backbone's own map; a pyramid's own; trainable, and new weights where none are asked for."""
    made, images = Maps(run, scale=1.0), torch.rand(2, 4, 16, 24)
    assert made.out_channels == [24] * 4 and made.patch_size == 8
    found = made(images)
    assert [tuple(one.shape) for one in found] == [(2, 24, 2, 3)] * 4
    assert torch.allclose(found[-1].mean(dim=(2, 3)), Plain(run, scale=1.0)(images), atol=1e-5)  # pooled by their mean
    assert all(p.requires_grad for p in made.parameters())
    fresh = Maps(run, scale=1.0, pretrained=False)
    assert not torch.equal(fresh(images)[-1], found[-1])
    pyramid = Maps(given(backbone("lwganet_small", contract(side=64))), scale=1.0)
    assert [one.shape[2] for one in pyramid(torch.rand(1, 4, 64, 64))] == [16, 8, 4, 2] and pyramid.patch_size == 16


def test_series_of_dates(given: Callable[[Loaded], str]) -> None:
    """As TerraTorch hands them over, (B, C, T, H, W); bands are picked at each date."""
    name = given(backbone("vit_tiny_patch8", contract().model_copy(update={"dates": 2})))
    images = torch.rand(2, 6, 2, 16, 16)
    plain = images[:, [4, 3, 2, 1]].transpose(1, 2).flatten(1, 2)
    assert torch.equal(Maps(name, MORE, scale=1.0)(images)[-1], Maps(name, scale=1.0)(plain)[-1])


class Samples(Dataset[dict[str, Any]]):
    """Twelve images of DN whose class their brightness tells, with what `target` names: a class each, or a mask of them."""

    def __init__(self, bands: int, target: str, side: int = 16) -> None:
        random = torch.Generator().manual_seed(0)
        self.target = target
        self.classes = torch.arange(12) % 3
        self.images = (torch.rand(12, bands, side, side, generator=random) + self.classes[:, None, None, None]) * 1000 + 500

    def __len__(self) -> int:
        return 12

    def __getitem__(self, number: int) -> dict[str, Any]:
        where = self.classes[number]
        truth = where.expand(self.images.shape[2:]).clone() if self.target == "mask" else where
        return {"image": self.images[number], self.target: truth}


def fit(module: Any, target: str, bands: int = 4) -> None:
    """A few steps with Lightning; what learns must have moved."""
    from lightning.pytorch import Trainer  # type: ignore[import-not-found]

    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    loader = DataLoader(Samples(bands, target), batch_size=4)
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, loader, loader)
    trainer.test(module, loader, verbose=False)
    learned = [name for name, p in module.named_parameters() if p.requires_grad]
    moved = [name for name, p in module.named_parameters() if not torch.equal(p, before[name])]
    assert set(moved) <= set(learned) and len(moved) > 0.5 * len(learned)


def test_in_timm(run: Path) -> None:
    timm = pytest.importorskip("timm")
    register_timm("swath_tested", run, MORE, scale=1e-4)
    images = torch.rand(2, 6, 32, 32) * 3000
    model = timm.create_model("swath_tested", pretrained=True, in_chans=6).eval()
    assert torch.equal(model(images), Plain(run, MORE, scale=1e-4)(images))
    scores = timm.create_model("swath_tested", pretrained=False, num_classes=5)
    assert isinstance(scores, Classifier) and scores.backbone.training and scores(images).shape == (2, 5)
    maps = timm.create_model("swath_tested", pretrained=True, features_only=True, out_indices=(0, -1))
    assert maps.feature_info.reduction() == [4, 32] and maps.feature_info.channels() == [24, 24]
    assert [tuple(one.shape) for one in maps(images)] == [(2, 24, 8, 8), (2, 24, 1, 1)]
    with pytest.raises(InputError, match="takes 6 channels, not 3"):
        timm.create_model("swath_tested", in_chans=3)


@pytest.mark.parametrize("frozen", [True, False])
def test_in_torchgeo(run: Path, frozen: bool) -> None:
    pytest.importorskip("torchgeo")
    try:
        from torchgeo.tasks import Classification, SemanticSegmentation  # type: ignore[import-not-found]
    except ImportError:  # before 0.10
        from torchgeo.trainers import ClassificationTask as Classification  # type: ignore[import-not-found]
        from torchgeo.trainers import SemanticSegmentationTask as SemanticSegmentation
    register_timm("swath_in_torchgeo", run, BANDS, scale=1e-4)
    common = {"weights": True, "in_channels": 4, "num_classes": 3, "freeze_backbone": frozen}
    task = Classification(model="swath_in_torchgeo", **common)
    assert torch.equal(
        task.model.backbone.state_dict()["norm.weight"], Plain(run, scale=1.0).backbone.state_dict()["norm.weight"]
    )
    fit(task, "label")
    for decoder in ("unet", "upernet", "segformer"):
        made = SemanticSegmentation(model=decoder, backbone="tu-swath_in_torchgeo", **common)
        assert any(p.requires_grad for p in made.model.encoder.parameters()) is not frozen
        if decoder == "unet":
            fit(made, "mask")
        assert made(torch.rand(2, 4, 32, 32) * 3000).shape == (2, 3, 32, 32)


def test_in_torchgeo_bench(run: Path) -> None:
    pytest.importorskip("torchgeo_bench")
    bands = [SimpleNamespace(name=name, mean=0.0, std=1.0) for name in MORE]
    theirs = {"normalization": "bandspec_zscore", "name": "swath", "eval": {"segmentation": {}}}
    model = torchgeo_bench(bands, run, scale=1e-4, **theirs)
    images = torch.rand(2, 6, 16, 16) * 3000
    assert torch.equal(model(images), Plain(run, MORE, scale=1e-4)(images))
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(TypeError, match="sizes"):
        torchgeo_bench(bands, run, scale=1e-4, sizes=32)


def test_torchgeo_bench_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own program on data of ours: nearest neighbours and the linear probe, then its segmentation probe on our maps."""
    pytest.importorskip("torchgeo_bench")
    import csv

    from torchgeo_bench import main as program  # type: ignore[import-not-found]
    from torchgeo_bench.datasets import loading  # type: ignore[import-not-found]
    from torchgeo_bench.datasets.base import BandSpec, BenchDataset  # type: ignore[import-not-found]

    def data(kind: str) -> type:
        class Ours(BenchDataset):
            name, task, num_classes, multilabel = f"ours-{kind}", kind, 3, False
            bands: ClassVar = [BandSpec("s2", name, name, mean=0.0, std=1.0, min=0.0, max=10000.0) for name in MORE]
            rgb_bands: ClassVar = ["red", "green", "blue"]
            split_sizes: ClassVar = {"train": 12, "val": 12, "test": 12}

            @classmethod
            def data_root(cls) -> Path:
                return tmp_path

            def get_dataset(self, split: str, **options: Any) -> Samples:
                return Samples(6, "label" if kind == "classification" else "mask", side=224)

        return Ours

    for kind in ("classification", "segmentation"):
        monkeypatch.setitem(loading._REGISTRY, f"ours-{kind}", data(kind))
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "swath.yaml").write_text(
        f"_target_: swath.probes.adapters.torchgeo_bench\nname: ours\nbackbone: {run}\nscale: 1e-4\nsize: 32\n"
        "eval: {segmentation: {layers: [levels.3, levels.2, levels.1, levels.0]}}\n"
    )
    settings = [
        "model=swath", "dataset.names=[ours-classification,ours-segmentation]", "dataset.bands=all", "dataset.image_size=null",
        "dataset.normalization=identity", "dataset.num_workers=0", "device=cpu", "eval.bootstrap=2", "eval.c_range=[-1,1,2]",
        "eval.segmentation.epochs=1", f"output={tmp_path / 'rows.csv'}",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["torchgeo-bench", "--config-dir", str(tmp_path / "conf"), *settings])
    monkeypatch.chdir(tmp_path)
    program.main()
    with (tmp_path / "rows.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"knn5", "linear", "seg-fpn"}
    assert float(rows["knn5"]["metric_value"]) == 1 and rows["knn5"]["feature_dim"] == "24"


@pytest.mark.parametrize("frozen", [True, False])
def test_in_terratorch(run: Path, frozen: bool) -> None:
    pytest.importorskip("terratorch")
    from terratorch.registry import BACKBONE_REGISTRY  # type: ignore[import-not-found]
    from terratorch.tasks import ClassificationTask, SemanticSegmentationTask  # type: ignore[import-not-found]

    register_terratorch()
    made = BACKBONE_REGISTRY.build("swath_backbone", path=str(run), scale=1e-4)
    assert made.out_channels == [24] * 4 and made.backbone.training
    common = {"backbone": "swath_backbone", "backbone_path": str(run), "backbone_bands": list(BANDS), "backbone_scale": 1e-4,
              "backbone_pretrained": True, "num_classes": 3}  # fmt: skip
    flat = {**common, "decoder": "IdentityDecoder"}
    fit(ClassificationTask(model_args=flat, model_factory="EncoderDecoderFactory", freeze_backbone=frozen), "label")
    necks = [{"name": "LearnedInterpolateToPyramidal"}]
    dense = {**common, "decoder": "UNetDecoder", "decoder_channels": [16, 8, 8, 4], "necks": necks}
    task = SemanticSegmentationTask(
        model_args=dense, model_factory="EncoderDecoderFactory", freeze_backbone=frozen, ignore_index=-1
    )
    assert any(p.requires_grad for p in task.model.encoder.parameters()) is not frozen
    fit(task, "mask")
    assert task(torch.rand(2, 4, 20, 28) * 3000).output.shape == (2, 3, 20, 28)  # padded to whole patches
