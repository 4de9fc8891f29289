"""One chunk of an ingest: read, check, encode and count some jobs. A pure function of them, so any process may do it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from swath.shards.bands import InputContract
from swath.shards.codec import DecodeError, decode, encode_npy
from swath.shards.index import VALID
from swath.shards.ingestion.plausibility import Levels
from swath.shards.ingestion.quality import digest, unfit
from swath.shards.sources.source import Item, Sample, Source
from swath.shards.statistics import Statistics
from swath.shards.writer import Member, Place


@dataclass(frozen=True)
class Job:
    """One sample to write: the number of its item in the source, its key in the shard, its split, label and block."""

    number: int
    item: Item
    key: str
    split: str
    label: str | None
    block: int = -1


@dataclass(frozen=True)
class Rules:
    """What share of a sample may be nodata, and cloud; whether samples with the same pixels are looked for."""

    max_nodata: float
    max_cloud: float
    drop_duplicates: bool


class Seen:
    """Statistics and levels by modality, of all samples taken in."""

    def __init__(self, contracts: Mapping[str, InputContract]) -> None:
        self.contracts = contracts
        self.statistics = {name: Statistics(len(contract.bands)) for name, contract in contracts.items()}
        self.levels = {name: Levels(contract) for name, contract in contracts.items()}

    def add(self, name: str, pixels: np.ndarray, valid: np.ndarray | None, scale: float, add: float) -> None:
        """Take in one part as stored."""
        self.statistics[name].add(pixels, valid, scale=scale, add=add, nodata=self.contracts[name].nodata)
        self.levels[name].add(pixels, valid, scale, add)

    def merge(self, other: "Seen") -> None:
        for name in self.contracts:
            self.statistics[name].merge(other.statistics[name])
            self.levels[name].merge(other.levels[name])

    def state(self) -> dict[str, Any]:
        """JSON without loss."""
        return {name: [self.statistics[name].state(), self.levels[name].state()] for name in self.contracts}

    def restore(self, state: dict[str, Any]) -> "Seen":
        """Take what `state` of the same contracts gave; KeyError, TypeError or ValueError where it is not one."""
        for name in self.contracts:
            statistics, levels = state[name]
            self.statistics[name] = Statistics.from_state(statistics)
            self.levels[name].restore(levels)
        return self


@dataclass
class Made:
    """What one job came to: `members` to write; without any, why it is left out, or why it cannot be decoded (`failure`)."""

    members: list[Member] = field(default_factory=list)
    label: str | None = None
    place: Place = Place()  # noqa: RUF009 - frozen
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    digest: bytes = b""
    left_out: str | None = None
    failure: str | None = None


@dataclass
class Chunk:
    """What its jobs came to, in their order, and what was seen in those that have members."""

    made: list[Made]
    seen: Seen


def make(source: Source, jobs: Sequence[Job], rules: Rules) -> Chunk:
    """Read and encode `jobs`. InputError: one is of another kind than the rest of the source."""
    seen = Seen(source.contracts)
    return Chunk([_make(source, job, rules, seen) for job in jobs], seen)


def _make(source: Source, job: Job, rules: Rules, seen: Seen) -> Made:
    try:
        sample = source.read(job.item)
    except DecodeError as error:
        return Made(failure=str(error))
    if (reason := unfit(sample, rules.max_nodata, rules.max_cloud)) is not None:
        return Made(left_out=reason)
    for name, part in sample.parts.items():
        seen.add(name, part.pixels, part.valid, part.scale, part.add)
    label = job.label if job.label is not None else sample.label
    return Made(
        _members(source, job, sample, label), label, Place.of(sample.meta),
        {name: (part.pixels.shape[1], part.pixels.shape[2]) for name, part in sample.parts.items()},
        digest(sample) if rules.drop_duplicates else b"",
    )  # fmt: skip


def _members(source: Source, job: Job, sample: Sample, label: str | None) -> list[Member]:
    radiometry = {
        name: {"scale": part.scale, "add": part.add, "scale_source": part.scale_source} for name, part in sample.parts.items()
    }
    meta = {"key": job.item.key, "dataset": source.dataset, "label": label, "radiometry": radiometry}
    meta |= sample.meta | ({"block": job.block} if job.block >= 0 else {})
    members = []
    for name in source.contracts:
        if (part := sample.parts.get(name)) is None:
            continue
        data = encode_npy(part.pixels) if part.data is None else part.data
        members.append(Member(f"{name}.{part.extension}", name, data, part.scale, part.add))
        if part.valid is not None and (part.valid != 1).any():
            members.append(Member(f"{name}{VALID}.npy", name + VALID, encode_npy(part.valid)))
    members += [Member(f"{name}.npy", name, encode_npy(labels)) for name, labels in sample.maps.items()]
    members.append(Member("json", "json", json.dumps(meta, sort_keys=True, allow_nan=False).encode()))
    return members


def seen_again(contracts: Mapping[str, InputContract], made: Sequence[Made]) -> Seen:
    """What was seen in some of a chunk's samples, from what is written of them."""
    seen = Seen(contracts)
    for one in made:
        members = {member.column: member for member in one.members}
        for name in contracts:
            if (member := members.get(name)) is not None:
                mask = members.get(name + VALID)
                valid = None if mask is None else _mask(mask.data)
                pixels = decode(member.data, member.suffix.rpartition(".")[2])
                seen.add(name, pixels, valid, member.scale, member.add)
    return seen


def _mask(data: bytes) -> np.ndarray:
    """(H, W), of a series (dates, H, W)."""
    codes = decode(data, "npy")
    return codes[0] if len(codes) == 1 else codes
