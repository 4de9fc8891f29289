"""swath doctor: what this machine has, what swath will use of it, and what is missing for more."""

import importlib.metadata
import importlib.util
import os
import platform
import time

import torch

import swath
from swath.backbones.base import registry as backbones
from swath.kernels.dispatch import OPERATORS
from swath.pretrain.objective import registry as objectives

_OPTIONAL = {
    "rasterio": ("GeoTIFF scenes", "pip install 'swath[geo]'"),
    "transformers": ("swath export", "pip install 'swath[hub]'"),
}


def doctor() -> str:
    """The report as text."""
    rows = [
        ("swath", swath.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} processors"),
        ("device", _device()),
        ("bf16", _bf16()),
    ]
    for package, (purpose, remedy) in _OPTIONAL.items():
        found = importlib.util.find_spec(package) is not None
        rows.append((package, importlib.metadata.version(package) if found else f"not installed; {purpose} needs it: {remedy}"))
    rows += _operators("cuda" if torch.cuda.is_available() else "cpu")
    rows.append(("backbones", ", ".join(backbones.names())))
    rows.append(("objectives", ", ".join(objectives.names())))
    return "\n".join(f"{name:25}{text}" for name, text in rows)


def _operators(device_type: str) -> list[tuple[str, str]]:
    """The implementation that each operator takes here, and why not a faster or an optional one."""
    rows = []
    for name, operator in sorted(OPERATORS.items()):
        reasons = "; ".join(f"not {other}: {why}" for other, why in operator.unavailable(device_type).items())
        rows.append((name, operator.fastest(device_type) + (f" ({reasons})" if reasons else "")))
    return rows


def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu (torch sees no GPU)"
    return ", ".join(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count()))


def _bf16() -> str:
    """Matrix products in bf16 beside fp32, timed here: what train.precision=auto will likely choose."""
    if torch.cuda.is_available():
        return "yes" if torch.cuda.is_bf16_supported(including_emulation=False) else "no: train.precision=auto means fp32 here"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(768, 768, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            _ = a @ a
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    gain = seconds[torch.float32] / seconds[torch.bfloat16]
    return f"matrix products are {gain:.1f} times as fast as in fp32 here"
