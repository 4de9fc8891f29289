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
    k = min(k, len(train.label))
    bank, queries = (F.normalize(torch.from_numpy(x)) for x in standardised(train, test))
    votes_nc = F.one_hot(torch.from_numpy(train.label), len(train.classes)).float()
    predicted = []
    for block_md in queries.split(max(1, _BLOCK_VALUES // len(bank))):
        cosine_mn = block_md @ bank.T
        weight_mn = torch.exp((cosine_mn - 1) / temperature) * _nearest(cosine_mn, k)
        predicted.append((weight_mn @ votes_nc).numpy().argmax(axis=1))
    settings = {"k": k, "temperature": temperature}
    return score(test.label, np.concatenate(predicted), test.block, len(train.classes), settings)


def _nearest(cosine_mn: torch.Tensor, k: int) -> torch.Tensor:
    """(M, N) bool: the k largest of each row, the first ones where several equal the k-th."""
    edge_m1 = cosine_mn.topk(k, dim=1).values[:, -1:]
    above_mn, level_mn = cosine_mn > edge_m1, cosine_mn == edge_m1
    room_m1 = k - above_mn.sum(dim=1, keepdim=True)
    if (level_mn.sum(dim=1, keepdim=True) > room_m1).any():
        level_mn &= level_mn.cumsum(dim=1) <= room_m1
    return above_mn | level_mn
