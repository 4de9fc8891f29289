"""Rasters other than GeoTIFF: VRT without what could harm, ENVI with its wavelengths, netCDF grids, JPEG 2000."""

from pathlib import Path

import numpy as np
import pytest

from swath.shards.errors import InputError
from swath.shards.sources.open import open_source
from swath.shards.sources.source import Options

rasterio = pytest.importorskip("rasterio")
from rasterio.transform import from_origin  # noqa: E402
from scipy.io import netcdf_file  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
PLACE = {"crs": "EPSG:32633", "transform": from_origin(300_000, 5_000_000, 10, 10)}


def tif(path: Path, pixels: np.ndarray, driver: str = "GTiff", **options: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    with rasterio.open(
        path, "w", driver=driver, count=count, height=height, width=width, dtype=pixels.dtype, **PLACE, **options
    ) as file:  # fmt: skip
        file.write(pixels)


def numbered(count: int, height: int = 9, width: int = 13, dtype: str = "uint16") -> np.ndarray:
    return np.arange(1, count * height * width + 1).reshape(count, height, width).astype(dtype)


def vrt(sources: str, bands: int = 1, more: str = "") -> str:
    rows = "".join(
        f'<VRTRasterBand dataType="UInt16" band="{n}"{more}><Description>B0{n + 1}</Description>{sources}</VRTRasterBand>'
        for n in range(1, bands + 1)
    )
    place = "<SRS>EPSG:32633</SRS><GeoTransform>300000.0, 10.0, 0.0, 5000000.0, 0.0, -10.0</GeoTransform>"
    return f'<VRTDataset rasterXSize="13" rasterYSize="9">{place}{rows}</VRTDataset>'


def simple(name: str, relative: str = "1") -> str:
    named = f'<SourceFilename relativeToVRT="{relative}">{name}</SourceFilename>'
    return f"<SimpleSource>{named}<SourceBand>1</SourceBand></SimpleSource>"


def test_vrt_of_files_beside_it_is_one_scene(tmp_path: Path):
    pixels = numbered(1)
    tif(tmp_path / "parts" / "x.tif", pixels)
    (tmp_path / "S2A_all.vrt").write_text(vrt(simple("parts/x.tif"), bands=2))
    source = open_source(tmp_path, Options())
    (item,) = source.items
    assert item.key == "S2A_all"
    assert source.contracts["sentinel2"].names == ("B02", "B03")
    assert np.array_equal(source.read(item).parts["sentinel2"].pixels, np.concatenate([pixels, pixels]))
    before = source.fingerprint
    tif(tmp_path / "parts" / "x.tif", numbered(1, 9, 13)[:, ::-1].copy())
    assert open_source(tmp_path, Options()).fingerprint != before


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (vrt(simple("../outside.tif")), "refers to '../outside.tif'; a VRT may name only"),
        (vrt(simple("/etc/hostname", "0")), "refers to '/etc/hostname'"),
        (vrt(simple("/vsicurl/http://127.0.0.1/x.tif", "0")), "refers to '/vsicurl"),
        (vrt(simple("http://127.0.0.1/x.tif")), "refers to 'http:"),
        (vrt(simple("linked.tif")), "refers to 'linked.tif'"),
        (vrt(simple("x.tif", "0")), r"refers to 'x.tif'.*relativeToVRT=1"),
        (vrt(simple("service.tif")), "which is no GeoTIFF, JPEG 2000 or VRT"),
        (vrt(simple("NETCDF:x.nc:v")), "refers to 'NETCDF"),
        (vrt(simple("&lt;GDAL_WMS/&gt;")), "refers to '<GDAL_WMS"),
        (vrt(simple("x.vrt")), "nested deeper"),
        (
            vrt(
                simple("x.tif") + "<PixelFunctionLanguage>Python</PixelFunctionLanguage>", more=' subClass="VRTDerivedRasterBand"'
            ),
            "VRT with VRTDerivedRasterBand is not read, since it can run code",
        ),
        (vrt(simple("x.tif") + "<PixelFunctionCode>print()</PixelFunctionCode>"), "VRT with PixelFunctionCode is not read"),
        (
            vrt("<SourceFilename relativeToVRT='1'>x.tif</SourceFilename>", more=' subClass="VRTRawRasterBand"'),
            "VRTRawRasterBand",
        ),
        ("<VRTDataset><GDALWarpOptions><SourceDataset>x</SourceDataset></GDALWarpOptions></VRTDataset>", "GDALWarpOptions"),
        ('<VRTDataset><Metadata domain="GEOLOCATION"><MDI key="X_DATASET">x</MDI></Metadata></VRTDataset>', "VRT with Metadata"),
        ('<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]><VRTDataset>&a;</VRTDataset>', "declares a document type"),
    ],
)
def test_vrt_that_leads_elsewhere_or_runs_code_is_refused(tmp_path: Path, text: str, match: str):
    folder = tmp_path / "set"
    for path in (folder / "x.tif", tmp_path / "outside.tif"):
        tif(path, numbered(1))
    (folder / "linked.tif").symlink_to(tmp_path / "outside.tif")
    (folder / "service.tif").write_text("<GDAL_WMS></GDAL_WMS>")
    (folder / "x.vrt").write_text(text)
    with pytest.raises(InputError, match=match) as caught:
        open_source(folder, Options())
    assert "\n" not in str(caught.value)


