"""A class for every pixel of a hyperspectral scene, from a few labels: overall and average accuracy, kappa.

Within one scene (train and test are the same shards) pixels are split by blocks, see `scene.splits`; otherwise the labels come
from the scene of train, and all labelled pixels of the scene of test are told. Scenes whose map has abundances are a regression,
see `abundances`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from torch import Tensor

from swath.probes.abundances import abundances
from swath.probes.confusion import IGNORE, accuracy, kappa, mean_recall
from swath.probes.heads import FromScratch, LinearHead, fit, seeded
from swath.probes.maps import contract_of, untrained
from swath.probes.metrics import interval
from swath.probes.overlays import coloured, picture
from swath.probes.pictures import confusion
from swath.probes.scene import TRAIN, Scene, Split, features, features_of, patch_statistics, patches, pooled, read_scene, splits
from swath.probes.task import Bench, Result, Row, task
from swath.shards.draw import hashes
from swath.shards.errors import InputError

COMPONENTS = 30
_MEASURES = {"oa": accuracy, "aa": mean_recall, "kappa": kappa}


@dataclass(frozen=True)
class Options:
    per_class: tuple[int, ...] = field(default=(5, 1, 10), metadata={"help": "labelled pixels; the first counts most (5,1,10)"})
    splits: int = field(default=10, metadata={"help": "splits by block (10)"})
    first: int = field(default=0, metadata={"help": "number of the first of these splits, to share them out (0)"})
    draws: int = field(default=5, metadata={"help": "draws of labelled pixels in each split, averaged (5)"})
    scratch_steps: int = field(default=100, metadata={"help": "steps from random weights; 0 leaves that row out (100)"})


@dataclass
class Round:
    """One split of labelled pixels: their numbers in the train and in the test scene, which may be the same one."""

    train: np.ndarray
    test: np.ndarray


@dataclass
class Pixels:
    """Labelled pixels of a scene: rows, columns and class numbers (n,), patches around them, what is known of each, by name."""

    scene: Scene
    rows: np.ndarray
    columns: np.ndarray
    label: np.ndarray
    patch: Callable[[slice], Tensor]
    known: dict[str, np.ndarray]


@task("pixel", Options, "classes or abundances of the pixels of a hyperspectral scene, from few labels, split by blocks")
def run(bench: Bench, options: Options) -> Result:
    """Rows are an SVM on the backbone's features of the patch around each pixel, the same on its random initialisation and on the
    bands' means and deviations over the patch, SVM and 1-NN on the spectrum of the pixel, SVM on 30 principal components of it,
    and training from scratch. Metrics are means over splits, named by labels per class; details has paired differences."""
    counts, loaded, readers = _counts(options), bench.loaded, bench.readers
    within = readers["train"].manifest.shards == readers["test"].manifest.shards
    source = read_scene(loaded, readers["train"])
    target = source if within else read_scene(loaded, readers["test"])
    guard = max(loaded.size) // 2
    if source.shares is not None or target.shares is not None:
        if not within:
            raise InputError("abundances are probed within one scene: give the same shards as --train and --test")
        return abundances(bench, source, guard, options.splits, options.first, options.scratch_steps)
    # before the long computation, since there may be none
    halves = splits(source.labels, guard, options.splits, bench.seed, first=options.first) if within else []
    train = _pixels(bench, "train", source, source.classes)
    test = train if within else _pixels(bench, "test", target, source.classes)
    every = Round(np.arange(len(train.label)), np.arange(len(test.label)))
    rounds = [_round(split, train) for split in halves] or [every] * options.splits
    totals: dict[str, dict[int, list[np.ndarray]]] = {}
    shown = np.full(target.labels.shape, IGNORE, np.uint8)
    for number, one in enumerate(rounds, options.first):
        for name, count, draw, predicted in _predicted(bench, options, counts, train, test, one, number):
            counted = _confusion(test.label[one.test], predicted, len(source.classes))
            totals.setdefault(name, {}).setdefault(count, []).append(counted)
            if name == "backbone" and count == counts[0] and draw == 0 and number == options.first:
                shown[test.rows[one.test], test.columns[one.test]] = predicted
    values = {
        name: {f"{metric}_{count}": _by_split([of(c) for c in some], len(rounds)) for count, some in by.items()
               for metric, of in _MEASURES.items()}
        for name, by in totals.items()
    }  # fmt: skip
    names = [f"{metric}_{count}" for count in counts for metric in _MEASURES]
    alone = np.full(len(rounds), -1)
    rows = [
        Row(
            name,
            {metric: float(found[metric].mean()) if metric in found else None for metric in names},
            {metric: interval(found[metric], alone) for metric in found if metric.startswith("oa") and len(rounds) > 1},
        )
        for name, found in values.items()
    ]
    paired = {
        name: {metric: _difference(values["backbone"][metric] - found[metric]) for metric in found if metric.startswith("oa")}
        for name, found in values.items()
        if name != "backbone"
    }
    total = np.sum(totals["backbone"][counts[0]], axis=0)
    truth = np.where(target.labels >= 0, target.labels, IGNORE).astype(np.uint8)
    settings = {
        "protocol": f"blocks of 16 px, half for train, guard of {guard} px" if within else "labels of train, all pixels of test",
        "labels_per_class": list(counts), "splits": len(rounds), "first_split": options.first, "draws": options.draws,
        "svm": "RBF, C = 100, gamma = scale, standardised on the train pixels of the split",
        "interval_method": "95 % bootstrap of the splits' means", "patch": list(loaded.size), "n_train": len(train.label),
        "n_test": len(test.label), "scratch": f"{options.scratch_steps} steps, first draw of each split, {counts[0]} labels",
    }  # fmt: skip
    details = {
        "classes": list(source.classes), "paired": paired, "confusion": total.tolist(),
        "split_pixels": [[len(one.train), len(one.test)] for one in rounds],
        "by_split": {name: {metric: found[metric].tolist() for metric in found} for name, found in values.items()},
    }  # fmt: skip
    pictures = {"confusion": confusion(total, source.classes), "map": picture([[coloured(truth), coloured(shown)]])}
    return Result(rows, settings, details, pictures, within)


def _counts(options: Options) -> tuple[int, ...]:
    counts = tuple(dict.fromkeys(options.per_class))
    if not counts or min(counts) < 1 or max(counts) > TRAIN:
        said = ",".join(map(str, counts))
        raise InputError(f"--per-class {said!r} is no list of numbers from 1 to {TRAIN}, such as 5,1,10")
    if options.splits < 1 or options.draws < 1 or options.first < 0 or options.scratch_steps < 0:
        raise InputError("--splits and --draws must be at least 1, --first and --scratch-steps at least 0")
    return counts


def _pixels(bench: Bench, part: str, scene: Scene, classes: tuple[str, ...]) -> Pixels:
    """Labelled pixels, their classes numbered as in `classes`; those of other classes are left out. InputError without any."""
    number = np.array([classes.index(name) if name in classes else -1 for name in (*scene.classes, "")])
    label = number[scene.labels]
    rows, columns = np.nonzero(label >= 0)
    if len(np.unique(label[rows, columns])) < 2:
        raise InputError(f"fewer than two of the classes {', '.join(classes)} have labelled pixels in the scene")
    loaded = bench.loaded
    patch = patches(scene, rows, columns, loaded.size)
    known = {
        "backbone": features_of(bench, part, loaded.backbone, scene, rows, columns),
        "random initialisation": features_of(bench, part, untrained(loaded, bench.seed), scene, rows, columns),
        "statistics": patch_statistics(patch, len(rows)),
        "spectrum": np.ascontiguousarray(scene.pixels[:, rows, columns].numpy().T),
    }
    return Pixels(scene, rows, columns, label[rows, columns], patch, known)


def _round(split: Split, pixels: Pixels) -> Round:
    where = (pixels.rows, pixels.columns)
    return Round(np.flatnonzero(split.train[where]), np.flatnonzero(split.test[where]))


def _predicted(
    bench: Bench, options: Options, counts: tuple[int, ...], train: Pixels, test: Pixels, one: Round, number: int
) -> "list[tuple[str, int, int, np.ndarray]]":
    """(row, labels per class, draw, class numbers of the test pixels) of everything on one split."""
    inputs = {}
    for name, x in train.known.items():
        mean, std = x[one.train].mean(axis=0, dtype=np.float64), x[one.train].std(axis=0, dtype=np.float64)
        std[std == 0] = 1
        inputs[name] = tuple(((part - mean) / std).astype(np.float32) for part in (x, test.known[name][one.test]))
    spectrum, spectrum_test = inputs.pop("spectrum")
    components = min(COMPONENTS, spectrum.shape[1], len(one.train))
    pca = PCA(components, svd_solver="full").fit(spectrum[one.train])
    machines: dict[str, tuple[SVC | KNeighborsClassifier, np.ndarray, np.ndarray]] = {}
    machines |= {name: (SVC(C=100.0), *x) for name, x in inputs.items()}
    machines["raw spectrum SVM"] = (SVC(C=100.0), spectrum, spectrum_test)
    machines["raw spectrum 1-NN"] = (KNeighborsClassifier(1), spectrum, spectrum_test)
    machines[f"PCA-{COMPONENTS} SVM"] = (SVC(C=100.0), pca.transform(spectrum), pca.transform(spectrum_test))
    made = []
    for count in counts:
        for draw in range(options.draws):
            few = few_of(train.label, one.train, count, bench.seed, f"pixel labels {number} {draw}")
            for name, (machine, x, x_test) in machines.items():
                made.append((name, count, draw, machine.fit(x[few], train.label[few]).predict(x_test)))
    if options.scratch_steps:
        few = few_of(train.label, one.train, counts[0], bench.seed, f"pixel labels {number} 0")
        made.append(("from scratch", counts[0], 0, _from_scratch(bench, options, train, few, test, one.test)))
    return made


def few_of(label_n: np.ndarray, among: np.ndarray, count: int, seed: int, stream: str) -> np.ndarray:
    """`count` pixels of each class, of those numbered in `among`, drawn by (seed, stream); all of a class that has fewer."""
    order = among[np.argsort(hashes(seed, stream, 0, len(label_n)).numpy()[among], kind="stable")]
    return np.sort(np.concatenate([order[label_n[order] == k][:count] for k in np.unique(label_n[among])]))


def _from_scratch(
    bench: Bench, options: Options, train: Pixels, few: np.ndarray, test: Pixels, asked: np.ndarray
) -> np.ndarray:  # fmt: skip
    """Class numbers of the pixels `asked` of `test`, by the backbone trained from random weights on a few of `train`."""
    loaded = bench.loaded
    wavelengths = [band.wavelength_nm for band in contract_of(loaded, bench.readers["train"]).bands]
    encoder = pooled(loaded, untrained(loaded, bench.seed), train.scene, wavelengths)
    head = seeded(bench.seed, lambda: LinearHead([loaded.backbone.pooled_width], len(train.scene.classes)))
    model = FromScratch(encoder, head.to(encoder.wavelength_nm.device))
    every = patches(train.scene, train.rows[few], train.columns[few], loaded.size)(slice(None)).contiguous()
    target = torch.from_numpy(train.label[few])[:, None, None]
    fit(model, [every], target, F.cross_entropy, steps=options.scratch_steps, rate=1e-3, seed=bench.seed, batch=32, flip=1)
    patch = patches(test.scene, test.rows[asked], test.columns[asked], loaded.size)
    x = torch.from_numpy(features(encoder, patch, len(asked)))[:, :, None, None]
    with torch.inference_mode():
        return head.cpu()([x], (1, 1)).argmax(dim=1).flatten().numpy()


def _confusion(truth_n: np.ndarray, predicted_n: np.ndarray, classes: int) -> np.ndarray:
    return np.bincount(truth_n * classes + predicted_n, minlength=classes * classes).reshape(classes, classes)


def _by_split(values: list[float], count: int) -> np.ndarray:
    """(splits,) means over the draws of each."""
    return np.array(values).reshape(count, -1).mean(axis=1)


def _difference(by_split: np.ndarray) -> list[float]:
    """Mean and the ends of its 95 % interval, over splits."""
    return [float(by_split.mean()), *interval(by_split, np.full(len(by_split), -1))]
