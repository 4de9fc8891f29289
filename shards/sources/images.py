"""One image, or a folder or a zip of them, by class or flat: `EuroSAT_RGB/<Class>/<file>.jpg`. Zips are read where they lie."""

import hashlib
import io
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from swath.shards.bands import Band, InputContract, Normalisation
from swath.shards.codec import DecodeError, decode, describe, encode_npy
from swath.shards.errors import InputError
from swath.shards.sources.archive import BROKEN, MAX_BYTES, open_zip, zip_members
from swath.shards.sources.folder import TIFF, Files, files_below
from swath.shards.sources.source import Item, Options, Part, Sample

EXTENSIONS = (".jpg", ".jpeg", ".png", ".tif", ".tiff")


class Images:
    """Class = folder below the class root, nested ones joined by '/'; files directly in the root have none.

    The class root is where paths stop being all alike: a lone top folder as in published zips is not a class.
    """

    kind = "images"

    def __init__(self, source: Path, options: Options) -> None:
        self.source, self.dataset = source, source.stem if source.is_file() else source.resolve().name
        alone = source.is_file() and source.suffix.lower() in EXTENSIONS
        self._zip = open_zip(source) if source.is_file() and not alone else None
        self.notes: tuple[str, ...] = ()
        if alone:
            self.source = source.parent
            sizes = _stated(Files((source,), 0), source.parent)
        elif self._zip is not None:
            sizes = zip_members(source, self._zip)
        else:
            files = files_below(source)
            sizes, self.notes = _stated(files, source), files.notes
        names = sorted(name for name in sizes if name.lower().endswith(EXTENSIONS))
        if not names:
            raise InputError(f"{source} holds no images ({', '.join(EXTENSIONS)}); name the folder that does")
        self.fingerprint = hashlib.sha256(repr([(n, sizes[n]) for n in names]).encode()).hexdigest()
        depth = _root_depth(names)
        self.items = [self._item(name, depth) for name in names]
        self.classes = tuple(sorted({item.label for item in self.items if item.label is not None}))
        self._first, first = self._first_readable()
        self._shape = (first.shape[0], str(first.dtype))
        self._options = options
        contract = _contract(first, options)
        self._modality = contract.modality
        self.contracts = {contract.modality: contract}

    def read(self, item: Item) -> Sample:
        data, pixels = self._decode(item)
        if (pixels.shape[0], str(pixels.dtype)) != self._shape:
            raise InputError(
                f"images differ: {self._first} has {self._shape[0]} band(s) of {self._shape[1]}, "
                f"{item.place} has {describe(pixels)}; make shards from one kind at a time"
            )
        extension = PurePosixPath(item.place).suffix.lower().lstrip(".")
        if extension in ("tif", "tiff"):
            data, extension = _reencode(pixels)
        nodata, scale, add = self._options.nodata, self._options.scale, self._options.add
        part = Part(
            pixels, data, "jpg" if extension == "jpeg" else extension,
            valid=None if nodata is None else (pixels != nodata).all(axis=0).astype(np.uint8),
            scale=1.0 if scale is None else scale, add=add or 0.0,
            scale_source=Part.scale_source if scale is None and add is None else "--scale and --add",
        )  # fmt: skip
        return Sample({self._modality: part}, item.label, {"source": item.place})

    def _decode(self, item: Item) -> tuple[bytes, np.ndarray]:
        data = self._bytes(item.place)
        jpeg = item.place.lower().endswith((".jpg", ".jpeg"))
        return data, decode(data, "jpg" if jpeg else "png")

    def _bytes(self, name: str) -> bytes:
        try:
            if self._zip is not None:
                return self._zip.read(name)
            path = self.source / name
            if path.stat().st_size > MAX_BYTES:
                raise DecodeError(f"{path.stat().st_size} bytes are beyond the limit of {MAX_BYTES}")
            return path.read_bytes()
        except BROKEN as error:
            raise DecodeError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None

    @staticmethod
    def _item(name: str, depth: int) -> Item:
        inner = PurePosixPath(*PurePosixPath(name).parts[depth:])
        label = None if len(inner.parts) == 1 else str(inner.parent)
        return Item(key=str(inner.with_suffix("")), lookup=name, label=label, place=name)

    def _first_readable(self) -> tuple[str, np.ndarray]:
        """What all others must look like; bad files before it are found and listed when their turn comes."""
        reason = ""
        for item in self.items:
            try:
                return item.place, self._decode(item)[1]
            except DecodeError as error:
                reason = reason or f"{item.place}: {error}"
        hint = "; scenes in a zip must be unpacked first" if self._zip and self.items[0].place.lower().endswith(TIFF) else ""
        raise InputError(f"none of the {len(self.items)} images in {self.source} can be decoded ({reason}){hint}")


def _contract(first: np.ndarray, options: Options) -> InputContract:
    count = len(first)
    names = options.bands or {3: ("red", "green", "blue"), 1: ("grey",)}.get(count)
    if names is None or len(names) != count:
        given = f"--bands names {len(options.bands)}" if options.bands else "their names are not known"
        raise InputError(f"images have {count} bands and {given}; give --bands with {count} names")
    none = tuple(0.0 for _ in names)
    return InputContract(
        modality="rgb" if count == 3 else "image", sensor=options.sensor or "unknown", level=options.level or "unknown",
        unit=options.unit or "digital number", nodata=options.nodata, dtype=str(first.dtype),
        bands=tuple(Band(name=n, common_name=n if n in ("red", "green", "blue") else None) for n in names),
        normalisation=Normalisation(mean=none, std=none, pixels=tuple(0 for _ in names)),
    )  # fmt: skip


def _reencode(pixels: np.ndarray) -> tuple[bytes, str]:
    """PNG where it can hold the pixels, else NPY."""
    if pixels.dtype != np.uint8 or len(pixels) not in (1, 3):
        return encode_npy(pixels), "npy"
    buffer = io.BytesIO()
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(np.moveaxis(pixels, 0, 2)))
    image.save(buffer, "PNG")
    return buffer.getvalue(), "png"


def _root_depth(names: list[str]) -> int:
    """How many leading folders all names share, keeping at least one folder as the class."""
    parts = [PurePosixPath(name).parts for name in names]
    depth = 0
    while all(len(p) > depth + 2 and p[depth] == parts[0][depth] for p in parts):
        depth += 1
    return depth


def _stated(files: Files, folder: Path) -> dict[str, tuple[int, ...]]:
    """Relative path → (bytes, mtime)."""
    status = {path.relative_to(folder).as_posix(): path.stat() for path in files.of(*EXTENSIONS)}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in status.items()}
