"""`swath shard --dry-run`: what an ingest would take, from the plan and from a few real chips. Nothing is written."""

import tarfile
import time
from pathlib import Path

from swath.shards.ingest import Blocks, check_numbers, plan_of, told
from swath.shards.ingestion.packer import MAX_SAMPLES
from swath.shards.ingestion.quality import LeftOut
from swath.shards.ingestion.selection import Selection
from swath.shards.ingestion.work import Rules, make
from swath.shards.sources.mirror import Mirror
from swath.shards.sources.source import Options

_CHIPS, _SECONDS = 32, 5.0  # that are tried, at most


def estimate(
    source: Path | Mirror,
    *,
    options: Options | None = None,
    recipe: str | None = None,
    split: Path | Blocks | None = None,
    selection: Selection | None = None,
    max_failed: float = 0.01,
    max_nodata: float = 0.5,
    shard_bytes: int = 256 << 20,
    workers: int = 0,
) -> str:
    """Lines for a person: chips by split, what is left out, bytes and hours. Arguments and errors are those of `shard`."""
    options, selection = options or Options(), selection or Selection()
    check_numbers(options, max_failed=max_failed, max_nodata=max_nodata, shard_bytes=shard_bytes, workers=workers)
    plan = plan_of(source, options, recipe, split, selection)
    jobs = [job for part in plan.jobs.values() for job in part]
    rules = Rules(max_nodata, selection.max_cloud, selection.drop_duplicates)
    tried = kept = failed = size = 0
    lost = LeftOut()
    begun = time.perf_counter()
    for job in jobs[:: max(1, len(jobs) // _CHIPS)][:_CHIPS]:
        (made,) = make(plan.source, [job], rules).made
        tried += 1
        failed += made.failure is not None
        if made.left_out is not None:
            lost.add(made.left_out, job.item.key)
        if made.members:
            kept += 1
            size += sum(tarfile.BLOCKSIZE + len(one.data) + -len(one.data) % tarfile.BLOCKSIZE for one in made.members)
        if time.perf_counter() - begun > _SECONDS:
            break
    each = (time.perf_counter() - begun) / tried
    total, chip = round(len(jobs) * size / tried), size / max(1, kept)
    shards = max(1, -(-total // shard_bytes), -(-len(jobs) // MAX_SAMPLES))
    hours = len(jobs) * each / max(1, workers) / 3600
    return "\n".join(
        [
            *plan.source.notes,
            *(f"{name or 'chips'}: {len(part)}" for name, part in plan.jobs.items()),
            *told(plan.left_out),
            f"tried {tried}: {kept} kept, {failed} not decodable" + "".join(f", {n} {why}" for why, n in lost.counts.items()),
            f"about {_bytes(total)} in {shards} shards or more, {_bytes(chip)} a chip",
            f"about {hours:.2g} hours at {each * 1e3:.2g} ms a chip" + (f" on {workers} workers" if workers > 1 else ""),
        ]
    )


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
