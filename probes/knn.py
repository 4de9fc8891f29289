"""k nearest neighbours by cosine on frozen features (Wu et al. 2018, as DINO evaluates it)."""

import numpy as np
import torch
import torch.nn.functional as F

from swath.probes.features import Features, standardised
from swath.probes.metrics import Scores, score

# similarities of a block of test samples to all of train: 2^23 of them are 32 MiB
_BLOCK_VALUES = 1 << 23


def knn(train: Features, test: Features, *, k: int = 20, temperature: float = 0.07) -> Scores:
    """Each of the k most similar training samples votes for its class with weight exp(cosine / temperature).

    Features are standardised on `train`, then scaled to length 1. Of equally similar samples the first counts, of equally
    heavy classes the first wins. `k` is capped at the number of training samples.
    """
    near_mk, cosine_mk = neighbours(train, test, k)
    weight_mk = np.exp((cosine_mk.astype(np.float64) - 1) / temperature)
    votes_mc = np.zeros((len(test.label), len(train.classes)))
    np.add.at(votes_mc, (np.arange(len(votes_mc))[:, None], train.label[near_mk]), weight_mk)
    settings = {"k": near_mk.shape[1], "temperature": temperature}
    return score(test.label, votes_mc.argmax(axis=1), test.block, len(train.classes), settings)


def neighbours(train: Features, test: Features, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows of `train` (M, k), their cosines (M, k)) of each of M test samples, the most similar first, of equals the first."""
    k = min(k, len(train.x))
    bank, queries = (F.normalize(torch.from_numpy(x)) for x in standardised(train, test))
    found = [_nearest(block_md @ bank.T, k) for block_md in queries.split(max(1, _BLOCK_VALUES // len(bank)))]
    near_mk, cosine_mk = (torch.cat(column).numpy() for column in zip(*found, strict=True))
    return near_mk, cosine_mk


def _nearest(cosine_mn: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns and values (M, k) of the k largest of each row, the first ones where several are equal."""
    top = cosine_mn.topk(min(k + 1, cosine_mn.shape[1]), dim=1)
    near_mk = top.indices[:, :k].sort(dim=1).values
    near_mk = near_mk.gather(1, cosine_mn.gather(1, near_mk).argsort(dim=1, descending=True, stable=True))
    if top.values.shape[1] > k:  # topk takes any of those that equal the k-th
        tied = torch.nonzero(top.values[:, k - 1] == top.values[:, k])[:, 0]
        if len(tied):
            near_mk[tied] = cosine_mn[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
    return near_mk, cosine_mn.gather(1, near_mk)
