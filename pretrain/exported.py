"""An exported or an imported folder, which may come from anybody: config.json and safetensors are read, and code that lies beside
them is never run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from swath.shards.bands import InputContract
from swath.shards.errors import InputError

CONFIG, WEIGHTS, OBJECTIVE = "config.json", "model.safetensors", "objective.safetensors"
MODEL_TYPE = "swath"
LARGEST_SIDE = 1 << 14  # pixels of an image that a backbone was trained at
_CONFIG_BYTES = 64 << 20
_Side = Annotated[StrictInt, Field(ge=1, le=LARGEST_SIDE)]


@dataclass
class Exported:
    """What config.json says: the backbone's `name` and `options`, likewise `objective` where it lies there too, contracts by
    modality, the (height, width) in pixels that it was trained at, where it comes from. `tensors()` reads the weights."""

    path: Path
    name: str
    options: dict[str, Any]
    objective: dict[str, Any] | None
    contracts: dict[str, InputContract]
    size: tuple[int, int]
    origin: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """The backbone's parameters, by names that begin with `backbone.`. InputError where they cannot be read."""
        return _read(self.path / WEIGHTS)

    def objective_tensors(self) -> dict[str, Tensor]:
        """The objective's own. InputError where they cannot be read."""
        return _read(self.path / OBJECTIVE)


class _Objective(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str
    options: dict[str, Any]


class _Config(BaseModel):
    """Of config.json what we read; transformers adds keys of its own when it saves one."""

    backbone_name: str
    backbone_options: dict[str, Any]
    objective: _Objective | None = None
    input_contract: InputContract | None = None
    input_contracts: dict[str, InputContract] = Field(default_factory=dict)  # where the bands are of several modalities
    image_size: _Side | tuple[_Side, _Side]
    origin: dict[str, Any] = Field(default_factory=dict)


def is_export(path: Path) -> bool:
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read_export(path: Path) -> Exported:
    """The folder at `path`. Raises InputError, in one line, for a config.json that is damaged or none of ours."""
    file = path / CONFIG
    try:
        if file.stat().st_size > _CONFIG_BYTES:
            raise InputError(f"{file} is larger than any that `swath export` writes")
        text = json.loads(file.read_bytes())
        kind = text.get("model_type") if isinstance(text, dict) else None
        if kind != MODEL_TYPE:
            raise InputError(f"{path} holds {f'a {kind} model' if kind else 'a config.json'}, not one that `swath export` wrote")
        config = _Config.model_validate(text)
        contracts = list(config.input_contracts.values()) or ([config.input_contract] if config.input_contract else [])
        if not contracts:
            raise ValueError("input_contract is missing")
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{file} is damaged ({'.'.join(map(str, first['loc']))}: {first['msg']}); export it again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged ({error}); export it again") from None
    size = config.image_size if isinstance(config.image_size, tuple) else (config.image_size, config.image_size)
    objective = None if config.objective is None else config.objective.model_dump()
    by_modality = {contract.modality: contract for contract in contracts}
    return Exported(path, config.backbone_name, config.backbone_options, objective, by_modality, size, config.origin)


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"the export {file.parent} is damaged ({file.name}: {' '.join(str(error).split())})") from None
