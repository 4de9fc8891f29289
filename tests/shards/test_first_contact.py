"""`swath init`: what is told is found, the rest is guessed and marked, what is odd is said; recipes do as options would."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from swath.shards.contact import first_look
from swath.shards.contact.archive_recipe import ArchiveRecipe, read_archive_recipe
from swath.shards.errors import InputError
from swath.shards.first_contact import confirmed, first_contact
from swath.shards.ingest import shard
from swath.shards.sources.source import Options
from tests.shards.sources import test_landsat as landsat
from tests.shards.sources import test_safe as safe
from tests.shards.sources import test_stac as stac
from tests.shards.test_real_data import need

rasterio = pytest.importorskip("rasterio")
pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning", "ignore::UserWarning")
BANDS = ("B02", "B03", "B04", "B08")


def dn(bands: int = 4, low: int = 200, high: int = 3000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (bands, 32, 40)).astype(np.uint16)


def tif(path: Path, pixels: np.ndarray, *, names: tuple[str, ...] = BANDS, crs: str | None = "EPSG:32633", **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tags, scale = more.pop("tags", {}), more.pop("scale", None)
    place = {"crs": crs, "transform": rasterio.transform.from_origin(5e5, 5e6, 10, 10)} if crs else {}
    with rasterio.open(
        path, "w", driver="GTiff", count=len(pixels), height=pixels.shape[1], width=pixels.shape[2], dtype=pixels.dtype,
        **place, **more,
    ) as file:  # fmt: skip
        if names:
            file.descriptions = names
        if scale is not None:
            file.scales = (scale,) * len(pixels)
        file.update_tags(**tags)
        file.write(pixels)
    return path


def told(folder: Path, count: int = 3, **more: Any) -> Path:
    """An archive whose files say all of themselves."""
    tags = {"SENSOR": "sentinel2", "LEVEL": "L1C"}
    for number in range(count):
        tif(folder / f"{number}.tif", dn(seed=number), tags=tags, scale=1e-4, nodata=0, **more)
    return folder


def init(archive: Path, out: Path) -> tuple[ArchiveRecipe, str, str]:
    """(recipe as read back, its text, warnings)."""
    made, warnings = first_contact(archive, out / "recipe.yaml")
    read = read_archive_recipe(out / "recipe.yaml")
    assert read.entries == made.entries, "what is written must be read as what was meant"
    assert Path(read.source) == archive
    return read, (out / "recipe.yaml").read_text(), "\n".join(warnings)


def test_what_files_tell_is_found_and_needs_no_confirmation(tmp_path: Path):
    recipe, text, warnings = init(told(tmp_path / "set"), tmp_path)
    assert not recipe.unconfirmed
    assert not warnings
    assert {n: e.found for n, e in recipe.entries.items() if not e.given} == {
        "sensor": "sentinel2", "level": "L1C", "bands": BANDS, "unit": "reflectance", "scale": 1e-4, "add": 0.0, "nodata": 0.0,
        "gsd": 10.0,
    }  # fmt: skip
    assert "file tag SENSOR of 3 of 3 scenes" in text
    assert "- B02       # 492.4 nm, blue, 10 m" in text
    assert confirmed(tmp_path / "recipe.yaml") == (tmp_path / "set", None, Options()), "found is left to the files"


def test_names_and_customs_are_guesses(tmp_path: Path):
    for number in range(3):
        tif(tmp_path / "set" / f"S2A_MSIL2A_2018010{number + 1}T101010_{number}.tif", dn(seed=number))
    recipe, text, _ = init(tmp_path / "set", tmp_path)
    unsure = {name for name, entry in recipe.entries.items() if not entry.confirm}
    assert unsure == {"sensor", "level", "unit", "scale", "add", "nodata"}
    assert "file name, such as S2A_MSIL2A_20180101T101010_0.tif, of 3 of 3 scenes" in text
    assert "dates  2018-01-01 to 2018-01-03" in text
    assert "EPSG:32633" in text
    assert "40×32" in text


def test_a_mark_keeps_shard_waiting(tmp_path: Path):
    tif(tmp_path / "set" / "S2A.tif", dn())
    init(tmp_path / "set", tmp_path)
    path = tmp_path / "recipe.yaml"
    with pytest.raises(InputError, match="6 guesses to confirm") as refused:
        confirmed(path)
    assert len(str(refused.value).splitlines()) == 1 + 6
    assert "\n  sensor: sentinel2 (file name" in str(refused.value)
    assert confirmed(path, yes=True)[2] == Options()
    path.write_text(path.read_text().replace("confirm: false", "confirm: true", 5))
    with pytest.raises(InputError, match="1 guesses to confirm"):
        confirmed(path)
    path.write_text(path.read_text().replace("  confirm: false", "").replace(", confirm: false", ""))
    assert confirmed(path)[2] == Options()


def test_a_recipe_does_what_its_options_do(tmp_path: Path):
    for number in range(4):
        tif(tmp_path / "set" / f"{number}.tif", dn(seed=number), names=())
    init(tmp_path / "set", tmp_path)
    path = tmp_path / "recipe.yaml"
    value = {
        "source": "set", "bands": list(BANDS), "sensor": {"value": "sentinel2"}, "level": {"value": "L2A", "because": "I know"},
        "scale": "1e-4", "add": -0.1, "nodata": 0, "chip": 16, "stride": 8, "gsd": 20, "resampling": "average",
    }  # fmt: skip
    path.write_text(yaml.safe_dump(value))
    source, layout, options = confirmed(path)
    assert (source, layout) == (tmp_path / "set", None)
    said = Options(
        chip=16, stride=8, bands=BANDS, sensor="sentinel2", level="L2A", scale=1e-4, add=-0.1, nodata=0.0, gsd_m=20.0,
        resampling="average",
    )  # fmt: skip
    assert options == said
    one = shard(source, tmp_path / "one", options=options, recipe=layout, progress=False)[""]
    two = shard(tmp_path / "set", tmp_path / "two", options=said, progress=False)[""]
    assert one == two
    assert one.contract().names == BANDS


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("source: set\nsensr: sentinel2\n", "sensr: unknown key; did you mean sensor?"),
        ("source: set\nsensor: {value: a, becuse: b}\n", "sensor.becuse: unknown key; did you mean because?"),
        ("source: set\nsensor: {value: a, found: b}\n", "sensor: an entry holds either found or value"),
        ("source: set\nsensor: {because: b}\n", "sensor: an entry holds either found or value"),
        ("source: set\nunit: furlongs\n", "unit.value: Input should be 'reflectance'"),
        ("source: set\nchip: many\n", "chip.value: "),
        ("source: set\nbands: B02\n", "bands.value: "),
        ("source: set\nscale: .nan\n", "scale.value: "),
        ("source: set\nsensor: a\nsensor: b\n", "sensor stands twice"),
        ("source: set\nsensor: {confirm: false, value: a, confirm: true}\n", "confirm stands twice"),
        ("source: &a set\nsensor: *a\n", "alias"),
        ("source: !!python/object/apply:os.system [true]\n", "not YAML"),
        ("source: 2019-99-99\n", "not YAML"),
        ("source: set\nbands: " + "[" * 5000, "nested deeper"),
        ("sensor: sentinel2\n", "no entry `source`"),
        ("- source\n", "no entry `source`"),
        ("", "no entry `source`"),
        ("source: [", "not YAML"),
        ("source: a\n---\nsource: b\n", "not YAML"),
        ("#" * (1 << 19), "larger than 256 KiB"),
        ("source: set\nrecipe: eurosat_rbg\n", "did you mean eurosat_rgb"),
        ("source: elsewhere\nsensor: {found: sentinel2}\n", "elsewhere does not exist"),
    ],
)
def test_edits_that_cannot_be_meant(tmp_path: Path, text: str, match: str):
    told(tmp_path / "set", 1)
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        source, layout, options = confirmed(path)
        shard(source, tmp_path / "out", options=options, recipe=layout, progress=False)
    assert match in str(refused.value)


def test_what_was_found_must_still_be_so(tmp_path: Path):
    """A finding that somebody edits, or files that have changed, are no silent no-op."""
    init(told(tmp_path / "set"), tmp_path)
    path = tmp_path / "recipe.yaml"
    text = path.read_text()
    path.write_text(text.replace("found: sentinel2", "found: landsat8"))
    with pytest.raises(InputError, match=r"sensor: landsat8 was found, and now it is sentinel2"):
        confirmed(path)
    path.write_text(text)
    told(tmp_path / "set", 3, crs="EPSG:32634")
    assert confirmed(path)[2] == Options()
    for number in range(3):
        tif(tmp_path / "set" / f"{number}.tif", dn(), tags={"SENSOR": "sentinel2", "LEVEL": "L2A"}, scale=1e-4, nodata=0)
    with pytest.raises(InputError, match="level: L1C was found, and now it is L2A"):
        confirmed(path)


def test_the_offset_that_no_file_mentions(tmp_path: Path):
    for number in range(3):
        tif(tmp_path / "set" / f"S2A_{number}.tif", dn(low=1100, high=4000, seed=number))
    recipe, _, warnings = init(tmp_path / "set", tmp_path)
    assert (recipe.entries["add"].value, recipe.entries["add"].confirm) == (-0.1, False)
    assert "900 DN or more in 3 of 3 chips" in recipe.entries["add"].because
    assert "add: " in warnings
    assert confirmed(tmp_path / "recipe.yaml", yes=True)[2] == Options(add=-0.1)


def test_dn_on_another_scale_than_the_sensors(tmp_path: Path):
    for number in range(3):
        tif(tmp_path / "Sentinel-2" / f"{number}.tif", dn(low=3000, high=60000, seed=number))
    recipe, _, warnings = init(tmp_path / "Sentinel-2", tmp_path)
    assert recipe.entries["sensor"].value == "sentinel2"
    assert recipe.entries["sensor"].because == "the name of the folder, Sentinel-2"
    assert (recipe.entries["scale"].value, recipe.entries["scale"].confirm) == (1 / 65535, False)
    assert "too bright for the usual 10000" in warnings


def test_zeros_that_nobody_declares(tmp_path: Path):
    pixels = dn(3)
    pixels[:, :20] = 0
    tif(tmp_path / "set" / "a.tif", pixels, names=("red", "green", "nir"), crs=None)
    recipe, text, warnings = init(tmp_path / "set", tmp_path)
    assert (recipe.entries["nodata"].value, recipe.entries["nodata"].confirm) == (0, False)
    assert "62% of the pixels" in warnings
    assert "1 scenes have no georeference" in warnings
    assert "CRS    none" in text
    assert not recipe.entries["sensor"].confirm
    assert not recipe.entries["unit"].confirm


def test_bands_without_names(tmp_path: Path):
    tif(tmp_path / "set" / "a.tif", dn(4), names=())
    recipe, _, _ = init(tmp_path / "set", tmp_path)
    assert recipe.entries["bands"].value == ("b01", "b02", "b03", "b04")
    assert not recipe.entries["bands"].confirm
    (tmp_path / "recipe.yaml").unlink()
    tif(tmp_path / "set" / "a.tif", dn(13), names=())
    recipe, _, _ = init(tmp_path / "set", tmp_path)
    assert recipe.options.bands is not None
    assert recipe.options.bands[-1] == "b13", "13 bands alone do not make a Sentinel-2"
    (tmp_path / "set" / "a.tif").rename(tmp_path / "set" / "S2A.tif")
    (tmp_path / "recipe.yaml").unlink()
    recipe, _, _ = init(tmp_path / "set", tmp_path)
    assert (recipe.options.bands or ())[8:10] == ("B8A", "B09")
    assert not recipe.entries["bands"].confirm


def test_mixtures_and_damage_are_said(tmp_path: Path):
    for number in range(3):
        tif(tmp_path / "set" / f"S2A_{number}.tif", dn(), crs=f"EPSG:3263{number}")
    tif(tmp_path / "set" / "S2B_0.tif", dn(3), names=BANDS[:3])
    tif(tmp_path / "set" / "S2B_1.tif", dn().astype(np.float32))
    (tmp_path / "set" / "S2B_2.tif").write_bytes(b"II*\0 no more")
    recipe, text, warnings = init(tmp_path / "set", tmp_path)
    assert recipe.entries["bands"].found == BANDS
    assert "1 have 3 bands (B02, B03, B04) of uint16" in warnings
    assert "of float32" in warnings
    assert "1 of 6 scenes cannot be opened: S2B_2.tif" in warnings
    assert "scenes are in 3 reference systems" in warnings
    assert all(f"# ! {line}" in text for line in warnings.splitlines())


def test_raw_radar_is_refused(tmp_path: Path):
    tif(tmp_path / "set" / "s1a-iw-grd-vv-20200101t000000-20200101t000025-030000-000000-001.tiff", dn(1), names=())
    with pytest.raises(InputError, match="calibrate and terrain-correct it first"):
        first_contact(tmp_path / "set", tmp_path / "recipe.yaml")
    assert not (tmp_path / "recipe.yaml").exists()


def test_images_in_class_folders(tmp_path: Path):
    for label in ("a", "b"):
        (tmp_path / "set" / label).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (32, 24), (number, 5, 9)).save(tmp_path / "set" / label / f"{number}.png")
    (tmp_path / "set" / "a" / "bad.png").write_bytes(b"none")
    recipe, text, warnings = init(tmp_path / "set", tmp_path)
    assert not recipe.unconfirmed
    assert recipe.layout is None, "class folders of images are of no data set in particular"
    assert "labels 2: a, b" in text
    assert "1 of 7 that were decoded are damaged: a/bad.png" in warnings
    assert confirmed(tmp_path / "recipe.yaml") == (tmp_path / "set", None, Options())


def test_published_data_sets_by_their_layout(tmp_path: Path):
    for label in ("Forest", "River"):
        folder = tmp_path / "set" / "EuroSAT_RGB" / label
        folder.mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (64, 64), (number, 5, 9)).save(folder / f"{label}_{number + 1}.jpg")
    recipe, text, _ = init(tmp_path / "set", tmp_path)
    assert (recipe.layout, list(recipe.entries)) == ("eurosat_rgb", ["recipe"])
    assert "6 of 6 file names" in text
    with pytest.raises(InputError, match="recipe: eurosat_rgb"):
        confirmed(tmp_path / "recipe.yaml")
    source, layout, options = confirmed(tmp_path / "recipe.yaml", yes=True)
    assert shard(source, tmp_path / "out", options=options, recipe=layout, progress=False)[""].dataset == "eurosat_rgb"


def test_products_tell_all_of_themselves(tmp_path: Path):
    """Old and new baseline together: each keeps its own offset, and a recipe must not give one to both."""
    for name, baseline, offset in ((safe.L2A, "04.00", -1000), (safe.OLD, "02.06", None)):
        safe.product(tmp_path / "safe", name, baseline, offset)
    landsat.scene(tmp_path / "landsat", landsat.L8, landsat.SURFACE | {"ST_B10": 44_000}, landsat.second_level())
    (tmp_path / "stac").mkdir()
    stac.item(tmp_path / "stac", "one")
    for kind, level, bands, add in (("safe", "L2A", 12, None), ("landsat", "L2SP", 7, -0.2), ("stac", "L2A", 5, -0.1)):
        (tmp_path / f"{kind}_recipe").mkdir()
        recipe, text, _ = init(tmp_path / kind, tmp_path / f"{kind}_recipe")
        assert not recipe.unconfirmed
        assert recipe.options == Options()
        assert (recipe.entries["level"].found, recipe.entries["add"].found) == (level, add)
        assert len(recipe.entries["bands"].found or ()) == bands
        assert f"({kind}); " in text
        assert confirmed(tmp_path / f"{kind}_recipe" / "recipe.yaml")[2] == Options()
    assert "each file keeps its own" in (tmp_path / "safe_recipe" / "recipe.yaml").read_text()


def test_only_a_few_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Evenly over the archive, whose first and last files are among them."""
    told(tmp_path / "set", 150)
    opened: list[str] = []
    scene = first_look.raster_scene

    def counted(source: Path, name: str, *rest: Any) -> Any:
        opened.append(name)
        return scene(source, name, *rest)

    monkeypatch.setattr(first_look, "raster_scene", counted)
    _, text, _ = init(tmp_path / "set", tmp_path)
    assert len(opened) == 20
    assert {"0", "99"} <= set(opened)
    assert "150 scenes (rasters); 20 opened" in text
    opened.clear()
    confirmed(tmp_path / "recipe.yaml")
    assert len(opened) == 20


