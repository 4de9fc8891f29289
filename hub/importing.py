"""`swath import`: a published checkpoint as a folder of ours, to probe, to export and to go on pretraining from.

The folder is an export's without its code: config.json and model.safetensors, with the objective's own parameters beside them in
objective.safetensors where the checkpoint has its decoder; and recipe.yaml, which goes on from there.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import Tensor

from swath.backbones.base import registry
from swath.hub.architecture import Architecture, Source
from swath.hub.contracts import agreed
from swath.hub.export import contracts_of, require_free
from swath.hub.fill import ODD, check_options, filled, refuse
from swath.hub.kinds import kind_of, load
from swath.hub.load import Loaded, load_backbone
from swath.hub.naming import as_published
from swath.hub.published import read_published
from swath.pretrain import objective as objectives
from swath.pretrain.exported import CONFIG, MODEL_TYPE, OBJECTIVE, WEIGHTS
from swath.pretrain.objective import Objective
from swath.shards.bands import InputContract
from swath.shards.errors import InputError
from swath.shards.files import whole_folder, write_bytes, write_json

RECIPE = "recipe.yaml"
_TASK = "objective."  # begins options of the objective


@dataclass
class Imported:
    """`loaded` is the backbone; `objective`, around it, None where the file had no decoder, and `task` its name and options.
    `left_out` are keys that are neither's; `notes` are for the user."""

    loaded: Loaded
    objective: Objective | None
    task: dict[str, Any] | None
    left_out: list[str]
    notes: list[str]


def import_published(
    kind: str,
    path: Path | str,
    to: Path | str,
    *,
    options: Mapping[str, Any] | None = None,
    bands: Sequence[str] | None = None,
    contracts: Mapping[str, InputContract] | None = None,
    prefix: str = "",
) -> Imported:
    """Write what `read` makes of a published checkpoint to the folder `to`, which must be new or empty, whole or not at all."""
    to = Path(to)
    require_free(to)
    made = read(kind, path, options=options, bands=bands, contracts=contracts, prefix=prefix)
    with whole_folder(to, "writing an import") as folder:
        _write(made, folder)
        load_backbone(folder)
    return made


def read(
    kind: str,
    path: Path | str,
    *,
    options: Mapping[str, Any] | None = None,
    bands: Sequence[str] | None = None,
    contracts: Mapping[str, InputContract] | None = None,
    prefix: str = "",
) -> Imported:
    """A published checkpoint of `kind` (see `kinds.KINDS`), with the input contract that it was trained under.

    Sizes come from the tensors. `options` says what they cannot tell, and the objective's with `objective.` before the name;
    they win over the script's arguments in the file. `bands` and `contracts`: see `contracts.agreed`; `prefix`: as for
    `load_published`. Raises InputError, in one line, for files that cannot be read safely, for keys that are missing, left over
    or of another shape, and for bands that are not the weights'.
    """
    path, described, asked = Path(path), kind_of(kind), dict(options or {})
    state, args = read_published(path, prefix)
    try:
        found = described.describe(Source(state, args, asked))
        used, note = agreed(found.contract, found.bands, found.dates, bands, contracts)
    except InputError as error:
        raise InputError(f"{path} as {kind}: {error}") from None
    except ODD as error:  # an option or an argument of the script that is nothing of the kind
        raise InputError(f"{path} as {kind}: its sizes and options do not go together ({_line(error)})") from None
    left_out = [name for name in state if name.removeprefix("backbone.").startswith(found.left_out)]
    if found.bands == 0:  # any number, so as many as there are in the contract
        found.options["bands"] = sum(contract.channels for contract in used.values())
        found.options["radar"] = sum(contract.channels for contract in used.values() if contract.is_radar)
        wavelength = [band.wavelength_nm or 0.0 for contract in used.values() for band in contract.bands]
        found.options["wavelength_nm"] = tuple(wavelength)
    for name, value in asked.items():
        if not name.startswith(_TASK):
            found.options[name] = tuple(value) if isinstance(value, list) else value
        elif found.objective is None:
            raise InputError(f"--option {name}: {path} has no decoder, so there is no objective to set options of")
        else:
            found.objective[1][name.removeprefix(_TASK)] = tuple(value) if isinstance(value, list) else value
    name, backbone, objective, task = _built(path, kind, found, used, state)
    side = backbone.config.image_size
    recipe = {"backbone": {"name": name, **_plain(backbone.config)}} | ({} if task is None else {"objective": task})
    origin = {
        "imported": {"kind": kind, "file": path.name, "sha256": _sha256(path), "code_licence": described.licence},
        "config": recipe,
    }
    loaded = Loaded(backbone.eval(), used, (side, side), name, _plain(backbone.config), origin)
    return Imported(loaded, objective, task, left_out, [note] if note else [])


