"""Every kernel on this GPU: checked against its reference, then timed beside other ways of doing the same.

    benchmarks/gpu.sh [--out DIR] [--only WORD] [--minutes 9]

Needs a checkout and a Python with torch and Triton. Writes gpu.json and gpu.txt; exit status 1 where a check fails. Times are
medians of CUDA events over alternating calls, with a flush of the L2 cache before each; memory is the peak beyond the inputs.
"""

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import attention, patches, scan
from benchmarks.gpu.case import Cases, Timing
from swath.kernels.dispatch import OPERATORS

MODULES: tuple[Cases, ...] = (scan, attention, patches)


def check(only: str, device: torch.device, deadline: float) -> dict[str, Any]:
    """{name: error in units of the tolerance, or what went wrong, or "not reached"}."""
    found: dict[str, Any] = {}
    for module in MODULES:
        for one in module.checks(device):
            if only not in one.name:
                continue
            if time.monotonic() > deadline:
                found[one.name] = "not reached"
                continue
            try:
                found[one.name] = round(one.error(), 4)
            except Exception:  # every kernel is to be reported on, whatever another one does
                found[one.name] = traceback.format_exc(limit=-3)
            torch.cuda.empty_cache()
            print(f"{one.name:70} {found[one.name]}", flush=True)
    return found


def measure(one: Timing, seconds: float) -> dict[str, Any]:
    """Median microseconds and peak bytes of each way, and what they come to beside the floor, the target and each other."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    calls: dict[str, Callable[[], object]] = {}
    row: dict[str, Any] = {"us": {}, "peak_mib": {}, "failed": {}}
    for label, make in one.ways.items():
        try:
            call = make()
            call()  # compiles
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            torch.cuda.synchronize()
        except Exception:  # as above
            row["failed"][label] = traceback.format_exc(limit=-3)
            continue
        row["peak_mib"][label] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
        calls[label] = call
    times: dict[str, list[float]] = {label: [] for label in calls}
    end = time.monotonic() + seconds
    for number in range(200):
        if number >= 5 and time.monotonic() > end:
            break
        for label, call in calls.items():
            flush.zero_()
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times[label].append(1e3 * start.elapsed_time(stop))
    row["us"] = {label: round(statistics.median(found), 1) for label, found in times.items() if found}
    (ours, *_) = one.ways
    if ours in row["us"]:
        mine = row["us"][ours]
        if one.floor_us:
            row["times_the_floor"] = round(mine / one.floor_us, 2)
        if one.target_us:
            row["target_us"], row["reached"] = one.target_us, mine <= one.target_us
        row["faster_than"] = {label: round(us / mine, 2) for label, us in row["us"].items() if label != ours}
        row["asked"] = {"faster": one.ratios, "memory_at_most": one.memory}
        row["memory_of"] = {
            label: round(row["peak_mib"][ours] / peak, 2) for label, peak in row["peak_mib"].items() if label != ours and peak
        }
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--minutes", type=float, default=9)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.sh: torch sees no GPU here", file=sys.stderr)
        return 2
    started = time.monotonic()
    device = torch.device("cuda")
    import triton

    result: dict[str, Any] = {
        "command": " ".join(["benchmarks/gpu.sh", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]},
        "implementations": {name: operator.fastest("cuda") for name, operator in OPERATORS.items()},
        "unavailable": {name: operator.unavailable("cuda") for name, operator in OPERATORS.items()},
        "checks": {},
        "timings": {},
    }
    args.out.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        (args.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")

    result["checks"] = check(args.only, device, started + 60 * args.minutes * 0.6)
    save()
    cases = [one for module in MODULES for one in module.timings(device) if args.only in one.name]
    for number, one in enumerate(cases):
        left = started + 60 * args.minutes * 0.95 - time.monotonic()
        if left <= 0:
            result["timings"][one.name] = "not reached"
            continue
        result["timings"][one.name] = row = measure(one, min(5.0, left / (len(cases) - number) / 2))
        torch.cuda.empty_cache()
        print(f"{one.name}: {json.dumps({k: v for k, v in row.items() if v and k != 'asked'})}", flush=True)
        save()
    bad = [name for name, error in result["checks"].items() if not isinstance(error, float | int) or not error <= 1]
    lines = [f"{result['device']}, torch {torch.__version__}, triton {triton.__version__}"]
    lines += [f"check {name}: {error}" for name, error in result["checks"].items()]
    lines += [f"time {name}: {json.dumps(row)}" for name, row in result["timings"].items()]
    (args.out / "gpu.txt").write_text("\n".join(lines) + "\n")
    print(f"{len(result['checks']) - len(bad)} of {len(result['checks'])} checks passed; {args.out / 'gpu.json'}")
    for name in bad:
        print(f"FAILED {name}: {result['checks'][name]}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
