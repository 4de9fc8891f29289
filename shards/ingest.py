"""`swath shard`: imagery → tar shards, index, statistics and manifest (DESIGN §2.2), atomically and restartably.

Everything is built in a sibling folder `.<out>.partial` and appears in one rename. Samples lie in the order of the hash of
their key, so that a shard is not one class and shuffling inside windows mixes well; chips of one part of a scene stay together,
since decoding a tile of JPEG 2000 for each of them would take days.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from swath.shards.bands import InputContract, Normalisation
from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.files import disk_errors, sync_folder
from swath.shards.identity import hash_text
from swath.shards.index import Index, columns_of
from swath.shards.ingestion import packer
from swath.shards.ingestion.blocks import assign_blocks
from swath.shards.ingestion.journal import FOLDER, Unfinished, building
from swath.shards.ingestion.packer import Limits, Packed, Packer, chunk_length
from swath.shards.ingestion.plausibility import Finding, check
from swath.shards.ingestion.quality import Duplicates, LeftOut
from swath.shards.ingestion.selection import Selection, drawn, select
from swath.shards.ingestion.work import Job, Rules, Seen
from swath.shards.ingestion.workers import Opening, Workers
from swath.shards.manifest import NAME, BandStatistics, Manifest, read_manifest
from swath.shards.recipes import registry
from swath.shards.sources.mirror import Mirror, located
from swath.shards.sources.open import open_source
from swath.shards.sources.source import Options, Source, maps_of
from swath.shards.sources.split import assign
from swath.shards.statistics import Statistics
from swath.shards.writer import Rows, flat_keys

_LOOKS = 16  # chips that are tried to learn the size of one
_VERSION = 4  # of what is written for one plan; a change makes unfinished ingests start over
_PERCENTILES = (1, 2, 5, 25, 50, 75, 95, 98, 99)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blocks:
    """Splits by spatial block: {name: fraction}, the side of a block, and how far apart splits must lie, from centre to centre.

    Without `buffer_km` it is the diagonal of a chip: neighbours do not come into different splits.
    """

    fractions: dict[str, float]
    block_km: float = 50.0
    buffer_km: float | None = None


@dataclass
class Plan:
    """What is to be done, before anything is decoded: per split the jobs in the order of the hash of their key."""

    source: Source
    jobs: dict[str, list[Job]]
    classes: tuple[str, ...]
    left_out: LeftOut
    blocks: Blocks | None = None

    @property
    def total(self) -> int:
        return sum(len(part) for part in self.jobs.values())


def plan_of(
    source: Path | Mirror, options: Options, recipe: str | None, split: Path | Blocks | None, selection: Selection
) -> Plan:
    """Open `source` and choose. Splits are those of a split file, of spatial blocks, or those that a published data set comes
    with. Raises InputError, also where nothing is left."""
    opened = open_source(source, options, recipe)
    left_out = LeftOut()
    items, classes = opened.items, opened.classes
    rest = "rest" if any(item.split for item in items) and split is None else ""
    jobs = [
        Job(number, item, key, ("" if split is not None else item.split) or rest, item.label)
        for number, (item, key) in enumerate(zip(items, flat_keys([item.key for item in items]), strict=True))
    ]
    if isinstance(split, Path):
        rows, listed = assign(split, items), []
        for job, row in zip(jobs, rows, strict=True):
            if row is None:
                left_out.add(f"not in {split}", job.item.key)
            else:
                listed.append(replace(job, split=row.split, label=row.label or job.label, block=row.block))
        jobs, given = listed, {row.label for row in rows if row is not None and row.label}
        classes = classes if given <= set(classes) else tuple(sorted(given | set(classes)))
    jobs = select(jobs, opened.dataset, selection, left_out)
    blocks = split if isinstance(split, Blocks) else None
    if blocks is not None and jobs:
        buffer_km = _diagonal_km(opened, jobs) if blocks.buffer_km is None else blocks.buffer_km
        blocks = replace(blocks, buffer_km=buffer_km)
        made = assign_blocks([job.item for job in jobs], blocks.fractions, block_km=blocks.block_km, buffer_km=buffer_km)
        left_out.merge(made.left_out)
        pairs = zip(jobs, made.rows, strict=True)
        jobs = [replace(job, split=row.split, block=row.block) for job, row in pairs if row is not None]
    jobs = drawn(jobs, opened.dataset, selection, left_out)
    if not jobs:
        raise InputError(f"no sample of {source} is left: {'; '.join(told(left_out))}")
    jobs.sort(key=lambda job: (hash_text(opened.dataset, job.item.near or job.key), hash_text(opened.dataset, job.key), job.key))
    names = sorted({job.split for job in jobs})
    if odd := next((name for name in names if name and not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name)), None):
        raise InputError(f"{source} has a split {odd!r}, which is no name of a folder; letters, digits, '_' and '-' are")
    return Plan(opened, {name: [job for job in jobs if job.split == name] for name in names}, classes, left_out, blocks)


def _diagonal_km(source: Source, jobs: list[Job]) -> float:
    """Of the first chip that can be decoded, corner to corner, and a hundredth more for rounding."""
    for job in jobs[:_LOOKS]:
        try:
            sample = source.read(job.item)
        except DecodeError:
            continue
        for name, part in sample.parts.items():
            gsd_m = sample.meta.get("gsd_m") or source.contracts[name].gsd_m
            if gsd_m:
                return 1.01 * math.hypot(*part.pixels.shape[1:]) * float(gsd_m) / 1000
    raise InputError("the ground that a chip covers cannot be told, so not how far apart splits must lie; give --buffer-km")


def shard(
    source: Path | str | Mirror,
    out: Path,
    *,
    options: Options | None = None,
    recipe: str | None = None,
    split: Path | Blocks | None = None,
    selection: Selection | None = None,
    max_failed: float = 0.01,
    max_nodata: float = 0.5,
    shard_bytes: int = 256 << 20,
    workers: int = 0,
    implausible_ok: bool = False,
    licence: str | None = None,
    progress: bool = True,
) -> dict[str, Manifest]:
    """Make shards of `source` in `out`; with splits one folder for each, keyed by its name, else the key is "".

    `source` is a path or an address (s3://, gs://, https://); `located` makes a copy of the latter elsewhere than usual.
    `recipe` names the layout of a published data set (shards/recipes); without one the kind of source is told from its files,
    as `options` say. Samples with more than `max_nodata` of their pixels invalid are left out. Files that cannot be decoded are
    listed in the manifest, and more than `max_failed` of all stop the run. `workers` processes decode (0: this one; a program
    that asks for more needs the usual `if __name__ == "__main__"`); the result is the same to the byte. Numbers that cannot be
    what they are said to be stop the run, unless `implausible_ok`. `licence` is the imagery's (the recipe's). A killed or stopped
    run continues when called again; a finished one is only checked. Raises InputError.
    """
    source, out = located(source), Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow a link at `out`
    options, selection = options or Options(), selection or Selection()
    check_numbers(options, max_failed=max_failed, max_nodata=max_nodata, shard_bytes=shard_bytes, workers=workers)
    plan = plan_of(source, options, recipe, split, selection)
    blocks = {"blocks": asdict(plan.blocks)} if plan.blocks is not None else {}
    said = {
        "recipe": recipe, **asdict(options), "selection": asdict(selection), **blocks,
        "shard_bytes": shard_bytes, "max_nodata": max_nodata, **({} if licence is None else {"licence": licence}),
    }  # fmt: skip
    mark = _fingerprint(plan, said)
    if (finished := _finished(out, mark, list(plan.jobs))) is not None:
        return finished
    opened = plan.source
    for note in (*opened.notes, *told(plan.left_out)):
        _log.info("%s", note)
    unfinished = out.with_name(f".{out.name}.partial")
    limits = Limits(shard_bytes, int(max_failed * plan.total))
    opening = Opening(source, options, recipe, opened.fingerprint)
    rules = Rules(max_nodata, selection.max_cloud, selection.drop_duplicates)
    given = [name for name in ("scale", "add", "unit") if getattr(options, name) is not None]
    look = partial(_look, given=given, implausible_ok=implausible_ok)
    made: dict[str, Packed] = {}
    failed: list[tuple[str, str]] = []
    duplicates = Duplicates() if selection.drop_duplicates else None
    with disk_errors("writing shards", out.parent), building(unfinished, mark):
        with _bar(plan.total, progress) as bar, Workers(workers, opening, opened, rules) as crew:
            for name, jobs in plan.jobs.items():
                journal = unfinished / FOLDER / (name or "all")
                length = chunk_length(opened, len(jobs), options.chip)
                made[name] = Packer(
                    opened, plan.classes, unfinished / name, journal, limits, length, crew.run, failed, duplicates, bar
                ).run(jobs, look)
        seen = Seen(opened.contracts)
        for name, packed in made.items():
            if not packed.shards:
                raise InputError(
                    f"no samples are left{f' for split {name}' if name else ''}: {len(packed.skipped)} cannot be decoded"
                    + "".join(f"; {line}" for line in told(packed.left_out))
                )
            seen.merge(packed.seen)
        if not any(statistics.count.any() for statistics in seen.statistics.values()):
            raise InputError(f"{source}: no valid pixels, so there are no statistics; --nodata says which value is none")
        findings = look(seen)
        for line in (*(f.text for f in findings), *_absent(made)):
            _log.warning("%s", line)
        for packed in made.values():
            for line in told(packed.left_out):
                _log.info("%s", line)
        manifests = {name: _manifest(plan, mark, said, packed, findings) for name, packed in made.items()}
        for name, manifest in manifests.items():
            rows = Rows.join(made[name].rows)
            columns = columns_of(list(opened.contracts), maps_of(opened))
            index = Index(rows.samples, rows.members, np.frombuffer(rows.keys, np.uint8), columns)
            manifests[name] = manifest.model_copy(update={"files": index.write(unfinished / name)})
            manifests[name].write(unfinished / name)
        shutil.rmtree(unfinished / FOLDER)
        if out.exists():
            out.rmdir()  # `_finished` has seen that it is empty
        unfinished.rename(out)
        sync_folder(out.parent)
    return manifests


def _bar(total: int, shown: bool) -> "tqdm[NoReturn]":
    """A progress bar; where stderr is a file, a line every half minute."""
    if sys.stderr.isatty():
        return tqdm(total=total, unit="chip", desc="swath shard", disable=not shown)
    line = "{desc}: {n_fmt} of {total_fmt} chips, {rate_fmt}, {remaining} left\n"
    return tqdm(
        total=total, unit="chip", desc="swath shard", disable=not shown,
        mininterval=30, maxinterval=30, delay=30, bar_format=line,
    )  # fmt: skip


def _look(seen: Seen, given: list[str], implausible_ok: bool) -> list[Finding]:
    """What is odd in the modalities that have pixels; Unfinished where it must not go on."""
    findings = [
        finding
        for name, contract in seen.contracts.items()
        if seen.statistics[name].count.any()
        for finding in check(contract, seen.statistics[name], seen.levels[name], given)
    ]
    stops = [finding.text for finding in findings if finding.severity == "stop"]
    if stops and not implausible_ok:
        raise Unfinished(f"{'; '.join(stops)}; --implausible-ok goes on regardless")
    return findings


def _absent(made: dict[str, Packed]) -> list[str]:
    """Lines on modalities that a split has no valid pixel of."""
    return [
        f"{name}: no valid pixel{f' in split {split}' if split else ''}, so it has no normalisation there"
        for split, packed in made.items()
        for name, statistics in packed.seen.statistics.items()
        if not statistics.count.any()
    ]


def told(left_out: LeftOut) -> list[str]:
    """Lines on what is not taken, and why."""
    return [
        f"{entry['samples']} chips left out: {reason} (such as {', '.join(entry['examples'][:2])})"
        for reason, entry in left_out.state().items()
    ]


def _manifest(plan: Plan, mark: str, said: dict[str, Any], packed: Packed, findings: list[Finding]) -> Manifest:
    source, seen = plan.source, packed.seen
    left_out = LeftOut()
    for part in (plan.left_out, packed.left_out):
        left_out.merge(part)
    return Manifest(
        dataset=source.dataset,
        licence=_licence(said),
        samples=sum(made.samples for made in packed.shards),
        contracts={
            name: contract_with(contract, seen.statistics[name], packed.sizes[name])
            for name, contract in source.contracts.items()
        },
        statistics={name: _spread(statistics) for name, statistics in seen.statistics.items() if statistics.pixels.any()},
        classes=plan.classes,
        maps=maps_of(source),
        shards=tuple(packed.shards),
        skipped=tuple(packed.skipped),
        plan=mark,
        made_by="swath shard",
        source={
            "kind": source.kind, **said, "left_out": left_out.state(), "notes": list(source.notes),
            "findings": [asdict(finding) for finding in findings],
        },
    )  # fmt: skip


def _licence(said: dict[str, Any]) -> str:
    """Of the imagery: as the user says, or the published data set's. Of a partner that is joined, only the user can say it."""
    if "licence" in said:
        return said["licence"]
    own = registry.find(said["recipe"]).licence if said["recipe"] is not None else ""
    own = "" if own in ("none stated", "that of your data") else own
    return f"{own}; of its partner not stated" if own and "other" in (said["join"] or {}) else own