def _built(
    path: Path, kind: str, found: Architecture, used: Mapping[str, InputContract], state: dict[str, Tensor]
) -> tuple[str, Any, Objective | None, dict[str, Any] | None]:
    """(name of the backbone, backbone, objective, its name and options), filled."""
    name = _name(found)
    try:
        check_options(registry, name, found.options)
        config = registry.configure(name, **found.options)
        if config.bands != (seen := sum(contract.channels for contract in used.values())):
            raise ValueError(f"{config.bands} bands are asked for, and the contract has {seen}; --bands or --contract says which")
        backbone = partial(registry.entry(name).build, config)
        if found.objective is None:
            kept = {key: tensor for key, tensor in state.items() if not key.removeprefix("backbone.").startswith(found.left_out)}
            return name, filled(backbone, lambda _: _finite(found.family.from_published(kept, config))), None, None
        task, options = found.objective
        check_options(objectives.registry, task, options)
        channels = {contract.modality: contract.channels for contract in used.values()}

        def around() -> Objective:
            return objectives.build(task, backbone(), (config.image_size, config.image_size), channels, **options)

        objective = filled(around, lambda empty: _finite(_mapped(empty, task, config, state)))
    except ODD as error:
        text = as_published(_line(error), found)
        raise InputError(f"{path} is not {kind} as published: {text[:600]}") from None
    return name, objective.backbone, objective, {"name": task, **_plain(objective.config)}  # type: ignore[attr-defined]


def _finite(ours: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    refuse([f"{name} holds numbers that are not finite" for name, tensor in ours.items() if not tensor.isfinite().all()])
    return ours


def _mapped(objective: Objective, task: str, config: Any, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """The parameters that the objective's own loader would fill it with."""
    caught = _Caught(objective)
    load(caught, task, config, state)
    return caught.ours


class _Caught:
    """An objective to a loader, which fills it last of all."""

    ours: Mapping[str, Tensor]

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def load_state_dict(self, ours: Mapping[str, Tensor], strict: bool = True) -> None:
        self.ours = ours


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _name(found: Architecture) -> str:
    """The registered name of the family whose sizes are these, or most of them."""
    names = [name for name in registry.names() if registry.entry(name).build.__module__ == found.family.__name__]

    def alike(name: str) -> int:
        return sum(found.options.get(key) == value for key, value in registry.entry(name).preset.items())

    return max(names, key=alike)


def _plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON has it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(made: Imported, folder: Path) -> None:
    loaded, objective = made.loaded, made.objective
    save_file(
        _contiguous({f"backbone.{n}": t for n, t in loaded.backbone.state_dict().items()}), folder / WEIGHTS, {"format": "pt"}
    )
    task = None
    if objective is not None and made.task is not None:
        own = {name: tensor for name, tensor in objective.state_dict().items() if not name.startswith("backbone.")}
        save_file(_contiguous(own), folder / OBJECTIVE, {"format": "pt"})
        options = dict(made.task)
        task = {"name": options.pop("name"), "options": options}
    config = {
        "model_type": MODEL_TYPE, "backbone_name": loaded.name, "backbone_options": loaded.options, "objective": task,
        "image_size": list(loaded.size), **contracts_of(loaded), "origin": loaded.origin,
    }  # fmt: skip
    write_json(folder / CONFIG, config)
    recipe = {**loaded.origin["config"], "data": {"size": loaded.size[0]}}
    said = "# goes on from here: swath pretrain recipe.yaml train.init=FOLDER data.train=SHARDS run.dir=RUN train.epochs=N\n"
    write_bytes(folder / RECIPE, (said + yaml.safe_dump(recipe, sort_keys=False)).encode())


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