def test_a_name_chooses_the_driver_not_the_content(tmp_path: Path):
    tif(tmp_path / "set" / "x.tif", numbered(1))
    (tmp_path / "set" / "y.tif").write_text(vrt(simple("/etc/hostname", "0")))
    source = open_source(tmp_path / "set", Options(bands=("nir",)))
    assert [scene.broken is None for scene in source.scenes] == [True, False]  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("names", [("cube.img", "cube.hdr"), ("cube.dat", "cube.dat.hdr"), ("cube", "cube.hdr")])
def test_envi_has_the_wavelengths_of_its_header(tmp_path: Path, names: tuple[str, str]):
    pixels = numbered(3, dtype="int16")
    pixels[:, 0, 0] = -99
    tif(tmp_path / "made.img", pixels, "ENVI")
    (tmp_path / "set").mkdir()
    header = (tmp_path / "made.hdr").read_text().split("band names")[0]
    (tmp_path / "set" / names[1]).write_text(
        f"{header}wavelength units = Micrometers\nwavelength = {{0.45, 0.5525, 2.2}}\nfwhm = {{0.01, 0.02, 0.03}}\n"
        "data ignore value = -99\nreflectance scale factor = 5000\n"
    )
    (tmp_path / "set" / names[0]).write_bytes((tmp_path / "made.img").read_bytes())
    source = open_source(tmp_path / "set", Options())
    contract = source.contracts["optical"]
    assert [(b.name, b.wavelength_nm, b.width_nm) for b in contract.bands] == [
        ("450nm", 450, 10), ("552.5nm", 552.5, 20), ("2200nm", 2200, 30),
    ]  # fmt: skip
    part = source.read(source.items[0]).parts["optical"]
    assert np.array_equal(part.pixels, pixels)
    assert (contract.nodata, part.scale, contract.gsd_m) == (-99, 1 / 5000, 10)
    assert part.valid is not None
    assert (part.valid == 0).sum() == 1
    (tmp_path / "set" / names[0]).unlink()
    with pytest.raises(InputError, match="has no data beside it"):
        open_source(tmp_path / "set", Options())


def test_netcdf_variables_are_bands(tmp_path: Path):
    """Variables of one grid, CF style; coordinates and coarser grids are none."""
    (tmp_path / "set").mkdir()
    values = {"red": numbered(1)[0].astype("i2"), "nir": (numbered(1)[0] + 1000).astype("i2")}
    with netcdf_file(tmp_path / "set" / "x.nc", "w") as file:
        file.Conventions = "CF-1.8"
        for axis, size, start, step in (("y", 9, 4_999_995, -10), ("x", 13, 300_005, 10)):
            file.createDimension(axis, size)
            made = file.createVariable(axis, "f8", (axis,))
            made[:] = start + step * np.arange(size)
            made.standard_name, made.units = f"projection_{axis}_coordinate", "m"
        mapping = file.createVariable("crs", "i4", ())
        mapping.grid_mapping_name = "transverse_mercator"
        mapping.spatial_ref = rasterio.crs.CRS.from_epsg(32633).to_wkt()
        for name, pixels in values.items():
            made = file.createVariable(name, "i2", ("y", "x"))
            made[:] = pixels
            made.grid_mapping, made.scale_factor, made.add_offset = "crs", 0.5, 1.0
            made._FillValue = np.int16(5)
    source = open_source(tmp_path / "set", Options())
    contract = source.contracts["optical"]
    assert (contract.names, contract.nodata, contract.gsd_m) == (("red", "nir"), 5, 10)
    part = source.read(source.items[0]).parts["optical"]
    assert np.array_equal(part.pixels, np.stack(list(values.values())))
    assert (part.scale, part.add) == (0.5, 1)
    assert source.items[0].lat == pytest.approx(45.13, abs=0.05)


def test_jpeg_2000_by_band(tmp_path: Path):
    for band, value in (("B02", 7), ("B03", 8)):
        tif(
            tmp_path / f"S2A_x_{band}.jp2", np.full((1, 16, 16), value, np.uint16), "JP2OpenJPEG", QUALITY="100", REVERSIBLE="YES"
        )
    source = open_source(tmp_path, Options())
    assert source.read(source.items[0]).parts["sentinel2"].pixels[:, 0, 0].tolist() == [7, 8]
