"""Parameters from a file into a module. What the file claims of sizes is looked at before any memory is taken for it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from swath.backbones.base import Registry
from swath.pretrain.config import component_problems
from swath.pretrain.initial import first_of, misfits

ODD = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)  # what odd options end in
_M = TypeVar("_M", bound=nn.Module)
_MOST = 20_000  # parameters of a module; the largest backbones have some thousand
_LARGEST = 1 << 16  # of an option that counts something


class Misfit(ValueError):
    """Parameters are not those of the module; names the first."""


def check_options(registry: Registry, name: str, options: Mapping[str, Any]) -> None:
    """ValueError for a name that is not registered, and for options that are unknown, of another type or of an absurd size."""
    if problems := component_problems(registry.kind, registry, {**options, "name": name}):
        raise ValueError(problems[0])
    if huge := [f"{key} is {v}" for key, v in options.items() if isinstance(v, int) and abs(v) > _LARGEST]:
        raise ValueError(f"{registry.kind}.{huge[0]}; no {registry.kind} has more than {_LARGEST:,}")


def filled(make: Callable[[], _M], mapped: Callable[[_M], Mapping[str, Tensor]]) -> _M:
    """What `make` builds with the parameters that `mapped` names for it, as fp32.

    Misfit for those that are missing, left over, or of another shape or kind. It is built in earnest only when all of them fit,
    so sizes that a file from anybody claims cost nothing.
    """
    with _rehearsal():
        empty = make()
    ours = mapped(empty)
    refuse(misfits(ours, empty.state_dict()))
    made = make()
    made.load_state_dict(
        {name: tensor.to(torch.float32) if tensor.is_floating_point() else tensor for name, tensor in ours.items()}
    )
    return made


@contextmanager
def _rehearsal() -> Iterator[None]:
    """What is built herein has no storage, and ValueError is raised where it gets more parameters than any model of ours."""
    count = 0

    def counted(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal count
        count += 1
        if count > _MOST:
            raise ValueError(f"its options ask for more than {_MOST:,} parameters")

    hook = register_module_parameter_registration_hook(counted)
    try:
        with torch.device("meta"):
            yield
    finally:
        hook.remove()


def refuse(wrong: list[str]) -> None:
    """Misfit, unless the list is empty."""
    if wrong:
        raise Misfit(first_of(wrong))
