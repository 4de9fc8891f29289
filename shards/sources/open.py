"""Which kind of source a path is."""

from pathlib import Path

from PIL import Image, TiffImagePlugin

from swath.shards.errors import InputError
from swath.shards.sources.folder import TIFF, files_below
from swath.shards.sources.images import Images
from swath.shards.sources.rasters import Rasters
from swath.shards.sources.source import Source

_GEO_TAGS = (33550, 34264, 34735)  # ModelPixelScale, ModelTransformation, GeoKeyDirectory
_BITS, _PHOTOMETRIC, _RGB = 258, 262, 2


def open_source(
    path: Path, *, chip: int | None, stride: int | None, bands: tuple[str, ...] | None, sensor: str | None, level: str | None
) -> Source:
    """Zips and folders without GeoTIFFs are images; folders of TIFFs are scenes unless these are plain RGB pictures."""
    if not path.exists():
        raise InputError(f"{path} does not exist; give a folder or a zip of images or of GeoTIFF scenes")
    if path.is_file():
        return Images(path, bands, sensor, level)
    tiffs = files_below(path).of(*TIFF)
    if not tiffs or _is_picture(tiffs[0]):
        return Images(path, bands, sensor, level)
    return Rasters(path, chip=chip, stride=stride, bands=bands, sensor=sensor, level=level)


def _is_picture(path: Path) -> bool:
    """A plain RGB TIFF without georeference, by its tags alone; whatever is odd is left to rasterio to judge."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
            tags = TiffImagePlugin.ImageFileDirectory_v2(head + file.read(8 if head[2:3] == b"\x2b" else 0))
            file.seek(tags.next)
            tags.load(file)
            plain = tags.get(_BITS) == (8, 8, 8) and tags.get(_PHOTOMETRIC) == _RGB
            return plain and not any(tag in tags for tag in _GEO_TAGS)
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, Image.DecompressionBombError):
        return False
