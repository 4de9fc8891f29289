"""Checkpoints: tensors through torch.distributed.checkpoint, everything else as JSON, whole or not at all (DESIGN §2.8).

A checkpoint is `checkpoints/step-00000100/` with `tensors/`, `state.json`, `files.json` (size and SHA-256 of every file) and,
last, `complete`. It is built beside its final name, fsynced, read back, renamed; then `latest` moves; then old ones go. All of
that is done in the background, from copies: a step waits for no disk.
"""

import hashlib
import json
import logging
import pickle
import shutil
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import Future as Task
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from enum import EnumType
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.tensor import DTensor
from torch.futures import Future

from swath.pretrain.pieces import Held, LoadPlanner, Piece, WritePlanner
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
    """Builds one checkpoint beside its final name. Every rank writes its file and measures it; rank 0 does everything else.

    These are the moments at which DCP calls a writer, and an error in any of them reaches all ranks.
    """

    def __init__(self, folder: Path, step: int, state: dict[str, Any], keep: int, permanent_every: int | None) -> None:
        self._final, self._partial = folder / name_of(step), folder / f".{name_of(step)}.partial"
        super().__init__(self._partial / "tensors", per_thread_copy_ahead=0)  # tensors are on the CPU, let it touch no GPU
        self._step, self._state, self._keep, self._permanent_every = step, state, keep, permanent_every

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # no path of this machine

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        folder = self._final.parent
        folder.mkdir(exist_ok=True)
        for left in folder.glob(".step-*.partial"):  # by one that was killed or failed
            shutil.rmtree(left, ignore_errors=True)
        self._partial.mkdir()
        (self._partial / "tensors").mkdir()
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        try:
            written = super().write_data(plan, planner).value()
        except RuntimeError as error:  # torch.save closes its archive after an error of the disk, and that fails in turn
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        own = (self._partial / "tensors").glob(f"{plan.storage_data.prefix}*")
        done: Future[Any] = Future()
        done.set_result((written, _measures(self._partial, own)))
        return done

    def finish(self, metadata: Metadata, results: list[Any]) -> None:
        super().finish(metadata, [written for written, _ in results])
        write_json(self._partial / "state.json", self._state)
        files = _measures(self._partial, (self._partial / name for name in ("state.json", "tensors/.metadata")))
        for _, measures in results:
            files |= measures
        write_json(self._partial / "files.json", files)
        write_bytes(self._partial / COMPLETE, b"")
        sync_folder(self._partial / "tensors")
        shutil.rmtree(self._final, ignore_errors=True)  # of a step that is done again after a fall-back
        self._partial.rename(self._final)
        folder = self._final.parent
        sync_folder(folder)
        write_bytes(folder / LATEST, self._final.name.encode())
        for old in _steps(folder)[: -self._keep]:
            if old != self._step and not (self._permanent_every and old % self._permanent_every == 0):
                shutil.rmtree(folder / name_of(old))


def name_of(step: int) -> str:
    return f"step-{step:08d}"


class Saver:
    """Writes the checkpoints of a run in a thread while training goes on, one at a time. All ranks use theirs alike.

    Within `with`, so that the end of the run, or its error, waits for what is being written.
    """

    def __init__(self, run: Path, world: World = ALONE, *, keep: int, permanent_every: int | None) -> None:
        self._folder, self._world, self._keep, self._permanent_every = run / FOLDER, world, keep, permanent_every
        self._group = world.group()  # the thread's exchanges must not meet those of training
        self._copies: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "swath-save")
        self._writing: Task[None] | None = None
        _quiet()

    @property
    def failed(self) -> bool:
        """Whether it is known that the last save went wrong; `wait` then raises why."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def save(self, step: int, tensors: Mapping[str, Held], state: dict[str, Any]) -> None:
        """Begin the checkpoint of `step`, once the one before is done (and raise its error). `tensors` may change when this
        returns. `latest` moves when all is written; then those go that are neither among `keep` nor permanent."""
        self.wait()
        copies: dict[str, Held] = {}
        for name, held in _share(tensors, self._world).items():
            tensor = held.values if isinstance(held, Piece) else held
            if name not in self._copies:
                self._copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            copy = self._copies[name].copy_(tensor)
            copies[name] = replace(held, values=copy) if isinstance(held, Piece) else copy
        writer = _Writer(self._folder, step, state, self._keep, self._permanent_every)
        self._writing = self._thread.submit(self._write, writer, copies)

    def wait(self) -> None:
        """Until nothing is being written. Raises the error of what was: InputError, of all ranks, for a disk that is full."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, writer: _Writer, tensors: dict[str, Held]) -> None:
        alone = self._group is None
        try:
            with disk_errors("writing a checkpoint", self._folder):
                try:
                    dcp.save(tensors, storage_writer=writer, planner=WritePlanner(), process_group=self._group, no_dist=alone)
                except CheckpointException as error:  # of all ranks; the first one's own says more
                    raise next(iter(error.failures.values()))[0] from None
        except InputError as error:
            raise self._world.refuse(str(error)) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()
        elif self.failed and self._writing is not None:
            log.warning("the last checkpoint is not there either: %s", self._writing.exception())


