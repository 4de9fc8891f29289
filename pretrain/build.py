"""The model of a run: what its recipe names, told what the data decide."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from swath.backbones import base
from swath.pretrain import objective
from swath.pretrain.config import Recipe
from swath.pretrain.data import Data
from swath.pretrain.objective import Objective
from swath.shards.draw import Draw
from swath.shards.errors import InputError
from swath.shards.prepare import Batch


def model(recipe: Recipe, data: Data, size: tuple[int, int], last: tuple[int, int]) -> Objective:
    """For images of `size` (height, width), `last` of them in the run; initialised from the seed alone.

    Components refuse what cannot be: InputError, in one line."""
    torch.manual_seed(recipe.run.seed)
    task = dict(recipe.objective)
    channels = {name: contract.channels for name, contract in data.contracts.items()}
    try:
        backbone = base.create(**backbone_options(recipe, data, last))
        made = objective.build(task.pop("name"), backbone, size, channels, **task)
        if not made.takes_pairs and (pairs := next((r for r in data.readers if len(r.contracts) > 1), None)):
            named = ", ".join(pairs.contracts)
            raise ValueError(
                f"samples of {pairs.place} have {named}, and {recipe.objective['name']} takes one of them; "
                "name it in data.modalities"
            )
    except ValueError as error:
        raise InputError(str(error)) from None
    for block in made.blocks():
        block.recompute = recipe.train.activation_checkpointing
        if recipe.train.compile:
            block.compute = torch.compile(block.compute)  # what lies inside the hooks of a strategy
    return made


def backbone_options(recipe: Recipe, data: Data, size: tuple[int, int]) -> dict[str, Any]:
    """The recipe's backbone with what the data decide: the number of bands, the size whose positions are exact, and where
    the backbone asks for them the wavelengths (0 for a band without one), the GSD of the pixels it sees, how many are radar.

    `size` is of the last stage: it is what is handed on, and its positions are to be learned, not interpolated."""
    contracts = list(data.contracts.values())
    one = len(contracts) == 1 or objective.registry.entry(recipe.objective["name"]).build.takes_pairs
    told: dict[str, Any] = {
        "bands": (sum if one else max)(contract.channels for contract in contracts),
        "image_size": max(size),
    }
    known = {field.name for field in dataclasses.fields(base.registry.entry(recipe.backbone["name"]).config)}
    if one:  # what it sees is one image
        bands = [band for contract in contracts for band in contract.bands]
        if "wavelength_nm" in known and any(band.wavelength_nm for band in bands):
            told["wavelength_nm"] = tuple(band.wavelength_nm or 0.0 for band in bands)
        if "gsd_m" in known and contracts[0].gsd_m and contracts[0].height:
            told["gsd_m"] = contracts[0].gsd_m * contracts[0].height / size[0]
        if "radar" in known:
            told["radar"] = sum(contract.channels for contract in contracts if contract.is_radar)
    return {**told, **recipe.backbone}


def rehearsal(made: Objective, data: Data, size: tuple[int, int], samples: int, device: torch.device) -> Callable[[], None]:
    """One forward and backward pass on so many blank images."""
    seen = (size[0] * made.scale, size[1] * made.scale)
    contracts = data.contracts if made.takes_pairs else {data.contract.modality: data.contract}
    blank = {name: torch.zeros(samples, contract.channels, *seen, device=device) for name, contract in contracts.items()}
    ids = torch.arange(samples, device=device)
    batch = Batch(blank, {}, ids, torch.zeros_like(ids), torch.ones(samples, device=device))

    def step() -> None:
        made(batch, Draw(0, ids, ids)).numerator.backward()

    return step
