"""Features that nobody trained: what a backbone must beat to be worth its name."""

import numpy as np
import torch
from torch import Tensor

from swath.probes.features import Features, labelled, over, with_labels
from swath.shards.bands import InputContract, Normalisation
from swath.shards.errors import InputError
from swath.shards.prepare import Batch
from swath.shards.reader import ShardReader

_OCTAVES = 6  # of a coordinate of the unit sphere: the finest has a period of 400 km on the ground


def colour_statistics(reader: ShardReader, contract: InputContract | None = None, numbers: np.ndarray | None = None) -> Features:
    """Mean and standard deviation of each band over a chip's clear pixels, (N, 2·C), of `numbers` or of all labelled samples;
    0 for a chip without any. They are physical values: each part's own normalisation would set train and test apart."""
    numbers = labelled(reader) if numbers is None else numbers
    own = reader.contract if contract is None else reader.contracts[contract.modality]
    own = own.model_copy(update={"normalisation": unnormalised(own)})
    if own.height is not None and own.width is not None:
        x = over(reader, numbers, own, (own.height, own.width), torch.device("cpu"), _moments, progress=False)
    else:  # of several sizes: one after the other, none resized
        rows = []
        for number in numbers:
            size = reader.pixels(int(number), own.modality).shape[1:]
            rows.append(over(reader, np.array([number]), own, size, torch.device("cpu"), _moments, progress=False))
        x = np.concatenate(rows)
    return with_labels(x, reader, numbers)


def unnormalised(contract: InputContract) -> Normalisation:
    """The rule that leaves physical values as they are."""
    count = len(contract.bands)
    return Normalisation(mean=(0.0,) * count, std=(1.0,) * count, pixels=contract.normalisation.pixels)


def _moments(batch: Batch) -> Tensor:
    (x_bchw,) = batch.images.values()
    valid = next(iter(batch.valid.values()), None)
    if valid is None:
        return torch.cat([x_bchw.mean(dim=(2, 3)), x_bchw.std(dim=(2, 3), correction=0)], dim=1)
    shown = valid if valid.shape[1] == 1 else valid.repeat_interleave(x_bchw.shape[1] // valid.shape[1], dim=1)
    count = shown.sum(dim=(2, 3)).clamp_min(1)
    mean = torch.where(shown, x_bchw, 0.0).sum(dim=(2, 3)) / count
    spread = torch.where(shown, x_bchw - mean[..., None, None], 0.0).square().sum(dim=(2, 3)) / count
    return torch.cat([mean, spread.sqrt()], dim=1)


def places(reader: ShardReader, numbers: np.ndarray) -> Features:
    """Where each sample lies and nothing else, (N, 36): waves of several lengths over the unit sphere's coordinates.

    InputError where a sample has no place.
    """
    samples = reader.index.samples[numbers]
    lat, lon = (samples[name].astype(np.float64) for name in ("lat", "lon"))
    return with_labels(waves(lat, lon, reader.manifest.dataset), reader, numbers)


def waves(lat_n: np.ndarray, lon_n: np.ndarray, dataset: str) -> np.ndarray:
    """(N, 36) float32 of degrees. InputError, naming the data set, where one is NaN."""
    lat, lon = np.radians(lat_n), np.radians(lon_n)
    if np.isnan(lat).any() or np.isnan(lon).any():
        raise InputError(f"samples of {dataset} have no place, so there is no probe of it alone; leave out --context")
    sphere = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)
    angle = (sphere[:, :, None] * np.pi * 2.0 ** np.arange(_OCTAVES)).reshape(len(lat), -1)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)
