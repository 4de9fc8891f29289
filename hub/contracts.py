"""The input contracts that published weights were trained under, and contracts that a user names instead.

RGB is of 8-bit images, as any folder of them is read. Sentinel-2 is reflectance: the published statistics are of DN, 10,000 times
as large.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from swath.shards.bands import Band, InputContract, Normalisation
from swath.shards.errors import InputError
from swath.shards.manifest import NAME, read_manifest
from swath.shards.sensors import SENTINEL1, SENTINEL2

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FMOW_RGB = (0.4182, 0.4215, 0.3991), (0.2877, 0.2754, 0.2764)
# Of fMoW-Sentinel's DN, as SatMAE publishes them (rounded): mean and standard deviation.
_FMOW_SENTINEL = {
    "B01": (1370.19, 633.15), "B02": (1184.38, 650.28), "B03": (1120.77, 712.13), "B04": (1136.26, 965.23),
    "B05": (1263.74, 948.98), "B06": (1645.40, 1108.07), "B07": (1846.87, 1258.36), "B08": (1762.60, 1233.15),
    "B8A": (1972.62, 1364.39), "B09": (582.73, 472.38), "B10": (14.77, 14.31), "B11": (1732.16, 1310.37),
    "B12": (1247.92, 1087.60),
}  # fmt: skip
_DN = 1e-4  # reflectance of one
_SATMAE = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
_SPECTRALGPT = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")


def _rgb(statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> InputContract:
    mean, std = (tuple(round(255 * value, 6) for value in values) for values in statistics)
    names = ("red", "green", "blue")
    return InputContract(
        modality="rgb", sensor="unknown", level="unknown", unit="digital number", dtype="uint8",
        bands=tuple(Band(name=name, common_name=name) for name in names),
        normalisation=Normalisation(mean=mean, std=std, pixels=(0,) * 3),
    )  # fmt: skip


def _clipped(names: Sequence[str]) -> InputContract:
    """SatMAE's rule: mean - 2 std … mean + 2 std becomes 0 … 1, and what lies beyond is cut."""
    statistics = [_FMOW_SENTINEL[name] for name in names]
    normalisation = Normalisation(
        mean=tuple(round((mean - 2 * std) * _DN, 9) for mean, std in statistics),
        std=tuple(round(4 * std * _DN, 9) for _, std in statistics), pixels=(0,) * len(names), clip=(0.0, 1.0),
    )  # fmt: skip
    return _sentinel2("sentinel2", names, normalisation)


def _sentinel2(modality: str, names: Sequence[str], normalisation: Normalisation) -> InputContract:
    return InputContract(
        modality=modality, sensor="sentinel2", level="L1C", unit="reflectance", dtype="uint16", gsd_m=10,
        bands=tuple(SENTINEL2.bands[name] for name in names), normalisation=normalisation,
    )  # fmt: skip


def _as_they_are(count: int) -> Normalisation:
    return Normalisation(mean=(0.0,) * count, std=(1.0,) * count, pixels=(0,) * count)


def _optical() -> InputContract:
    return _sentinel2("sentinel2_l1c", tuple(SENTINEL2.bands), _as_they_are(len(SENTINEL2.bands)))


def _radar() -> InputContract:
    return InputContract(
        modality="sentinel1", sensor="sentinel1", level="sigma0", unit="dB", dtype="float32", gsd_m=10,
        bands=(SENTINEL1.bands["VV"], SENTINEL1.bands["VH"]), normalisation=_as_they_are(2),
    )  # fmt: skip


_UINT8 = "its script also rounds to 256 steps after that, which is left out"
_UNKNOWN = "how SSL4EO-S12 was normalised for it is not published: values enter as they are; --contract says better"
# What its weights were trained on, and what there is to say of it.
PUBLISHED: dict[str, tuple[tuple[InputContract, ...], str]] = {
    "imagenet": ((_rgb(_IMAGENET),), ""),
    "aerial": ((_rgb(_IMAGENET),), ""),  # other images, ImageNet's statistics
    "fmow_rgb": ((_rgb(_FMOW_RGB),), ""),
    "fmow_sentinel": ((_clipped(_SATMAE),), _UINT8),
    "spectralgpt": (
        (_clipped(_SPECTRALGPT),),
        "pretraining took each image's own minimum and maximum to 0 … 1, which a contract cannot say; the rule of its "
        "fine-tuning on BigEarthNet stands for it",
    ),
    "optical": ((_optical(),), _UNKNOWN),
    "radar": ((_radar(),), _UNKNOWN),
    "optical+radar": ((_optical(), _radar()), _UNKNOWN),
}


