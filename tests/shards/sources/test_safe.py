"""Sentinel-2 products in the published tree, every band with its own constant; old and new baselines mean the same."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from swath.shards.errors import InputError
from swath.shards.ingest import shard
from swath.shards.reader import ShardReader
from swath.shards.sources.open import open_source
from swath.shards.sources.source import Options

rasterio = pytest.importorskip("rasterio")
from rasterio.transform import from_origin  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
NATIVE = {
    "B01": 60, "B02": 10, "B03": 10, "B04": 10, "B05": 20, "B06": 20, "B07": 20, "B08": 10, "B8A": 20, "B09": 60,
    "B10": 60, "B11": 20, "B12": 20,
}  # fmt: skip
VALUE = {name: 500 + 100 * number for number, name in enumerate(NATIVE)}  # reflectance · 10000
GROUND_M = 240
L2A = "S2A_MSIL2A_20220210T101141_N0400_R022_T32TQM_20220210T131529"
OLD = "S2A_MSIL2A_20180210T101141_N0206_R022_T32TQM_20180210T131529"
L1C = "S2B_MSIL1C_20190416T101029_N0207_R022_T33TUL_20190416T121510"


def jp2(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    side = len(pixels)
    place = {"crs": "EPSG:32632", "transform": from_origin(699_960, 5_100_000, GROUND_M / side, GROUND_M / side)}
    with rasterio.open(
        path, "w", driver="JP2OpenJPEG", count=1, height=side, width=side, dtype=pixels.dtype,
        QUALITY="100", REVERSIBLE="YES", **place,
    ) as file:  # fmt: skip
        file.write(pixels, 1)
    Path(f"{path}.aux.xml").unlink(missing_ok=True)


def metadata(level: str, baseline: str, offsets: list[int], quantification: str = "10000", start: str = "") -> str:
    """The elements of MTD_MSIL1C.xml and MTD_MSIL2A.xml that say what the numbers mean, where they stand in them."""
    long, tag = {"L1C": ("Level-1C", "RADIO_ADD_OFFSET"), "L2A": ("Level-2A", "BOA_ADD_OFFSET")}[level]
    row = "".join(f'<{tag} band_id="{i}">{v}</{tag}>' for i, v in enumerate(offsets))
    listed = {"L1C": "Radiometric_Offset_List", "L2A": "BOA_ADD_OFFSET_VALUES_LIST"}[level]
    values = {
        "L1C": f'<QUANTIFICATION_VALUE unit="none">{quantification}</QUANTIFICATION_VALUE>',
        "L2A": f'<QUANTIFICATION_VALUES_LIST><BOA_QUANTIFICATION_VALUE unit="none">{quantification}</BOA_QUANTIFICATION_VALUE>'
        '<AOT_QUANTIFICATION_VALUE unit="none">1000.0</AOT_QUANTIFICATION_VALUE></QUANTIFICATION_VALUES_LIST>',
    }[level]
    root = f"{long}_User_Product"
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>{start}<n1:{root} xmlns:n1="https://psd-15.sentinel2.eo.esa.int/PSD/User.xsd">'
        f"<n1:General_Info><Product_Info><PRODUCT_START_TIME>2022-02-10T10:11:41.024Z</PRODUCT_START_TIME>"
        f"<PROCESSING_BASELINE>{baseline}</PROCESSING_BASELINE></Product_Info><Product_Image_Characteristics>{values}"
        f"{f'<{listed}>{row}</{listed}>' if offsets else ''}</Product_Image_Characteristics></n1:General_Info>"
        f"<n1:Quality_Indicators_Info><Cloud_Coverage_Assessment>12.5</Cloud_Coverage_Assessment></n1:Quality_Indicators_Info>"
        f"</n1:{root}>"
    )


def product(
    folder: Path, name: str, baseline: str, offset: int | None, scl: np.ndarray | None = None, without: tuple[str, ...] = ()
) -> Path:
    """A `.SAFE` folder; L2A has its bands at coarser sizes too (with values that must not be taken), TCI, AOT and WVP."""
    level, tile = name[7:10], name[38:44]
    root = folder / f"{name}.SAFE"
    images = root / "GRANULE" / f"{level}_{tile}_A034678_20220210T101141" / "IMG_DATA"
    stem = f"{tile}_{name[11:26]}"
    for band, gsd in NATIVE.items():
        if band in without or (level == "L2A" and band == "B10"):
            continue
        pixels = np.full((GROUND_M // gsd,) * 2, VALUE[band] - (offset or 0), np.uint16)
        if level == "L1C":
            jp2(images / f"{stem}_{band}.jp2", pixels)
            continue
        jp2(images / f"R{gsd}m" / f"{stem}_{band}_{gsd}m.jp2", pixels)
        if gsd < 60:
            jp2(images / "R60m" / f"{stem}_{band}_60m.jp2", np.full((4, 4), 9999, np.uint16))
    if level == "L2A":
        jp2(images / "R20m" / f"{stem}_SCL_20m.jp2", np.full((12, 12), 4, np.uint8) if scl is None else scl)
        for other in ("TCI", "AOT", "WVP"):
            jp2(images / "R10m" / f"{stem}_{other}_10m.jp2", np.full((24, 24), 1, np.uint8))
    jp2(root / "GRANULE" / images.parent.name / "QI_DATA" / "MSK_CLDPRB_20m.jp2", np.zeros((12, 12), np.uint8))
    offsets = [] if offset is None else [offset] * 13
    (root / f"MTD_MSI{level}.xml").write_text(metadata(level, baseline, offsets))
    (root / "manifest.safe").write_text("<xfdu/>")
    return root


def zipped(root: Path, out: Path) -> Path:
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, path.relative_to(root.parent).as_posix())
    return out


def test_old_and_new_baseline_mean_the_same(tmp_path: Path):
    """Through the whole ingest: DN as stored, and one reflectance from both."""
    product(tmp_path / "set", OLD, "02.06", None)
    product(tmp_path / "set", L2A, "04.00", -1000)
    manifest = shard(tmp_path / "set", tmp_path / "out", progress=False)[""]
    contract, reader = manifest.contract(), ShardReader(tmp_path / "out")
    names = tuple(name for name in NATIVE if name != "B10")
    assert contract.names == names
    assert [b.gsd_m for b in contract.bands] == [NATIVE[n] for n in names]
    assert (contract.sensor, contract.level, contract.unit, contract.nodata) == ("sentinel2", "L2A", "reflectance", 0)
    assert (contract.gsd_m, contract.resampling, contract.height) == (10, "nearest to the finest grid", 24)
    seen = set()
    for number in range(2):
        meta, pixels = reader.meta(number), reader.pixels(number)
        told = meta["radiometry"]["sentinel2"]
        physical = pixels * told["scale"] + told["add"]
        np.testing.assert_allclose(
            physical, np.broadcast_to(np.array([VALUE[n] / 1e4 for n in names])[:, None, None], physical.shape)
        )
        seen.add((meta["baseline"], int(pixels[0, 0, 0]), told["add"]))
        assert "BOA_ADD_OFFSET" in told["scale_source"]
        assert (meta["tile"], meta["time"], meta["scene_cloud"]) == ("32TQM", "2022-02-10T10:11:41.024000+00:00", 0.125)
    assert seen == {("02.06", 500, 0.0), ("04.00", 1500, -0.1)}
    np.testing.assert_allclose(contract.normalisation.std, 0, atol=1e-9)


@pytest.mark.parametrize(("baseline", "offset"), [("02.07", None), ("05.10", -1000)])
def test_level_1c_has_thirteen_bands(tmp_path: Path, baseline: str, offset: int | None):
    root = product(tmp_path, L1C, baseline, offset)
    source = open_source(root, Options())
    contract = source.contracts["sentinel2"]
    assert (contract.names, contract.level) == (tuple(NATIVE), "L1C")
    part = source.read(source.items[0]).parts["sentinel2"]
    np.testing.assert_allclose(part.pixels[:, 3, 3] * part.scale + part.add, [VALUE[n] / 1e4 for n in NATIVE])
    assert part.valid is None


def test_scene_classification_becomes_the_mask(tmp_path: Path):
    scl = np.full((12, 12), 4, np.uint8)
    scl[0] = np.arange(12)
    source = open_source(product(tmp_path, L2A, "04.00", -1000, scl).parent, Options())
    valid = source.read(source.items[0]).parts["sentinel2"].valid
    assert valid is not None
    assert valid[0].tolist() == np.repeat([0, 0, 1, 3, 1, 1, 1, 1, 2, 2, 2, 1], 2).tolist()
    assert (valid[2:] == 1).all()


def test_items_know_place_time_and_cloud(tmp_path: Path):
    source = open_source(product(tmp_path, L2A, "04.00", -1000).parent, Options(chip=8))
    assert len(source.items) == 9
    first, *_, last = source.items
    assert (first.time, first.cloud, first.lookup) == ("2022-02-10T10:11:41.024000+00:00", 0.125, f"{L2A}.SAFE")
    assert (first.lat, first.lon) == (pytest.approx(46.02, abs=0.05), pytest.approx(11.58, abs=0.05))
    assert (first.lat or 0) > (last.lat or 0)
    assert (first.lon or 0) < (last.lon or 0)


def test_zips_are_read_where_they_lie(tmp_path: Path):
    root = product(tmp_path / "made", L2A, "04.00", -1000)
    (tmp_path / "zips").mkdir()
    path = zipped(root, tmp_path / "zips" / "download 1.zip")
    plain = open_source(root, Options(chip=10))
    for place in (path, path.parent):
        source = open_source(place, Options(chip=10))
        assert source.contracts == plain.contracts
        assert [item.key for item in source.items] == [item.key for item in plain.items]
        for mine, theirs in zip(source.items, plain.items, strict=True):
            assert np.array_equal(source.read(mine).parts["sentinel2"].pixels, plain.read(theirs).parts["sentinel2"].pixels)
    product(path.parent, L2A, "04.00", -1000)
    with pytest.raises(InputError, match=f"holds {L2A} twice"):
        open_source(path.parent, Options())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../outside.xml", "x")
    with pytest.raises(InputError, match="leads outside; nothing was read"):
        open_source(path, Options())


def test_chosen_bands_in_the_order_asked_for(tmp_path: Path):
    source = open_source(product(tmp_path, L2A, "04.00", -1000).parent, Options(bands=("B12", "B02")))
    part = source.read(source.items[0]).parts["sentinel2"]
    assert source.contracts["sentinel2"].names == ("B12", "B02")
    assert part.pixels[:, 0, 0].tolist() == [VALUE["B12"] + 1000, VALUE["B02"] + 1000]
    with pytest.raises(InputError, match="--bands names B10; Sentinel-2 L2A has B01"):
        open_source(tmp_path, Options(bands=("B10",)))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (metadata("L2A", "04.00", []), "baseline 04.00 has a BOA_ADD_OFFSET for each band, and there is none"),
        (metadata("L2A", "04.00", [-1000] * 13, "0"), "BOA_QUANTIFICATION_VALUE is 0"),
        (metadata("L2A", "04.00", [-1000] * 13, "ten"), "'ten', not a number"),
        (metadata("L2A", "four", [-1000] * 13), "PROCESSING_BASELINE is 'four'"),
        ("<a><b></a>", "is no XML that can be read"),
    ],
)
def test_damaged_metadata_is_listed_with_its_reason(tmp_path: Path, text: str, reason: str):
    product(tmp_path / "set", OLD, "02.06", None)
    broken = product(tmp_path / "set", L2A, "04.00", -1000)
    (broken / "MTD_MSIL2A.xml").write_text(text)
    manifest = shard(tmp_path / "set", tmp_path / "out", max_failed=0.5, progress=False)[""]
    assert manifest.samples == 1
    ((key, said),) = manifest.skipped
    assert key == L2A
    assert reason in said


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (metadata("L2A", "04.00", [-1000] * 12 + [-900]), r"bands have different BOA_ADD_OFFSET \(-1000, -900\)"),
        (metadata("L2A", "04.00", [-1000] * 13, start='<!DOCTYPE x [<!ENTITY a "b">]>'), "declares a document type"),
    ],
)
def test_metadata_that_contradict_themselves_or_try_something(tmp_path: Path, text: str, match: str):
    root = product(tmp_path, L2A, "04.00", -1000)
    (root / "MTD_MSIL2A.xml").write_text(text)
    with pytest.raises(InputError, match=match):
        open_source(tmp_path, Options())


def test_missing_and_damaged_bands(tmp_path: Path):
    root = product(tmp_path / "one", L2A, "04.00", -1000, without=("B09",))
    source = open_source(root, Options())
    assert f"{L2A} lacks B09" in source.notes
    product(tmp_path / "one", OLD, "02.06", None)
    with pytest.raises(InputError, match=f"{L2A} lacks B09"):
        open_source(tmp_path / "one", Options())
    damaged = product(tmp_path / "two", L2A, "04.00", -1000)
    next(damaged.rglob("*_B05_20m.jp2")).write_bytes(b"\0\0\0\x0cjP  ")
    with pytest.raises(InputError, match=r"none of the 1 scenes in .* can be read \(cannot be opened"):
        open_source(tmp_path / "two", Options())


def test_kinds_that_do_not_go_together(tmp_path: Path):
    product(tmp_path / "levels", L2A, "04.00", -1000, without=("B09",))
    product(tmp_path / "levels", L1C, "02.07", None)
    with pytest.raises(InputError, match=r"scenes differ: S2A_MSIL2A.*S2B_MSIL1C.*make shards from one kind"):
        open_source(tmp_path / "levels", Options())
    raw = tmp_path / "raw" / "S1A_IW_GRDH_1SDV_20200101T052712_20200101T052737_030605_0381B5_1A2B.SAFE"
    (raw / "measurement").mkdir(parents=True)
    (raw / "manifest.safe").write_text("<xfdu/>")
    (raw / "measurement" / "s1a-iw-grd-vv-20200101t052712-20200101t052737-030605-0381b5-001.tiff").write_bytes(b"II*\0")
    zipped(raw, tmp_path / "raw.zip")
    for path in (raw, raw.parent, tmp_path / "raw.zip", raw / "measurement"):
        with pytest.raises(InputError, match=r"raw Sentinel-1 product.*calibrate and terrain-correct it first"):
            open_source(path, Options())
    product(tmp_path / "mixed", L2A, "04.00", -1000)
    (tmp_path / "mixed" / "LC08_L2SP_191030_20200605_20200824_02_T1_MTL.txt").write_text("GROUP = LANDSAT_METADATA_FILE")
    with pytest.raises(InputError, match=r"holds \.SAFE products .* and Landsat scenes"):
        open_source(tmp_path / "mixed", Options())
