"""Parameters, operations, images/s and peak memory of every family; those of linear cost at larger images too.

    python benchmarks/backbones.py [--names vim_small vit_base_patch16] [--sizes 224 512] [--out FILE]

Forward passes of one image of 3 bands without gradients, in fp32 on a CPU, bf16 autocast on a GPU. Peak memory is what was held
at most beyond weights and input: by the allocator on a GPU, by the process (resident, with the libraries' scratch) on a CPU. For
families of linear cost the exponents of time and memory over tokens are fitted (1 is linear; what does not grow lowers the
latter), between 512² and the largest size. At the end, DynamicVis against ViT at the largest size, both base.
"""

import argparse
import ctypes
import itertools
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from swath.backbones.base import Backbone, create, registry

SIZES, LARGER = [224], [512, 1024, 2048]


def linear_cost(build: type[Backbone]) -> bool:
    """Scans and pyramids; attention over all tokens is quadratic."""
    return "ordered" in build.traits or "sparse" not in build.traits


def chosen() -> list[str]:
    """A name of each family: its small or base size, at patch 16 where there is a choice."""
    names = []
    for build in registry.families():
        own = [name for name in registry.names() if registry.entry(name).build is build]
        names.append(min(own, key=lambda name: ("_base" not in name, "patch16" not in name and "patch" in name, len(name))))
    return sorted(names)


class Peak:
    """Bytes that were held at most beyond those at the start: of the CUDA allocator, or of the process's resident memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        self.before = self._resident("VmRSS")

    def bytes(self) -> int:
        after = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else self._resident("VmHWM")
        return after - self.before

    @staticmethod
    def _resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def allocated(backbone: Backbone, size: int, device: torch.device) -> float:
    """MiB that torch's allocator held at most during one forward pass, input and weights not counted."""
    x = torch.randn(1, backbone.config.bands, size, size, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        backbone(x)
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        backbone(x)
    results: Any = record.profiler
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.kineto_results.events() if e.name() == "[memory]")
    return round(max(itertools.accumulate(change for _, change in changes)) / 2**20, 1)


def flops(backbone: Backbone, size: int) -> int:
    """Of matrix products and convolutions; on the meta device, since counting writes attention's scores out."""
    meta = type(backbone)(backbone.config).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        meta(torch.empty(1, backbone.config.bands, size, size, device="meta"))
    return counter.get_total_flops()


def measure(backbone: Backbone, size: int, device: torch.device, seconds: float) -> dict[str, Any]:
    x = torch.randn(1, backbone.config.bands, size, size, device=device)
    grid = backbone.grid(size, size)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        backbone(x[..., : x.shape[2] // 4, : x.shape[3] // 4] if size >= 896 else x)  # what is set up once is not its cost
        peak, times = Peak(device), list[float]()
        while len(times) < 3 or sum(times) < seconds:
            start = time.perf_counter()
            backbone(x)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            if sum(times) > 20 * seconds:
                break
        memory = peak.bytes()
    return {
        "tokens": math.prod(grid),
        "gflop": round(flops(backbone, size) / 1e9, 2),
        "images_per_second": round(1 / statistics.median(times), 3),
        "peak_mib": round(memory / 2**20, 1),
    }


def exponent(rows: dict[str, dict[str, Any]], key: str) -> float | None:
    """Slope of log(value) over log(tokens), by least squares."""
    points = [(math.log(r["tokens"]), math.log(r[key] if key == "peak_mib" else 1 / r[key])) for r in rows.values()]
    if len(points) < 2:
        return None
    mean_x, mean_y = (statistics.mean(values) for values in zip(*points, strict=True))
    return round(sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points), 2)


def against_vit(size: int, device: torch.device) -> dict[str, Any]:
    """DynamicVis-base and ViT-base with SDPA, alternating; explicit attention by its scores alone, of one layer in fp32."""
    ours, vit = (create(name, bands=3, image_size=224).eval().to(device) for name in ("dynamicvis_base", "vit_base_patch16"))
    pairs = [(measure(ours, size, device, 0.1), measure(vit, size, device, 0.1)) for _ in range(2)]
    peak, vit_peak = (statistics.median(pair[i]["peak_mib"] for pair in pairs) for i in (0, 1))
    held, vit_held = (allocated(backbone, size, device) for backbone in (ours, vit))
    tokens = pairs[0][1]["tokens"]
    explicit = vit.config.heads * tokens**2 * 4 / 2**20
    return {
        "size": size,
        "dynamicvis_base": [pair[0] for pair in pairs],
        "vit_base_patch16": [pair[1] for pair in pairs],
        "explicit_scores_mib": round(explicit, 1),
        "allocated_mib": {"dynamicvis_base": held, "vit_base_patch16": vit_held},
        "allocated_over_vit": round(held / vit_held, 3),
        "resident_over_vit": round(peak / vit_peak, 3),
        "resident_over_explicit": round(peak / explicit, 3),
        "time_over_vit": round(statistics.median(p[1]["images_per_second"] / p[0]["images_per_second"] for p in pairs), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="*", default=chosen())
    parser.add_argument("--sizes", nargs="*", type=int, default=SIZES)
    parser.add_argument("--larger", nargs="*", type=int, default=LARGER)
    parser.add_argument("--seconds", type=float, default=2.0, help="to spend on each timing, at least")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    families: dict[str, Any] = {}
    for name in args.names:
        entry = registry.entry(name)
        bands = entry.build.tiny["bands"] if entry.build.tiny["bands"] % 3 == 0 else 3
        backbone = create(name, bands=bands, image_size=224).eval().to(device)
        row: dict[str, Any] = {"parameters": sum(p.numel() for p in backbone.parameters()), "bands": bands}
        row["at"] = {str(size): measure(backbone, size, device, args.seconds) for size in args.sizes}
        if linear_cost(entry.build):
            larger = {str(size): measure(backbone, size, device, args.seconds) for size in args.larger}
            row["at"] |= larger
            row["exponents"] = {key: exponent(larger, key) for key in ("images_per_second", "peak_mib")}
        families[name] = row
        print(name, json.dumps(row), flush=True)
    result = {
        "command": " ".join(["python", "benchmarks/backbones.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
        if device.type == "cpu"
        else torch.cuda.get_device_name(),
        "families": families,
    }
    if args.larger:
        result["against_vit"] = against_vit(max(args.larger), device)
        print(json.dumps(result["against_vit"]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
