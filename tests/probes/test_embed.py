"""Features of shards and of the scenes that they were cut from are the same; scenes cost no more memory for being large."""

import gc
import json
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swath.hub.load import load_backbone
from swath.launch.cli import main
from swath.probes.embed import embed
from swath.probes.features import extract
from swath.probes.neighbours import Index, nearest, retrieve
from swath.shards.errors import InputError
from swath.shards.ingest import shard
from swath.shards.prepare import prepare
from swath.shards.reader import ShardReader
from swath.shards.sources.cut import Scenes
from swath.shards.sources.source import Options
from tests.hub.made import loaded, save_run, write_shards

parquet = pytest.importorskip("pyarrow.parquet")
rasterio = pytest.importorskip("rasterio")
from rasterio.transform import from_origin  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning", "ignore::UserWarning")
NAMES = ("B02", "B03", "B04", "B08")


def scene(path: Path, height: int, width: int, *, sparse: bool = False) -> Path:
    """Four bands of Sentinel-2 at 10 m with an offset of −1000 DN, some nodata, and a mask of clouds beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {
        "driver": "GTiff", "height": height, "width": width, "crs": "EPSG:32633", "nodata": 0, "tiled": True,
        "blockxsize": 128, "blockysize": 128, "transform": from_origin(500_000, 5_000_000, 10, 10),
    }  # fmt: skip
    with rasterio.open(path, "w", count=4, dtype="uint16", sparse_ok=True, **options) as file:
        file.descriptions = NAMES
        file.update_tags(SENSOR="sentinel2", LEVEL="L2A", BOA_ADD_OFFSET="-1000", ACQUIRED="2020-06-01T10:00:00")
        if sparse:
            rows = np.full((4, 16, width), 2500, np.uint16)
            for top in range(0, height, 16):
                file.write(rows, window=((top, top + 16), (0, width)))
        else:
            dn = np.random.default_rng(height).integers(1100, 5000, (4, height, width)).astype(np.uint16)
            dn[:, :9, :5] = 0
            file.write(dn)
    if not sparse:
        codes = np.ones((1, height, width), np.uint8)
        codes[:, -20:, -20:] = 2
        with rasterio.open(
            path.with_name(f"{path.stem}_valid.tif"), "w", count=1, dtype="uint8", **options | {"nodata": None}
        ) as f:
            f.write(codes)
    return path


def backbone(folder: Path, data: Path) -> Path:
    """A run that was trained on such scenes, at 16 × 16 pixels."""
    (made,) = ShardReader(data).contracts.values()
    source = loaded(made)
    source.contracts = {made.modality: made}
    return save_run(source, folder)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(scene, shards of its 32-pixel chips, run)"""
    folder = tmp_path_factory.mktemp("cut")
    file = scene(folder / "archive" / "S2A_town.tif", 96, 160)
    shard(folder / "archive", folder / "shards", options=Options(chip=32), max_nodata=1.0, progress=False)
    return file, folder / "shards", backbone(folder / "run", folder / "shards")


def rows(path: Path) -> dict[str, dict[str, Any]]:
    table = parquet.read_table(path).to_pylist()
    assert len({row["key"] for row in table}) == len(table)
    return {row["key"]: row for row in table}


