"""Label maps beside chips, and the feature maps that a head for every pixel reads; computed once, in memory.

Letters: n b sample, c band, d width, h w pixels or places, t date.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from swath.backbones.base import Backbone, Context, create
from swath.hub.load import Loaded
from swath.pretrain.precision import Precision, autocast
from swath.probes.confusion import IGNORE
from swath.probes.features import Features, kept, key_of
from swath.probes.linear import held_out
from swath.probes.statistics import waves
from swath.probes.task import Bench
from swath.shards.bands import InputContract
from swath.shards.errors import InputError
from swath.shards.manifest import LabelMap
from swath.shards.prepare import prepare
from swath.shards.reader import Chips, ShardReader

BATCH = 64
_WHERE = ("gsd_m", "lat", "lon", "time")


@dataclass
class Tiles:
    """Samples with a label map. For each date there are `images` (N, C, H, W) at the backbone's size and `pixels` (N, C, h, w) at
    their own, normalised by the backbone; `places`, (N,) float64 each, are gsd_m, lat, lon and, for each date, time, NaN where
    unknown; `target` (N, h, w) uint8 class numbers or IGNORE; block, id and number among the samples of the shards (N,)."""

    images: list[Tensor]
    pixels: list[Tensor]
    places: list[Tensor]
    target: Tensor
    block: np.ndarray
    id: np.ndarray
    number: np.ndarray

    def __len__(self) -> int:
        return len(self.target)


def label_map(reader: ShardReader, name: str) -> LabelMap:
    """The map of classes called `name`; InputError where these shards have none."""
    found = reader.manifest.maps.get(name)
    if found is None or not found.classes:
        others = ", ".join(n for n, m in reader.manifest.maps.items() if m.classes) or "none"
        raise InputError(
            f"data set {reader.manifest.dataset} has no label map {name!r} (it has {others}); `swath shard` takes along "
            "rasters that lie beside the scenes, see docs/dense-probes.md"
        )
    return found


def class_names(reader: ShardReader, name: str) -> tuple[str, ...]:
    """Of a label map, in the order of their codes."""
    return tuple(named for _, named in sorted(label_map(reader, name).classes.items()))


def numbered(codes: np.ndarray, found: LabelMap, names: Sequence[str]) -> np.ndarray:
    """uint8 places in `names` of the codes of a map, IGNORE for what has no name. InputError for a class that `names` lack."""
    made = np.full(codes.shape, IGNORE, dtype=np.uint8)
    for code, name in found.classes.items():
        of_class = codes == code
        if name in names:
            made[of_class] = names.index(name)
        elif of_class.any():
            raise InputError(f"no training pixel can be of class {name}; the maps of train name {', '.join(names)}")
    return made


def read_tiles(loaded: Loaded, reader: ShardReader, name: str, names: Sequence[str], *, apart: bool = False) -> Tiles:
    """The samples of `reader` that have the label map `name`; with `apart`, each date of a series by itself.

    Raises InputError where there are none, and for chips that are not all of one size.
    """
    contract, size = contract_of(loaded, reader), loaded.size
    found, modality = label_map(reader, name), contract.modality
    numbers = np.array([n for n in range(len(reader)) if reader.has(n, name) and reader.has(n, modality)], dtype=np.int64)
    if len(numbers) == 0:
        raise InputError(f"no sample of {reader.manifest.dataset} has a map of {name}")
    theirs = reader.contracts[modality]
    if theirs.height is None or theirs.width is None:
        raise InputError(f"chips of {reader.manifest.dataset} are of several sizes; make shards with one (`swath shard --chip`)")
    own, dates = (theirs.height, theirs.width), theirs.dates if apart else 1
    images, pixels, places, target = [[] for _ in range(dates)], [[] for _ in range(dates)], [], []
    for first in range(0, len(numbers), BATCH):
        some = numbers[first : first + BATCH]
        chips = reader.chips(some)
        for date in range(dates):
            one = _date(chips, modality, date, len(contract.bands)) if apart else chips
            images[date].append(prepare(one, {modality: contract}, size).images[modality])
            pixels[date].append(images[date][-1] if own == size else prepare(one, {modality: contract}, own).images[modality])
        time = chips.meta["time"].reshape(len(some), -1)
        gsd_m = chips.meta["gsd_m"] * (own[0] / size[0] * own[1] / size[1]) ** 0.5
        places.append(torch.stack([gsd_m, chips.meta["lat"], chips.meta["lon"], *time.unbind(1)]))
        for number in some.tolist():
            codes = reader.label_map(number, name)
            if codes is None or codes.shape != (1, *own):
                raise InputError(f"sample {reader.index.key(number)}: its map of {name} is not of its chip's size {own}")
            target.append(numbered(codes[0], found, names))
    if all((one == IGNORE).all() for one in target):
        raise InputError(f"no pixel of {reader.manifest.dataset} has a label in its maps of {name}")
    samples = reader.index.samples[numbers]
    whole = [torch.cat(each) for each in images]
    return Tiles(
        whole, whole if own == size else [torch.cat(each) for each in pixels], list(torch.cat(places, dim=1).unbind(0)),
        torch.from_numpy(np.stack(target)), samples["block"].astype(np.int64), samples["id"].astype(np.int64), numbers,
    )  # fmt: skip


def contract_of(loaded: Loaded, reader: ShardReader) -> InputContract:
    """The backbone's contract of the modality that both have."""
    shared = [name for name in reader.contracts if name in loaded.contracts]
    if not shared:
        raise InputError(f"data set {reader.manifest.dataset} has {', '.join(reader.contracts)}, the backbone takes "
                         f"{', '.join(loaded.contracts)}")  # fmt: skip
    return loaded.contracts[shared[0]]


