"""`auto`: which precision to train in is decided once, by a quick measurement, and stored with the run."""

import time
from collections.abc import Callable
from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]
WORTH = 1.15  # bf16 must be this much faster to be chosen


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def choose(device: torch.device, step: Callable[[], None], tries: int = 3) -> tuple[Precision, float]:
    """(precision, how many times faster bf16 is). `step` is one forward and backward pass that changes no weight.

    On a GPU the answer is known: bf16 where it has it. On a CPU the two are alternated and the fastest of each compared.
    """
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16" if has else "fp32"), float("nan")
    seconds: dict[Precision, list[float]] = {"fp32": [], "bf16": []}
    for attempt in range(tries + 1):
        for precision, measured in seconds.items():
            start = time.perf_counter()
            with autocast(precision, device):
                step()
            if attempt:  # the first pair warms up
                measured.append(time.perf_counter() - start)
    gain = min(seconds["fp32"]) / min(seconds["bf16"])
    return ("bf16" if gain >= WORTH else "fp32"), gain
