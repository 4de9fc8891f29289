"""Weights that published code wrote, in a backbone of ours: read without running code, mapped by name, strict about every key."""

import argparse
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from swath.backbones.base import Backbone, registry
from swath.shards.errors import InputError

# Where training scripts put the weights, the first that is there.
_PLACES = ("model", "state_dict", "model_state_dict", "teacher", "student")


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
    state = _without(_read(path), prefix)
    backbone: Backbone = build(config)
    try:
        backbone.load_state_dict(mapping(state, config), strict=True)
    except (KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} does not fit {name}: {' '.join(str(error).split())}") from None
    return backbone.eval()


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path} is not a file; give a checkpoint (.safetensors, .pth, .pt, .bin)")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} cannot be read as weights only: {reason}") from None
    for place in _PLACES:
        if isinstance(held, dict) and isinstance(held.get(place), dict):
            held = held[place]
            break
    if not isinstance(held, dict) or not all(isinstance(v, Tensor) for v in held.values()) or not held:
        raise InputError(f"{path} holds no dictionary of tensors, neither itself nor under {', '.join(_PLACES)}")
    return held


def _without(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Keys without `prefix`, which all must have, and without what DataParallel and torch.compile put in front of all of them."""
    if prefix:
        if not any(key.startswith(prefix) for key in state):
            raise InputError(f"no key begins with {prefix!r}; they begin like {', '.join(sorted(state)[:3])}")
        return {key[len(prefix) :]: tensor for key, tensor in state.items() if key.startswith(prefix)}
    for front in ("module.", "_orig_mod."):
        if all(key.startswith(front) for key in state):
            state = {key[len(front) :]: tensor for key, tensor in state.items()}
    return state
