"""`swath embed`: pooled features of samples, or of the tiles of samples and scenes, in one Parquet file.

Scenes are read window by window and rows are written group by group, so memory depends on the batch and not on the scene.
Decoding and normalisation are those of `swath shard` and of training. Letters: b sample, c band, t date, h w pixels, d width.
"""

import hashlib
import json
import logging
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from tqdm import tqdm

import swath
from swath.hub.card import without_paths
from swath.hub.load import Loaded, load_backbone
from swath.pretrain.objective import context
from swath.probes.features import matched, require_contract
from swath.shards.bands import InputContract
from swath.shards.codec import DecodeError
from swath.shards.draw import Draw
from swath.shards.errors import InputError
from swath.shards.files import disk_errors, sync_folder
from swath.shards.manifest import NAME as MANIFEST
from swath.shards.prepare import prepare
from swath.shards.reader import VALID_CLEAR, Chips, ShardReader, Stored
from swath.shards.sources.cut import WHOLE, Scenes, starts
from swath.shards.sources.mirror import located
from swath.shards.sources.open import open_source
from swath.shards.sources.source import Options, Sample, Source
from swath.shards.writer import NO_TIME, Place, flat_keys

GROUP_BYTES = 16 << 20  # of features in a row group: what waits to be written
_DEGREE_M = 111_320.0
_TRAINED = ("step", "samples", "recipe", "adapted")  # what the file says of where the weights come from
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass
class Tile:
    """A sample, or a window of it at (top, left) in its pixels: (C, h, w) as stored, validity codes (dates, h, w) or None where
    all is clear; `meta` as in a sample's JSON."""

    key: str
    top: int
    left: int
    pixels: np.ndarray
    valid: np.ndarray | None
    scale: float
    add: float
    label: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass
class Embedded:
    """How many rows of how many features were written, how many tiles had no valid pixel, how many items were not decodable."""

    rows: int
    width: int
    empty: int
    failed: int


@dataclass
class _Data:
    """Where tiles come from; `failed` counts what could not be decoded on the way."""

    name: str
    contract: InputContract
    total: int | None
    tiles: Iterator[Tile]
    failed: int = 0


