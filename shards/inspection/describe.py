"""What a folder of shards holds, in words: a line for each thing a person would ask about."""

from collections import Counter
from typing import Any

import numpy as np

from swath.shards.bands import InputContract
from swath.shards.inspection.sheet import day, sample_json
from swath.shards.inspection.survey import Stored, Survey
from swath.shards.manifest import NAME, BandStatistics, Manifest
from swath.shards.reader import ShardReader

_LISTED, _SHARDS, _CLASSES, _BANDS = 10, 12, 60, 40  # lines of what was left out, of shards, of classes, of bands
_JSON = 10_000  # samples whose JSON is looked at for labels


def describe(reader: ShardReader, found: Survey) -> list[str]:
    """Lines on samples, modalities, radiometry, classes, shards and on how they were made. Texts are as the manifest has them."""
    manifest = reader.manifest
    lines = [f"{manifest.dataset}: {manifest.samples} samples"]
    lines += _places(found, len(reader))
    for name, contract in reader.contracts.items():
        lines += ["", *_modality(contract, found.stored[name], manifest.statistics.get(name), len(reader))]
        lines += _radiometry(reader, name, found.stored[name])
    return [*lines, "", *_labels(reader, found), *_shards(manifest), *_source(manifest)]


def _places(found: Survey, samples: int) -> list[str]:
    """When, how fine and where, each with how many samples tell it."""
    lines = []
    for name, extent, words in (
        ("time", found.time, lambda e: f"{day(e.low)} to {day(e.high)}"),
        ("GSD", found.gsd_m, lambda e: f"{e.low:g} m" if e.low == e.high else f"{e.low:g} to {e.high:g} m"),
    ):
        lines.append(f"{name}: {words(extent)}, {_of(extent.count, samples)}" if extent.count else f"{name}: not known")
    if found.lat.count:
        (west, east), lat = found.longitudes, found.lat
        over = " across the date line" if east > 180 else ""
        span = f"{lat.low:.4f} to {lat.high:.4f} °N, {_east(west):.4f} to {_east(east):.4f} °E"
        lines.append(f"place: {span}{over}, {_of(lat.count, samples)}")
    else:
        lines.append("place: not known")
    lines += [f"place: {found.off_globe} samples have a position that is not on the globe"] * bool(found.off_globe)
    return lines


def _east(lon: float) -> float:
    return lon - 360 if lon > 180 else lon


def _of(count: int, samples: int) -> str:
    return "all samples" if count == samples else f"{count} of {samples} samples"


def _modality(contract: InputContract, stored: Stored, spread: BandStatistics | None, samples: int) -> list[str]:
    """A modality's head line and its table of bands."""
    size = f"{contract.height}×{contract.width}" if contract.height else "of several sizes"
    dates = f", {contract.dates} dates" if contract.dates > 1 else ""
    masks = f", {stored.masked} of them with masks" if stored.masked else ""
    gsd = f", {contract.gsd_m:g} m per pixel" if contract.gsd_m else ""
    gsd += f" ({contract.resampling})" if contract.gsd_m and contract.resampling else ""
    part = "" if stored.samples == samples else f" of {samples}"
    norm, names = contract.normalisation, ("1", "50", "99")
    columns: dict[str, tuple[float | None, ...]] = {
        "mean": norm.mean, "std": norm.std, "min": norm.minimum,
        **{f"{n} %": (spread.percentiles.get(n, ()) if spread else ()) for n in names},
        "max": norm.maximum, "nodata %": tuple(100 * share for share in spread.nodata_share) if spread else (),
    }  # fmt: skip
    columns = {name: values for name, values in columns.items() if len(values) == len(contract.bands)}
    head = f"{'band':<12}{'name':<11}{'nm':>8}{'gsd m':>7}" + "".join(f"{name:>11}" for name in columns)
    rows = []
    for row, band in enumerate(contract.bands):
        known = f"{_number(band.wavelength_nm, 8)}{_number(band.gsd_m, 7)}"
        values = [v[row] if norm.pixels[row] or name == "nodata %" else None for name, v in columns.items()]
        rows.append(f"{band.name:<12}{band.common_name or '–':<11}{known}" + "".join(_number(v, 11) for v in values))
    return [
        f"{contract.modality}: in {stored.samples}{part} samples {size}{dates}{gsd}, {contract.sensor} {contract.level}, "
        f"{contract.unit}, stored as {contract.dtype}, nodata {contract.nodata}{masks}",
        head, *_middle_out(rows, _BANDS, "bands"),
    ]  # fmt: skip


def _number(value: float | None, width: int) -> str:
    return f"{'–':>{width}}" if value is None else f"{value:{width}.5g}"


def _middle_out(rows: list[str], most: int, what: str) -> list[str]:
    """All, or the first and the last."""
    half = most // 2
    return rows if len(rows) <= most else [*rows[:half], f"… {len(rows) - 2 * half} more {what} …", *rows[-half:]]


