"""Which kind of source a path is."""

from pathlib import Path

from PIL import Image

from swath.shards.errors import InputError
from swath.shards.sources.images import Images
from swath.shards.sources.rasters import Rasters
from swath.shards.sources.source import Source

_GEO_TAGS = (33550, 34264, 34735)  # ModelPixelScale, ModelTransformation, GeoKeyDirectory


def open_source(
    path: Path, *, chip: int | None, stride: int | None, bands: tuple[str, ...] | None, sensor: str | None, level: str | None
) -> Source:
    """Zips and folders with JPEG or PNG are images; folders of TIFFs are scenes unless these are plain RGB pictures."""
    if not path.exists():
        raise InputError(f"{path} does not exist; give a folder or a zip of images or of GeoTIFF scenes")
    if path.is_file():
        return Images(path, bands, sensor, level)
    try:
        next(path.iterdir(), None)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    tiffs = [p for p in path.rglob("*") if p.suffix.lower() in (".tif", ".tiff") and not p.name.startswith(".")]
    if not tiffs or _is_picture(min(tiffs)):
        return Images(path, bands, sensor, level)
    return Rasters(path, chip=chip, stride=stride, bands=bands, sensor=sensor, level=level)


def _is_picture(path: Path) -> bool:
    """A plain RGB TIFF without georeference; whatever Pillow cannot read is left to rasterio to judge."""
    try:
        with Image.open(path) as image:
            tags = getattr(image, "tag_v2", {})
            return image.mode == "RGB" and not any(tag in tags for tag in _GEO_TAGS)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
