"""Going back after too many bad steps in a row: to the last checkpoint before them, and on without the samples that they had.

`returns.json` in the run folder lists them, {"to": steps done, "from": first bad step, "sample_ids": [...]} each, written before
anything else is done; a run that is killed meanwhile goes on alike. Samples that are left out keep their place in the order, as
samples without a valid pixel do, so nothing else moves. A checkpoint knows the returns that came before it; one that does not
know of a return, and is later than where that went, belongs to what was undone, and is removed.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swath.pretrain import checkpoint
from swath.shards.bands import InputContract
from swath.shards.files import write_json
from swath.shards.prepare import Batch

FILE = "returns.json"


class Return(Exception):
    """The run has noted a return, and is to be continued from its folder."""


def read(run: Path) -> list[dict[str, Any]]:
    """The returns so far, the first one first."""
    path = run / FILE
    return json.loads(path.read_text()) if path.exists() else []


def note(run: Path, bad: dict[int, list[int]]) -> dict[str, Any]:
    """Write down one more: to before the first of the `bad` steps (counted from 1), whose sample ids are given."""
    first = min(bad)
    to = max((step for step in checkpoint._steps(run / checkpoint.FOLDER) if step < first), default=0)
    made = {"to": to, "from": first, "sample_ids": sorted({one for ids in bad.values() for one in ids})}
    write_json(run / FILE, [*read(run), made])
    return made


def undo(run: Path) -> None:
    """Remove the checkpoints of what was undone."""
    returns = read(run)
    for step in checkpoint._steps(run / checkpoint.FOLDER) if returns else ():
        path = run / checkpoint.FOLDER / checkpoint.name_of(step)
        try:
            known = len(checkpoint.read_state(path)["returns"])
        except (OSError, ValueError, KeyError):
            continue  # a damaged one, for others to judge
        if any(step > one["to"] for one in returns[known:]):
            shutil.rmtree(path)


def ids(returns: list[dict[str, Any]], device: torch.device) -> Tensor | None:
    """(samples,) int64 of those left out; None where there are none."""
    left_out = sorted({one for made in returns for one in made["sample_ids"]})
    return torch.tensor(left_out, device=device) if left_out else None


def leave_out(batch: Batch, ids: Tensor | None, contracts: Mapping[str, InputContract]) -> Batch:
    """The batch with the samples of `ids` as if they had no valid pixel; `contracts` of its modalities."""
    if ids is None:
        return batch
    stays_b = ~torch.isin(batch.id, ids)
    shown = stays_b[:, None, None, None]
    valid = {}
    for name, image in batch.images.items():
        whole = torch.ones(len(image), contracts[name].dates, *image.shape[2:], dtype=torch.bool, device=image.device)
        valid[name] = batch.valid.get(name, whole) & shown
    images = {name: torch.where(shown, image, 0.0) for name, image in batch.images.items()}
    return replace(batch, images=images, valid=valid, weight=batch.weight * stays_b)
