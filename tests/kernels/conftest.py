"""Kernels run with uninitialised memory full of NaN."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors

_device_constructors()  # torch remembers these functions at first use: before they are replaced below


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a kernel does not write shows: torch.empty and its relatives give NaN, in eager code."""

    def poison(name: str, owner: Any) -> None:
        original = getattr(owner, name)

        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = original(*args, **kwargs)
            if torch.compiler.is_compiling() or not isinstance(tensor, torch.Tensor) or type(tensor) is not torch.Tensor:
                return tensor
            if tensor.is_floating_point() and tensor.device.type != "meta":
                tensor.fill_(float("nan"))
            return tensor

        monkeypatch.setattr(owner, name, made)

    poison("empty", torch)
    poison("empty_like", torch)
    poison("new_empty", torch.Tensor)
    yield