def agreed(
    name: str, count: int, dates: int, bands: Sequence[str] | None, given: Mapping[str, InputContract] | None
) -> tuple[dict[str, InputContract], str]:
    """(contracts by modality, radar last; what is to be said of them) of weights that take `count` bands, 0 for any number.

    `name` is of `PUBLISHED`; `bands` are what the user says that they are; `given` replaces what was published. Raises
    InputError where one of these has other bands than the weights, or has them in another order.
    """
    published, note = PUBLISHED[name]
    contracts = sorted(given.values(), key=lambda one: one.is_radar) if given else [*published]
    if given:
        note = ""
        if len(given) != len(published):
            raise InputError(
                f"--contract has modalities {', '.join(given)}; the weights take {len(published)}, {_listed(published)}"
            )
    if count:
        contracts = [_fitting(contracts[0], published[0], count, bands, bool(given))]
    elif bands is not None:
        contracts = _picked(contracts, bands)
    contracts = [contract.model_copy(update={"dates": dates}) if not given else contract for contract in contracts]
    if any(contract.dates != dates for contract in contracts):
        raise InputError(f"--contract is of {contracts[0].dates} date(s), the weights of {dates}")
    return {contract.modality: contract for contract in contracts}, note


def _fitting(
    contract: InputContract, published: InputContract, count: int, bands: Sequence[str] | None, given: bool
) -> InputContract:
    """The contract of weights whose bands are fixed."""
    names, known = list(contract.names), list(published.names)
    if bands is not None and list(bands) != names:
        raise InputError(_differ("--bands", list(bands), names))
    if len(names) != count:
        what = "--contract names" if given else "published ones take"
        raise InputError(
            f"the weights take {count} bands, and {what} {len(names)} ({', '.join(names)}); "
            "--contract FILE.json or SHARDS says which they are"
        )
    if names != known and sorted(names) == sorted(known):
        raise InputError(_differ("--contract", names, known))
    return contract


def _differ(whose: str, theirs: list[str], weights: list[str]) -> str:
    how = "in another order" if sorted(theirs) == sorted(weights) else "others"
    return f"{whose} has {', '.join(theirs)}, and the weights take {', '.join(weights)}: {how}"


def _picked(contracts: Sequence[InputContract], bands: Sequence[str]) -> list[InputContract]:
    """Of weights that take any bands: those, of each modality its own, in the order asked for."""
    known = [name for contract in contracts for name in contract.names]
    if unknown := [name for name in bands if name not in known] or [name for name in bands if list(bands).count(name) > 1]:
        raise InputError(f"--bands: {', '.join(dict.fromkeys(unknown))} are unknown or named twice; there are {', '.join(known)}")
    made = []
    for contract in contracts:
        places = [contract.names.index(name) for name in bands if name in contract.names]
        statistics = contract.normalisation
        update = {
            field: tuple(values[place] for place in places)
            for field in ("mean", "std", "pixels", "minimum", "maximum")
            if (values := getattr(statistics, field))
        }
        if not places:
            raise InputError(
                f"--bands leaves nothing of {contract.modality}, which the weights take: {', '.join(contract.names)}"
            )
        bands_of = tuple(contract.bands[place] for place in places)
        made.append(contract.model_copy(update={"bands": bands_of, "normalisation": statistics.model_copy(update=update)}))
    return made


def _listed(contracts: Sequence[InputContract]) -> str:
    return ", ".join(contract.modality for contract in contracts)


def read_contracts(path: Path) -> dict[str, InputContract]:
    """Contracts by modality from a folder of shards, its manifest, an exported folder's config.json, or JSON of one or several.

    Raises InputError where there is none.
    """
    if path.is_dir():
        return read_manifest(path).contracts
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--contract {path} cannot be read ({error}); give JSON, or a folder with {NAME}") from None
    if isinstance(value, dict):
        for key in ("contracts", "input_contracts", "input_contract"):
            value = value.get(key, value) if isinstance(value, dict) else value
    found = value if isinstance(value, dict) else {}
    try:
        contracts = [InputContract.model_validate(one) for one in ([found] if "bands" in found else found.values())]
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"--contract {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if not contracts:
        raise InputError(f"--contract {path} holds no input contract")
    return {contract.modality: contract for contract in contracts}
