"""Weights that published code wrote, in a backbone of ours: read without running code, mapped by name, strict about every key."""

import argparse
import re
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from swath.backbones.base import Backbone, registry
from swath.shards.errors import InputError

# Where training scripts put the weights, the first that is there.
_PLACES = ("model", "state_dict", "model_state_dict", "teacher", "student")
LARGEST = 32 * 2**30


class _Dtype:
    """What stands in a pickle for numpy.dtype; numpy's own would take sizes and states of any kind from the file."""

    def __init__(self, name: str, *_: Any) -> None:
        self.name, self.order = name, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _number(dtype: _Dtype, data: bytes) -> float | int | bool:
    """numpy's scalar of a plain type, as Python has it."""
    if dtype.name not in ("f2", "f4", "f8", "b1", *(f"{sign}{size}" for sign in "iu" for size in (1, 2, 4, 8))):
        raise ValueError(f"numpy's {dtype.name} is no plain number")
    return np.frombuffer(data, dtype.order + dtype.name, count=1).item()


# What training scripts store beside weights, as data: their arguments, and numbers of numpy under its old and new names.
_HARMLESS: list[Any] = [
    argparse.Namespace, (_Dtype, "numpy.dtype"), *((_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))
]  # fmt: skip


def load_published(name: str, path: Path | str, *, prefix: str = "", **options: Any) -> Backbone:
    """The backbone `name` (with `options`) in eval mode, with the weights of a published checkpoint.

    `path` is a .safetensors file or one of torch.save, read with weights only (argparse.Namespace, which training scripts store
    beside them, is let through as data). `prefix` is cut from the front of keys; others are left to the family's own mapping,
    which says of every key that it does not know or misses.

    Raises InputError for files that are not there, damaged or hold more than weights, for families without a mapping, and for
    weights that do not fit.
    """
    path = Path(path)
    try:
        config = registry.configure(name, **options)
        build = registry.entry(name).build
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None
    mapping = getattr(sys.modules[build.__module__], "from_published", None)
    if mapping is None:
        raise InputError(f"{name}: no layout of published weights is known for this family")
    state = read_published(path, prefix)[0]
    backbone: Backbone = build(config)
    try:
        backbone.load_state_dict(mapping(state, config), strict=True)
    except (KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} does not fit {name}: {' '.join(str(error).split())}") from None
    return backbone.eval()


def read_published(path: Path | str, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, what the training script was told) of a published checkpoint; see `load_published`.

    The second is the file's `args`, or {}. A file of torch.save is mapped into memory, so that of the optimiser's state beside
    the weights nothing is read. Raises InputError for files that are not there, too large, damaged or hold more than weights.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file; give a checkpoint (.safetensors, .pth, .pt, .bin)")
    if path.stat().st_size > LARGEST:
        raise InputError(
            f"{path} has {path.stat().st_size / 2**30:.0f} GiB; no checkpoint of these is above {LARGEST / 2**30:.0f}"
        )
    if path.suffix == ".safetensors":
        try:
            held: Any = load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None
    else:
        held = _unpickled(path)
    args = held.get("args") if isinstance(held, dict) else None
    for place in _PLACES:
        if isinstance(held, dict) and isinstance(held.get(place), dict):
            held = held[place]
            break
    if not isinstance(held, dict) or not held or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in held.items()):
        raise InputError(f"{path} holds no dictionary of tensors, neither itself nor under {', '.join(_PLACES)}")
    for name, tensor in held.items():
        plain = tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
        if not plain or tensor.numel() * tensor.element_size() > path.stat().st_size:
            raise InputError(f"{path}: {name} is no plain tensor, or claims more numbers than the file holds")
    told = vars(args) if isinstance(args, argparse.Namespace) else args
    return _without(held, prefix), {name: v for name, v in told.items() if _plain(v)} if isinstance(told, dict) else {}


def _plain(value: Any) -> bool:
    """Is it a number, a text, or a list or dictionary, as arguments of scripts are?"""
    return isinstance(value, bool | int | float | str | list | tuple | dict)


def _unpickled(path: Path) -> Any:
    """What torch.save wrote, with nothing called but what makes tensors, plain containers, numbers and argparse.Namespace."""
    archive = zipfile.is_zipfile(path)
    try:
        if archive:
            with zipfile.ZipFile(path) as members:
                if sum(member.file_size for member in members.infolist()) > path.stat().st_size:
                    raise InputError(f"{path} is compressed, which torch.save never does; its size cannot be trusted")
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except InputError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        text = " ".join(str(error).split())
        asked = re.search(r"GLOBAL ([\w.]+)", text)
        reason = re.sub(r"^Weights only load failed.*?(WeightsUnpickler error: |$)", "", text).partition(" Check the doc")[0]
        odd = f"it is damaged, or nothing that torch.save wrote ({(reason or type(error).__name__)[:200]})"
        reason = f"it asks for {asked[1]}, which was not called" if asked else odd
        raise InputError(f"{path} cannot be read as weights only: {reason}") from None


def _without(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Keys that begin with `prefix`, without it; and without what DataParallel, torch.compile or a model around the encoder put
    in front of all of them."""
    if prefix:
        if not any(key.startswith(prefix) for key in state):
            raise InputError(f"no key begins with {prefix!r}; they begin like {', '.join(sorted(state)[:3])}")
        return {key[len(prefix) :]: tensor for key, tensor in state.items() if key.startswith(prefix)}
    for front in ("module.", "_orig_mod.", "encoder.", "backbone."):
        if all(key.startswith(front) for key in state):
            state = {key[len(front) :]: tensor for key, tensor in state.items()}
    return state
