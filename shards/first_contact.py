"""`swath init`: a first look at an archive, from a few of its files, as a recipe that a person confirms.

Every kind of source says itself what it understands of the files; here the evidence is gathered, decoded values are compared
with it, and what nobody can know is guessed and marked.
"""

import logging
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swath.shards.codec import DecodeError
from swath.shards.contact.archive_recipe import ArchiveRecipe, Entry, brief, read_archive_recipe, write_text
from swath.shards.contact.evidence import found, main, who_says
from swath.shards.contact.first_look import SECONDS, Look, counted, look, spread, understand
from swath.shards.errors import InputError
from swath.shards.files import disk_errors, write_bytes
from swath.shards.ingestion.plausibility import check
from swath.shards.ingestion.work import Seen
from swath.shards.sensors import SENSORS
from swath.shards.sources.cut import CHIP, WHOLE
from swath.shards.sources.scene import Stack
from swath.shards.sources.source import Options

RECIPE_FILES = (".yaml", ".yml")
_CHIPS = 24  # that are decoded
# hundreds of DN: no dark pixel of Sentinel-2, and hardly anything in B10, is so bright unless the offset is in
_HIGH = {"dark": 9, "B10": 8}
_ZEROS = 0.05  # share of pixels that are 0 in all bands, from which on they look like nodata
_log = logging.getLogger(__name__)


