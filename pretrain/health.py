"""Is the representation alive? Measured on a fixed, un-augmented sample, judged against its own initialisation (DESIGN §4)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ROWS = 4096  # tokens looked at; enough for a rank of a few hundred
RANK, DEVIATION, POSITIONAL = 0.5, 0.1, 0.9
CLIMBING = 1.05  # times the rank of the look before


def measure(pooled_bd: Tensor, tokens_bnd: Tensor) -> dict[str, float]:
    """Of pooled features and of patch tokens: mean standard deviation, mean absolute centred cosine, effective rank.

    `positional` is the share of the tokens' variance that position alone explains: variance of the per-position means over the
    total. Needs the same places in every sample.
    """
    made: dict[str, float] = {}
    tokens_bnd = tokens_bnd.float()
    flat = tokens_bnd.flatten(0, 1)
    flat = flat[:: max(1, len(flat) // _ROWS)]
    for name, rows_nd in (("pooled", pooled_bd.float()), ("tokens", flat)):
        centred = rows_nd - rows_nd.mean(dim=0)
        unit = torch.nn.functional.normalize(centred[:1024], dim=1)
        cosine = (unit @ unit.T).abs()
        pairs = len(unit) * (len(unit) - 1)
        made[f"{name}_std"] = centred.std(dim=0).mean().item()
        made[f"{name}_cosine"] = ((cosine.sum() - cosine.diagonal().sum()) / pairs).item()
        made[f"{name}_rank"] = effective_rank(centred)
    total = tokens_bnd.flatten(0, 1).var(dim=0, correction=0).sum()
    by_place = tokens_bnd.mean(dim=0).var(dim=0, correction=0).sum()
    made["positional"] = (by_place / total.clamp_min(1e-12)).item()
    return made


def effective_rank(centred_nd: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007); 0 for constant features."""
    gram = (centred_nd.T @ centred_nd).double()
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    total = values.sum()
    if total <= 1e-9:
        return 0.0
    share = values / total
    return torch.exp(-(share * share.clamp_min(1e-300).log()).sum()).item()


def _signs(row: dict[str, Any], before: dict[str, Any], first: dict[str, Any]) -> set[str]:
    """What is wrong at one look, by name, given the look before and the one at initialisation.

    A healthy run's rank dips while the first coarse structure is learned and then climbs, so a rank that is climbing is no sign.
    """
    signs = set()
    for name in ("pooled", "tokens"):
        rank, deviation = f"{name}_rank", f"{name}_std"
        if row[rank] < RANK * first[rank] and row[rank] < CLIMBING * before[rank]:
            signs.add(f"the effective rank of {name} features fell below half of its initial {first[rank]:.1f}")
        if row[deviation] < DEVIATION * first[deviation]:
            signs.add(f"the deviation of {name} features fell below a tenth of its initial {first[deviation]:.3g}")
    if row["positional"] > max(POSITIONAL, first["positional"]):
        signs.add("position alone explains over 90 % of the tokens' variance")
    return signs


def warnings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What was wrong at the last two looks alike; `rows` starts with the look at initialisation."""
    if len(rows) < 3:
        return []
    return sorted(_signs(rows[-1], rows[-2], rows[0]) & _signs(rows[-2], rows[-3], rows[0]))
