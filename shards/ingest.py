"""`swath shard`: imagery → tar shards, index, statistics and manifest (DESIGN §2.2), atomically and restartably.

Everything is built in a sibling folder `.<out>.partial` and appears in one rename. Samples lie in the order of the hash of
their key, so that a shard is not one class and shuffling inside windows mixes well.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from swath.shards import packer
from swath.shards.bands import InputContract, Normalisation
from swath.shards.draw import hash_text
from swath.shards.errors import InputError
from swath.shards.files import disk_errors, sync_folder
from swath.shards.index import Index, columns_of
from swath.shards.journal import FOLDER, building
from swath.shards.manifest import NAME, Manifest, read_manifest
from swath.shards.packer import Job, Limits, Packed, Packer
from swath.shards.sources.open import open_source
from swath.shards.sources.source import Options, Source
from swath.shards.sources.split import assign
from swath.shards.statistics import Statistics
from swath.shards.writer import flat_keys

_VERSION = 3  # of what is written for one plan; a change makes unfinished ingests start over
_log = logging.getLogger(__name__)


def shard(
    source: Path,
    out: Path,
    *,
    options: Options | None = None,
    recipe: str | None = None,
    split: Path | None = None,
    max_failed: float = 0.01,
    max_nodata: float = 0.5,
    shard_bytes: int = 256 << 20,
    progress: bool = True,
) -> dict[str, Manifest]:
    """Make shards of `source` in `out`; with splits one folder for each, keyed by its name, else the key is "".

    Splits are those of a split file, or those that a published data set comes with. `recipe` names its layout
    (shards/recipes); without one the kind of source is told from its files, as `options` say. Chips with more than `max_nodata` of their pixels invalid are left out. Files that cannot be decoded are listed
    in the manifest, and more than `max_failed` of all stop the run. A killed run continues when called again; a finished
    one is only checked. Raises InputError.
    """
    source, out = Path(source), Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow a link at `out`
    options = options or Options()
    _check_numbers(options, max_failed, max_nodata, shard_bytes)
    opened = open_source(source, options, recipe)
    jobs, classes, unlisted = _jobs(opened, split)
    said = {"recipe": recipe, **asdict(options), "shard_bytes": shard_bytes, "max_nodata": max_nodata}
    plan = _fingerprint(opened, jobs, classes, said)
    if (finished := _finished(out, plan, list(jobs))) is not None:
        return finished
    for note in (*opened.notes, *([f"{unlisted} chips are not in {split} and are left out"] if unlisted else [])):
        _log.info("%s", note)
    partial = out.with_name(f".{out.name}.partial")
    total = sum(len(part) for part in jobs.values())
    limits = Limits(shard_bytes, max_nodata, int(max_failed * total))
    made: dict[str, Packed] = {}
    failed: list[tuple[str, str]] = []
    with disk_errors("writing shards", out.parent), building(partial, plan):
        with _bar(total, progress) as bar:
            for name, part in jobs.items():
                journal = partial / FOLDER / (name or "all")
                made[name] = Packer(opened, classes, partial / name, journal, limits, failed, bar).run(part)
        manifests = {}
        for name, packed in made.items():
            if not packed.shards:
                raise InputError(
                    f"no samples are left{f' for split {name}' if name else ''}: {packed.left_out} are mostly nodata "
                    f"(--max-nodata {max_nodata}) and {len(packed.skipped)} cannot be decoded"
                )
            manifests[name] = _manifest(opened, classes, plan, {**said, "not_in_split": unlisted}, packed)
        for name, manifest in manifests.items():
            rows = made[name].rows
            columns = columns_of(list(opened.contracts))
            Index(rows.samples, rows.members, np.frombuffer(rows.keys, np.uint8), columns).write(partial / name)
            manifest.write(partial / name)
        shutil.rmtree(partial / FOLDER)
        if out.exists():
            out.rmdir()  # `_finished` has seen that it is empty
        partial.rename(out)
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


def _jobs(source: Source, split: Path | None) -> tuple[dict[str, list[Job]], tuple[str, ...], int]:
    """Per split the jobs in the order of the hash of their key; the classes; how many items the split file lacks."""
    keys = flat_keys([item.key for item in source.items])
    classes = source.classes
    if split is None:
        parts, unlisted = {}, 0
        rest = "rest" if any(item.split for item in source.items) else ""
        for key, item in zip(keys, source.items, strict=True):
            parts.setdefault(item.split or rest, []).append(Job(key, item, item.label, -1))
    else:
        rows = assign(split, source.items)
        parts = {}
        for key, item, row in zip(keys, source.items, rows, strict=True):
            if row is not None:
                parts.setdefault(row.split, []).append(Job(key, item, row.label or item.label, row.block))
        unlisted = sum(row is None for row in rows)
        given = {row.label for row in rows if row is not None and row.label}
        classes = classes if given <= set(classes) else tuple(sorted(given | set(classes)))
    for part in parts.values():
        part.sort(key=lambda job: (hash_text(source.dataset, job.key), job.key))
    return dict(sorted(parts.items())), classes, unlisted


def _manifest(source: Source, classes: tuple[str, ...], plan: str, options: dict[str, Any], packed: Packed) -> Manifest:
    return Manifest(
        dataset=source.dataset,
        samples=len(packed.rows.samples),
        contracts={
            name: contract_with(contract, packed.statistics[name], packed.sizes[name])
            for name, contract in source.contracts.items()
        },
        classes=classes,
        shards=tuple(packed.shards),
        skipped=tuple(packed.skipped),
        plan=plan,
        made_by="swath shard",
        source={"kind": source.kind, **options, "left_out_nodata": packed.left_out, "notes": list(source.notes)},
    )


def contract_with(contract: InputContract, statistics: Statistics, sizes: set[tuple[int, int]]) -> InputContract:
    """The contract with its normalisation filled in, and height and width where all samples have the same."""
    if not (statistics.count > 0).all():
        raise InputError(f"{contract.modality}: no valid pixels, so there are no statistics")
    rows = {name: tuple(float(x) for x in getattr(statistics, name)) for name in ("mean", "std", "minimum", "maximum")}
    normalisation = Normalisation(pixels=tuple(int(n) for n in statistics.count), **rows)
    height, width = next(iter(sizes)) if len(sizes) == 1 else (None, None)
    return contract.model_copy(update={"normalisation": normalisation, "height": height, "width": width})


def _fingerprint(source: Source, jobs: dict[str, list[Job]], classes: tuple[str, ...], options: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([_VERSION, packer.MAX_SAMPLES, source.fingerprint, classes, options]).encode())
    for contract in source.contracts.values():
        digest.update(contract.model_dump_json().encode())
    for name, part in jobs.items():
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


def _check_numbers(options: Options, max_failed: float, max_nodata: float, shard_bytes: int) -> None:
    for name, value in (("--chip", options.chip), ("--stride", options.stride), ("--shard-bytes", shard_bytes)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    for name, share in (("--max-failed", max_failed), ("--max-nodata", max_nodata)):
        if not 0 <= share <= 1:
            raise InputError(f"{name} is a share between 0 and 1, not {share}")
