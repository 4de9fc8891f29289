"""`swath probe segment` and `change` on synthetic scenes, from label maps in shards to rows and pictures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from swath.probes.confusion import IGNORE
from swath.probes.heads import SCALES, LinearHead, UPerHead, fit, resize
from swath.probes.maps import encoder, extract_maps, numbered, read_tiles
from swath.probes.task import Bench
from swath.probes.tasks import change, segment
from swath.shards.errors import InputError
from swath.shards.manifest import LabelMap
from swath.shards.reader import ShardReader
from tests.probes.dense_shards import TINY, backbone, bench, scenes

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def dates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    return scenes(folder / "scenes", folder / "dates")


@pytest.fixture(scope="module")
def pairs(dates: Path) -> Path:
    return scenes(dates.with_name("scenes"), dates.with_name("pairs"), pairs=True)


def test_resizing_is_bilinear_and_means() -> None:
    x = torch.randn(2, 3, 4, 6)
    assert resize(x, (9, 6)).numpy() == pytest.approx(F.interpolate(x, (9, 6), mode="bilinear").numpy(), abs=1e-6)
    assert resize(x, (2, 3)).numpy() == pytest.approx(F.avg_pool2d(x, 2).numpy(), abs=1e-6)


@pytest.mark.parametrize("shapes", [[(5, 8, 8)], [(5, 8, 6), (7, 4, 3), (3, 2, 1)], [(6, 3, 5)] * len(SCALES), [(6, 1, 1)] * 4])
@pytest.mark.parametrize("head", [LinearHead, UPerHead])
def test_heads_take_one_level_or_several(head: type, shapes: list[tuple[int, int, int]]) -> None:
    made = head([shape[0] for shape in shapes], 4)
    levels = [torch.randn(2, *shape) for shape in shapes]
    out = made(levels, (16, 11))
    assert out.shape == (2, 4, 16, 11)
    (out - torch.randn_like(out)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


def test_a_linear_head_learns_what_is_linear() -> None:
    """Against least surprise: pixels whose class is the larger of two bands, every tenth without a label."""
    torch.manual_seed(0)
    x = torch.randn(12, 2, 8, 8)
    target = (x[:, 0] > x[:, 1]).to(torch.uint8)
    target[:, 0] = IGNORE
    model = fit(LinearHead([2], 2), [x], target, segment._loss, steps=60, rate=0.1, seed=0)
    called = model([x], (8, 8)).argmax(1)
    assert (called == target)[:, 1:].float().mean() > 0.95


@pytest.mark.parametrize("name,levels", [("vit_tiny_patch8", 4), ("vmamba_tiny", 4)])
def test_levels_of_a_plain_backbone_and_a_pyramid(dates: Path, name: str, levels: int) -> None:
    reader = ShardReader(dates / "val")
    if name.startswith("vit"):
        loaded = backbone(reader, 16, **TINY)
    else:
        from swath.backbones.base import registry

        loaded = backbone(reader, 32, name=name, **{k: v for k, v in registry.entry(name).build.tiny.items()
                                                    if k not in ("bands", "image_size")})  # fmt: skip
    tiles = read_tiles(loaded, reader, "landcover", [f"{c}" for c in reader.manifest.maps["landcover"].classes.values()])
    contract = next(iter(loaded.contracts.values()))
    found = extract_maps(encoder(loaded, loaded.backbone, contract, several=True), tiles)
    assert len(found) == levels and all(len(level) == len(tiles) for level in found)
    last = extract_maps(encoder(loaded, loaded.backbone, contract), tiles)[-1]
    assert (found[-1] == last).all()
    if name.startswith("vit"):  # the last tap, before the final norm, is of the same places
        with torch.inference_mode():
            tokens = loaded.backbone.encode(loaded.backbone.tokenize(tiles.images[0][:2])).tokens
        assert last[:2].flatten(2).mT.numpy() == pytest.approx(tokens.numpy(), abs=1e-5)


def test_labels_by_code() -> None:
    codes = np.array([[0, 3, 7], [9, 3, 255]], np.uint8)
    found = LabelMap(classes={3: "water", 7: "field", 8: "road"})
    assert numbered(codes, found, ["field", "water"]).tolist() == [[IGNORE, 1, 0], [IGNORE, 1, IGNORE]]
    with pytest.raises(InputError, match="class field"):
        numbered(codes, found, ["water"])


def test_segment(dates: Path) -> None:
    options = segment.Options(steps=25, scratch_steps=2)
    given = bench(dates)
    made = segment.run(given, options)
    assert [row.name for row in made.rows] == ["backbone", "random initialisation", "statistics", "from scratch"]
    assert next(iter(made.rows[0].metrics)) == "miou" and made.settings["n_test"] == len(given.readers["test"])
    for row in made.rows:
        assert 0 <= row.metrics["miou"] <= 1 and row.interval["miou"][0] <= row.metrics["miou"] + 1e-9  # type: ignore[operator]
    # one matrix over all pixels of test that have a label
    reader = given.readers["test"]
    labelled = sum(int((reader.label_map(n, "landcover") > 0).sum()) for n in range(len(reader)))  # type: ignore[operator]
    assert np.sum(made.details["by_row"]["backbone"]["confusion"]) == labelled == made.settings["test_pixels"]
    assert set(made.pictures) == {"confusion", "overlays"} and made.settings["rows"]["backbone"]["chosen_on"] == "val"
    again = segment.run(bench(dates), options)
    assert again.rows == made.rows and again.details == made.details  # bit for bit
    with pytest.raises(InputError, match="neither linear nor upernet"):
        segment.run(given, replace(options, head="conv"))
    with pytest.raises(InputError, match=r"no label map .buildings. .it has landcover"):
        segment.run(given, replace(options, labels="buildings"))


def test_place_and_time_are_withheld_unless_asked_for(dates: Path, pairs: Path) -> None:
    reader = ShardReader(dates / "test")
    loaded = backbone(reader, 16, **TINY, context=True)
    contract = next(iter(loaded.contracts.values()))
    tiles = read_tiles(loaded, reader, "landcover", list(reader.manifest.maps["landcover"].classes.values()))
    bare, told = (extract_maps(encoder(loaded, loaded.backbone, contract, told=given), tiles)[0] for given in (False, True))
    assert not torch.allclose(bare, told)
    moved = replace(tiles, places=[tiles.places[0], *(place + 1 for place in tiles.places[1:])])
    assert torch.equal(extract_maps(encoder(loaded, loaded.backbone, contract), moved)[0], bare)
    half = extract_maps(encoder(loaded, loaded.backbone, contract), tiles, "bf16")[0]
    assert not torch.equal(half, bare) and torch.allclose(half, bare, atol=0.1)
    for task, folder in ((segment, dates), (change, pairs)):
        made = task.run(bench(folder), task.Options(steps=1, scratch_steps=0, context=True))
        assert [row.name for row in made.rows] == [
            "backbone", "backbone, told place and time", "random initialisation", "statistics", "place only",
        ]  # fmt: skip


def test_what_a_backbone_normalises_by_has_no_part_in_change_vectors(pairs: Path) -> None:
    given = bench(pairs)
    (contract,) = given.loaded.contracts.values()
    rule = contract.normalisation
    other = contract.model_copy(update={"normalisation": rule.model_copy(update={"std": tuple(7 * s for s in rule.std[::-1])})})
    names, found = ("unchanged", "changed"), []
    for one in (contract, other):
        loaded = replace(given.loaded, contracts={one.modality: one})
        parts = {part: read_tiles(loaded, reader, "change", names, apart=True) for part, reader in given.readers.items()}
        found.append(change.magnitudes(parts).test)
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-3)


def test_segment_without_val_and_with_upernet(dates: Path) -> None:
    made = segment.run(bench(dates, val=False), segment.Options(head="upernet", steps=2, scratch_steps=0))
    assert [row.name for row in made.rows] == ["backbone", "random initialisation", "statistics"]
    assert made.settings["rows"]["backbone"]["chosen_on"] == "a fifth of train"


def test_change(pairs: Path) -> None:
    options = change.Options(steps=25, scratch_steps=2)
    made = change.run(bench(pairs), options)
    assert [row.name for row in made.rows] == ["backbone", "random initialisation", "statistics", "from scratch"]
    total = np.array(made.details["by_row"]["backbone"]["confusion"])
    assert total.sum() == made.settings["test_pixels"] and total[1].sum() == made.settings["changed_pixels"] > 0
    assert made.rows[0].metrics["f1"] == pytest.approx(2 * total[1, 1] / (total[1].sum() + total[:, 1].sum()))
    assert change.run(bench(pairs), options).rows == made.rows


def test_change_needs_pairs(dates: Path, pairs: Path) -> None:
    with pytest.raises(InputError, match="--dates-per-sample 2"):
        change.run(bench(dates), change.Options())
    given = bench(pairs)
    (contract,) = given.loaded.contracts.values()
    turned = contract.model_copy(update={"bands": contract.bands[::-1]})
    other = Bench(replace(given.loaded, contracts={contract.modality: turned}), given.readers)
    with pytest.raises(InputError, match="input contracts differ"):
        change.run(other, change.Options())
    with pytest.raises(InputError, match="--changed is one of them"):
        change.run(given, change.Options(changed="burnt"))


def test_the_threshold_is_that_of_best_f1() -> None:
    score = np.array([[[0.1, 0.4, 0.4], [0.8, 0.9, 0.2]]])
    truth = np.array([[[0, 1, 0], [1, 0, IGNORE]]], np.uint8)
    best, settings = change.threshold(score, truth)
    every = {
        t: 2 * ((score >= t) & (truth == 1)).sum() / (((score >= t) & (truth != IGNORE)).sum() + 2) for t in (0.1, 0.4, 0.8, 0.9)
    }
    assert best == pytest.approx(max(every.values())) and every[settings["threshold"]] == best
    with pytest.raises(InputError, match="no pixel has changed"):
        change.threshold(score, np.zeros_like(truth))