def test_shards_and_the_scene_they_were_cut_from(cut: tuple[Path, Path, Path], tmp_path: Path) -> None:
    file, shards, run = cut
    of_shards = embed(run, shards, tmp_path / "shards.parquet", progress=False)
    of_scene = embed(run, file, tmp_path / "scene.parquet", tile=32, batch=4, progress=False)
    embed(run, file.parent, tmp_path / "folder.parquet", tile=32, progress=False)
    assert of_shards.rows == of_scene.rows == 15 and of_scene.width == 24
    one, two, three = (rows(tmp_path / f"{name}.parquet") for name in ("shards", "scene", "folder"))
    assert one.keys() == two.keys() == three.keys()
    source, reader = load_backbone(run), ShardReader(shards)
    (name,) = reader.contracts
    for number in range(len(reader)):
        key = reader.index.key(number)
        images = prepare(reader.chips([number]), {name: source.contract}, (16, 16)).images[name]
        with torch.inference_mode():
            plain = source.backbone(images).pooled[0].numpy()
        for made in (one, two, three):  # batches of other sizes are summed in another order
            assert made[key]["feature"] == pytest.approx(plain, abs=2e-6)
            assert {k: v for k, v in made[key].items() if k not in ("feature", "top", "left")} == {
                k: v for k, v in one[key].items() if k not in ("feature", "top", "left")
            }
    corner = two["S2A_town_y00064_x00128"]
    assert (corner["top"], corner["left"], corner["height"], corner["width"]) == (64, 128, 32, 32)
    assert (corner["west"], corner["north"], corner["crs"]) == (501_280, 4_999_360, "EPSG:32633")
    assert 0 < corner["valid"] < 1 and corner["gsd_m"] == 10 and corner["time"].isoformat() == "2020-06-01T10:00:00+00:00"
    assert corner["lat"] == pytest.approx(45.14, abs=0.01) and one["S2A_town_y00000_x00064"]["valid"] == 1
    told = parquet.read_schema(tmp_path / "scene.parquet").metadata[b"swath"].decode()
    assert str(tmp_path) not in told and str(file.parent) not in told and "secret" not in told
    assert json.loads(told)["backbone"] == "vit_tiny_patch8" and json.loads(told)["size"] == [16, 16]


def test_tiles_overlap_and_reach_the_edges(cut: tuple[Path, Path, Path], tmp_path: Path) -> None:
    file, shards, run = cut
    embed(run, file, tmp_path / "a.parquet", tile=40, overlap=10, progress=False)
    made = rows(tmp_path / "a.parquet").values()
    assert sorted({row["top"] for row in made}) == [0, 30, 56] and max(row["left"] for row in made) == 120
    assert len(made) == 3 * 5 and all(row["height"] == row["width"] == 40 for row in made)
    embed(run, shards, tmp_path / "b.parquet", tile=24, overlap=8, progress=False)
    inner = rows(tmp_path / "b.parquet")
    assert len(inner) == 15 * 4
    piece = inner["S2A_town_y00032_x00064_y00008_x00008"]
    assert (piece["west"], piece["north"], piece["east"], piece["south"]) == (500_720, 4_999_600, 500_960, 4_999_360)
    embed(run, file, tmp_path / "c.parquet", tile=24, overlap=16, progress=False)
    same = rows(tmp_path / "c.parquet")["S2A_town_y00040_x00072"]  # the same ground, cut out of the scene
    assert piece["feature"] == pytest.approx(same["feature"], abs=2e-6) and piece["lat"] == pytest.approx(same["lat"], abs=1e-5)
    embed(run, file, tmp_path / "e.parquet", tile=1000, dtype="float16", progress=False)
    (whole,) = rows(tmp_path / "e.parquet").values()
    assert whole["key"] == "S2A_town" and (whole["height"], whole["width"]) == (96, 160)
    assert str(parquet.read_schema(tmp_path / "e.parquet").field("feature").type.value_type) == "halffloat"


