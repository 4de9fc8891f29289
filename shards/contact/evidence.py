"""What is understood of an archive, and who says so: a file's own metadata, its name, or only what is customary."""

from typing import Any, NamedTuple

from swath.shards.bands import InputContract
from swath.shards.contact.first_look import Look
from swath.shards.sensors import SENSORS, level_of, sensor_of
from swath.shards.sources.scene import UNSCALED, Stack, open_raster, raster_errors

_PRODUCTS = {"safe": "the products' MTD_MSIL*.xml", "landsat": "the scenes' MTL files", "stac": "the STAC items"}
_LEVELS = {"sentinel2": "L1C, L2A", "sentinel1": "sigma0, gamma0", "unknown": "L1C, L2A, sigma0"}


class Said(NamedTuple):
    """The evidence, and whether the files themselves told it, so that it need not be confirmed."""

    because: str
    certain: bool


def main(look: Look) -> InputContract:
    """The first modality, which is the one that options speak of."""
    return next(iter(look.source.contracts.values()))


def found(look: Look) -> dict[str, Any]:
    """What swath understands of the files, by entry of a recipe; None where they differ, and each keeps its own."""
    contract = main(look)
    held: dict[str, Any] = {
        "sensor": contract.sensor, "level": contract.level, "bands": contract.names, "unit": contract.unit,
        "nodata": contract.nodata, "gsd": contract.gsd_m,
    }  # fmt: skip
    if look.scenes:
        scales = {1.0 if stack.scale is None else stack.scale for stack in look.stacks}
        adds = {stack.add for stack in look.stacks}
        held["scale"] = scales.pop() if len(scales) == 1 else None
        held["add"] = adds.pop() if len(adds) == 1 else None
    return held


def who_says(look: Look) -> dict[str, Said]:
    """The evidence of each entry of `found`."""
    if not look.scenes:
        return _of_arrays(look)
    contract, stack = main(look), look.stacks[0]
    raw = look.raw.get(look.scenes[0].name, stack)
    product = _PRODUCTS.get(look.kind)
    if product is not None:
        words = Said(f"{product}, {look.of_all()}", True)
        said = dict.fromkeys(("sensor", "level", "bands", "unit"), words)
    else:
        said = {"sensor": _sensor(look), "level": _level(look), "bands": _bands(raw, look), "unit": _unit(stack, look)}
    if contract.level == "unknown":
        said["level"] = Said(f"nothing says it; for instance {_LEVELS.get(contract.sensor, 'L1TP, L2SP')}", False)
    said |= _radiometry(look)
    if raw.nodata is not None or look.kind in ("safe", "landsat"):
        said["nodata"] = Said(product or f"declared by {look.of_all()}", True)
    elif contract.nodata is not None:
        said["nodata"] = Said(f"no file declares one; customary for {contract.sensor}", False)
    else:
        said["nodata"] = Said("no file declares one", True)
    said["gsd"] = Said(_grids(look), True)
    return said


def _sensor(look: Look) -> Said:
    named = look.count(lambda stack: sensor_of(stack.shown[0]) is not None)
    tagged = look.count(lambda stack: sensor_of(stack.tags.get("SENSOR", "")) is not None)
    if main(look).sensor not in SENSORS:
        return Said(f"no tag and no name of file or folder speaks of one that is known ({', '.join(SENSORS)})", False)
    if tagged:
        return Said(f"file tag SENSOR of {look.of_all(tagged)}", tagged == len(look.stacks))
    return Said(f"file name, such as {_name(look)}, of {look.of_all(named)}", False)


def _level(look: Look) -> Said:
    if tagged := look.count(lambda stack: "LEVEL" in stack.tags):
        return Said(f"file tag LEVEL of {look.of_all(tagged)}", tagged == len(look.stacks))
    return Said(f"file name of {look.of_all(look.count(lambda stack: level_of(stack.shown[0]) is not None))}", False)


def _name(look: Look) -> str:
    return look.stacks[0].shown[0].rpartition("/")[2]


def _bands(raw: Stack, look: Look) -> Said:
    """Who gives the bands their names and their order."""
    if all(band.wavelength_nm for band in raw.bands):
        return Said(f"wavelengths in the headers of {look.of_all()}", True)
    try:
        with open_raster(raw.paths[0]) as file:
            described = all(file.descriptions) or file.driver == "netCDF"
    except raster_errors():
        described = False
    if described:
        return Said(f"descriptions of the bands in {look.of_all()}", True)
    if len(raw.paths) == len(raw.bands) and len(raw.paths) > 1:
        return Said(f"a file for each band, called after it, in {look.of_all()}", False)
    return Said("three bands of 8 bits are taken for red, green, blue", False)


def _unit(stack: Stack, look: Look) -> Said:
    if "UNITS" in stack.tags:
        return Said(f"file tag UNITS of {look.of_all(look.count(lambda s: 'UNITS' in s.tags))}", True)
    if stack.sensor not in SENSORS:
        return Said("nothing says what the numbers mean", False)
    if stack.scale is not None and stack.said.startswith("file tag: scale"):
        return Said(f"{stack.sensor}, and the files give a scale", True)
    return Said(f"customary for {stack.sensor} in {stack.dtype}", False)


def _radiometry(look: Look) -> dict[str, Said]:
    says = sorted({stack.said for stack in look.stacks})
    differ = len(says) > 1 or len({(stack.scale, stack.add) for stack in look.stacks}) > 1
    words = f"they differ, and each file keeps its own; for instance {says[0]}" if differ else says[0]
    if says == [UNSCALED]:
        return dict.fromkeys(("scale", "add"), Said(f"no file gives one, of {look.of_all()}", True))
    certain = all(s.startswith("file") for s in says)
    if certain or any("file tag" in s for s in says):
        return {"scale": Said(words, certain), "add": Said(words, True)}
    later = "; Sentinel-2's is -0.1 from baseline 04.00 on" if look.stacks[0].sensor == "sentinel2" else ""
    return {"scale": Said(words, False), "add": Said(f"no file gives an offset{later}", False)}


def _grids(look: Look) -> str:
    sizes = sorted({stack.grid.gsd_m for stack in look.stacks if stack.grid.gsd_m is not None})
    own = sorted({g for g in look.stacks[0].gsd_m if g})
    coarser = f"; bands of {', '.join(f'{g:g}' for g in own)} m come to the finest" if len(own) > 1 else ""
    if not sizes:
        return "metres; the files have no georeference"
    if len(sizes) > 1:
        return f"metres; the grids have {sizes[0]:g} to {sizes[-1]:g}, and each scene keeps its own{coarser}"
    return f"metres, by the grids of {look.of_all()}{coarser}; `value: 20` would resample to 20"


def _of_arrays(look: Look) -> dict[str, Said]:
    """Images and arrays hold numbers and little else."""
    picture = look.kind == "images" and main(look).dtype == "uint8"
    untold = Said("images do not say it", True) if picture else Said("nothing in the files says it", False)
    bands = "the columns' names" if look.kind == "parquet" else "numbered as they stand: nothing in the files names them"
    return {
        "sensor": untold, "level": untold, "bands": Said("the colours of images", True) if picture else Said(bands, False),
        "unit": Said("pixels of images, 0 to 255", True) if picture else Said("nothing says what the numbers mean", False),
        "nodata": Said("no file declares one", True),
    }  # fmt: skip
