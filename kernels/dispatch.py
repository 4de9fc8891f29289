"""Which implementation of an operator runs here, and why a faster one does not.

Every operator names its implementations once, fastest first. `use` overrides the choice, for comparison and tests.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

# Says for a device type ("cpu", "cuda") why an implementation cannot run there; None where it can.
Missing = Callable[[str], str | None]


@dataclass(frozen=True)
class Implementation:
    """`automatic` ones are chosen where they can run; the others, optional back ends, only through `use`."""

    name: str
    missing: Missing
    automatic: bool = True
    slow: bool = False  # taken on a GPU, it warns once


class Operator:
    """The implementations of one operator, fastest first; the last runs everywhere."""

    def __init__(self, name: str, *implementations: Implementation) -> None:
        self.name = name
        self.implementations = {one.name: one for one in implementations}
        OPERATORS[name] = self

    def choose(self, device: torch.device) -> str:
        """The implementation for tensors on `device`; on the meta device, where only shapes are made, that of a CPU.

        Raises ValueError where `use` asked for one that cannot run there.
        """
        kind = "cpu" if device.type == "meta" else device.type
        if (forced := _FORCED.get(self.name)) is not None:
            reason = _missing(self.name, forced, kind)
            if reason is not None and not (forced == "triton" and interpreted()):
                raise ValueError(f"{self.name}: {forced} cannot take a tensor on {kind}: {reason}")
            return forced
        return self.fastest(kind)

    def fastest(self, device_type: str) -> str:
        """The first automatic implementation that can run on such a device; taking a slow one on a GPU warns once."""
        name, why = _fastest(self.name, device_type)
        if why and not torch.compiler.is_compiling():
            _warn(why)
        return name

    def unavailable(self, device_type: str) -> dict[str, str]:
        """{implementation: why it is not available} of those before the one that `fastest` takes, and of the optional ones."""
        taken, _ = _fastest(self.name, device_type)
        reasons: dict[str, str] = {}
        before = True
        for one in self.implementations.values():
            before = before and one.name != taken
            if (before or not one.automatic) and (reason := _missing(self.name, one.name, device_type)) is not None:
                reasons[one.name] = reason
        return reasons


def summary(device_type: str) -> str:
    """One line: which implementation each operator takes on such a device."""
    return ", ".join(f"{name} {operator.fastest(device_type)}" for name, operator in sorted(OPERATORS.items()))


OPERATORS: dict[str, Operator] = {}
_FORCED: dict[str, str] = {}


@torch.compiler.assume_constant_result  # asked once, and not looked into, while compiling
def _missing(operator: str, implementation: str, device_type: str) -> str | None:
    return OPERATORS[operator].implementations[implementation].missing(device_type)


@torch.compiler.assume_constant_result
def _fastest(operator: str, device_type: str) -> tuple[str, str]:
    return _found(operator, device_type)


@cache
def _found(operator: str, device_type: str) -> tuple[str, str]:
    """(name, what to warn of)."""
    reasons: list[str] = []
    for one in OPERATORS[operator].implementations.values():
        if not one.automatic:
            continue
        if (reason := _missing(operator, one.name, device_type)) is None:
            slow = one.slow and device_type != "cpu"
            return one.name, f"{operator}: taking the slow {one.name} on {device_type}; {'; '.join(reasons)}" if slow else ""
        reasons.append(f"{one.name}: {reason}")
    raise AssertionError(f"{operator} has no implementation for {device_type}")


@cache
def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)


@contextmanager
def use(**implementations: str) -> Iterator[None]:
    """Within it, `use(selective_scan="reference")` takes that implementation of that operator.

    Raises ValueError for a name that does not exist.
    """
    for operator, name in implementations.items():
        if operator not in OPERATORS or name not in OPERATORS[operator].implementations:
            known = {o.name: list(o.implementations) for o in OPERATORS.values()}
            raise ValueError(f"there is no implementation {name!r} of {operator!r}; there are {known}")
    before = dict(_FORCED)
    _FORCED.update(implementations)
    try:
        yield
    finally:
        _FORCED.clear()
        _FORCED.update(before)


def everywhere(device_type: str) -> str | None:
    """Of an implementation in plain torch."""
    return None


def on_cpu(device_type: str) -> str | None:
    return None if device_type == "cpu" else "it is for tensors on a CPU"


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors: right, slow, and never chosen but by `use`."""
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


def with_triton(device_type: str) -> str | None:
    """Of a Triton kernel."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; a torch for CUDA brings it"
    if device_type != "cuda":
        return "it needs a GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return f"it needs compute capability 8.0, this GPU has {'.'.join(map(str, torch.cuda.get_device_capability()))}"
    return None


def check_contents(device: torch.device) -> bool:
    """Whether to look into indices and packings: always on a CPU, on a GPU (a synchronisation) where SWATH_CHECK=1."""
    return device.type == "cpu" or os.environ.get("SWATH_CHECK") == "1"


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast casts products to on such a device; None outside of it, and where there is no autocast."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)