def load_pyarrow() -> Any:
    """pyarrow's `parquet`; it is an extra."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError("files of features need pyarrow: pip install 'swath[tables]'") from None
    return pyarrow.parquet


def embed(
    backbone: Path | str,
    data: Path | str,
    to: Path | str,
    *,
    tile: int | None = None,
    overlap: int = 0,
    size: int | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    batch: int = 64,
    options: Options | None = None,
    recipe: str | None = None,
    progress: bool = True,
) -> Embedded:
    """Write the features of `data` (a folder of shards, or what `swath shard` reads: a scene, a folder of them, images) to `to`.

    `tile` pixels a side cut samples and scenes into windows that share `overlap` pixels; those at the right and the bottom lie
    closer to the ones before. By default samples, images and scenes of up to 256 pixels are whole, larger scenes are cut at the
    size that the backbone was trained at. Each is resized to `size`, by default that of training. `options` and `recipe` say of
    scenes what their files do not. Tiles without a valid pixel are left out. `to` must not exist, and appears when all is done.

    Raises InputError for another input contract, sizes that do not fit, and where nothing can be embedded.
    """
    parquet, to = load_pyarrow(), Path(to)
    if to.exists() or to.is_symlink():
        raise InputError(f"{to} exists; choose another file, or remove it")
    loaded = load_backbone(backbone)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded.backbone.to(device)
    _check_sizes(loaded, tile, overlap, size, batch)
    opened = _open(loaded, data, tile, overlap, batch, options or Options(), recipe)
    settings = {"tile": tile, "overlap": overlap, "size": [size, size] if size else list(loaded.size), "dtype": dtype}
    schema = _schema(loaded, opened, settings)
    with disk_errors("writing features", to.parent):
        to.parent.mkdir(parents=True, exist_ok=True)
        partial = to.with_name(f".{to.name}.partial")
        partial.unlink(missing_ok=True)  # of one that was killed
        try:
            with partial.open("xb") as file:
                with parquet.ParquetWriter(file, schema) as writer:
                    made = _write(loaded, opened, writer, schema, tuple(settings["size"]), batch, progress)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(to)
            sync_folder(to.parent)
        finally:
            partial.unlink(missing_ok=True)
    return made


def _check_sizes(loaded: Loaded, tile: int | None, overlap: int, size: int | None, batch: int) -> None:
    if (tile is not None and tile < 1) or batch < 1:
        raise InputError(f"--tile and --batch must be at least 1, not {tile} and {batch}")
    if overlap and tile is None:
        raise InputError("--overlap says more of --tile, which is not given")
    if tile is not None and not 0 <= overlap < tile:
        raise InputError(f"--overlap must be 0 … {tile - 1}, less than --tile, not {overlap}")
    if size is not None:
        try:
            loaded.backbone.grid(size, size)
        except ValueError as error:
            raise InputError(f"--size {size}: {error}") from None


def _open(
    loaded: Loaded, place: Path | str, tile: int | None, overlap: int, batch: int, options: Options, recipe: str | None
) -> _Data:
    """The data, after its contract has been compared with the backbone's."""
    if (Path(place) / MANIFEST).is_file():
        if options != Options() or recipe is not None:
            raise InputError(f"{place} holds shards, which say themselves what they are; leave options of scenes out")
        reader = ShardReader(place)
        contract = require_contract(loaded, reader)
        return _Data(
            reader.manifest.dataset, contract, None if tile else len(reader), _of_shards(reader, contract, tile, overlap, batch)
        )
    if splits := sorted(path.parent.name for path in Path(place).glob(f"*/{MANIFEST}")):
        raise InputError(f"{place} holds the splits {', '.join(splits)}; give one of them")
    source = open_source(located(place), options, recipe)
    for note in source.notes:
        _log.info("%s", note)
    contract = matched(loaded, source.contracts, f"data {source.dataset}", str(place))
    if contract.dates > 1:
        raise InputError(f"the backbone takes series of {contract.dates} dates: make shards of them with --dates-per-sample")
    if isinstance(source, Scenes):
        return _scenes(loaded, source, contract, tile, overlap)
    made = _Data(source.dataset, contract, None if tile else len(source.items), iter(()))
    made.tiles = _of_items(source, made, tile, overlap)
    return made


def _scenes(loaded: Loaded, source: Scenes, contract: InputContract, tile: int | None, overlap: int) -> _Data:
    side = _side(loaded, source, tile)
    ends = [(grid.height, grid.width) for grid in source.grids if grid is not None]
    total = sum(math.prod(len(starts(end, min(side, end), side - overlap, True)) for end in both) for both in ends)
    made = _Data(source.dataset, contract, total, iter(()))
    made.tiles = _of_scenes(source, made, side, overlap)
    return made


def _side(loaded: Loaded, source: Scenes, tile: int | None) -> int:
    if tile is not None:
        return tile
    if all(max(grid.height, grid.width) <= WHOLE for grid in source.grids if grid is not None):
        return WHOLE
    if loaded.size[0] != loaded.size[1]:
        raise InputError(f"the backbone was trained at {loaded.size[0]}×{loaded.size[1]} pixels, no square; give --tile")
    return loaded.size[0]


def _of_shards(reader: ShardReader, contract: InputContract, tile: int | None, overlap: int, batch: int) -> Iterator[Tile]:
    classes, name = reader.manifest.classes, contract.modality
    for numbers in _batched(iter(range(len(reader))), batch):
        chips = reader.chips(numbers)
        stored = chips.stored[name]
        for row, number in enumerate(numbers):
            height, width = stored.size[row].tolist()
            label = int(chips.label[row])
            whole = Tile(
                reader.index.key(number), 0, 0, stored.pixels[row, :, :height, :width].numpy(),
                None if stored.valid is None else stored.valid[row, :, :height, :width].numpy(),
                float(stored.scale[row]), float(stored.add[row]), classes[label] if label >= 0 else None,
                _known(reader.meta(number), {name: float(value[row]) for name, value in chips.meta.items() if value.ndim == 1}),
            )  # fmt: skip
            yield from _cut(whole, tile, overlap)