def _spread(statistics: Statistics) -> BandStatistics:
    rows = statistics.percentiles(_PERCENTILES)
    return BandStatistics(
        percentiles={
            str(q): tuple(None if np.isnan(x) else float(x) for x in row) for q, row in zip(_PERCENTILES, rows, strict=True)
        },
        nodata_share=tuple(float(x) for x in statistics.nodata_share),
    )


def contract_with(contract: InputContract, statistics: Statistics, sizes: set[tuple[int, int]]) -> InputContract:
    """The contract with its normalisation filled in, and height and width where all samples have the same.

    A band without a valid pixel has 0 everywhere in its normalisation, and says so by its `pixels`.
    """
    some = statistics.count > 0
    mean, std, minimum, maximum = (
        tuple(float(x) for x in np.where(some, getattr(statistics, name), 0.0)) for name in ("mean", "std", "minimum", "maximum")
    )
    pixels = tuple(int(n) for n in statistics.count)
    normalisation = Normalisation(pixels=pixels, mean=mean, std=std, minimum=minimum, maximum=maximum)
    height, width = next(iter(sizes)) if len(sizes) == 1 else (None, None)
    return contract.model_copy(update={"normalisation": normalisation, "height": height, "width": width})


def _fingerprint(plan: Plan, said: dict[str, Any]) -> str:
    source = plan.source
    head = [_VERSION, packer.MAX_SAMPLES, source.fingerprint, plan.classes, said, plan.left_out.state()]
    digest = hashlib.sha256(json.dumps(head).encode())
    for contract in source.contracts.values():
        digest.update(contract.model_dump_json().encode())
    for name, label_map in maps_of(source).items():
        digest.update(repr((name, label_map)).encode())
    for name, part in plan.jobs.items():
        for job in part:
            digest.update(repr((name, job.key, job.label, job.block)).encode())
    return digest.hexdigest()


def _finished(out: Path, plan: str, names: list[str]) -> dict[str, Manifest] | None:
    """The manifests if `out` is already what would be made, None if it is free; else InputError."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if out.is_dir() and all((out / name / NAME).exists() for name in names):
        manifests = {name: read_manifest(out / name) for name in names}
        if all(manifest.plan == plan for manifest in manifests.values()):
            return manifests
    raise InputError(f"{out} exists and was not made by this command; remove it or choose another --out")


def check_numbers(options: Options, *, max_failed: float, max_nodata: float, shard_bytes: int, workers: int) -> None:
    """InputError for what is out of range."""
    for name, value in (("--chip", options.chip), ("--stride", options.stride), ("--shard-bytes", shard_bytes)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    if workers < 0:
        raise InputError(f"--workers must be at least 0, not {workers}")
    for name, share in (("--max-failed", max_failed), ("--max-nodata", max_nodata)):
        if not 0 <= share <= 1:
            raise InputError(f"{name} is a share between 0 and 1, not {share}")
