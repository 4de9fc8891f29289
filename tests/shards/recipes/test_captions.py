"""RSICD and its kin, SkyScript, ChatEarthNet, GAIA: generated in their published layouts."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from swath.shards.errors import InputError
from swath.shards.ingest import shard
from swath.shards.reader import ShardReader
from swath.shards.recipes.registry import find
from swath.shards.sources.source import Options
from tests.shards.recipes.published import opened, picture, samples, zipped

# every image has a colour of its own, so that a caption which goes to another image fails
COLOURS = {f"{kind}_{n}": (20 * n, 90, 10 * len(kind)) for kind in ("airport", "beach") for n in (1, 2, 3)}


def png(colour: Any, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


def karpathy(path: Path, names: list[str], extension: str, **more: Any) -> None:
    images = [
        {
            "imgid": n, "filename": f"{name}.{extension}", "split": ("train", "train", "val", "test")[n % 4],
            "sentences": [{"raw": f"a {name} , seen {i} ."} for i in range(4)] + [{"raw": f"a {name} , seen 0 ."}],
        } | more
        for n, name in enumerate(names)
    ]  # fmt: skip
    path.write_text(json.dumps({"images": images, "dataset": "x"}))


def check(made: dict[str, Any], folder: str = "") -> None:
    for key, (item, sample) in made.items():
        name = key.removeprefix(folder)
        assert sample.meta["captions"] == [f"a {name} , seen {i} ." for i in range(4)]  # each once
        assert abs(int(sample.parts["rgb"].pixels[0].mean()) - COLOURS[name][0]) <= 2
        assert item.lookup == sample.meta["source"]


def rsicd(root: Path) -> Path:
    for name, colour in COLOURS.items():
        picture(root / "RSICD_images" / f"{name}.jpg", 16, colour=colour)
    karpathy(root / "dataset_rsicd.json", list(COLOURS), "jpg")
    return root


def test_rsicd_as_folder_and_as_zip(tmp_path: Path):
    folder = rsicd(tmp_path / "a")
    packed = tmp_path / "b"
    packed.mkdir()
    zipped(folder / "RSICD_images", packed / "RSICD_images.zip")
    (packed / "dataset_rsicd.json").write_bytes((folder / "dataset_rsicd.json").read_bytes())
    for root in (folder, packed):
        made = samples(opened("rsicd", root))
        assert list(made) == sorted(COLOURS)
        check(made)
        assert [made[name][0].split for name in COLOURS] == ["train", "train", "val", "test", "train", "train"]
        part = made["beach_2"][1].parts["rgb"]
        assert (part.data, part.extension) == ((folder / "RSICD_images" / "beach_2.jpg").read_bytes(), "jpg")


def test_rsicd_to_shards(tmp_path: Path):
    manifests = shard(rsicd(tmp_path / "a"), tmp_path / "out", recipe="rsicd", progress=False)
    assert {name: manifest.samples for name, manifest in manifests.items()} == {"train": 4, "val": 1, "test": 1}
    reader = ShardReader(tmp_path / "out" / "train")
    for n in range(4):
        meta = reader.meta(n)
        assert meta["captions"][1] == f"a {meta['key']} , seen 1 ."
        assert abs(int(reader.pixels(n)[0].mean()) - COLOURS[meta["key"]][0]) <= 2


@pytest.mark.parametrize(
    ("recipe", "images", "listed"), [("rsitmd", "images", "dataset_RSITMD.json"), ("ucm_captions", "imgs", "dataset.json")]
)
def test_the_kin_of_rsicd_in_tiff(tmp_path: Path, recipe: str, images: str, listed: str):
    for n, (name, colour) in enumerate(COLOURS.items()):
        picture(tmp_path / images / f"{name}.tif", (16, 16 + n % 2), colour=colour)  # sizes wobble
    karpathy(tmp_path / listed, list(COLOURS), "tif", keywords=["runway"])
    made = samples(opened(recipe, tmp_path))
    assert len(made) == 6
    check(made)
    assert made["beach_1"][1].meta["keywords"] == ["runway"]
    assert {sample.parts["rgb"].extension for _, sample in made.values()} == {"npy"}


def test_images_and_records_that_do_not_meet_are_counted(tmp_path: Path):
    root = rsicd(tmp_path)
    (root / "RSICD_images" / "beach_3.jpg").unlink()
    picture(root / "RSICD_images" / "stranger.jpg")
    source = opened("rsicd", root)
    assert len(source.items) == 5
    assert "1 records have no image, such as beach_3.jpg" in source.notes
    assert "1 images have no record, and are left out" in source.notes


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "cannot be read .*JSON"),
        ("[" * 100_000, "cannot be read .*JSON"),
        ("[]", "not as published"),
        ('{"images": [{"filename": 3, "sentences": []}]}', "not as published .*named 3"),
        (
            '{"images": [{"filename": "airport_1.jpg", "sentences": [{"raw": "x"}], "split": "../up"}]}',
            r"split is named '\.\./up'",
        ),
        ('{"images": [{"filename": "airport_1.jpg"}]}', "not as published"),
        ('{"images": [{"filename": "../RSICD_images/airport_1.jpg", "sentences": [{"raw": "x"}]}]}', "is not rsicd"),
        ('{"images": []}', "no record of an image"),
    ],
)
def test_lists_that_are_not_as_published(tmp_path: Path, text: str, match: str):
    root = rsicd(tmp_path)
    (root / "dataset_rsicd.json").write_text(text)
    with pytest.raises(InputError, match=match) as caught:
        opened("rsicd", root)
    assert "\n" not in str(caught.value)


def test_what_is_not_there(tmp_path: Path):
    with pytest.raises(InputError, match=r"holds no dataset_rsicd\.json"):
        opened("rsicd", tmp_path)
    with pytest.raises(InputError, match="fixes --chip"):
        find("rsicd").open(rsicd(tmp_path / "a"), Options(chip=64))


def skyscript(root: Path) -> Path:
    """images2 unpacked, images3 still a zip; the same file name in both; meta zips that hold pickles."""
    picture(root / "images2" / "a198234555_CH_19.jpg", 20, colour=(10, 0, 0))
    picture(root / "images2" / "a7_DE_18.jpg", 24, colour=(20, 0, 0))
    picture(root / "tmp" / "images3" / "a198234555_CH_19.jpg", 20, colour=(30, 0, 0))
    zipped(root / "tmp", root / "images3.zip")
    (root / "tmp" / "images3" / "a198234555_CH_19.jpg").unlink()
    (root / "meta").mkdir()
    (root / "meta" / "a7_DE_18.pickle").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    zipped(root / "meta", root / "meta2.zip")
    (root / "meta3.zip").write_bytes(b"not even opened")
    (root / "SkyScript_train_top30pct_filtered_by_CLIP_openai.csv").write_text(
        "filepath,title,title_multi_objects\n"
        'images2/a198234555_CH_19.jpg,"a church, old","a church, old; a wall"\nimages4/gone.jpg,a,b\n'
        "images3/a198234555_CH_19.jpg,a lake,a lake\n"
    )
    (root / "SkyScript_val_5K_filtered_by_CLIP_openai.csv").write_text(
        "filepath,title,title_multi_objects\nimages2/a7_DE_18.jpg,a farm,a farm near a road\n"
    )
    return root


def test_skyscript(tmp_path: Path):
    source = opened("skyscript", skyscript(tmp_path))
    made = samples(source)
    found = {key: (int(s.parts["rgb"].pixels[0].mean()), s.meta["captions"], item.split) for key, (item, s) in made.items()}
    assert found == {
        "images2/a198234555_CH_19": (10, ["a church, old", "a church, old; a wall"], "train"),
        "images3/a198234555_CH_19": (30, ["a lake"], "train"),
        "images2/a7_DE_18": (20, ["a farm", "a farm near a road"], "val"),
    }
    assert any("pickles and are not read" in note for note in source.notes)
    assert "1 records have no image, such as images4/gone.jpg" in source.notes


def test_skyscript_with_a_damaged_list(tmp_path: Path):
    root = skyscript(tmp_path)
    (root / "SkyScript_test_30K.csv").write_text("filepath,title\nimages2/a.jpg\n")
    with pytest.raises(InputError, match=r"SkyScript_test_30K.csv, near row 0"):
        opened("skyscript", root)
    (root / "SkyScript_test_30K.csv").write_text("path,title\nimages2/a.jpg,b\n")
    with pytest.raises(InputError, match="no column 'filepath'"):
        opened("skyscript", root)


def test_chatearthnet(tmp_path: Path):
    for n in range(4):
        picture(tmp_path / "s2_rgb_images" / "s2_images" / f"{n}.png", 16, colour=(40 * n, 1, 2))
    lists = tmp_path / "lists" / "json_files"
    lists.mkdir(parents=True)
    # a list of captions, a text, another name of the field; one image is in two lists, of different splits
    (lists / "ChatEarthNet_caps_35_train.json").write_text(
        json.dumps([{"image": "0.png", "caption": ["zero", "nought"]}, {"image": "1.png", "caption": "one"}])
    )
    (lists / "ChatEarthNet_caps_35_val.json").write_text(json.dumps([{"image_id": "2.png", "caption": "two"}]))
    (lists / "ChatEarthNet_caps_4v_test.json").write_text(json.dumps([{"image": "1.png", "caption": "uno"}]))
    zipped(tmp_path / "lists", tmp_path / "json_files.zip")
    for path in lists.iterdir():
        path.unlink()
    source = opened("chatearthnet", tmp_path)
    made = samples(source)
    assert {key: (item.split, s.meta["captions"]) for key, (item, s) in made.items()} == {
        "0": ("train", ["zero", "nought"]),
        "1": ("test", ["one", "uno"]),  # held out by one list, so held out
        "2": ("val", ["two"]),
    }
    assert [int(s.parts["rgb"].pixels[0].mean()) for _, s in made.values()] == [0, 40, 80]
    assert "1 images have no record, and are left out" in source.notes


def gaia(root: Path, *, packed: bool) -> Path:
    """img2dataset numbers what it fetches; record 2 could not be fetched, and 3 is damaged."""
    root.mkdir()
    entries = [
        {
            "id": f"g{n}", "image_src": f"https://x.org/{n}?a=b.jpg", "image_alt": "alt", "captions": [f"{n} a", f"{n} b"],
            "lat": 10.5 + n, "lon": "20.25" if n else None, "satellite": "Terra", "resolution": "",
        }
        for n in range(5)
    ]  # fmt: skip
    (root / "train_data.json").write_text(json.dumps(entries[:4]).replace("10.5,", "NaN,"))
    (root / "test_data.json").write_text(json.dumps(entries[4:]))
    files = {}
    for number, n in enumerate((4, 0, 1)):
        split = "test" if n == 4 else "train"
        about = {
            "key": f"{number:09d}",
            "url": "https://moved" if n == 1 else entries[n]["image_src"],
            "caption": "alt",
            "status": "success",
        } | ({"id": f"g{n}"} if n else {})
        files |= {f"{split}/{number:09d}.png": png((10 * n, 0, 0)), f"{split}/{number:09d}.json": json.dumps(about).encode()}
    files |= {"train/000000007.png": png((99, 0, 0)), "train/000000007.json": b"{"}
    if packed:
        for split in ("train", "test"):
            (root / split).mkdir()
            with tarfile.open(root / split / "00000.tar", "w") as tar:
                for name, data in files.items():
                    if name.startswith(split):
                        info = tarfile.TarInfo(name.partition("/")[2])
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    else:
        for name, data in files.items():
            path = root / name.replace("/", "/00000/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return root


@pytest.mark.parametrize("packed", [True, False])
def test_gaia(tmp_path: Path, packed: bool):
    source = opened("gaia", gaia(tmp_path / "gaia", packed=packed))
    made = samples(source)
    found = {
        s.meta["gaia_id"]: (int(s.parts["rgb"].pixels[0].mean()), s.meta["captions"], item.split, item.lat, item.lon)
        for item, s in made.values()
    }
    assert found == {
        "g0": (0, ["0 a", "0 b"], "train", None, None),
        "g1": (10, ["1 a", "1 b"], "train", 11.5, 20.25),
        "g4": (40, ["4 a", "4 b"], "test", 14.5, 20.25),
    }
    assert "2 records have no image, such as https://x.org/2?a=b.jpg" in source.notes
    assert made["train/00000/000000001"][1].parts["rgb"].data == png((0, 0, 0))  # as it came
    assert made["train/00000/000000001"][1].meta["gaia_satellite"] == "Terra"


def test_grey_and_damaged_images_are_skipped_and_told(tmp_path: Path):
    root = rsicd(tmp_path / "a")
    picture(root / "RSICD_images" / "airport_1.jpg", 16, "L", 40)  # the first
    (root / "RSICD_images" / "beach_3.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(InputError, match=r"of 6 files .* cannot be decoded, more than --max-failed"):
        shard(root, tmp_path / "out", recipe="rsicd", progress=False)
    manifests = shard(root, tmp_path / "out", recipe="rsicd", max_failed=0.5, progress=False)
    skipped = dict(pair for manifest in manifests.values() for pair in manifest.skipped)
    assert sorted(skipped) == ["airport_1", "beach_3"]
    assert "has 1 band(s) of uint8, the others 3" in skipped["airport_1"]
    assert all(manifest.contract().names == ("red", "green", "blue") for manifest in manifests.values())


def test_no_image_of_the_bands_that_are_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"none of the 6 images of rsicd can be decoded to 4 bands .*has 3 band"):
        opened("rsicd", rsicd(tmp_path), bands=("a", "b", "c", "d"))