def _known(meta: dict[str, Any], index: dict[str, float]) -> dict[str, Any]:
    """A sample's JSON, with what the index has of place and time in its stead."""
    return meta | {name: None if value != value else value for name, value in index.items()}


def _of_scenes(source: Scenes, data: _Data, side: int, overlap: int) -> Iterator[Tile]:
    for number in range(len(source.scenes)):
        for item in source.chips(number, side, side - overlap, edges=True):
            try:
                sample = source.read(item)
            except DecodeError as error:
                _log.warning("%s is left out: %s", item.key, error)
                data.failed += 1
                continue
            _, top, left, _, _ = item.place
            yield _of_sample(flat_keys([item.key])[0], sample, data.contract, top, left)


def _of_items(source: Source, data: _Data, tile: int | None, overlap: int) -> Iterator[Tile]:
    for item, key in zip(source.items, flat_keys([item.key for item in source.items]), strict=True):
        try:
            sample = source.read(item)
        except DecodeError as error:
            _log.warning("%s is left out: %s", item.lookup, error)
            data.failed += 1
            continue
        if data.contract.modality in sample.parts:
            sample.label = sample.label if sample.label is not None else item.label
            yield from _cut(_of_sample(key, sample, data.contract), tile, overlap)


def _of_sample(key: str, sample: Sample, contract: InputContract, top: int = 0, left: int = 0) -> Tile:
    part = sample.parts[contract.modality]
    place = Place.of(sample.meta)
    # as the index of shards keeps them
    index = {name: float(np.float32(getattr(place, name))) for name in ("lat", "lon", "gsd_m")}
    time = np.nan if place.time == NO_TIME else float(place.time)
    valid = part.valid[None] if part.valid is not None and part.valid.ndim == 2 else part.valid
    return Tile(
        key, top, left, part.pixels, valid, part.scale, part.add, sample.label,
        _known(sample.meta, {**index, "time": time}),
    )  # fmt: skip


def _cut(whole: Tile, side: int | None, overlap: int) -> Iterator[Tile]:
    """Windows of a tile, also at its edges; the tile itself where it is no larger than one."""
    height, width = whole.pixels.shape[1:]
    if side is None or (height <= side and width <= side):
        yield whole
        return
    tall, wide = min(side, height), min(side, width)
    for top in starts(height, tall, side - overlap, True).tolist():
        for left in starts(width, wide, side - overlap, True).tolist():
            rows, columns = slice(top, top + tall), slice(left, left + wide)
            yield Tile(
                f"{whole.key}_y{top:05d}_x{left:05d}", top, left, whole.pixels[:, rows, columns],
                None if whole.valid is None else whole.valid[:, rows, columns], whole.scale, whole.add, whole.label,
                _moved(whole.meta, (height, width), (top, left, tall, wide)),
            )  # fmt: skip


def _moved(meta: dict[str, Any], size: tuple[int, int], window: tuple[int, int, int, int]) -> dict[str, Any]:
    """`meta` of a window of a sample: rows run south and columns east, as `prepare` takes them."""
    top, left, height, width = window
    moved = dict(meta)
    if _bounds(meta) is not None:
        west, south, east, north = meta["bounds"]
        x, y = (east - west) / size[1], (north - south) / size[0]
        moved["bounds"] = [west + left * x, north - (top + height) * y, west + (left + width) * x, north - top * y]
    lat, lon, gsd_m = (meta.get(name) for name in ("lat", "lon", "gsd_m"))
    if lat is not None and lon is not None and gsd_m is not None:
        south_m, east_m = ((a + b / 2 - c / 2) * gsd_m for a, b, c in ((top, height, size[0]), (left, width, size[1])))
        moved["lat"] = lat - south_m / _DEGREE_M
        moved["lon"] = lon + east_m / (_DEGREE_M * max(np.cos(np.deg2rad(lat)), 1e-3))
    return moved


def _bounds(meta: Mapping[str, Any]) -> list[float] | None:
    bounds = meta.get("bounds")
    known = isinstance(bounds, list) and len(bounds) == 4 and all(isinstance(value, int | float) for value in bounds)
    return bounds if known else None


