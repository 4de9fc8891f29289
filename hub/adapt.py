"""`swath adapt`: a backbone for other bands than it was trained on, or for data whose contract differs in what one accepts.

Weights are sliced by band name (`Backbone.with_bands`); nothing is trained. What was relaxed stands in the new contract
(`accepts`), in the origin (`adapted`, which config.json carries) and in the card.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from swath.backbones.base import create, nearest
from swath.hub.export import write_export
from swath.hub.load import Loaded, load_backbone
from swath.shards.bands import Accepted, Band, InputContract, Normalisation
from swath.shards.errors import InputError
from swath.shards.manifest import read_manifest

SAME_NM = 20.0  # bands whose centres are no further apart may be called the same; the sensors' own differ by up to 15 nm
_FIELDS: dict[str, Accepted] = {"modality": "sensor", "sensor": "sensor", "level": "level", "unit": "unit"}


@dataclass(frozen=True)
class Wish:
    """What a backbone is to become. `bands` in their order, by the names that they have after `rename` {theirs: ours}; `accept`
    are mismatches to let pass; `data` is a contract that must fit in the end: its bands are the default, new bands take their
    wavelength and statistics from it, and with "normalisation" accepted all bands take its statistics."""

    bands: tuple[str, ...] | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    accept: tuple[Accepted, ...] = ()
    data: InputContract | None = None


def adapt(
    path: Path | str,
    to: Path | str,
    *,
    bands: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
    accept: Sequence[str] = (),
    data: Path | str | None = None,
) -> Loaded:
    """Write the backbone at `path` (run, checkpoint or export), adapted, as an export to `to`, new or empty; see `Wish`.

    `data` is a folder of shards. Raises InputError where the weights cannot be adapted so, with the reason.
    """
    if unknown := [name for name in accept if name not in get_args(Accepted)]:
        raise InputError(
            f"--accept {unknown[0]}{nearest(unknown[0], get_args(Accepted))}; it takes {', '.join(get_args(Accepted))}"
        )
    loaded = load_backbone(path)
    theirs = None if data is None else _contract_of(Path(data), loaded)
    made = adapted(loaded, Wish(None if bands is None else tuple(bands), dict(rename or {}), tuple(accept), theirs))  # type: ignore[arg-type]
    write_export(made, Path(to))
    return made


def _contract_of(data: Path, loaded: Loaded) -> InputContract:
    manifest = read_manifest(data)
    shared = [name for name in manifest.contracts if name in loaded.contracts] or list(manifest.contracts)
    if len(shared) > 1:
        raise InputError(f"{data} has modalities {', '.join(shared)}, of which none is the backbone's; give shards of one")
    return manifest.contract(shared[0])


def adapted(loaded: Loaded, wish: Wish) -> Loaded:
    """`loaded` as `wish` says; `loaded` itself is left as it is. Raises InputError for what cannot be."""
    before = loaded.contract
    if wish.bands is None and not wish.rename and not wish.accept and wish.data is None:
        raise InputError("nothing to adapt: give --bands, --map, --accept or --data")
    renamed = _renamed(before, wish)
    contract, said = _chosen(before, renamed, wish)
    options, backbone = loaded.options, loaded.backbone
    names, wavelengths = contract.names, [band.wavelength_nm for band in contract.bands]
    if (list(names), wavelengths) != ([band.name for band in renamed], [band.wavelength_nm for band in before.bands]):
        try:
            changed, state = backbone.with_bands([band.name for band in renamed], names, wavelengths)
            options = {**options, **changed}
            backbone = create(loaded.name, **options).eval()
        except ValueError as error:
            raise InputError(f"{loaded.name} cannot be adapted to {', '.join(names)}: {error}") from None
        backbone.load_state_dict(state)
    if wish.data is not None:
        theirs = wish.data
        contract.require(theirs, ours="adapted backbone", theirs="data", remedy=command(loaded, theirs))
    origin = {**loaded.origin, "adapted": [*loaded.origin.get("adapted", []), *said]}
    return replace(loaded, backbone=backbone, options=options, contracts={contract.modality: contract}, origin=origin, place="")


def _renamed(contract: InputContract, wish: Wish) -> list[Band]:
    """The backbone's bands, those of `wish.rename` by their new names, and as the data know them."""
    ours = {name: new for new, name in wish.rename.items()}
    if len(ours) < len(wish.rename):
        raise InputError("--map gives one band two names; each of the backbone's bands has one")
    if unknown := [name for name in ours if name not in contract.names]:
        raise InputError(
            f"--map {ours[unknown[0]]}={unknown[0]}: the backbone has no band {unknown[0]}"
            f"{nearest(unknown[0], contract.names)}; it has {', '.join(contract.names)} (write theirs=ours)"
        )
    made = []
    for band in contract.bands:
        new = ours.get(band.name, band.name)
        known = _band(wish.data, new) if band.name in ours else None
        made.append(known or band.model_copy(update={"name": new}))
    names = [band.name for band in made]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--map makes two bands {twice[0]}; map the other one as well")
    return made