def save(
    run: Path, step: int, tensors: Mapping[str, Held], state: dict[str, Any], *, keep: int, permanent_every: int | None
) -> None:
    """One checkpoint, written when this returns."""
    with Saver(run, keep=keep, permanent_every=permanent_every) as saver:
        saver.save(step, tensors, state)


def _share(tensors: Mapping[str, Held], world: World) -> dict[str, Held]:
    """What this rank writes: its shards and pieces, and of what all ranks have a copy of, every `size`-th by size."""
    copies = [(-one.nbytes, name) for name, one in tensors.items() if isinstance(one, Tensor) and not isinstance(one, DTensor)]
    copies = [name for _, name in sorted(copies)]
    others = set(copies) - set(copies[world.rank :: world.size])
    return {name: tensor for name, tensor in tensors.items() if name not in others}


def _quiet() -> None:
    """One process is what we mean, so DCP need not warn of it. For good: a filter that one thread puts back is another's too."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _measures(folder: Path, paths: Iterable[Path]) -> dict[str, list[Any]]:
    return {str(path.relative_to(folder)): _measure(path) for path in sorted(paths)}


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
    for name, (size, _) in expected.items():
        file = path / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    with ThreadPoolExecutor() as pool:  # hashing holds no lock
        for name, found in zip(expected, pool.map(_measure, (path / name for name in expected)), strict=True):
            if found != expected[name]:
                return f"{name} does not match its checksum"
    if missing := {"state.json", "tensors/.metadata"} - expected.keys():
        return f"{', '.join(sorted(missing))} is missing"
    return None


def read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / "state.json").read_text())


def load_into(path: Path, tensors: Mapping[str, Held], world: World = ALONE) -> None:
    """Fill `tensors` in place from a checkpoint folder; InputError unless names and shapes are the same."""
    shapes = _shapes(path)
    wrong = sorted(n for n in shapes.keys() | tensors.keys() if n not in tensors or shapes.get(n) != tensors[n].shape)
    if wrong:
        raise InputError(f"checkpoint {path} does not fit this model: {', '.join(wrong[:5])} differ ({len(wrong)} in all)")
    _quiet()
    dcp.load(dict(tensors), storage_reader=_Reader(path / "tensors"), planner=LoadPlanner(), no_dist=world.size == 1)


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
    _quiet()
    dcp.load(dict(made), storage_reader=_Reader(path / "tensors"), no_dist=True)
    return read_state(path), {name[len(prefix) :]: tensor for name, tensor in made.items()}


def tensors_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Held]:
    """Everything that a run must remember and that is a tensor, by parameter name: `model.*` and `optimizer.*`."""
    made: dict[str, Held] = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            made[f"optimizer.{name}.{key}"] = value
    return made


def start_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter its state by a step that is skipped, and moves nothing, so that a checkpoint can be loaded into it.

    A parameter may wait for its first gradient: the head of a modality that comes late. Its state is saved like the others'.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    one = torch.ones((), device=optimizer.param_groups[0]["params"][0].device)
    optimizer.grad_scale, optimizer.found_inf = one, one  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