def _chips(tiles: Sequence[Tile], contract: InputContract) -> Chips:
    """One batch; smaller tiles are padded, and their padding is not valid."""
    sizes = [tuple(tile.pixels.shape[1:]) for tile in tiles]
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    pixels = np.zeros((len(tiles), contract.channels, height, width), dtype=tiles[0].pixels.dtype)
    valid = np.zeros((len(tiles), contract.dates, height, width), dtype=np.uint8)
    for row, (tile, (h, w)) in enumerate(zip(tiles, sizes, strict=True)):
        if tile.pixels.shape[0] != contract.channels:
            raise InputError(f"{tile.key} has {tile.pixels.shape[0]} bands, the contract {contract.channels}")
        pixels[row, :, :h, :w] = tile.pixels
        valid[row, :, :h, :w] = VALID_CLEAR if tile.valid is None else tile.valid
    clear = len(set(sizes)) == 1 and all(tile.valid is None for tile in tiles)
    scale, add = (torch.tensor([getattr(tile, name) for tile in tiles], dtype=torch.float64) for name in ("scale", "add"))
    number = torch.arange(len(tiles))
    meta = {
        name: torch.tensor([np.nan if (v := tile.meta.get(name)) is None else v for tile in tiles], dtype=torch.float64)
        for name in ("lat", "lon", "gsd_m", "time")
        if name != "time" or contract.dates == 1
    }
    stored = Stored(torch.from_numpy(pixels), None if clear else torch.from_numpy(valid), torch.tensor(sizes), scale, add)
    return Chips({contract.modality: stored}, number, 0 * number, 0 * number - 1, meta)


