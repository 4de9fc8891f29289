"""Weights that a run starts from (`train.init`): the backbone of a run, export or import, and the objective's where they fit.

The normalisation that these weights were trained with goes on being theirs: the run takes it from them, not from its shards.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from swath.pretrain.checkpoint import read_checkpoint
from swath.pretrain.config import Recipe
from swath.pretrain.exported import is_export, read_export
from swath.pretrain.objective import Objective
from swath.shards.bands import InputContract
from swath.shards.errors import InputError
from swath.shards.files import write_json

START = "start.json"  # in the run folder: what it started from
_BACKBONE = "backbone."
# Of a backbone's options what may be other than where the weights come from: it changes no parameter's meaning.
_FREE = ("image_size", "pool", "gsd_m", "wavelength_nm")


@dataclass
class Initial:
    """`backbone` {"name", "options"}; `objective` likewise, None where only the backbone is there; `tensors` by their names in
    an objective: the backbone's begin with `backbone.`."""

    backbone: dict[str, Any]
    objective: dict[str, Any] | None
    contracts: dict[str, InputContract]
    tensors: dict[str, Tensor]


def read_initial(path: Path) -> Initial:
    """The weights at `path`: a run folder (its latest checkpoint), a checkpoint, an exported or an imported folder.

    Of the latter only config.json and the weights are read: code that lies in the folder is never run. Raises InputError where
    there are no weights, or they are damaged.
    """
    if is_export(path):
        exported = read_export(path)
        backbone, objective = {"name": exported.name, "options": exported.options}, exported.objective
        tensors = exported.tensors() | ({} if objective is None else exported.objective_tensors())
        return Initial(backbone, objective, exported.contracts, tensors)
    state, tensors = read_checkpoint(path, "model.")
    try:
        options = dict(state["config"]["objective"])
        objective = {"name": options.pop("name"), "options": options}
        contracts = [InputContract.model_validate(contract) for contract in state["contracts"].values()]
        return Initial(state["backbone"], objective, {contract.modality: contract for contract in contracts}, tensors)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"train.init: {path} cannot be read ({' '.join(str(error).split())})") from None


def examine(model: Objective, recipe: Recipe, contracts: dict[str, InputContract]) -> None:
    """Of a run that is new: may it start from `train.init`? `model` may be on the meta device.

    Raises InputError, both sides shown, for data of other bands, and for another backbone.
    """
    folder = recipe.train.init
    if folder is None or (recipe.run.dir / START).exists():
        return
    found = read_initial(folder)
    where = ", ".join(one.path for one in recipe.data.train)
    if missing := contracts.keys() - found.contracts.keys():
        raise InputError(
            f"train.init: {folder} was trained on {', '.join(found.contracts)}, and {where} holds {', '.join(sorted(missing))}; "
            "name what both have in data.modalities"
        )
    for name, contract in contracts.items():
        remedy = "shards with these bands, or a start without train.init"
        found.contracts[name].require(contract, ours=f"train.init {folder}", theirs=where, remedy=remedy)
    config = model.backbone.config
    differing = [
        f"{key} is {value!r} there, {_plain(getattr(config, key))!r} here"
        for key, value in found.backbone["options"].items()
        if key not in _FREE and hasattr(config, key) and _plain(getattr(config, key)) != value
    ]
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(_BACKBONE)}
    theirs = {name: tensor for name, tensor in found.tensors.items() if name.startswith(_BACKBONE)}
    if wrong := "; ".join(differing) or first_of(misfits(theirs, own)):
        raise InputError(f"train.init: backbone {recipe.backbone['name']} is not the one in {folder}: {wrong}")


def begin(recipe: Recipe, contracts: dict[str, InputContract]) -> None:
    """Keep in the run folder, once, what a run that was examined starts from."""
    folder, path = recipe.train.init, recipe.run.dir / START
    if folder is None or path.exists():
        return
    found = read_initial(folder)
    used = {name: found.contracts[name].model_dump(mode="json") for name in contracts}
    write_json(path, {"backbone": found.backbone["name"], "objective": found.objective, "contracts": used})


def started(recipe: Recipe) -> dict[str, Any] | None:
    """What `begin` kept: the name of the backbone, the objective, the contracts; None of a run that starts from nothing."""
    path = recipe.run.dir / START
    return json.loads(path.read_text()) if recipe.train.init is not None and path.exists() else None


def renormalised(contracts: dict[str, InputContract], start: dict[str, Any] | None) -> dict[str, InputContract]:
    """The data's contracts with the normalisation of the weights that the run started from."""
    if start is None:
        return contracts
    known = {name: InputContract.model_validate(contract) for name, contract in start["contracts"].items()}
    return {
        name: contract.model_copy(update={"normalisation": known[name].normalisation}) if name in known else contract
        for name, contract in contracts.items()
    }


def load(model: Objective, recipe: Recipe) -> str:
    """Fill `model` from `train.init`, and return one line that says what was taken.

    The objective's own parameters are taken where the objective is the same and all of them fit; else they stay as initialised.
    """
    folder = recipe.train.init
    assert folder is not None
    found, task = read_initial(folder), recipe.objective["name"]
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(_BACKBONE)}
    theirs = {name: tensor for name, tensor in found.tensors.items() if not name.startswith(_BACKBONE)}
    if found.objective is None:
        reason = "nothing but the backbone is there"
    elif found.objective["name"] != task:
        reason = f"that of {folder} is {found.objective['name']}"
    else:
        reason = first_of(misfits(theirs, own))
    taken = {name: tensor for name, tensor in found.tensors.items() if not reason or name.startswith(_BACKBONE)}
    model.load_state_dict(taken, strict=not reason)
    if reason:
        model.after_start()
    head = f"objective {task} anew, since {reason}" if reason else f"the weights of objective {task} too"
    return f"starting from the weights of {folder}: backbone {found.backbone['name']}, {head}; normalised as there"


def _plain(value: Any) -> Any:
    """As JSON has it: lists for tuples."""
    return json.loads(json.dumps(value))


def misfits(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """What of `given` is not as `wanted`: missing, left over, or of another shape or kind; a few words each."""
    wrong = [f"{name} is missing" for name in wanted if name not in given]
    wrong += [f"{name} is not known" for name in given if name not in wanted]
    for name, tensor in given.items():
        if (own := wanted.get(name)) is None:
            continue
        if tensor.shape != own.shape:
            wrong.append(f"{name} is of shape {tuple(tensor.shape)}, and would have to be {tuple(own.shape)}")
        elif tensor.is_floating_point() != own.is_floating_point() or tensor.is_complex():
            wrong.append(f"{name} is of {tensor.dtype}, and would have to be {own.dtype}")
    return wrong


def first_of(wrong: list[str]) -> str:
    """The first three, and how many more there are; nothing where nothing is wrong."""
    return "; ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
