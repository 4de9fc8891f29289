"""So2Sat LCZ42: `training.h5`, `validation.h5`, `testing.h5` with sen1 (N, 32, 32, 8), sen2 (N, 32, 32, 10), label (N, 17)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from swath.shards.bands import Band
from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.recipes.registry import register
from swath.shards.sensors import SENTINEL2, band
from swath.shards.sources import hdf5
from swath.shards.sources.cube import clear, take
from swath.shards.sources.planned import Planned, contract, fingerprint
from swath.shards.sources.source import Item, Options, Part, Sample

SPLITS = {"training": "train", "validation": "val", "testing": "test"}
# in file order; real and imaginary parts are amplitudes, the others linear intensities and covariances
SEN1 = ("VH_re", "VH_im", "VV_re", "VV_im", "VH_lee", "VV_lee", "cov_re", "cov_im")
SEN2 = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
CLASSES = (
    "compact high-rise", "compact mid-rise", "compact low-rise", "open high-rise", "open mid-rise", "open low-rise",
    "lightweight low-rise", "large low-rise", "sparsely built", "heavy industry", "dense trees", "scattered trees",
    "bush or scrub", "low plants", "bare rock or paved", "bare soil or sand", "water",
)  # fmt: skip


@dataclass(kw_only=True)
class So2Sat(Planned):
    root: Path
    _files: dict[str, Any] = field(default_factory=dict)

    def read(self, item: Item) -> Sample:
        name, number = item.place
        if name not in self._files:  # opened where it is read: a handle must not cross into another process
            self._files[name] = hdf5.open_file(self.root / name)
        file, parts = self._files[name], {}
        for modality, key in (("sentinel1", "sen1"), ("sentinel2", "sen2")):
            try:
                pixels = take(hdf5.dataset(file, key), "nhwc", n=number)
            except hdf5.read_errors() as error:
                raise DecodeError(f"{name}: {key} of sample {number} is damaged ({error})") from None
            parts[modality] = Part(pixels, valid=clear(pixels, None))
        parts["sentinel2"].scale_source = "publisher: stored as reflectance"
        return Sample(parts, item.label, {"gsd_m": 10.0, "source": item.lookup})


@register("so2sat", "So2Sat LCZ42, Sentinel-1 and 2 pairs of 32 px in 17 local climate zones", "CC-BY-4.0")
def so2sat(path: Path, options: Options) -> So2Sat:
    """`path` is the folder of one split scheme: that of v2, or `random/`, `block/` or `culture_10/` of v3 and later."""
    files = {p.stem: p for p in sorted(path.glob("*.h5")) if p.stem in SPLITS and not p.is_symlink()} if path.is_dir() else {}
    if not files:
        schemes = [p.parent.name for p in sorted(path.glob("*/training.h5"))] if path.is_dir() else []
        remedy = f"name one of its folders: {', '.join(schemes)}" if schemes else "training.h5 and so on are expected"
        raise InputError(f"{path} is not a split scheme of So2Sat; {remedy}")
    items: list[Item] = []
    dtypes: dict[str, set[str]] = {"sen1": set(), "sen2": set()}
    for stem in sorted(files, key=list(SPLITS).index):
        file_path = files[stem]
        with hdf5.open_file(file_path) as file:
            labels = _labels(file, file_path)
            for key, bands in (("sen1", SEN1), ("sen2", SEN2)):
                array = hdf5.dataset(file, key)
                if len(array.shape) != 4 or array.shape[0] != len(labels) or array.shape[3] != len(bands):
                    raise InputError(f"{file_path}: {key} is {array.shape}, ({len(labels)}, 32, 32, {len(bands)}) is due")
                dtypes[key].add(str(array.dtype.newbyteorder("=")))
        items += [
            Item(f"{stem}/{n:06d}", f"{stem}/{n:06d}", CLASSES[label], (file_path.name, n), SPLITS[stem])
            for n, label in enumerate(labels)
        ]
    mixed = [key for key, kinds in dtypes.items() if len(kinds) > 1]
    if mixed:
        kinds = " and ".join(sorted(dtypes[mixed[0]]))
        raise InputError(f"{path}: {mixed[0]} is {kinds} in different files; use files of one version")
    contracts = {
        "sentinel1": contract(
            "sentinel1", [Band(name=n, gsd_m=10.0) for n in SEN1], dtypes["sen1"].pop(), sensor="sentinel1",
            level="SLC and Lee-filtered", unit="linear power", gsd_m=10.0,
        ),
        "sentinel2": contract(
            "sentinel2", [band(n, SENTINEL2) for n in SEN2], dtypes["sen2"].pop(), sensor="sentinel2", level="L1C",
            unit="reflectance", gsd_m=10.0, resampling="to 10 m by the publisher",
        ),
    }  # fmt: skip
    left = sorted(p.name for p in path.glob("*.h5") if p.stem not in SPLITS)
    return So2Sat(
        dataset="so2sat", kind="so2sat", contracts=contracts, items=items, classes=CLASSES, root=path,
        fingerprint=fingerprint(path, files.values(), options),
        notes=(
            "sentinel1: bands 1 to 4 are real and imaginary parts (amplitudes), 5 to 8 linear intensities and covariances",
            *((f"{', '.join(left)} left out: what they hold is not known",) if left else ()),
        ),
    )  # fmt: skip


def _labels(file: Any, path: Path) -> np.ndarray:
    """The number of each sample's class; InputError unless every row of `label` is one-hot."""
    try:
        onehot = hdf5.dataset(file, "label", whole=True)[()]
    except hdf5.read_errors() as error:
        raise InputError(f"{path}: label cannot be read ({error})") from None
    if onehot.ndim != 2 or onehot.shape[1] != len(CLASSES):
        raise InputError(f"{path}: label has the shape {onehot.shape}; (N, {len(CLASSES)}) one-hot is expected")
    wrong = np.flatnonzero(((onehot != 0) & (onehot != 1)).any(axis=1) | (onehot.sum(axis=1) != 1))
    if len(wrong):
        raise InputError(f"{path}: label {wrong[0]} (and {len(wrong) - 1} more) is not one-hot")
    return onehot.argmax(axis=1)