def test_names_of_files_are_no_yaml(tmp_path: Path):
    """What an archive calls its files, bands and folders must not become entries of the recipe, nor break it."""
    archive = tmp_path / 'a: "b" #\nlevel: L9 \u2028'
    for number in range(2):
        tif(archive / f"S2A_{number}\nadd: 7.tif", dn(), names=("B02", "x\ny: 1", "on", "1e3"), crs=None)
    (archive / "S2A_\nnodata: 3.tif").write_bytes(b"II*\0none")
    recipe, _, _ = init(archive, tmp_path)
    assert recipe.entries["bands"].found == ("B02", "x\ny: 1", "on", "1e3")
    assert recipe.options == Options()
    assert confirmed(tmp_path / "recipe.yaml", yes=True)[0] == archive


def test_what_is_there_is_not_overwritten(tmp_path: Path):
    init(told(tmp_path / "set"), tmp_path)
    with pytest.raises(InputError, match="may have been edited"):
        first_contact(tmp_path / "set", tmp_path / "recipe.yaml")
    with pytest.raises(InputError, match="must end in"):
        first_contact(tmp_path / "set", tmp_path / "recipe")
    for empty in ("nothing", "missing"):
        (tmp_path / "nothing").mkdir(exist_ok=True)
        with pytest.raises(InputError):
            first_contact(tmp_path / empty, tmp_path / "other.yaml")
        assert not (tmp_path / "other.yaml").exists()


