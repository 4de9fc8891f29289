"""VRT files are text that names other files and can carry code: only plain mosaics and stacks of files beside them are read."""

from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.sources.markup import MAX_BYTES, local, parse_xml

_PLAIN = {
    "VRTDataset", "SRS", "GeoTransform", "GCPList", "GCP", "Metadata", "MDI", "VRTRasterBand", "ColorInterp", "NoDataValue",
    "Description", "UnitType", "Offset", "Scale", "CategoryNames", "Category", "ColorTable", "Entry", "HideNoDataValue",
    "Histograms", "HistItem", "HistMin", "HistMax", "BucketCount", "IncludeOutOfRange", "Approximate", "HistCounts", "MaskBand",
    "OverviewList", "Overview", "SimpleSource", "ComplexSource", "AveragedSource", "SourceFilename", "SourceBand",
    "SourceProperties", "SrcRect", "DstRect", "NODATA", "ScaleOffset", "ScaleRatio", "UseMaskBand",
}  # fmt: skip
# Of files that GDAL takes for nothing else; an XML service description, which reaches into the network, is none of them.
_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
_MAX_DEPTH = 4


def check_vrt(path: Path, files: frozenset[Path], folder: Path, depth: int = 0) -> set[Path]:
    """The files that a VRT reads, all of them among `files`; InputError for anything that leads elsewhere or runs code."""
    shown = path.relative_to(folder).as_posix()
    if depth > _MAX_DEPTH:
        raise InputError(f"{shown}: VRT files are nested deeper than {_MAX_DEPTH}; write it as GeoTIFF (gdal_translate)")
    if path.stat().st_size > MAX_BYTES:
        raise DecodeError(f"{shown}: a VRT of {path.stat().st_size} bytes is beyond the limit of {MAX_BYTES}")
    root = parse_xml(path.read_bytes(), shown)
    found: set[Path] = set()
    for element in root.iter():
        name = local(element.tag)
        kind = element.get("subClass", "VRTSourcedRasterBand")
        if name not in _PLAIN or kind != "VRTSourcedRasterBand" or element.get("domain") == "GEOLOCATION":
            what = kind if kind != "VRTSourcedRasterBand" else name
            raise InputError(f"{shown}: a VRT with {what} is not read, since it can run code or reach other files; "
                             "write it as GeoTIFF (gdal_translate)")  # fmt: skip
        if name == "SourceFilename":
            found |= _referenced(element, path, shown, files, folder, depth)
    return found


def _referenced(
    element: ElementTree.Element, path: Path, shown: str, files: frozenset[Path], folder: Path, depth: int
) -> set[Path]:  # fmt: skip
    text = (element.text or "").strip()
    inner = PurePosixPath(text)
    target = path.parent / inner
    outside = inner.is_absolute() or ".." in inner.parts or ":" in text or "\\" in text or "<" in text
    if outside or element.get("relativeToVRT") != "1" or target not in files:
        raise InputError(
            f"{shown} refers to {text[:120]!r}; a VRT may name only plain files beside or below it (relativeToVRT=1)"
        )
    with target.open("rb") as file:
        head = file.read(16)
    if head.startswith(_MAGIC):
        return {target}
    if target.suffix.lower() != ".vrt":
        raise InputError(f"{shown} refers to {text[:120]!r}, which is no GeoTIFF, JPEG 2000 or VRT; write it as GeoTIFF")
    return {target} | check_vrt(target, files, folder, depth + 1)
