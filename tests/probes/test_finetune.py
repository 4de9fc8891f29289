"""Fine-tuning: learns, is the same bits again, continues where it was, and does what is published of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swath.backbones.base import create, registry
from swath.hub.load import Loaded
from swath.probes import tune as module
from swath.probes.run import probe, table
from swath.probes.tune import Classifier, DropPath, Tuning, blocks_of, groups, mixed, predict, tune
from swath.shards.draw import Draw
from swath.shards.errors import InputError
from swath.shards.reader import ShardReader
from tests.hub.made import contract, loaded, save_run, write_shards

PLAIN: dict[str, Any] = {"progress": False, "epochs": 4, "batch": 8, "seeds": 2, "lr": (0.02,)}


def make(folder: Path, count: int, seed: int) -> Path:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    pixels = random.integers(1000, 3000, (count, 4, 16, 16))
    pixels[:, 3] += 1500 * labels[:, None, None]
    return write_shards(folder, pixels.astype(np.uint16), labels.tolist(), blocks=[row // 4 for row in range(count)])


def test_a_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, train, test = save_run(loaded(), tmp_path / "run"), make(tmp_path / "train", 64, 0), make(tmp_path / "test", 32, 1)
    began: list[int] = []
    tuned = module.tune
    monkeypatch.setattr("swath.probes.tuned.tune", lambda *args, **more: began.append(more["seed"]) or tuned(*args, **more))
    result = probe("finetune", run, train, test, cache=tmp_path / "cache", **PLAIN)
    names = [row["name"] for row in result["rows"]]
    assert names == ["backbone", "random initialisation, linear", "statistics, linear", "from scratch"]
    assert result["accuracy"] > 0.8 and list(result["seeds"]) == ["0", "1"] and "deviation of seeds" in table(result)
    assert result["accuracy"] == pytest.approx(np.mean(list(result["seeds"].values())))
    assert began == [0, 1, 0, 1]
    again = probe("finetune", run, train, test, cache=False, **PLAIN | {"seeds": 1, "from_scratch": False})
    assert again["confusion"] == result["confusion"] and again["seeds"]["0"] == result["seeds"]["0"]
    assert again["rows"][1:3] == result["rows"][1:3]
    began.clear()
    more = probe("finetune", run, train, test, cache=tmp_path / "cache", **PLAIN | {"seeds": 3, "from_scratch": False})
    assert began == [2] and len(more["rows"]) == 3  # the first two seeds were done
    refused: list[dict[str, Any]] = [{"seeds": 0}, {"lr": ()}, {"epochs": 0}, {"ema": 1.0}, {"drop_path": -0.1}]
    for wrong in refused:
        options: dict[str, Any] = PLAIN | wrong
        with pytest.raises(InputError, match="--"):
            probe("finetune", run, train, test, cache=False, **options)


def test_the_learning_rate_is_chosen_without_test(tmp_path: Path) -> None:
    run, train, test = save_run(loaded(), tmp_path / "run"), make(tmp_path / "train", 64, 0), make(tmp_path / "test", 8, 1)
    given: dict[str, Any] = PLAIN | {"lr": (1e-7, 0.02), "seeds": 1, "from_scratch": False, "cache": False}
    result = probe("finetune", run, train, test, **given)
    assert result["settings"]["lr"] == 0.02 and result["settings"]["chosen_on"] == "a fifth of train"
    assert [step["lr"] for step in result["settings"]["lr_tried"]] == [1e-7, 0.02]


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_several_labels_and_the_same_bits(tmp_path: Path, ema: float) -> None:
    source, reader = loaded(), ShardReader(make(tmp_path / "train", 24, 0))
    target = np.stack([reader.labels > 0, np.ones(24, bool), np.arange(24) % 2 > 0], axis=1)
    made = []
    for _ in range(2):
        tuning = Tuning(epochs=2, batch=8, ema=ema)
        model = tune(source, reader, np.arange(24), target, tuning, lr_per_256=0.02, seed=1, precision="fp32", progress=False)
        made.append(predict(model, source, reader, np.arange(24), "fp32", progress=False))
    assert made[0].shape == (24, 3) and (made[0] == made[1]).all() and np.isfinite(made[0]).all()
    before = source.backbone.state_dict()
    assert all((tensor == before[name]).all() for name, tensor in loaded().backbone.state_dict().items())


def test_divergence_is_one_line(tmp_path: Path) -> None:
    reader = ShardReader(make(tmp_path / "train", 24, 0))
    target = np.eye(2, dtype=bool)[reader.labels]
    with pytest.raises(InputError, match=r"diverged at step .* a lower --lr"):
        tune(loaded(), reader, np.arange(24), target, Tuning(epochs=9, batch=4), lr_per_256=1e30, seed=0, precision="fp32",
             progress=False)  # fmt: skip


def test_layers_learn_less_the_lower_they_are() -> None:
    model = Classifier(loaded().backbone, 3)
    made = groups(model, Tuning(layer_decay=0.5))
    scale = {id(p): group["scale"] for group in made for p in group["params"]}
    of = {name: scale[id(p)] for name, p in model.named_parameters()}
    assert len(of) == sum(len(group["params"]) for group in made) == len(list(model.parameters()))
    assert of["backbone.cls_token"] == of["backbone.patch_embed.proj.weight"] == 0.5**3
    assert of["backbone.blocks.0.norm1.weight"] == 0.5**2 and of["backbone.blocks.1.mlp.fc2.weight"] == 0.5
    assert of["backbone.norm.weight"] == of["norm.bias"] == of["head.weight"] == 1
    decay = {id(p): group["weight_decay"] for group in made for p in group["params"]}
    assert decay[id(model.head.bias)] == 0 and decay[id(model.head.weight)] == 0.05


def test_mixing() -> None:
    images, target = torch.rand(8, 4, 12, 16), torch.eye(8)
    draw = Draw(0, torch.arange(8), torch.zeros(8, dtype=torch.int64))
    both, share = mixed(images, target, Tuning(mixup=0.8, cutmix=1.0), draw)
    assert share.sum(dim=1) == pytest.approx(np.ones(8)) and not torch.equal(both, images)
    left = share.diagonal()
    boxes, cut = mixed(images, target, Tuning(mixup=0, cutmix=1.0), draw)
    own = (boxes == images).all(dim=1).float().mean(dim=(1, 2))  # of a box, pixels are of the one or of the other
    assert own == pytest.approx(cut.diagonal().numpy(), abs=1e-6)
    sums, blend = mixed(images, target, Tuning(mixup=0.8, cutmix=0), draw)
    lam = blend.diagonal()[:, None, None, None]
    assert torch.allclose(sums, lam * images + (1 - lam) * images.flip(0), atol=1e-6)
    assert ((left == cut.diagonal()) | (left == blend.diagonal())).all()
    none, same = mixed(images, target, Tuning(mixup=0, cutmix=0), draw)
    assert none is images and same is target


def test_a_dropped_path_is_the_identity_and_the_mean_is_kept() -> None:
    backbone = loaded().backbone
    images = torch.rand(64, 4, 16, 16)
    draw = Draw(0, torch.arange(64), torch.zeros(64, dtype=torch.int64))
    seen: list[torch.Tensor] = []
    last = backbone.blocks[-1]  # type: ignore[index]
    with torch.no_grad(), DropPath(backbone, 0.5) as drop:
        hook = last.register_forward_hook(lambda block, given, made: seen.extend([given[0], made]))  # type: ignore[operator]
        drop.draw(draw)
        backbone(images)
        hook.remove()
        assert drop.rates == [0, 0.5] and drop.kept is not None
        entered, left = seen
        dropped = ~drop.kept[:, 1]
        assert 20 < dropped.sum() < 44 and torch.equal(left[dropped], entered[dropped])
        whole = last.compute(entered)  # type: ignore[union-attr, operator]
        assert torch.allclose(left[~dropped], entered[~dropped] + 2 * (whole - entered)[~dropped], atol=1e-5)
    assert not any(block._forward_hooks for block in blocks_of(backbone))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(registry.families().values()))
def test_every_family_can_be_fine_tuned(name: str, tmp_path: Path) -> None:
    options = dict(registry.entry(name).build.tiny)
    torch.manual_seed(0)
    backbone = create(name, **options).eval()
    side, dates = options["image_size"], backbone.grid(options["image_size"], options["image_size"])[0]
    count = options["bands"] // dates
    bands = contract(*(f"b{number}" for number in range(count)), side=side).model_copy(update={"dates": dates})
    if getattr(backbone.config, "wavelength_nm", None) is None and "any_bands" in backbone.traits:
        given = tuple(band.model_copy(update={"wavelength_nm": 450.0 + 50 * n}) for n, band in enumerate(bands.bands))
        bands = bands.model_copy(update={"bands": given})
    source = Loaded(backbone, {bands.modality: bands}, (side, side), name, options, {})
    pixels = np.random.default_rng(0).integers(1000, 3000, (16, count * dates, side, side)).astype(np.uint16)
    reader = ShardReader(write_shards(tmp_path / "train", pixels, [0, 1] * 8, bands=bands))
    tuning = Tuning(epochs=2, batch=4, drop_path=0.2)
    target = np.eye(2, dtype=bool)[reader.labels]
    model = tune(source, reader, np.arange(16), target, tuning, lr_per_256=1e-3, seed=0, precision="fp32", progress=False)
    made = groups(Classifier(backbone, 2), tuning)
    assert min(group["scale"] for group in made) < 1 == max(group["scale"] for group in made)
    assert np.isfinite(predict(model, source, reader, np.arange(16), "fp32", progress=False)).all()
