"""Features that nobody trained: what a backbone must beat to be worth its name."""

import numpy as np

from swath.probes.features import Features
from swath.shards.reader import VALID_CLEAR, ShardReader


def colour_statistics(reader: ShardReader) -> Features:
    """Mean and standard deviation of each band over a chip's clear pixels, (N, 2·C), of labelled samples."""
    numbers = np.flatnonzero(reader.labels >= 0)
    rows = []
    for number in numbers:
        values_cn = reader.pixels(int(number)).reshape(len(reader.contract.bands), -1).astype(np.float32)
        codes = reader.valid(int(number))
        if codes is not None:
            values_cn = values_cn[:, codes.reshape(-1) == VALID_CLEAR]
        rows.append(np.concatenate([values_cn.mean(axis=1), values_cn.std(axis=1)]))
    samples = reader.index.samples[numbers]
    return Features(
        np.stack(rows), samples["label"].astype(np.int64), samples["block"].astype(np.int64), samples["id"].astype(np.int64),
        reader.manifest.classes,
    )  # fmt: skip