def test_a_scene_is_never_in_memory(cut: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen times the pixels: no more windows are alive at a time, and the peak stays far below the scene."""
    run, live, peaks, most = cut[2], [0], {}, {}
    read = Scenes.read

    def counted(self: Scenes, item: Any) -> Any:
        sample = read(self, item)
        (part,) = sample.parts.values()
        live[0] += 1
        weakref.finalize(
            part.pixels.base if part.pixels.base is not None else part.pixels, lambda: live.__setitem__(0, live[0] - 1)
        )
        most[side] = max(most.get(side, 0), live[0])
        return sample

    monkeypatch.setattr(Scenes, "read", counted)
    monkeypatch.setattr("swath.probes.embed.GROUP_BYTES", 4 * 24 * 40)  # rows are written forty at a time
    for side in (512, 2048):
        file = scene(tmp_path / str(side) / "S2A_big.tif", side, side, sparse=True)
        gc.collect()
        tracemalloc.start()
        made = embed(run, file, tmp_path / f"{side}.parquet", tile=128, batch=4, progress=False)
        peaks[side] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert made.rows == (side // 128) ** 2
    assert parquet.ParquetFile(tmp_path / "2048.parquet").num_row_groups == 7  # of 40 rows, whole batches each
    assert most[2048] <= most[512] + 4 <= 16, most  # two batches of four, and the one that is worked on
    assert peaks[2048] < 2048 * 2048 * 4 * 2 / 4, peaks  # the scene itself: 32 MiB
    assert peaks[2048] < 1.5 * peaks[512] + 2**20, peaks


def test_nothing_is_half_written(cut: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, shards, run = cut
    target = tmp_path / "out" / "a.parquet"
    read = Scenes.read

    def broken(self: Scenes, item: Any) -> Any:
        if item.place[1] > 32:
            raise KeyboardInterrupt
        return read(self, item)

    monkeypatch.setattr(Scenes, "read", broken)
    with pytest.raises(KeyboardInterrupt):
        embed(run, file, target, tile=32, batch=2, progress=False)
    assert not list(target.parent.iterdir())
    monkeypatch.setattr(Scenes, "read", read)
    target.with_name(".a.parquet.partial").write_bytes(b"of one that was killed")
    embed(run, file, target, tile=32, progress=False)
    assert [p.name for p in target.parent.iterdir()] == ["a.parquet"]
    before = target.read_bytes()
    with pytest.raises(InputError, match="exists; choose another"):
        embed(run, shards, target, progress=False)
    assert target.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"overlap": 4}, "--tile, which is not given"),
        ({"tile": 8, "overlap": 8}, r"0 … 7"),
        ({"size": 12}, "--size 12"),
        ({"tile": 0}, "at least 1"),
        ({"options": Options(level="L2A")}, "holds shards"),
    ],
)
def test_what_does_not_fit_is_refused(cut: tuple[Path, Path, Path], tmp_path: Path, options: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        embed(cut[2], cut[1], tmp_path / "a.parquet", progress=False, **options)
    assert not list(tmp_path.iterdir())


def test_splits_are_given_one_at_a_time(cut: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds the splits shards; give one"):
        embed(cut[2], cut[1].parent, tmp_path / "a.parquet", progress=False)


def test_another_contract_is_refused_with_the_command(cut: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"level: L2A \| L1C(.|\n)*swath adapt .* --accept level --to DIR"):
        embed(cut[2], cut[0], tmp_path / "a.parquet", options=Options(level="L1C"), progress=False)


def test_a_void_scene_gives_nothing(cut: tuple[Path, Path, Path], tmp_path: Path) -> None:
    file = scene(tmp_path / "S2A_void.tif", 32, 32)
    with rasterio.open(file, "r+") as f:
        f.write(np.zeros((4, 32, 32), np.uint16))
    with pytest.raises(InputError, match="1 tiles without a valid pixel"):
        embed(cut[2], file, tmp_path / "a.parquet", progress=False)


@pytest.fixture
def chips(tmp_path: Path) -> tuple[Path, Path]:
    """(run, shards) of 40 chips, of which every tenth is nearly the same."""
    random = np.random.default_rng(0)
    kinds = random.integers(1000, 4000, (10, 4, 16, 16))
    pixels = np.concatenate([kinds + random.integers(0, 5, kinds.shape) for _ in range(4)]).astype(np.uint16)
    data = write_shards(tmp_path / "chips", pixels, [n % 2 for n in range(40)])
    return save_run(loaded(), tmp_path / "run"), data


def test_the_nearest_are_those_alike(chips: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = chips
    file = tmp_path / "f.parquet"
    assert main(["embed", str(run), "--data", str(data), "--to", str(file)]) == 0
    assert "40 rows of 24 features" in capsys.readouterr().out
    assert main(["retrieve", str(file), "--query", "000003", "17", "-k", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    found = [sorted(near["row"] for near in answer["neighbours"]) for answer in result["queries"]]
    assert found == [[13, 23, 33], [7, 27, 37]] and result["queries"][1]["query"] == "000017"
    assert [near["label"] for near in result["queries"][0]["neighbours"]] == ["water"] * 3
    assert main(["retrieve", str(file), "--query", "000003", "-k", "3"]) == 0
    text = capsys.readouterr().out.splitlines()
    assert text[0] == "nearest to 000003, of 40 rows of chips" and len(text) == 4 and "water" in text[1]
    assert len(retrieve(file, ["0"], k=99)["queries"][0]["neighbours"]) == 39  # all but itself
    for query, reason in (("nothing", "no key .* no number of its 40 rows, and no image"), ("40", "no key")):
        with pytest.raises(InputError, match=reason):
            retrieve(file, [query])
    with pytest.raises(InputError, match="no file of features"):
        retrieve(data / "manifest.json", ["0"])
    x = np.concatenate(list(Index.open(file).blocks()))
    assert x.shape == (40, 24) and x == pytest.approx(extract(load_backbone(run), ShardReader(data), progress=False).x, abs=2e-6)


def test_an_image_finds_its_own_tile(cut: tuple[Path, Path, Path], tmp_path: Path) -> None:
    file, _, run = cut
    embed(run, file, tmp_path / "f.parquet", tile=32, progress=False)
    with rasterio.open(file) as source, rasterio.open(
        tmp_path / "S2A_query.tif", "w", driver="GTiff", count=4, dtype="uint16", height=32, width=32, nodata=0,
        crs=source.crs, transform=source.transform,
    ) as made:  # fmt: skip
        made.write(source.read(window=((32, 64), (96, 128))))
        made.descriptions = NAMES
        made.update_tags(**source.tags())
    result = retrieve(tmp_path / "f.parquet", [str(tmp_path / "S2A_query.tif")], k=1, backbone=run)
    (near,) = result["queries"][0]["neighbours"]
    assert near["key"] == "S2A_town_y00032_x00096" and near["cosine"] == pytest.approx(1, abs=1e-5)
    assert result["queries"][0] | {"neighbours": []} == {"query": "S2A_query.tif", "row": None, "neighbours": []}
    with pytest.raises(InputError, match="needs --backbone"):
        retrieve(tmp_path / "f.parquet", [str(tmp_path / "S2A_query.tif")])
    (mine,) = ShardReader(cut[1]).contracts.values()
    other = save_run(loaded(mine, seed=5), tmp_path / "other")
    with pytest.raises(InputError, match="other weights"):
        retrieve(tmp_path / "f.parquet", [str(tmp_path / "S2A_query.tif")], backbone=other)


def test_a_picture_is_a_query_too(tmp_path: Path) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        Image.fromarray(random.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "pictures").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").rename(tmp_path / "pictures" / f"{name}.png")
    shard(tmp_path / "pictures", tmp_path / "shards", implausible_ok=True, progress=False)
    run = backbone(tmp_path / "run", tmp_path / "shards")
    assert embed(run, tmp_path / "pictures", tmp_path / "f.parquet", progress=False).rows == 3
    result = retrieve(tmp_path / "f.parquet", [str(tmp_path / "pictures" / "b.png")], k=1, backbone=run)
    assert result["queries"][0]["neighbours"][0]["key"] == "b"


@pytest.mark.parametrize("blocks", [1, 7, 1000])
def test_nearest_is_a_plain_sort(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swath.probes.neighbours._BLOCK_VALUES", 5 * blocks)
    random = np.random.default_rng(0)
    x = random.normal(size=(50, 6)).astype(np.float32)
    x[30:40] = x[10:20]  # equals: the first row counts
    queries = x[[10, 35, 3, 4, 5]]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = unit[[10, 35, 3, 4, 5]] @ unit.T
    expected = np.argsort(-np.round(cosine, 6), axis=1, kind="stable")[:, :8]
    found, similarity = nearest(x, queries, 8)
    assert (found == expected).all() and similarity == pytest.approx(np.take_along_axis(cosine, expected, 1), abs=1e-6)
    found, _ = nearest(iter(np.array_split(x, 3)), queries, 8, exclude=np.array([10, -1, 3, 4, 5]))
    assert 10 not in found[0] and found[0, 0] == 30 and 15 in found[1] and not (found[2:, 0] == [3, 4, 5]).any()


def test_nearest_of_few_rows() -> None:
    found, cosine = nearest(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), 4, exclude=np.array([0, -1]))
    assert found.tolist() == [[1, -1, -1, -1], [1, 0, -1, -1]] and cosine[0, 1] == -np.inf
    with pytest.raises(ValueError, match="width 3, queries 2"):
        nearest(np.zeros((1, 3), np.float32), np.zeros((1, 2), np.float32), 1)
