"""A frozen backbone, or all that it was pretrained with, from whatever a user points at: a run folder, a checkpoint in it, an
exported folder, or a Hub id."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from swath.backbones.base import Backbone, create
from swath.hub.remote import local
from swath.pretrain.checkpoint import read_checkpoint
from swath.pretrain.initial import CONFIG, OBJECTIVE, WEIGHTS
from swath.pretrain.objective import Objective, build, registry
from swath.shards.bands import InputContract, side_by_side
from swath.shards.errors import InputError

MODEL_TYPE = "swath"
_MODEL, _BACKBONE = "model.", "backbone."
_CONFIG_BYTES = 64 << 20  # of a config.json, which may come from anybody


@dataclass
class Loaded:
    """A backbone in eval mode and fp32, and what must be known to use it.

    `name` and `options` rebuild it (`create(name, **options)`); `size` is the (height, width) in pixels that it was trained
    at; `origin` says where it comes from: step, samples, versions, and the resolved recipe under "config"; `shards` lists what
    a run was trained on: data set number, name, samples, checksum; `place` is
    where it was loaded from, for messages.
    """

    backbone: Backbone
    contracts: dict[str, InputContract]
    size: tuple[int, int]
    name: str
    options: dict[str, Any]
    origin: dict[str, Any]
    shards: list[list[Any]] = field(default_factory=list)
    place: str = ""

    @property
    def contract(self) -> InputContract:
        """Of the only modality, or of several whose bands the backbone sees as one image; else InputError."""
        contracts = list(self.contracts.values())
        if len(contracts) == 1:
            return contracts[0]
        if sum(contract.channels for contract in contracts) != self.backbone.config.bands:
            raise InputError(f"the backbone was trained on {', '.join(self.contracts)}; name one modality")
        return side_by_side(contracts)


@dataclass
class Head:
    """What an objective has besides the backbone: the parameters of its decoder, teacher, and so on.

    `name` and `options`, all of them, rebuild the objective; `tensors` are those of its state that are not the backbone's.
    """

    name: str
    options: dict[str, Any]
    tensors: dict[str, Tensor]


def load_backbone(path: Path | str) -> Loaded:
    """The backbone at `path`; a run folder stands for its latest checkpoint, ORG/NAME[@REVISION] for a model of the Hub unless
    something of that name lies here.

    Raises InputError for a folder that is none of the three, for a Hub id that cannot be had, for damaged files, an unknown
    backbone, and parameters that are missing, left over or of another shape.
    """
    path = local(path)
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; a backbone is a run folder, a checkpoint, an exported folder or a Hub id")
    exported = _read_export(path)
    state, tensors = exported or read_checkpoint(path, _MODEL + _BACKBONE)
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
    return Loaded(backbone.eval(), contracts, (height, width), name, options, origin, state.get("shards", []), str(path))


def load_objective(path: Path | str) -> Objective:
    """The objective at `path` around its backbone, in eval mode and fp32, as the run left it; of an export, one that was written
    `--with-decoder`.

    Raises InputError where `path` holds no objective, or it does not fit its backbone, besides what `load_backbone` raises.
    """
    loaded, head = load_backbone(path), read_head(path)
    channels = {name: contract.channels for name, contract in loaded.contracts.items()}
    stages = loaded.origin.get("config", {}).get("train", {}).get("stages")
    size = (stages[-1]["size"],) * 2 if stages else loaded.size  # a run in stages is built for the last one
    encoder = {_BACKBONE + name: tensor for name, tensor in loaded.backbone.state_dict().items()}
    try:
        made = build(head.name, loaded.backbone, size, channels, **head.options)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    _fill(made, encoder | head.tensors, Path(path), "objective")
    return made.eval()


def read_head(path: Path | str) -> Head:
    """What belongs to the objective alone of a run, a checkpoint or an export; InputError where there is none."""
    path = local(path)
    if (path / CONFIG).is_file():
        return _exported_head(path)
    state, tensors = read_checkpoint(path, _MODEL)
    try:
        options = dict(state["config"]["objective"])
        name = options.pop("name")
        options = dataclasses.asdict(registry.configure(name, **options))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} does not name the objective that it was trained with ({error!r})") from None
    return Head(name, options, {n: tensor for n, tensor in tensors.items() if not n.startswith(_BACKBONE)})


def _exported_head(path: Path) -> Head:
    try:
        objective = json.loads((path / CONFIG).read_text()).get("objective")
        if objective is None or not (path / OBJECTIVE).is_file():
            raise InputError(f"{path} holds a backbone without its objective; export its run with --with-decoder")
        return Head(objective["name"], dict(objective["options"]), load_file(path / OBJECTIVE))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise InputError(f"the objective of the export {path} is damaged ({error}); export it again") from None


def _size(size: int | list[int] | None, contract: InputContract) -> tuple[int, int]:
    """(height, width) that a recipe's `data.size` stands for: a side, both, or the chips' own."""
    if size is None:
        if contract.height is None or contract.width is None:
            raise ValueError("neither the recipe nor the contract has an image size")
        return contract.height, contract.width
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _origin(state: dict[str, Any]) -> dict[str, Any]:
    return {key: state[key] for key in ("step", "samples", "recipe", "versions", "config", "datasets") if key in state}


def _read_export(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """An exported folder in the shape of a checkpoint's (state, tensors), or None where `path` is no such folder.

    Only config.json and the weights are read: code that lies in the folder is never run.
    """
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        return None
    try:
        if (path / CONFIG).stat().st_size > _CONFIG_BYTES:
            raise InputError(f"{path / CONFIG} is larger than any that `swath export` writes")
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
    except (OSError, ValueError, KeyError, AttributeError, RecursionError, SafetensorError) as error:
        raise InputError(f"the export {path} is damaged ({error}); export it again") from None
    return state, {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}


def _fill(module: nn.Module, tensors: dict[str, Tensor], path: Path, what: str = "backbone") -> None:
    """Load `tensors` as fp32; InputError names the first parameters that do not fit."""
    own = module.state_dict()
    problems = {
        "missing": own.keys() - tensors.keys(),
        "left over": tensors.keys() - own.keys(),
        "of another shape": {key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape},
    }
    found = [f"{len(keys)} {how} ({', '.join(sorted(keys)[:3])}{' …' if len(keys) > 3 else ''})"
             for how, keys in problems.items() if keys]  # fmt: skip
    if found:
        raise InputError(f"{path}: the parameters are not those of its {what}: {'; '.join(found)}")
    module.load_state_dict({k: v.to(torch.float32) if v.is_floating_point() else v for k, v in tensors.items()})