def test_sentinel2_scene_on_another_scale(tmp_path: Path):
    recipe, _, warnings = init(need("scenes/s2_scene_aquileia"), tmp_path)
    assert "DN are taken as reflectance · 65535, and sentinel2's are customarily · 10000" in warnings
    entries = recipe.entries
    assert (entries["sensor"].found, entries["level"].found) == ("sentinel2", "L2A")
    assert len(entries["bands"].found or ()) == 12
    assert (entries["scale"].found, entries["scale"].confirm) == (pytest.approx(1 / 65535), False)
    assert (entries["chip"].value, entries["chip"].confirm) == (64, True)


def test_landsat_scene_without_metadata(tmp_path: Path):
    recipe, text, _ = init(need("scenes/landsat8_LC81210442015044LGN00"), tmp_path)
    entries = recipe.entries
    assert (entries["sensor"].found, entries["unit"].found, entries["nodata"].found) == ("landsat8", "digital number", 0)
    assert not (entries["sensor"].confirm or entries["unit"].confirm or entries["nodata"].confirm or entries["level"].confirm)
    assert "32% of the pixels" in entries["nodata"].because
    assert "- B4        # 655 nm, red, 150.02 m" in text


def test_published_samples(tmp_path: Path):
    recipe, text, _ = init(need("bigearthnet_samples/S2"), tmp_path)
    assert recipe.layout == "bigearthnet_v1"
    assert "132 of 132 file names" in text
    assert asdict(recipe.options) == asdict(Options())
    for number, (name, layout) in enumerate((("hsi/SalinasA", "salinas_a"), ("EuroSAT_RGB.zip", "eurosat_rgb"))):
        (tmp_path / str(number)).mkdir()
        assert init(need(name), tmp_path / str(number))[0].layout == layout


def test_the_documented_recipes_are_recipes(tmp_path: Path):
    page = (Path(__file__).parents[2] / "docs" / "first-contact.md").read_text()
    blocks = page.split("```yaml\n")[1:]
    assert len(blocks) == 2
    for block, count in zip(blocks, (5, 1), strict=True):
        (tmp_path / "recipe.yaml").write_text(block.partition("```")[0])
        assert len(read_archive_recipe(tmp_path / "recipe.yaml").unconfirmed) == count
