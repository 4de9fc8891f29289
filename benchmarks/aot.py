"""Compile every Triton kernel ahead of time, on any machine, and say how many registers it takes and how much it spills.

    python -m benchmarks.aot [--out benchmarks/results/aot.json]

Each operator is called on CPU tensors of the sizes below; what it would launch is compiled for sm_80 and sm_90 instead, with
the Triton that is installed, and nothing runs. Registers and spills are read from the machine code by `cuobjdump`.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import swath.kernels.dispatch as dispatch
from benchmarks.gpu import attention, patches, scan
from swath.kernels.scan.op import KEEP

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32)}
_TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip


def source(kernel: JITFunction[Any], arguments: dict[str, Any]) -> ASTSource:
    """What a launch with these arguments compiles, with Triton's usual assumptions of divisibility by 16."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for number, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(number,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


@contextmanager
def recorded(found: dict[str, tuple[JITFunction[Any], dict[str, Any], dict[str, Any]]]) -> Iterator[None]:
    """Launches are noted instead of run, one per kernel and set of compile-time values."""
    run, interpreted, keep = JITFunction.run, dispatch.interpreted, KEEP["cpu"]

    def note(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
        options = {name: given.pop(name) for name in ("num_warps", "num_stages") if name in given}
        arguments = dict(zip(self.arg_names, args, strict=False)) | given
        dtypes = sorted({str(v.dtype)[6:] for v in arguments.values() if isinstance(v, torch.Tensor) and v.is_floating_point()})
        constants = {p.name: arguments[p.name] for p in self.params if p.is_constexpr}
        label = f"{self.fn.__module__.removeprefix('swath.kernels.')}.{self.fn.__name__} {'/'.join(dtypes)} " + " ".join(
            f"{name}={value}" for name, value in constants.items()
        )
        found.setdefault(label, (self, arguments, options))

    JITFunction.run = note  # type: ignore[method-assign]
    dispatch.interpreted, KEEP["cpu"] = lambda: True, KEEP["cuda"]
    try:
        yield
    finally:
        JITFunction.run, dispatch.interpreted, KEEP["cpu"] = run, interpreted, keep  # type: ignore[method-assign]


def usage(cubin: bytes) -> dict[str, int]:
    """Registers per thread, and bytes that each thread keeps in memory for want of them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(numbers["REG"]), "spilled_bytes": int(numbers["STACK"]) + int(numbers["LOCAL"])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels whose label contains this")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    calls: list[Callable[[], object]] = [*scan.launches(), *attention.launches(), *patches.launches()]
    found: dict[str, tuple[JITFunction[Any], dict[str, Any], dict[str, Any]]] = {}
    with recorded(found):
        for call in calls:
            call()
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for label, (kernel, arguments, options) in found.items():
        if args.only not in label:
            continue
        rows[label] = {}
        for name, target in TARGETS.items():
            started = time.perf_counter()
            made = triton.compile(source(kernel, arguments), target=target, options=options)
            rows[label][name] = usage(made.asm["cubin"]) | {"seconds": round(time.perf_counter() - started, 1)}
        print(label, rows[label], flush=True)
    if args.out:
        result = {
            "command": " ".join(["python", "-m", "benchmarks.aot", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d"),
            "versions": {"triton": triton.__version__, "torch": torch.__version__},
            "kernels": rows,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