def _band(data: InputContract | None, name: str) -> Band | None:
    return None if data is None else next((band for band in data.bands if band.name == name), None)


def _chosen(before: InputContract, renamed: list[Band], wish: Wish) -> tuple[InputContract, list[str]]:
    """The new contract, and one line for each relaxation."""
    names = [band.name for band in renamed]
    chosen = wish.bands or (wish.data.names if wish.data is not None else tuple(names))
    if unknown := [name for name in chosen if name not in names and _band(wish.data, name) is None]:
        more = "--data" if wish.data is None else "the data"
        raise InputError(
            f"the backbone has no band {unknown[0]}{nearest(unknown[0], names)}; it has {', '.join(names)}; what a new band is, "
            f"and its statistics, come from {more}"
        )
    bands, rows = [], []
    for name in chosen:
        band = renamed[names.index(name)] if name in names else _band(wish.data, name)
        assert band is not None
        theirs = name not in names or (wish.data is not None and "normalisation" in wish.accept)
        source, number = (wish.data, wish.data.names.index(name)) if theirs and wish.data else (before, names.index(name))
        bands.append(band)
        rows.append(_statistics(source, number))
        if rows[-1][2] == 0 and theirs:
            raise InputError(f"the data have no valid pixel of {name}, so no statistics to normalise it by")
    mean, std, pixels, minimum, maximum = zip(*rows, strict=True)
    spread = {} if None in (*minimum, *maximum) else {"minimum": minimum, "maximum": maximum}
    stored = {} if wish.data is None else {"dtype": wish.data.dtype, "nodata": wish.data.nodata}
    try:
        contract = InputContract.model_validate(
            before.model_dump()
            | {"bands": bands, "normalisation": Normalisation(mean=mean, std=std, pixels=pixels, **spread), **stored}
            | {"accepts": tuple(dict.fromkeys((*before.accepts, *wish.accept)))}
        )
    except ValidationError as error:
        raise InputError(f"--bands {','.join(chosen)}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    return contract, _said(before, contract, names, wish)


def _statistics(contract: InputContract, number: int) -> tuple[float, float, int, float | None, float | None]:
    """mean, std, pixels, and the extremes where they are known."""
    n = contract.normalisation
    extremes = [values[number] if values else None for values in (n.minimum, n.maximum)]
    return n.mean[number], n.std[number], n.pixels[number], extremes[0], extremes[1]


def _said(before: InputContract, after: InputContract, names: list[str], wish: Wish) -> list[str]:
    lines = [f"map: band {new} of the data is {ours} of the weights" for new, ours in wish.rename.items()]
    if list(after.names) != names:
        lost = [name for name in names if name not in after.names]
        new = [name for name in after.names if name not in names]
        lines.append(
            f"bands: {', '.join(after.names)}"
            + (f"; dropped: {', '.join(lost)}" if lost else "")
            + (f"; new, with weights from their wavelengths: {', '.join(new)}" if new else "")
        )
    for name in wish.accept:
        if name == "normalisation":
            whose = "the data's own mean and standard deviation" if wish.data is not None else "the weights' own all the same"
            lines.append(f"accept normalisation: data of other statistics pass, normalised by {whose}")
        elif name == "wavelength":
            lines.append("accept wavelength: bands are compared by name, at other wavelengths too")
        elif name == "gsd":
            trained = f"{before.gsd_m:g} m" if before.gsd_m else "the pixels"
            lines.append(f"accept gsd: data of other pixel sizes pass; the weights were trained at {trained}")
        else:
            lines.append(f"accept {name}: data of any {name} pass; the weights were trained on {getattr(before, name)}")
    if after.nodata != before.nodata:
        lines.append(f"nodata: {_number(after.nodata)}, as the data have it, instead of {_number(before.nodata)}")
    return lines


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


def command(loaded: Loaded, theirs: InputContract, data: str = "SHARDS") -> str:
    """The `swath adapt …` after which `loaded` takes data of the contract `theirs` (shards at `data`); where no adapting helps,
    why, and what would."""
    ours = loaded.contract
    instead = "make shards with these bands (`swath shard`), or pretrain on these (`swath pretrain`)"
    if ours.dates != theirs.dates:
        return f"samples of {ours.dates} date(s), which `swath shard --dates-per-sample` makes"
    rename = _twins(ours, theirs)
    back = {mine: new for new, mine in rename.items()}
    names = [back.get(name, name) for name in ours.names]
    new = [name for name in theirs.names if name not in names]
    wavelengths = [band.wavelength_nm for band in theirs.bands]
    if list(theirs.names) != names:
        try:
            loaded.backbone.with_bands(names, theirs.names, wavelengths)
        except ValueError as error:
            return f"{instead}; `swath adapt` cannot help: {error}"
    accept = {_FIELDS[name] for name in _FIELDS if getattr(ours, name) != getattr(theirs, name)}
    known = dict(zip(names, ours.bands, strict=True))
    same = [band for band in theirs.bands if band.name in known]
    if any(known[band.name].wavelength_nm != band.wavelength_nm for band in same):
        accept.add("wavelength")
    if "unit" in accept:
        accept.add("normalisation")  # in another unit the weights' statistics mean nothing
    accept -= set(ours.accepts)
    words = ["swath adapt", shlex.quote(loaded.place or "BACKBONE")]
    words += ["--bands", ",".join(theirs.names)] if list(theirs.names) != names else []
    words += ["--map", ",".join(f"{new}={mine}" for new, mine in rename.items())] if rename else []
    words += ["--accept", ",".join(name for name in get_args(Accepted) if name in accept)] if accept else []
    words += ["--data", shlex.quote(data)] if new or "normalisation" in accept else []
    return " ".join([*words, "--to DIR"])


def _twins(ours: InputContract, theirs: InputContract) -> dict[str, str]:
    """{their name: our name} of bands that seem to be the same under another name: close in wavelength, and either written alike,
    of the same common name, or the closest."""
    taken = {band.name for band in theirs.bands if band.name in ours.names}
    made: dict[str, str] = {}
    for band in theirs.bands:
        if band.name in taken:
            continue
        likely = [
            (not alike, abs((mine.wavelength_nm or 0) - (band.wavelength_nm or 0)), mine.name)
            for mine in ours.bands
            if mine.name not in taken and mine.name not in made.values() and _close(mine, band)
            if (alike := _alike(mine, band)) or (mine.wavelength_nm and band.wavelength_nm)
        ]
        if likely:
            made[band.name] = min(likely)[2]
    return made


def _close(one: Band, two: Band) -> bool:
    if one.wavelength_nm is None or two.wavelength_nm is None:
        return True
    return abs(one.wavelength_nm - two.wavelength_nm) <= SAME_NM


def _alike(one: Band, two: Band) -> bool:
    plain = [re.sub(r"(?<![0-9])0+(?=[0-9])", "", re.sub(r"[^a-z0-9]", "", band.name.lower())) for band in (one, two)]
    words = [{name, band.common_name} - {None} for name, band in zip(plain, (one, two), strict=True)]
    return bool(words[0] & words[1])