def _features(loaded: Loaded, chips: Chips, contract: InputContract, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pooled features (B, D) float32, and the share (B,) of valid pixels that they come from."""
    device = next(loaded.backbone.parameters()).device
    prepared = prepare(chips.to(device), {contract.modality: contract}, size)
    with torch.inference_mode():
        ctx = context(prepared, contract.modality, loaded.backbone, Draw(0, chips.id, chips.visit))
        pooled_bd = loaded.backbone(prepared.images[contract.modality], ctx).pooled.float().cpu().numpy()
    if not np.isfinite(pooled_bd).all():
        raise InputError(f"backbone {loaded.name} gives features that are not finite; its run has diverged")
    seen = prepared.valid.get(contract.modality)
    return pooled_bd, np.ones(len(pooled_bd)) if seen is None else seen.float().mean(dim=(1, 2, 3)).cpu().numpy()


def _write(loaded: Loaded, data: _Data, writer: Any, schema: Any, size: tuple[int, ...], batch: int, progress: bool) -> Embedded:
    width = loaded.backbone.pooled_width
    group = max(1, GROUP_BYTES // (4 * width))
    made, waiting, x = Embedded(0, width, 0, 0), [], []

    def flush() -> None:
        writer.write_table(_table(waiting, np.concatenate(x), schema), row_group_size=group)
        made.rows += len(waiting)
        waiting.clear()
        x.clear()

    with tqdm(total=data.total, desc="embed", unit="tile", disable=not progress) as bar:
        for tiles, chips in _ahead((tiles, _chips(tiles, data.contract)) for tiles in _batched(data.tiles, batch)):
            pooled_bd, share_b = _features(loaded, chips, data.contract, (size[0], size[1]))
            seen = share_b > 0
            made.empty += int((~seen).sum())
            x.append(pooled_bd[seen])
            waiting += [_row(tile, float(share)) for tile, share in zip(tiles, share_b, strict=True) if share > 0]
            bar.update(len(tiles))
            if len(waiting) >= group:
                flush()
    if waiting:
        flush()
    made.failed = data.failed
    if not made.rows:
        raise InputError(
            f"nothing of {data.name} can be embedded: {made.empty} tiles without a valid pixel, {made.failed} not decodable"
        )
    return made


def _batched(items: Iterator[_T], count: int) -> Iterator[list[_T]]:
    while taken := list(islice(items, count)):
        yield taken


def _ahead(batches: Iterator[_T]) -> Iterator[_T]:
    """The next one is made in a thread while this one is worked on."""
    with ThreadPoolExecutor(1, thread_name_prefix="swath-embed") as pool:
        coming = pool.submit(next, batches, None)
        while (made := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield made


def _row(tile: Tile, share: float) -> dict[str, Any]:
    bounds, time = _bounds(tile.meta), tile.meta.get("time")
    crs = tile.meta.get("crs")
    return {
        "key": tile.key, "label": tile.label, "top": tile.top, "left": tile.left,
        "height": tile.pixels.shape[1], "width": tile.pixels.shape[2],
        **dict(zip(("west", "south", "east", "north"), bounds or [None] * 4, strict=True)),
        "crs": crs if isinstance(crs, str) else None,
        **{name: tile.meta.get(name) for name in ("lat", "lon", "gsd_m")},
        "time": int(time) if isinstance(time, int | float) else None, "valid": share,
    }  # fmt: skip


def _table(rows: list[dict[str, Any]], x_nd: np.ndarray, schema: Any) -> Any:
    import pyarrow as pa

    columns = {f.name: pa.array([row[f.name] for row in rows], f.type) for f in schema if f.name != "feature"}
    flat = x_nd.astype(schema.field("feature").type.value_type.to_pandas_dtype()).reshape(-1)
    feature = pa.FixedSizeListArray.from_arrays(pa.array(flat), x_nd.shape[1])
    return pa.table({**columns, "feature": feature}, schema=schema)


def _schema(loaded: Loaded, data: _Data, settings: dict[str, Any]) -> Any:
    import pyarrow as pa

    kind = pa.float16() if settings["dtype"] == "float16" else pa.float32()
    whole = [pa.field(name, pa.int32()) for name in ("top", "left", "height", "width")]
    ground = [pa.field(name, pa.float64()) for name in ("west", "south", "east", "north")]
    place = [pa.field(name, pa.float64()) for name in ("lat", "lon", "gsd_m")]
    contract = data.contract.model_dump(mode="json")
    told = {
        "backbone": loaded.name,
        "weights_sha256": weights_digest(loaded),
        "contract_sha256": hashlib.sha256(json.dumps(contract, sort_keys=True).encode()).hexdigest(),
        "bands": list(data.contract.names),
        "trained": without_paths({key: loaded.origin[key] for key in _TRAINED if key in loaded.origin}),
        "data": data.name,
        **settings,
        "versions": {"swath": swath.__version__, "python": platform.python_version(), "torch": torch.__version__},
    }
    return pa.schema(
        [
            pa.field("key", pa.string()), pa.field("label", pa.string()), *whole, *ground, pa.field("crs", pa.string()), *place,
            pa.field("time", pa.timestamp("s", "UTC")), pa.field("valid", pa.float32()),
            pa.field("feature", pa.list_(kind, loaded.backbone.pooled_width)),
        ],
        metadata={"swath": json.dumps(told)},
    )  # fmt: skip


def weights_digest(loaded: Loaded) -> str:
    """SHA-256 of the parameters: whether two files of features come from the same weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(loaded.backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def embed_image(loaded: Loaded, image: Path, size: tuple[int, int], options: Options | None = None) -> np.ndarray:
    """Pooled features (1, D) float32 of one whole image or scene, as a row of `embed` would have them."""
    source = open_source(located(image), options or Options())
    contract = matched(loaded, source.contracts, f"image {source.dataset}", str(image))
    if isinstance(source, Scenes):
        grid = source.grids[0]
        side = 1 if grid is None else max(grid.height, grid.width)
        items = list(source.chips(0, side, side))
    else:
        items = source.items
    if len(items) != 1:
        raise InputError(f"{image} holds {len(items)} images; give one")
    try:
        tile = _of_sample("query", source.read(items[0]), contract)
    except DecodeError as error:
        raise InputError(f"{image} cannot be read: {error}") from None
    x_1d, share = _features(loaded, _chips((tile,), contract), contract, size)
    if share[0] == 0:
        raise InputError(f"{image} has no valid pixel")
    return x_1d