def first_contact(archive: Path, out: Path) -> tuple[ArchiveRecipe, list[str]]:
    """Write `out` about `archive`; returns what it says, and lines of warning. Raises InputError."""
    if out.suffix.lower() not in RECIPE_FILES:
        raise InputError(f"--out {out} must end in {' or '.join(RECIPE_FILES)}")
    if out.exists():
        raise InputError(f"{out} exists and may have been edited; remove it, or choose another --out")
    seen, options, told = understand(archive)
    values = _values(seen)
    entries = _entries(seen, options, told)
    if values is not None:
        entries = _Judge(seen, values, entries).judge()
    recipe = ArchiveRecipe(source=str(archive.absolute()), **entries)
    text = write_text(recipe, _head(archive, out, seen, values), main(seen).bands)
    with disk_errors("writing the recipe", out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(out, text.encode())
    return recipe, seen.warnings


def confirmed(path: Path, *, yes: bool = False) -> tuple[Path, str | None, Options]:
    """(source, layout, options) of the recipe at `path`, for `shard`.

    InputError while guesses in it are not confirmed, unless `yes`, and where files do not say any more what was found.
    """
    recipe = read_archive_recipe(path)
    if recipe.unconfirmed and not yes:
        listed = "".join(f"\n  {line}" for line in recipe.unconfirmed)
        raise InputError(
            f"{path} holds {len(recipe.unconfirmed)} guesses to confirm: write `confirm: true` for each, or --yes for all{listed}"
        )
    for line in recipe.unconfirmed:
        _log.info("taken as guessed: %s", line)
    expected = {name: entry.found for name, entry in recipe.entries.items() if not entry.given}
    if expected:
        now = found(look(Path(recipe.source), recipe.options, recipe.layout))
        differ = [
            f"\n  {name}: {brief(held)} was found, and now it is {brief(now[name])}"
            for name, held in expected.items()
            if name in now and now[name] != held
        ]
        if differ:
            raise InputError(
                f"{path} does not fit its values and {recipe.source}; write `value:` to overrule the files, or let "
                f"swath init look again{''.join(differ)}"
            )
    return Path(recipe.source), recipe.layout, recipe.options


def _entries(look: Look, options: Options, told: dict[str, str]) -> dict[str, Entry[Any]]:
    """What was found, each with who says so; what had to be guessed, as a value."""
    if look.published is not None:
        return {"recipe": Entry[Any](value=look.published, because=look.because, confirm=False)}
    held, said = found(look), who_says(look)
    made: dict[str, Entry[Any]] = {}
    for name in (name for name in ArchiveRecipe.model_fields if name in said):
        if name in told:
            made[name] = Entry[Any](value=getattr(options, name), because=told[name], confirm=False)
        else:
            made[name] = Entry[Any](found=held[name], because=said[name].because, confirm=said[name].certain)
    return made | (_cut(look) if look.scenes else {})


def _cut(look: Look) -> dict[str, Entry[Any]]:
    """How scenes become chips: nothing to confirm, but to be seen and changed."""
    grids = [stack.grid for stack in look.stacks]
    sizes = counted(Counter(f"{g.width}×{g.height}" for g in grids))
    if all(max(g.height, g.width) <= WHOLE for g in grids):
        return {"chip": Entry[Any](value=None, because=f"files are small ({sizes} px): each is a chip, as it is")}
    chips = round(len(look.source.items) / len(grids) * look.units)
    return {
        "chip": Entry[Any](value=CHIP, because=f"pixels; scenes of {sizes} px give about {chips} such chips"),
        "stride": Entry[Any](value=CHIP, because="pixels from chip to chip; where it is smaller than chip, they overlap"),
    }


@dataclass
class Values:
    """What some decoded chips show: statistics of all, and by modality the shares of pixels that are 0 in all bands."""

    seen: Seen
    chips: int
    zeros: dict[str, float]
    sizes: Counter[str]
    times: list[str]


def _values(look: Look) -> Values | None:
    """Decode a few chips, evenly over the archive. None where not one can be."""
    source = look.source
    made = Values(Seen(source.contracts), 0, {}, Counter(), [])
    zeros: Counter[str] = Counter()
    pixels: Counter[str] = Counter()
    bad: list[str] = []
    other: list[str] = []
    started = time.monotonic()
    for item in spread(source.items, _CHIPS):
        if time.monotonic() - started > SECONDS:
            break
        try:
            sample = source.read(item)
        except DecodeError as error:
            bad.append(f"{item.lookup}: {error}")
            continue
        except InputError as error:
            other.append(str(error))
            continue
        made.chips += 1
        for name, part in sample.parts.items():
            made.seen.add(name, part.pixels, part.valid, part.scale, part.add)
            bands = part.pixels.reshape(-1, len(source.contracts[name].bands), *part.pixels.shape[1:])
            zeros[name] += int((bands == 0).all(axis=1).sum())
            pixels[name] += bands[:, 0].size
        main = next(iter(sample.parts.values()), None)
        if main is not None:
            made.sizes[f"{main.pixels.shape[2]}×{main.pixels.shape[1]}"] += 1
        if isinstance(moment := sample.meta.get("time"), str):
            made.times.append(moment)
    tried = made.chips + len(bad) + len(other)
    look.warnings += [f"{len(bad)} of {tried} that were decoded are damaged: {bad[0]}"] if bad else []
    look.warnings += [f"{len(other)} of {tried} that were decoded are of another kind: {other[0]}"] if other else []
    made.zeros = {name: zeros[name] / pixels[name] for name in pixels if pixels[name]}
    return made if made.chips else None


class _Judge:
    """Compares the entries with decoded values: evidence is added, and what they contradict becomes a guess and a warning."""

    def __init__(self, look: Look, values: Values, entries: dict[str, Entry[Any]]) -> None:
        self.look, self.values, self.entries, self.contract = look, values, dict(entries), main(look)

    def judge(self) -> dict[str, Entry[Any]]:
        if self.look.published is None and self.values.seen.statistics[self.contract.modality].count.any():
            self._compare()
        doubted = any(name in self.entries and self.entries[name].given for name in ("scale", "add"))
        for name, contract in self.look.source.contracts.items():
            if self.values.seen.statistics[name].count.any():
                findings = check(contract, self.values.seen.statistics[name], self.values.seen.levels[name])
                answered = doubted and name == self.contract.modality
                self.look.warnings += [f.text for f in findings if not (answered and f.severity == "stop")]
        return self.entries

    def _add(self, name: str, words: str) -> None:
        if name in self.entries and not self.entries[name].confirm:
            entry = self.entries[name]
            self.entries[name] = entry.model_copy(update={"because": f"{entry.because}; {words}"})

    def _guess(self, name: str, value: float, words: str) -> None:
        self.entries[name] = Entry[Any](value=value, because=words, confirm=False)
        self.look.warnings.append(f"{name}: {words}; taken as {value:.6g}")

    def _compare(self) -> None:
        low, middle, high = self.values.seen.statistics[self.contract.modality].percentiles([1, 50, 99])
        self._add("unit", f"values lie from {np.nanmin(low):.4g} to {np.nanmax(high):.4g}")
        zeros = self.values.zeros.get(self.contract.modality, 0.0)
        empty = f"{zeros:.0%} of the pixels of {self.values.chips} chips are 0 in all bands"
        if self.contract.nodata is not None:
            self._add("nodata", empty)
        elif zeros >= _ZEROS:
            self._guess("nodata", 0.0, f"no file declares one, and {empty}")
        known = SENSORS.get(self.contract.sensor)
        if not self.look.scenes or known is None or self.contract.unit != "reflectance" or known.unit != "reflectance":
            return
        stack = self.look.stacks[0]
        scale = 1.0 if stack.scale is None else stack.scale
        if not stack.said.startswith("file") and stack.dtype == "uint16" and np.nanmax(middle) > 2:
            stored = (np.nanmax(middle) - stack.add) / scale
            words = f"half of a band lies above DN {stored:.0f}, too bright for the usual {1 / scale:.6g}"
            self._guess("scale", 1 / 65535, words)
            return
        if not np.isclose(scale, known.scale):
            usual = f"{known.name}'s are customarily · {1 / known.scale:.6g}"
            self.look.warnings.append(f"scale: DN are taken as reflectance · {1 / scale:.6g}, and {usual}")
        self._offset(stack)

    def _offset(self, stack: Stack) -> None:
        """Whether chips that claim no offset are nowhere dark."""
        levels = self.values.seen.levels[self.contract.modality].seen
        steps = [(kind, step, count) for (add, kind, step), count in levels.items() if add == 0]
        total, bright = sum(n for _, _, n in steps), sum(n for kind, step, n in steps if step >= _HIGH[kind])
        cirrus = any(kind == "B10" for kind, _, _ in steps)
        what = f"the median of B10 lies at {_HIGH['B10'] * 100}" if cirrus else f"the darkest 1 % lie at {_HIGH['dark'] * 100}"
        words = f"{what} DN or more in {bright} of {total} chips"
        if total and bright > 0.9 * total and not stack.said.startswith("file metadata"):
            self._guess("add", -0.1, f"{words}: Sentinel-2's offset of 1000 DN seems to be in, and no file says so")
        elif total:
            self._add("add", words)


def _head(archive: Path, out: Path, look: Look, values: Values | None) -> list[str]:
    """Comments: how to read the file, what is there, and what is odd."""
    lines = [
        f"What swath understands of {archive}. Look it over, then:  swath shard {out} --out shards",
        "",
        "  value    what this file says; it wins over the files",
        "  found    what swath reads from each file by itself; to overrule it, write `value:` in its place",
        "  confirm  false is a guess, and swath shard waits: write true, or delete the mark",
        "",
        f"{look.units} {'scenes' if look.scenes else 'samples'} ({look.kind}); "
        + (f"{look.opened} opened, " if look.scenes else "")
        + (f"{values.chips} chips decoded" if values else "not one chip can be decoded"),
    ]
    times = {s.time for s in look.scenes if s.time} | set(values.times if values else [])
    if look.scenes:
        grids = [s.stacks[0].grid for s in look.scenes]
        lines.append(f"  size   {counted(Counter(f'{g.width}×{g.height}' for g in grids))} px")
        lines.append(f"  CRS    {counted(Counter('none' if g.crs is None else g.crs.to_string() for g in grids))}")
    elif values is not None:
        lines.append(f"  size   {counted(values.sizes)} px")
    if times:
        lines.append(f"  dates  {min(times)[:10]} to {max(times)[:10]}")
    if look.source.classes:
        listed = look.source.classes
        lines.append(f"  labels {len(listed)}: {', '.join(listed[:12])}{' …' if len(listed) > 12 else ''}")
    contracts = list(look.source.contracts.values())
    for contract in contracts if look.published else contracts[1:]:
        beside = "" if look.published else "beside it "
        lines.append(
            f"  {beside}{contract.modality}: {', '.join(contract.names[:16])}{' …' if len(contract.names) > 16 else ''} "
            f"({contract.dtype}, {contract.unit}, {contract.sensor} {contract.level})"
        )
    return lines + (["", *(f"! {line}" for line in look.warnings)] if look.warnings else [])