def _date(chips: Chips, modality: str, date: int, bands: int) -> Chips:
    """One date of a series, as chips of that date alone."""
    stored = chips.stored[modality]
    valid = None if stored.valid is None else stored.valid[:, date : date + 1]
    one = replace(stored, pixels=stored.pixels[:, date * bands : (date + 1) * bands], valid=valid)
    return replace(
        chips, stored={modality: one}, meta=chips.meta | {"time": chips.meta["time"].reshape(len(chips.id), -1)[:, date]}
    )


def held(tiles: Tiles) -> np.ndarray:
    """(N,) bool: the fixed fifth that settings are chosen on where there is no val."""
    return held_out(Features(np.empty((len(tiles), 0)), np.zeros(len(tiles)), tiles.block, tiles.id, ()))


def untrained(loaded: Loaded, seed: int) -> Backbone:
    """The same backbone with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = create(loaded.name, **loaded.options)
    return made.eval().to(next(loaded.backbone.parameters()).device)


class Encoder(nn.Module):
    """Images and places as in `Tiles` → feature maps, finest first: of two dates, how far they differ.

    With `several` there are at least four levels: a pyramid's own, else what passes after each quarter of the blocks, whose
    strides the head sets apart. Otherwise it is all maps that the backbone declares. Where and when are withheld unless `told`.
    """

    wavelength_nm: Tensor

    def __init__(self, backbone: Backbone, wavelength_nm: Tensor, dates: int, several: bool, told: bool) -> None:
        super().__init__()
        self.backbone, self.dates, self.several, self.told = backbone, dates, several, told
        self.register_buffer("wavelength_nm", wavelength_nm)

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        images, places = inputs[: self.dates], inputs[self.dates :]
        gsd_m, lat, lon, *times = places
        by_date = []
        for date, image in enumerate(images):
            # of dates that are apart each has its time; a series has all of them
            time = times[date] if self.dates > 1 else torch.stack(times, dim=1) if len(times) > 1 else times[0]
            where = (lat, lon, time) if self.told else (None, None, None)
            context = Context(self.wavelength_nm, gsd_m, *where, torch.zeros_like(gsd_m).float())
            by_date.append(encode_levels(self.backbone, image, context, self.several)[1])
        if self.dates == 1:
            return by_date[0]
        return [(a - b).abs() for a, b in zip(*by_date, strict=True)]


def encode_levels(backbone: Backbone, image_bchw: Tensor, context: Context, several: bool) -> tuple[Tensor, list[Tensor]]:
    """Pooled features (B, D), and the maps of an `Encoder`."""
    tokens = backbone.tokenize(image_bchw, context)
    taps = tuple(-(-backbone.depth * quarter // 4) - 1 for quarter in (1, 2, 3))
    features = backbone.encode(tokens, taps=taps if several else ())
    maps = [features.maps[stride] for stride in sorted(features.maps)]
    if not several or len(maps) > 1:
        return features.pooled, maps
    groups, rows, columns = prod(tokens.grid[:2]), *tokens.grid[2:]
    each = [features.taps[tap][:, -groups * rows * columns :] for tap in taps]
    return features.pooled, [x.unflatten(1, (groups, rows, columns)).mean(dim=1).permute(0, 3, 1, 2) for x in each] + maps


def encoder(
    loaded: Loaded, backbone: Backbone, contract: InputContract, *, dates: int = 1, several: bool = False, told: bool = False
) -> Encoder:
    nanometres = [float("nan") if band.wavelength_nm is None else band.wavelength_nm for band in contract.bands]
    wavelength_nm = torch.tensor(nanometres, dtype=torch.float64, device=next(loaded.backbone.parameters()).device)
    return Encoder(backbone, wavelength_nm, dates, several, told)


def inputs_of(tiles: Tiles) -> list[Tensor]:
    """What an `Encoder` takes of them."""
    return [*tiles.images, *tiles.places]


def place_maps(tiles: Tiles, dataset: str) -> list[Tensor]:
    """Where each tile lies and nothing else, as a map of one place (N, 36, 1, 1). InputError where one has no place."""
    _, lat, lon, *_ = tiles.places
    return [torch.from_numpy(waves(lat.numpy(), lon.numpy(), dataset))[:, :, None, None]]


def maps_of(bench: Bench, part: str, of: Encoder, tiles: Tiles) -> list[Tensor]:
    """As `extract_maps`, of the tiles of a part of the bench ("train", "val", "test"); computed once, see `kept`."""
    with torch.inference_mode():
        first = of([x[:1].to(of.wavelength_nm.device) for x in inputs_of(tiles)])
    shapes = [level.shape[1:] for level in first]
    loaded = replace(bench.loaded, backbone=of.backbone)
    key = key_of(loaded, bench.readers[part], tiles.number, bench, "maps", of.dates, of.several, of.told)

    def make() -> np.ndarray:
        return torch.cat([level.flatten(1) for level in extract_maps(of, tiles, bench.precision)], dim=1).numpy()

    flat = torch.from_numpy(kept(bench, key, (len(tiles), sum(map(prod, shapes))), make))
    parts = flat.split([prod(shape) for shape in shapes], dim=1)
    return [level.unflatten(1, shape) for level, shape in zip(parts, shapes, strict=True)]


def extract_maps(of: Encoder, tiles: Tiles, precision: Precision = "fp32") -> list[Tensor]:
    """The feature maps of all tiles, computed in `precision`, fp32, on the CPU. InputError where they are not finite."""
    device, inputs = of.wavelength_nm.device, inputs_of(tiles)
    made: list[list[Tensor]] = []
    with torch.inference_mode(), autocast(precision, device):
        for first in range(0, len(tiles), BATCH):
            made.append([x.float().cpu() for x in of([x[first : first + BATCH].to(device) for x in inputs])])
    levels = [torch.cat(level) for level in zip(*made, strict=True)]
    if not all(bool(level.isfinite().all()) for level in levels):
        raise InputError("the backbone gives features that are not finite; its run has diverged")
    return [level.clone() for level in levels]  # out of inference mode: heads are trained on them