def _radiometry(reader: ShardReader, modality: str, stored: Stored) -> list[str]:
    """What stored values are multiplied by and what is added, with how many samples, and who says so in the first of them."""
    lines = []
    for (scale, add), count in stored.pairs.most_common(_LISTED):
        told = sample_json(reader, stored.first[scale, add]).get("radiometry")
        one = told.get(modality) if isinstance(told, dict) else None
        says = one.get("scale_source") if isinstance(one, dict) else None
        sign = "−" if add < 0 else "+"
        lines.append(f"  value = stored · {scale:g} {sign} {abs(add):g} in {count} samples ({says or 'nobody says why'})")
    shown = sum(count for _, count in stored.pairs.most_common(_LISTED))
    rest = stored.samples - shown
    return lines + [f"  and other scales and offsets in {rest} samples"] * bool(rest)


def _labels(reader: ShardReader, found: Survey) -> list[str]:
    """Samples of each class, and of each of several labels."""
    manifest = reader.manifest
    pairs = list(zip(("(none)", *manifest.classes), found.labels[:-1].tolist(), strict=True))
    shown = [(name, count) for name, count in pairs if count] if manifest.classes else []
    many = len(shown) > _CLASSES
    shown = sorted(shown, key=lambda pair: -pair[1]) if many else shown
    lines = [f"class {name}: {count}" for name, count in shown[:_CLASSES]]
    lines += [f"… {len(shown) - _CLASSES} more classes, with {shown[-1][1]} to {shown[_CLASSES][1]} samples"] if many else []
    empty = [name for name, count in pairs[1:] if not count]
    if empty:
        lines.append(
            f"{len(empty)} classes without a sample: {', '.join(empty[:_LISTED])}{', …' if len(empty) > _LISTED else ''}"
        )
    if found.labels[-1]:
        lines.append(f"{found.labels[-1]} samples have the number of a class that the manifest does not list")
    return lines + _several_labels(reader)


def _several_labels(reader: ShardReader) -> list[str]:
    """Of samples with a list of labels; a few are looked at first, since each is a read of its own."""
    for most in (64, _JSON):
        numbers = np.unique(np.linspace(0, len(reader) - 1, most).round().astype(int))
        counts: Counter[str] = Counter()
        for number in numbers.tolist():
            labels: Any = sample_json(reader, number).get("labels")
            counts.update(set(map(str, labels)) if isinstance(labels, list) else ())
        if not counts:
            return []
    part = "" if len(numbers) == len(reader) else f" of {len(numbers)} samples looked at"
    lines = [f"label {name}: {count}{part}" for name, count in counts.most_common(_CLASSES)]
    return lines + [f"… {len(counts) - _CLASSES} more labels"] * (len(counts) > _CLASSES)


def _shards(manifest: Manifest) -> list[str]:
    sizes = [shard.bytes for shard in manifest.shards]
    if len(sizes) <= _SHARDS:
        lines = [f"{s.name}: {s.samples} samples, {s.bytes} bytes" for s in manifest.shards]
    else:
        samples = [shard.samples for shard in manifest.shards]
        lines = [f"shards have {min(samples)} to {max(samples)} samples, {min(sizes)} to {max(sizes)} bytes"]
    return [*lines, f"{sum(sizes)} bytes in {len(sizes)} shards"]


def _source(manifest: Manifest) -> list[str]:
    """How the shards were made; what was skipped and left out, and why; what was noted."""
    said = dict(manifest.source)
    lines = [f"{len(manifest.skipped)} could not be decoded"]
    lines += [f"  {key}: {reason}" for key, reason in manifest.skipped[:_LISTED]]
    lines += [f"  … and {len(manifest.skipped) - _LISTED} more, in {NAME}"] * (len(manifest.skipped) > _LISTED)
    left_out, notes, findings = (said.pop(name, None) for name in ("left_out", "notes", "findings"))
    for reason, entry in left_out.items() if isinstance(left_out, dict) else ():
        known = isinstance(entry, dict)
        examples = entry.get("examples") if known else None
        such = f" (such as {', '.join(map(str, examples[:2]))})" if isinstance(examples, list) and examples else ""
        lines.append(f"{entry.get('samples') if known else entry} left out: {reason}{such}")
    for finding in findings if isinstance(findings, list) else ():
        lines.append(f"warning: {finding.get('text') if isinstance(finding, dict) else finding}")
    lines += [f"note: {note}" for note in (notes if isinstance(notes, list) else ())]
    settings = [f"{name} {value}" for name, value in _flat(said) if value not in (None, False)]
    made = f"made by {manifest.made_by}" if manifest.made_by else ""
    return lines + [" with ".join(part for part in (made, ", ".join(settings)) if part)] * bool(made or settings)


def _flat(said: dict[str, Any]) -> list[tuple[str, Any]]:
    """Settings of settings beside the others."""
    return [pair for name, value in said.items() for pair in (value.items() if isinstance(value, dict) else [(name, value)])]
