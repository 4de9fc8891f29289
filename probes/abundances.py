"""Which share of each pixel is which material: a ridge regression on features, split by blocks; RMSE, the less the better."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge

from swath.probes.heads import FromScratch, LinearHead, fit, seeded
from swath.probes.maps import contract_of, untrained
from swath.probes.metrics import interval
from swath.probes.overlays import grey, picture
from swath.probes.scene import BLOCK, Scene, Split, features, features_of, patch_statistics, patches, pooled, splits
from swath.probes.task import Bench, Result, Row
from swath.shards.draw import hashes

STRENGTHS = tuple(float(a) for a in np.logspace(-2, 6, 9))
_SCRATCH_PIXELS = 2048  # of train that a model is trained on from scratch


@dataclass
class Known:
    """Pixels (n,) of a scene by row and column, their shares (n, S), and what is known of each, by name of a row."""

    rows: np.ndarray
    columns: np.ndarray
    shares: np.ndarray
    inputs: dict[str, np.ndarray]


def abundances(bench: Bench, scene: Scene, guard: int, count: int, first: int, scratch_steps: int) -> Result:
    """Rows are the backbone's features of the patch around each pixel, those of its random initialisation, the bands' means and
    deviations over the patch, the spectrum of the pixel, 30 principal components of it, and training from scratch."""
    assert scene.shares is not None
    loaded, there = bench.loaded, np.isfinite(scene.shares).all(axis=0)
    wavelengths = [band.wavelength_nm for band in contract_of(loaded, bench.readers["train"]).bands]
    made = splits(np.where(there, 0, -1), guard, count, bench.seed, first=first)
    rows, columns = np.nonzero(there)
    patch = patches(scene, rows, columns, loaded.size)
    spectrum = np.ascontiguousarray(scene.pixels[:, rows, columns].numpy().T)
    inputs = {
        "backbone": features_of(bench, "train", loaded.backbone, scene, rows, columns),
        "random initialisation": features_of(bench, "train", untrained(loaded, bench.seed), scene, rows, columns),
        "statistics": patch_statistics(patch, len(rows)),
        "raw spectrum": spectrum,
        "PCA-30": spectrum,
    }
    known = Known(rows, columns, scene.shares[:, rows, columns].T, inputs)
    errors: dict[str, list[np.ndarray]] = {name: [] for name in inputs}
    chosen: dict[str, list[float]] = {name: [] for name in inputs}
    shown = np.zeros_like(scene.shares)
    for split in made:
        train, test = np.flatnonzero(split.train[rows, columns]), np.flatnonzero(split.test[rows, columns])
        for name in inputs:
            predicted, strength = _ridge(known, name, split, train, test, bench.seed)
            chosen[name].append(strength)
            errors[name].append(np.square(predicted - known.shares[test]).mean(axis=0))
            if name == "backbone" and split is made[0]:
                shown[:, rows[test], columns[test]] = predicted.T
        if scratch_steps:
            predicted = _from_scratch(bench, scene, known, train, test, scratch_steps, wavelengths)
            errors.setdefault("from scratch", []).append(np.square(predicted - known.shares[test]).mean(axis=0))
    rmse = {name: np.sqrt(np.stack(found).mean(axis=1)) for name, found in errors.items()}
    alone = np.full(count, -1)
    table = [
        Row(name, {"rmse": float(found.mean())}, {"rmse": interval(found, alone)} if count > 1 else {})
        for name, found in rmse.items()
    ]
    settings = {
        "protocol": f"blocks of {BLOCK} px, half for train, guard of {guard} px", "splits": count, "first_split": first,
        "regression": "ridge on standardised features, shares cut at 0 and made to sum to 1",
        "strength": "chosen on a fifth of the train blocks", "strengths": chosen, "patch": list(loaded.size),
        "better": "less", "interval_method": "95 % bootstrap of the splits", "n": len(rows),
    }  # fmt: skip
    details = {
        "materials": list(scene.classes),
        "rmse_of_material": {name: np.sqrt(np.mean(found, axis=0)).tolist() for name, found in errors.items()},
        "by_split": {name: found.tolist() for name, found in rmse.items()},
        "paired": {
            name: [float((rmse["backbone"] - found).mean()), *interval(rmse["backbone"] - found, alone)]
            for name, found in rmse.items()
            if name != "backbone"
        },
    }
    pictures = {"map": picture([[grey(share) for share in one] for one in (np.nan_to_num(scene.shares), shown)])}
    return Result(table, settings, details, pictures, within=True)


def _ridge(
    known: Known, name: str, split: Split, train: np.ndarray, test: np.ndarray, seed: int
) -> tuple[np.ndarray, float]:  # fmt: skip
    """(shares of the test pixels, strength of the penalty)."""
    width = split.train.shape[1]
    block = known.rows[train] // BLOCK * -(-width // BLOCK) + known.columns[train] // BLOCK
    blocks = np.unique(block)
    order = blocks[np.argsort(hashes(seed, "abundances", 0, int(blocks.max()) + 1).numpy()[blocks], kind="stable")]
    held = np.isin(block, order[: max(1, len(order) // 5)])
    x, y = known.inputs[name], known.shares
    mean, std = x[train].mean(axis=0, dtype=np.float64), x[train].std(axis=0, dtype=np.float64)
    std[std == 0] = 1
    x_train, x_test = (x[train] - mean) / std, (x[test] - mean) / std
    if name.startswith("PCA"):
        pca = PCA(min(30, x.shape[1], len(train)), svd_solver="full").fit(x_train)
        x_train, x_test = pca.transform(x_train), pca.transform(x_test)

    def error(strength: float) -> float:
        model = Ridge(alpha=strength, solver="cholesky").fit(x_train[~held], y[train][~held])
        return float(np.square(whole(np.asarray(model.predict(x_train[held]))) - y[train][held]).mean())

    best = min(STRENGTHS, key=error)
    return whole(np.asarray(Ridge(alpha=best, solver="cholesky").fit(x_train, y[train]).predict(x_test))), best


def whole(shares_ns: np.ndarray) -> np.ndarray:
    """Shares that are not negative, and sum to 1; alike where none is positive."""
    cut = np.clip(shares_ns, 0, None)
    total = cut.sum(axis=1, keepdims=True)
    return np.where(total > 0, cut / np.where(total > 0, total, 1), 1 / cut.shape[1])


def _from_scratch(
    bench: Bench, scene: Scene, known: Known, train: np.ndarray, test: np.ndarray, steps: int, wavelengths: list[float | None]
) -> np.ndarray:
    """Shares of the test pixels, by the backbone trained from random weights."""
    loaded = bench.loaded
    train = np.sort(train[np.argsort(hashes(bench.seed, "scratch", 0, len(train)).numpy(), kind="stable")][:_SCRATCH_PIXELS])
    encoder = pooled(loaded, untrained(loaded, bench.seed), scene, wavelengths)
    head = seeded(bench.seed, lambda: LinearHead([loaded.backbone.pooled_width], known.shares.shape[1]))
    model = FromScratch(encoder, head.to(encoder.wavelength_nm.device))
    every = patches(scene, known.rows[train], known.columns[train], loaded.size)(slice(None)).contiguous()
    # a target has rows and columns: the shares of a pixel stand in a column
    target = torch.from_numpy(known.shares[train])[:, :, None]
    fit(
        model, [every], target, lambda made, wanted: F.mse_loss(made[:, :, :1, 0].softmax(dim=1), wanted),
        steps=steps, rate=1e-3, seed=bench.seed, batch=32,
    )  # fmt: skip
    patch = patches(scene, known.rows[test], known.columns[test], loaded.size)
    x = torch.from_numpy(features(encoder, patch, len(test)))[:, :, None, None]
    with torch.inference_mode():
        return head.cpu()([x], (1, 1)).softmax(dim=1)[:, :, 0, 0].numpy()
