"""A frozen backbone, or all that it was pretrained with, from whatever a user points at: a run folder, a checkpoint in it, an
exported folder, or a Hub id."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from torch import Tensor, nn

from swath.backbones.base import Backbone, Registry, create
from swath.backbones.base import registry as backbones
from swath.hub.fill import ODD, Misfit, check_options, filled
from swath.hub.remote import local
from swath.pretrain.checkpoint import read_checkpoint
from swath.pretrain.exported import OBJECTIVE, is_export, read_export
from swath.pretrain.objective import Objective, build, registry
from swath.shards.bands import InputContract, side_by_side
from swath.shards.errors import InputError

_MODEL, _BACKBONE = "model.", "backbone."
_M = TypeVar("_M", bound=nn.Module)


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
    if is_export(path):
        exported, shards = read_export(path), []
        name, options, contracts = exported.name, exported.options, exported.contracts
        size, origin, tensors = exported.size, exported.origin, exported.tensors()
        tensors = {name.removeprefix(_BACKBONE): tensor for name, tensor in tensors.items()}
    else:
        state, tensors = read_checkpoint(path, _MODEL + _BACKBONE)
        try:
            name, options = state["backbone"]["name"], state["backbone"]["options"]
            given = [InputContract.model_validate(contract) for contract in state["contracts"].values()]
            contracts = {contract.modality: contract for contract in given}
            size, shards, origin = _size(state["config"]["data"]["size"], given[0]), state.get("shards", []), _origin(state)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else repr(error)
            raise InputError(f"{path} does not describe its backbone as this version of swath expects it ({what})") from None
    backbone = _built(backbones, name, options, lambda: create(name, **options), tensors, path)
    seen = {sum(contract.channels for contract in contracts.values()), *(contract.channels for contract in contracts.values())}
    if backbone.config.bands not in seen and "any_bands" not in backbone.traits:
        raise InputError(f"{path}: its backbone takes {backbone.config.bands} bands, and its input contract has {max(seen)}")
    return Loaded(backbone.eval(), contracts, size, name, options, origin, shards, str(path))


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

    def around() -> Objective:
        return build(head.name, create(loaded.name, **loaded.options), size, channels, **head.options)

    return _built(registry, head.name, head.options, around, encoder | head.tensors, Path(path)).eval()


def read_head(path: Path | str) -> Head:
    """What belongs to the objective alone of a run, a checkpoint or an export; InputError where there is none."""
    path = local(path)
    if is_export(path):
        exported = read_export(path)
        if exported.objective is None or not (path / OBJECTIVE).is_file():
            raise InputError(f"{path} holds a backbone without its objective; export its run with --with-decoder")
        return Head(exported.objective["name"], exported.objective["options"], exported.objective_tensors())
    state, tensors = read_checkpoint(path, _MODEL)
    try:
        options = dict(state["config"]["objective"])
        name = options.pop("name")
        options = dataclasses.asdict(registry.configure(name, **options))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} does not name the objective that it was trained with ({error!r})") from None
    return Head(name, options, {n: tensor for n, tensor in tensors.items() if not n.startswith(_BACKBONE)})


def _size(size: int | list[int] | None, contract: InputContract) -> tuple[int, int]:
    """(height, width) that a recipe's `data.size` stands for: a side, both, or the chips' own."""
    if size is None:
        if contract.height is None or contract.width is None:
            raise ValueError("neither the recipe nor the contract has an image size")
        return contract.height, contract.width
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _origin(state: dict[str, Any]) -> dict[str, Any]:
    return {key: state[key] for key in ("step", "samples", "recipe", "versions", "config", "datasets") if key in state}


def _built(
    registered: Registry, name: str, options: dict[str, Any], make: Callable[[], _M], tensors: Mapping[str, Tensor], path: Path
) -> _M:
    """What `make` builds of a backbone or an objective, with `tensors`; InputError names the first that do not fit."""
    try:
        check_options(registered, name, options)
        return filled(make, lambda _: tensors)
    except Misfit as error:
        raise InputError(f"{path}: the parameters are not those of its {registered.kind}: {error}") from None
    except ODD as error:
        raise InputError(f"{path}: its {registered.kind} cannot be built: {' '.join(str(error).split())[:300]}") from None
