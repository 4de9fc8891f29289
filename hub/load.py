"""A frozen backbone from whatever a user points at: a run folder, a checkpoint in it, or an exported folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from swath.backbones.base import Backbone, create
from swath.pretrain.checkpoint import read_checkpoint
from swath.shards.bands import InputContract, side_by_side
from swath.shards.errors import InputError

CONFIG, WEIGHTS, MODEL_TYPE = "config.json", "model.safetensors", "swath"
_PREFIX = "model.backbone."


@dataclass
class Loaded:
    """A backbone in eval mode and fp32, and what must be known to use it.

    `name` and `options` rebuild it (`create(name, **options)`); `size` is the (height, width) in pixels that it was trained
    at; `origin` says where it comes from: step, samples, versions, and the resolved recipe under "config".
    """

    backbone: Backbone
    contracts: dict[str, InputContract]
    size: tuple[int, int]
    name: str
    options: dict[str, Any]
    origin: dict[str, Any]

    @property
    def contract(self) -> InputContract:
        """Of the only modality, or of several whose bands the backbone sees as one image; else InputError."""
        contracts = list(self.contracts.values())
        if len(contracts) == 1:
            return contracts[0]
        if sum(contract.channels for contract in contracts) != self.backbone.config.bands:
            raise InputError(f"the backbone was trained on {', '.join(self.contracts)}; name one modality")
        return side_by_side(contracts)


def load_backbone(path: Path | str) -> Loaded:
    """The backbone at `path`; a run folder stands for its latest checkpoint.

    Raises InputError for a folder that is none of the three, for damaged files, an unknown backbone, and parameters that
    are missing, left over or of another shape.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; a backbone is a run folder, a checkpoint or an exported folder")
    exported = _read_export(path)
    state, tensors = exported or read_checkpoint(path, _PREFIX)
    try:
        name, options = state["backbone"]["name"], state["backbone"]["options"]
        given = [InputContract.model_validate(contract) for contract in state["contracts"].values()]
        contracts = {contract.modality: contract for contract in given}
        height, width = _size(state["config"]["data"]["size"], given[0])
        origin = state["origin"] if exported else _origin(state)
    except (KeyError, TypeError, ValueError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else repr(error)
        raise InputError(f"{path} does not describe its backbone as this version of swath expects it ({what})") from None
    try:
        backbone = create(name, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    _fill(backbone, tensors, path)
    return Loaded(backbone.eval(), contracts, (height, width), name, options, origin)


def _size(size: int | list[int] | None, contract: InputContract) -> tuple[int, int]:
    """(height, width) that a recipe's `data.size` stands for: a side, both, or the chips' own."""
    if size is None:
        if contract.height is None or contract.width is None:
            raise ValueError("neither the recipe nor the contract has an image size")
        return contract.height, contract.width
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _origin(state: dict[str, Any]) -> dict[str, Any]:
    return {key: state[key] for key in ("step", "samples", "recipe", "versions", "config") if key in state}


def _read_export(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """An exported folder in the shape of a checkpoint's (state, tensors), or None where `path` is no such folder.

    Only config.json and the weights are read: code that lies in the folder is never run.
    """
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        return None
    try:
        config = json.loads((path / CONFIG).read_text())
        if config.get("model_type") != MODEL_TYPE:
            raise InputError(f"{path} holds a {config.get('model_type')} model, not one that `swath export` wrote")
        tensors = load_file(path / WEIGHTS)
        state = {
            "backbone": {"name": config["backbone_name"], "options": config["backbone_options"]},
            "contracts": config.get("input_contracts") or {"input": config["input_contract"]},
            "config": {"data": {"size": config["image_size"]}},
            "origin": config["origin"],
        }
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise InputError(f"the export {path} is damaged ({error}); export it again") from None
    return state, {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}


def _fill(backbone: Backbone, tensors: dict[str, Tensor], path: Path) -> None:
    """Load `tensors` as fp32; InputError names the first parameters that do not fit."""
    own = backbone.state_dict()
    problems = {
        "missing": own.keys() - tensors.keys(),
        "left over": tensors.keys() - own.keys(),
        "of another shape": {key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape},
    }
    found = [f"{len(keys)} {what} ({', '.join(sorted(keys)[:3])}{' …' if len(keys) > 3 else ''})"
             for what, keys in problems.items() if keys]  # fmt: skip
    if found:
        raise InputError(f"{path}: the parameters are not those of its backbone: {'; '.join(found)}")
    backbone.load_state_dict({k: v.to(torch.float32) if v.is_floating_point() else v for k, v in tensors.items()})
