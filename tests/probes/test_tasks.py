"""Every task on small shards: its rows, the protocol they keep, what is cached, and the same bits again."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.preprocessing import StandardScaler

from swath.pretrain.checkpoint import save
from swath.probes import cache, features, tuned
from swath.probes.features import Features
from swath.probes.frozen import fitting_size, normalised
from swath.probes.knn import neighbours
from swath.probes.metrics import AveragePrecision, interval, interval_of_draws, resampled
from swath.probes.run import probe, probes, table
from swath.probes.statistics import colour_statistics
from swath.probes.task import Result, tasks
from swath.probes.tasks.fewshot import pick
from swath.shards.bands import Normalisation
from swath.shards.errors import InputError
from swath.shards.reader import ShardReader
from tests.hub.made import contract, loaded, save_run, write_shards

Make = Callable[..., Path]
Probe = Callable[..., dict[str, Any]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Shards of two classes that differ in their near infrared, in blocks of four."""

    def shards(name: str, count: int, seed: int, **options: Any) -> Path:
        random = np.random.default_rng(seed)
        labels = options.pop("labels", random.integers(0, 2, count))
        pixels = random.integers(1000, 3000, (count, 4, 16, 16))
        pixels[:, 3] += 900 * np.maximum(labels, 0)[:, None, None]
        blocks = options.pop("blocks", [row // 4 for row in range(count)])
        return write_shards(tmp_path / name, pixels.astype(np.uint16), labels, blocks=blocks, **options)

    return shards


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_run(loaded(seed=7), tmp_path / "run")


@pytest.fixture
def ask(run: Path, make: Make, tmp_path: Path) -> Probe:
    """A probe of that run on train, val and test."""
    parts = {"train": make("train", 48, 0), "test": make("test", 32, 1), "val": make("val", 24, 2)}

    def asked(task: str, **options: Any) -> dict[str, Any]:
        return probe(task, run, **{"progress": False, "from_scratch": 0, "cache": tmp_path / "cache", **parts, **options})

    return asked


def names(result: dict[str, Any]) -> list[str]:
    return [row["name"] for row in result["rows"]]


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "seconds"}


@pytest.mark.parametrize(
    ("task", "options", "metric"),
    [("knn", {"k": 5}, "accuracy"), ("linear", {"c": (0.01, 1.0)}, "accuracy"), ("retrieve", {"k": (1, 5)}, "R@1"),
     ("fewshot", {"shots": (1, 4), "draws": 3}, "accuracy, 1 per class")],
)  # fmt: skip
def test_a_frozen_task(task: str, options: dict[str, Any], metric: str, ask: Probe, run: Path, tmp_path: Path) -> None:
    file = tmp_path / "out" / "made.json"
    result = ask(task, json_path=file, **options)
    assert names(result) == ["backbone", "random initialisation", "statistics"] and result["metric"] == metric
    assert json.loads(file.read_text()) == result == json.loads((run / "probes" / f"{task}.json").read_text())
    for row in result["rows"]:
        for name, (low, high) in row["interval"].items():
            assert 0 <= low <= row["metrics"][name] <= high <= 1
        assert metric in row["interval"]
    assert result[metric] == result["rows"][0]["metrics"][metric] > 0.6
    assert result["settings"]["seed"] == 0 and result["settings"]["precision"] in ("fp32", "bf16")
    assert {"neighbours", "pca"} <= set(result["pictures"])
    for name in result["pictures"]:
        assert Image.open(file.with_name(f"made-{name}.png")).size[0] > 100
    text = table(result)
    assert all(name in text for name in names(result)) and f"{result[metric]:.3f}" in text
    assert without_times(ask(task, cache=False, **options)) == without_times(result)


@pytest.mark.parametrize(("task", "options"), [("knn", {}), ("fewshot", {"shots": (2,), "draws": 2})])
def test_every_table_has_a_row_from_scratch(
    task: str, options: dict[str, Any], ask: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained once; by the command's own choice as often as sees 20,000 samples, at most 30 times; told apart in the settings."""
    began: list[int] = []
    tune = tuned.tune
    monkeypatch.setattr(tuned, "tune", lambda *a, **more: began.append(len(a[2])) or tune(*a, **more))
    result = ask(task, from_scratch=2, **options)
    assert names(result)[-1] == "from scratch" and began == [48 if task == "knn" else 4]
    assert set(result["rows"][-1]["metrics"]) == set(result["rows"][0]["metrics"]) and result["rows"][-1]["interval"]
    assert result["seconds"]["training"] > 0
    assert without_times(ask(task, from_scratch=2, **options)) == without_times(result) and len(began) == 1
    monkeypatch.setattr(tuned, "SCRATCH_EPOCHS", 1)
    assert names(ask(task, from_scratch=None, **options)) == names(result) and len(began) == 2
    assert tuned.scratch_epochs(None, 10**6) == tuned.scratch_epochs(None, 5) == 1 and tuned.scratch_epochs(7, 5) == 7


def test_features_are_computed_once_and_kept_by_content(
    ask: Probe, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    extract = features.extract
    monkeypatch.setattr(features, "extract", lambda one, reader, **more: made.append(one.name) or extract(one, reader, **more))
    result = ask("knn", precision="fp32")
    assert len(made) == 4  # train and test, of the backbone and of random weights; nothing is chosen on val
    ask("retrieve", precision="fp32")
    assert len(made) == 4
    ask("linear", precision="fp32")
    assert len(made) == 6  # val too
    for change, computed in (
        ({"precision": "bf16"}, 4),
        ({"size": 32}, 4),
        ({"seed": 5}, 2),
        ({"train": make("more", 48, 9)}, 2),
    ):
        made.clear()
        ask("knn", **{"precision": "fp32", **change})
        assert len(made) == computed, change
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"\x93NUMPY\x01\x00 and then nothing")
    made.clear()
    assert without_times(ask("knn", precision="fp32")) == without_times(result) and len(made) == 4
    assert not list((tmp_path / "cache").glob(".*"))


def test_a_cache_is_bounded_and_never_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    monkeypatch.setattr(cache, "LIMIT", 500)
    for number in range(4):
        cache.keep(tmp_path, f"{number}", x)  # 176 bytes each
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["2", "3"]
    assert (cache.load(tmp_path, "3", (4, 3)) == x).all()  # type: ignore[operator]
    assert cache.load(tmp_path, "3", (3, 4)) is None and cache.load(tmp_path, "0", (4, 3)) is None
    (tmp_path / "file").write_text("")
    cache.keep(tmp_path / "file" / "below", "1", x)
    cache.keep(None, "1", x)


def test_probes_share_their_features(run: Path, ask: Probe, tmp_path: Path) -> None:
    folders = (tmp_path / "train", tmp_path / "test")
    one, two = probes(["knn", "retrieve"], run, *folders, cache=False, from_scratch=0, progress=False, temperature=1.0)
    assert one["settings"]["temperature"] == 1.0 and "temperature" not in two["settings"]
    assert two["seconds"]["features"] < one["seconds"]["features"]
    with pytest.raises(InputError, match=r"has no option 'temprature' \(did you mean temperature\?\)"):
        probes(["knn"], run, *folders, temprature=1.0)
    with pytest.raises(InputError, match=r"no probe is called 'knnn' \(did you mean knn\?\); there are"):
        probe("knnn", run, *folders)
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("retrieve", {"k": (0,)}, "must be numbers from 1"), ("knn", {"k": 0}, "--k must be at least 1"),
        ("knn", {"temperature": 0.0}, "--temperature above 0"), ("linear", {"c": ()}, "--c must be numbers above 0, not none"),
        ("multilabel", {"c": (0.1, -1.0)}, "--c must be numbers above 0, not 0.1,-1"), ("knn", {"from_scratch": -1}, "0 or more"),
        ("knn", {"size": -8}, "--size must be at least 1"), ("knn", {"seed": 2**64}, "--seed must be"),
        ("knn", {"json_path": tmp_path}, "is a folder"),
    ]  # fmt: skip
    for task, wrong, said in refused:
        with pytest.raises(InputError, match=said):
            probe(task, run, *folders, **wrong)


def test_the_table_of_preprocessing_marks_the_contract(ask: Probe) -> None:
    result = ask("knn", preprocessing_table=True)
    cells = result["preprocessing"]
    assert [(c["size"], c["normalisation"]) for c in cells if c["contract"]] == [("pretraining", "pretraining")]
    assert len(cells) == 12 and next(c["value"] for c in cells if c["contract"]) == result["accuracy"]
    assert {tuple(c["pixels"]) for c in cells if c["size"] == "2×"} == {(32, 32)}
    assert "pretraining (16 × 16)" in table(result) and " *" in table(result)
    larger = ask("knn", preprocessing_table=True, size=32)["preprocessing"]
    assert larger == cells  # what was asked for this once is not the contract's


def test_normalisations_are_contracts() -> None:
    own, target = contract(), contract()
    numbers = Normalisation(mean=(0.3,) * 4, std=(0.1,) * 4, pixels=(5,) * 4, minimum=(0.1,) * 4, maximum=(0.5,) * 4)
    target = target.model_copy(update={"normalisation": numbers})
    made = {name: normalised(own, target, name) for name in ("pretraining", "target", "min-max", "no")}
    assert made["pretraining"] == own and made["target"].normalisation == numbers  # type: ignore[union-attr]
    assert made["min-max"].normalisation.mean == (0.1,) * 4  # type: ignore[union-attr]
    assert made["min-max"].normalisation.std == pytest.approx((0.4,) * 4)  # type: ignore[union-attr]
    assert made["no"].normalisation.std == (1.0,) * 4 and normalised(own, own, "min-max") is None  # type: ignore[union-attr]
    assert fitting_size(loaded(), 20, 20) == (24, 24) and fitting_size(loaded(), 19, 19) == (16, 16)


def test_context_is_withheld_unless_asked_for(make: Make, tmp_path: Path) -> None:
    """A backbone that encodes place gives other features where it is told; place alone finds classes that lie apart."""
    source = loaded(seed=1)
    options = source.options | {"context": True}
    from swath.backbones.base import create

    told = replace(source, backbone=create(source.name, **options).eval(), options=options)
    parts = {}
    for seed, part in enumerate(("train", "test")):
        labels = np.arange(40) % 2
        places = [(40.0 * label + row / 10, 10.0) for row, label in enumerate(labels)]
        parts[part] = make(part, 40, seed, labels=labels, places=places)
    bare, placed = (features.extract(told, ShardReader(parts["train"]), told=given, progress=False).x for given in (False, True))
    assert not np.allclose(bare, placed)
    result = probe("knn", save_run(told, tmp_path / "run"), **parts, context=True, cache=False, from_scratch=0, progress=False)
    assert names(result) == [
        "backbone", "backbone, told place and time", "random initialisation", "statistics", "place only",
    ]  # fmt: skip
    assert result["rows"][-1]["metrics"]["accuracy"] == 1
    none = make("nowhere", 20, 3)
    with pytest.raises(InputError, match="have no place"):
        probe("knn", tmp_path / "run", none, none, context=True, cache=False, from_scratch=0, progress=False)


def test_transductive_rows_say_so(make: Make, run: Path, tmp_path: Path) -> None:
    train, test = make("train", 40, 0), make("test", 24, 1)
    plain = {"cache": False, "from_scratch": 0, "progress": False}
    unknown = probe("knn", run, train, test, **plain)  # type: ignore[arg-type]
    assert unknown["transductive"] is None and "is unknown" in table(unknown)
    clean = probe("knn", run, train, test, pretrained_on=[train], **plain)  # type: ignore[arg-type]
    assert clean["transductive"] is False and "transductive" not in table(clean)
    seen = probe("knn", run, train, test, pretrained_on=[train, test], **plain)  # type: ignore[arg-type]
    assert [row["transductive"] for row in seen["rows"]] == [True, True, False]
    assert "24 sample ids" in seen["transductive_because"] and "backbone (transductive)" in table(seen)
    source = loaded()
    shards = [[0, shard.name, shard.samples, shard.sha256] for shard in ShardReader(test).manifest.shards]
    state = {
        "step": 1, "samples": 1, "config": {"data": {"size": 16, "train": [{"path": str(tmp_path / "gone"), "weight": None}]}},
        "backbone": {"name": source.name, "options": source.options}, "shards": shards, "versions": {},
        "contracts": {name: one.model_dump(mode="json") for name, one in source.contracts.items()},
    }  # fmt: skip
    weights = {f"model.backbone.{name}": tensor for name, tensor in source.backbone.state_dict().items()}
    (tmp_path / "other").mkdir()
    save(tmp_path / "other", 1, weights, state, keep=1, permanent_every=None)
    by_shard = probe("knn", tmp_path / "other", train, test, **plain)  # type: ignore[arg-type]
    assert by_shard["transductive"] is True and "1 shards of test" in by_shard["transductive_because"]
    leaked = probe("knn", run, test, test, **plain)  # type: ignore[arg-type]
    assert leaked["test_samples_also_in"] == {"train": 24} and "these figures say little" in table(leaked)


def test_linear_equals_scikit_learn_on_the_same_features(ask: Probe, tmp_path: Path) -> None:
    """Within 0.3 points; C is the one that was chosen on val, whatever test would have liked."""
    result = ask("linear", precision="fp32")
    train, test = (features.extract(loaded(seed=7), ShardReader(tmp_path / part), progress=False) for part in ("train", "test"))
    scaler = StandardScaler().fit(train.x)
    other = LogisticRegression(C=result["settings"]["C"], max_iter=5000).fit(scaler.transform(train.x), train.label)
    assert result["accuracy"] == pytest.approx(other.score(scaler.transform(test.x), test.label), abs=0.003)
    assert result["settings"]["chosen_on"] == "val" and len(result["settings"]["path"]) == 10


def test_multilabel(make: Make, run: Path, tmp_path: Path) -> None:
    """Labels are lists in the samples' JSON; one that test lacks counts as 0, one that train lacks cannot be found."""
    parts = {}
    for seed, (part, rare) in enumerate((("train", "glacier"), ("test", "volcano"))):
        labels = np.random.default_rng(seed).integers(0, 2, 40)
        lists = [["land", *(["green"] * bool(label)), *([rare] * (row < 5))] for row, label in enumerate(labels)]
        metas = [{"labels": one} if row else {} for row, one in enumerate(lists)]
        parts[part] = make(part, 40, seed, labels=labels, metas=metas)
    result = probe("multilabel", run, **parts, cache=False, from_scratch=0, progress=False, c=(0.1, 1.0), precision="fp32")
    assert result["classes"] == ["glacier", "green", "land", "volcano"] and result["classes_without_positives"] == ["glacier"]
    assert result["n_train"] == result["n_test"] == 39 and result["unlabelled"]["train"] == 1
    ap = result["AP"]
    assert ap["glacier"] == 0 and ap["land"] == 1 and ap["volcano"] == pytest.approx(4 / 39) and ap["green"] > 0.8
    assert result["macro_mAP"] == pytest.approx(sum(ap.values()) / 4)
    assert result["macro_mAP_of_present"] == pytest.approx(sum(ap.values()) / 3)
    assert names(result) == ["backbone", "random initialisation", "statistics"] and result["interval"][0] < result["micro_mAP"]
    with pytest.raises(InputError, match="has a list of labels"):
        probe("multilabel", run, make("plain", 8, 0), parts["test"], cache=False, from_scratch=0, progress=False)


@pytest.mark.parametrize("levels", [3, 10_000])
def test_average_precision_is_scikit_learns(levels: int) -> None:
    """Equal scores too, and weights as repetitions."""
    random = np.random.default_rng(0)
    truth, score = random.random((200, 5)) < 0.3, random.integers(0, levels, (200, 5)) / levels
    weight = random.integers(0, 4, 200).astype(float)
    measure = AveragePrecision(truth, score)
    for column in range(5):
        plain = average_precision_score(truth[:, column], score[:, column])
        weighted = average_precision_score(truth[:, column], score[:, column], sample_weight=weight)
        assert measure()[column] == pytest.approx(plain, abs=1e-12)
        assert measure(weight)[column] == pytest.approx(weighted, abs=1e-12)
    assert AveragePrecision(np.zeros((3, 1), bool), np.ones((3, 1)))()[0] == 0


def test_intervals_draw_blocks_and_repetitions() -> None:
    random = np.random.default_rng(0)
    correct, block = random.random(200) < 0.7, np.repeat(np.arange(20), 10)
    means = [(weight * correct).sum() / weight.sum() for weight in resampled(block)]
    assert np.quantile(means, [0.025, 0.975]) == pytest.approx(interval(correct, block))
    assert interval_of_draws(correct[None], block) == pytest.approx(interval(correct, block))
    apart = np.stack([np.ones(200, bool), np.zeros(200, bool)])
    assert interval_of_draws(apart, block) == (0, 1)


def test_few_shots_are_drawn_by_sample_id() -> None:
    label = np.repeat(np.arange(3), 20)
    train = Features(
        np.zeros((60, 2), np.float32), label, np.full(60, -1), np.random.default_rng(0).permutation(60), ("a", "b", "c")
    )
    rows = pick(train, 5, 0, 0)
    assert np.bincount(label[rows]).tolist() == [5, 5, 5] and set(pick(train, 2, 0, 0)) < set(rows)
    assert set(pick(train, 5, 0, 1)) != set(rows) != set(pick(train, 5, 1, 0))
    moved = np.random.default_rng(1).permutation(60)
    other = Features(train.x, label[moved], train.block, train.id[moved], train.classes)
    assert set(other.id[pick(other, 5, 0, 0)]) == set(train.id[rows])


def test_neighbours_are_ranked_the_first_of_equals_first() -> None:
    x = np.array([[1, 0], [0, 1], [1, 0], [-1, 0], [1, 0]], np.float32)
    none = np.full(5, -1)
    train = Features(x, none, none, none, ())
    near, cosine = neighbours(train, Features(x[:1], none[:1], none[:1], none[:1], ()), 2)
    assert near.tolist() == [[0, 2]] and cosine[0, 0] == pytest.approx(1)
    every, _ = neighbours(train, Features(x[:1], none[:1], none[:1], none[:1], ()), 9)
    assert every[0, :3].tolist() == [0, 2, 4] and sorted(every[0]) == [0, 1, 2, 3, 4]


def test_statistics_are_of_clear_pixels_in_the_contracts_unit(make: Make) -> None:
    """Not in units of a data set's own deviation, which train and test have not in common."""
    bands = contract()
    other = bands.model_copy(update={"normalisation": bands.normalisation.model_copy(update={"mean": (0.9,) * 4})})
    reader = ShardReader(make("train", 12, 0, bands=other))
    made = colour_statistics(reader)
    pixels = reader.pixels(3).astype(np.float64) * 1e-4
    assert made.x.shape == (12, 8) and made.x[3, :4] == pytest.approx(pixels.mean(axis=(1, 2)), abs=1e-6)
    assert made.x[3, 4:] == pytest.approx(pixels.std(axis=(1, 2)), abs=1e-6)


def test_every_task_tells_a_person_what_its_options_are() -> None:
    import dataclasses

    found = tasks()
    assert {"knn", "linear", "finetune", "multilabel", "retrieve", "fewshot"} <= found.keys()
    for task in found.values():
        assert task.help
        for field in dataclasses.fields(task.options):
            assert field.metadata.get("help"), f"{task.name}: {field.name}"
    assert Result([], {}).pictures == {}
