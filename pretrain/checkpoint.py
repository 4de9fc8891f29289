"""Checkpoints: tensors through torch.distributed.checkpoint, everything else as JSON, whole or not at all (DESIGN §2.8).

A checkpoint is `checkpoints/step-00000100/` with `tensors/`, `state.json`, `files.json` (size and SHA-256 of every file) and,
last, `complete`. It is built beside its final name, fsynced, read back, renamed; then `latest` moves; then old ones go.
"""

import hashlib
import json
import logging
import pickle
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import EnumType
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from swath.pretrain.world import ALONE, World
from swath.shards.errors import InputError
from swath.shards.files import disk_errors, sync_folder, write_bytes, write_json

log = logging.getLogger("swath")
FOLDER, LATEST, COMPLETE, DAMAGED = "checkpoints", "latest", "complete", ".damaged"

# All that a checkpoint's metadata may be made of; nothing here executes anything.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "StorageMeta"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "float64", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"},
    "collections": {"OrderedDict"},
}  # fmt: skip


def _member(owner: Any, name: str) -> Any:
    """What the first releases of Python 3.11 pickle an enum's member as: getattr, here of an enum's own members only."""
    if not isinstance(owner, EnumType) or name not in owner.__members__:
        raise pickle.UnpicklingError(f"getattr of {name} does not belong in a checkpoint's metadata")
    return owner[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint's metadata")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """Reads DCP's metadata, which is a pickle, without letting it call anything, and no file outside the folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise pickle.UnpicklingError(f"path {info.relative_path!r} leaves the checkpoint")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Writer(dcp.FileSystemWriter):
    """Writes no path of this machine into the metadata."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def save(
    run: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], world: World = ALONE, *, keep: int,
    permanent_every: int | None,
) -> None:  # fmt: skip
    """Write the checkpoint of `step`, move `latest` to it, remove those that are neither among `keep` nor permanent.

    Each rank writes its share of the tensors; rank 0 does everything else.
    """
    folder = run / FOLDER
    final, partial = folder / name_of(step), folder / f".{name_of(step)}.partial"

    @disk_errors("writing a checkpoint", folder)
    def begin() -> None:
        folder.mkdir(exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()

    @disk_errors("writing a checkpoint", folder)
    def finish() -> None:
        write_json(partial / "state.json", state)
        write_json(partial / "files.json", {name: _measure(partial / name) for name in _files(partial)})
        write_bytes(partial / COMPLETE, b"")
        sync_folder(partial / "tensors")
        shutil.rmtree(final, ignore_errors=True)  # of a step that is done again after a fall-back
        partial.rename(final)
        sync_folder(folder)
        write_bytes(folder / LATEST, final.name.encode())
        for old in _steps(folder)[:-keep]:
            if old != step and not (permanent_every and old % permanent_every == 0):
                shutil.rmtree(folder / name_of(old))

    world.first(begin)
    with disk_errors("writing a checkpoint", folder), _one_process():
        try:
            dcp.save(dict(tensors), storage_writer=_Writer(partial / "tensors"), no_dist=world.size == 1)
        except CheckpointException as error:  # of all ranks; the first one's own says more
            raise next(iter(error.failures.values()))[0] from None
    world.first(finish)


@contextmanager
def _one_process() -> Iterator[None]:
    """One process is what we mean, so DCP need not warn of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _measure(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _steps(folder: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in folder.glob("step-????????") if p.name[5:].isdigit())


def find_latest(run: Path, *, mend: bool = False) -> Path | None:
    """The newest checkpoint of a run that is whole, or None. Damaged ones are named; with `mend` they are set aside."""
    folder = run / FOLDER
    for step in reversed(_steps(folder)):
        path = folder / name_of(step)
        problem = _problem(path)
        if problem is None:
            return path
        log.warning("checkpoint %s is damaged (%s); falling back to the one before", path, problem)
        if mend:
            aside = path.with_name(path.name + DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    return None


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, found before anything in it is opened; None if nothing is."""
    if not (path / COMPLETE).exists():
        return "it was not finished"
    try:
        expected = json.loads((path / "files.json").read_text())
    except (OSError, ValueError) as error:
        return f"files.json: {error}"
    for name, measure in expected.items():
        file = path / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != measure[0]:
            return f"{name} has {file.stat().st_size} bytes instead of {measure[0]}"
        if _measure(file) != measure:
            return f"{name} does not match its checksum"
    if missing := {"state.json", "tensors/.metadata"} - expected.keys():
        return f"{', '.join(sorted(missing))} is missing"
    return None


def read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / "state.json").read_text())


def load_into(path: Path, tensors: dict[str, Tensor], world: World = ALONE) -> None:
    """Fill `tensors` in place from a checkpoint folder; InputError unless names and shapes are the same."""
    shapes = _shapes(path)
    wrong = sorted(n for n in shapes.keys() | tensors.keys() if n not in tensors or shapes.get(n) != tensors[n].shape)
    if wrong:
        raise InputError(f"checkpoint {path} does not fit this model: {', '.join(wrong[:5])} differ ({len(wrong)} in all)")
    with _one_process():
        dcp.load(dict(tensors), storage_reader=_Reader(path / "tensors"), no_dist=world.size == 1)


def _shapes(path: Path) -> dict[str, torch.Size]:
    return {name: info.size for name, info in _infos(path).items()}


def _infos(path: Path) -> dict[str, TensorStorageMetadata]:
    """Name → shape and dtype of every tensor in a checkpoint; InputError if it holds anything else."""
    try:
        metadata = _Reader(path / "tensors").read_metadata()
        infos = {n: i for n, i in metadata.state_dict_metadata.items() if isinstance(i, TensorStorageMetadata)}
        if len(infos) != len(metadata.state_dict_metadata):
            raise pickle.UnpicklingError("it holds something that is not a tensor")
    except (OSError, pickle.UnpicklingError, AttributeError, EOFError, TypeError, ValueError, ImportError) as error:
        raise InputError(f"checkpoint {path} cannot be read: {error}") from None
    return infos


def read_checkpoint(path: Path | str, prefix: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(state, tensors whose names start with `prefix`, without it) of a run folder's latest checkpoint or of a checkpoint."""
    path = Path(path)
    if (path / FOLDER).is_dir():
        latest = find_latest(path)
        if latest is None:
            raise InputError(f"run {path} has no whole checkpoint yet")
        path = latest
    else:
        problem = _problem(path)
        if problem is not None:
            raise InputError(f"{path} is not a run folder or a whole checkpoint: {problem}")
    made = {
        name: torch.empty(info.size, dtype=info.properties.dtype)
        for name, info in _infos(path).items()
        if name.startswith(prefix)
    }
    with _one_process():
        dcp.load(dict(made), storage_reader=_Reader(path / "tensors"), no_dist=True)
    return read_state(path), {name[len(prefix) :]: tensor for name, tensor in made.items()}


def tensors_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that a run must remember and that is a tensor, by parameter name: `model.*` and `optimizer.*`."""
    made = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            made[f"optimizer.{name}.{key}"] = value
    return made


def start_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter its state without moving a weight (its rate is 0 here), so that a checkpoint can be loaded into it.

    A parameter may wait for its first gradient: the head of a modality that comes late. Its state is saved like the others'.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for state in optimizer.state.values():
        state["step"].zero_()
    optimizer.zero_grad(set_to_none=True)
