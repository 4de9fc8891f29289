"""Archives on S3, GCS and HTTP: the same samples as from disk, nothing read twice or beyond need, nothing outside the copy."""

import errno
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import numpy as np
import pytest

from swath.launch.cli import main
from swath.shards.errors import InputError
from swath.shards.ingest import shard
from swath.shards.manifest import Manifest
from swath.shards.sources.mirror import Mirror, located
from swath.shards.sources.open import open_source
from swath.shards.sources.source import Options, Sample
from swath.shards.stores.cache import CacheOptions
from swath.shards.stores.remote import Patience
from tests.s3_server import s3_server

pytest.importorskip("aiohttp")
rasterio = pytest.importorskip("rasterio")
from rasterio.transform import from_origin  # noqa: E402

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")]
QUICK = Patience(attempts=3, first_wait=0, timeout=5)
HANGS = 0


class Server(ThreadingHTTPServer):
    """A folder by HTTP, with index pages, and as much of GCS as reading takes.

    `failing[path]` are statuses to answer, one per request, then the file; HANGS is no answer at all. `sent` are (path, bytes
    of body).
    """

    daemon_threads = True

    def __init__(self, folder: Path, *, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.ranges = folder, ranges
        self.failing: dict[str, list[int]] = {}
        self.sent: list[tuple[str, int]] = []
        self.pages: dict[str, bytes] = {}
        self.released = threading.Event()
        self.place = f"http://127.0.0.1:{self.server_port}"

    def total(self) -> int:
        return sum(count for _, count in self.sent)

    def asked(self, path: str) -> int:
        return sum(name == path for name, _ in self.sent)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        server, parts = self.server, urlsplit(self.path)
        name = unquote(parts.path).removeprefix("/")
        if name.startswith("storage/v1/b/") and name.endswith("/o"):
            prefix = parse_qs(parts.query).get("prefix", [""])[0]
            rows = [_gcs(server.folder, p) for p in sorted(server.folder.rglob("*")) if p.is_file()]
            return self._answer(name, 200, json.dumps({"items": [r for r in rows if r["name"].startswith(prefix)]}).encode())
        if found := re.match(r"(download/)?storage/v1/b/archive/o/(.*)", name):
            name = found[2]
            if not found[1] and (server.folder / name).is_file() and "alt=media" not in parts.query:
                return self._answer(name, 200, json.dumps(_gcs(server.folder, server.folder / name)).encode())
        if server.failing.get(name):
            status = server.failing[name].pop(0)
            if status == HANGS:
                server.sent.append((name, 0))
                server.released.wait(60)
                self.close_connection = True
                return None
            return self._answer(name, status, b"")
        path = server.folder / name
        if name in server.pages or path.is_dir():
            rows = [quote(p.name) + "/" * p.is_dir() for p in path.iterdir()] if path.is_dir() else []
            links = "".join(f'<a href="{row}">x</a>' for row in ("?C=N;O=D", "../", "https://example.com/x", *rows))
            page = f"<html>{links}</html>"
            return self._answer(name, 200, server.pages.get(name) or page.encode(), {"Content-Type": "text/html"})
        if not path.is_file():
            return self._answer(name, 404, b"")
        data, stat = path.read_bytes(), path.stat()
        headers = {"ETag": f'"{stat.st_mtime_ns}-{stat.st_size}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not server.ranges or asked is None:
            return self._answer(name, 200, data, headers)
        first, last = int(asked[1]), int(asked[2]) if asked[2] else len(data) - 1
        if first >= len(data):
            return self._answer(name, 416, b"", {"Content-Range": f"bytes */{len(data)}"})
        body = data[first : last + 1]
        headers["Content-Range"] = f"bytes {first}-{first + len(body) - 1}/{len(data)}"
        return self._answer(name, 206, body, headers)

    def _answer(self, name: str, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.server.sent.append((name, len(body)))
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _gcs(folder: Path, path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {
        "kind": "storage#object", "name": path.relative_to(folder).as_posix(), "bucket": "archive", "size": str(stat.st_size),
        "etag": f"{stat.st_mtime_ns}",
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "remote").mkdir()
    return tmp_path / "remote"


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with Server(folder) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()


@pytest.fixture
def cache(tmp_path: Path) -> CacheOptions:
    return CacheOptions(tmp_path / "cache", 1 << 30)


@pytest.fixture
def s3(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Any]]:
    """An S3 server on loopback; the call uploads the folder and gives a client."""
    with s3_server(monkeypatch) as client:

        def upload() -> Any:
            client.create_bucket(Bucket="archive")
            for path in folder.rglob("*"):
                if path.is_file():
                    client.put_object(Bucket="archive", Key=path.relative_to(folder).as_posix(), Body=path.read_bytes())
            return client

        yield upload


def scene(path: Path, side: int, seed: int = 0, count: int = 2, **how: Any) -> None:
    """Noise, which no compression makes smaller, in uint16; band b lies between 200·(b+1) and 200·(b+6)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 1000, (count, side, side), dtype=np.uint16)
    pixels += np.arange(200, 200 * (count + 1), 200, dtype=np.uint16)[:, None, None]
    place = {"crs": "EPSG:32633", "transform": from_origin(300_000 + 100_000 * seed, 5_000_000, 10, 10)}
    with rasterio.open(path, "w", driver="GTiff", count=count, height=side, width=side, dtype="uint16", **place, **how) as file:
        file.write(pixels)
        for band in range(count):
            file.set_band_description(band + 1, ("B02", "B03", "B04", "B08")[band])


TILED = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate"}


def scenes(folder: Path) -> None:
    """Two large scenes with tiles, and one small one in a folder."""
    scene(folder / "scenes" / "S2A a.tif", 1024, 0, **TILED)
    scene(folder / "scenes" / "S2A_b.tif", 1024, 1, **TILED)
    scene(folder / "scenes" / "more" / "S2A_c.tif", 256, 2)


def samples(place: Path | Mirror, options: Options = Options(chip=256)) -> dict[str, Sample]:  # noqa: B008
    source = open_source(place, options)
    return {item.key: source.read(item) for item in source.items}


def same(one: dict[str, Sample], two: dict[str, Sample]) -> bool:
    assert list(one) == list(two) and len(one) > 1
    for key, sample in one.items():
        for name, part in sample.parts.items():
            np.testing.assert_array_equal(part.pixels, two[key].parts[name].pixels)
        assert sample.meta == two[key].meta
    return True


def mirror(address: str, cache: CacheOptions) -> Mirror:
    made = located(address, cache, QUICK)
    assert isinstance(made, Mirror)
    return made


def shards_of(made: dict[str, Manifest]) -> list[str]:
    return [one.sha256 for manifest in made.values() for one in manifest.shards]


def test_index_pages(server: Server, cache: CacheOptions):
    scenes(server.folder)
    made = mirror(f"{server.place}/scenes", cache)
    assert set(made.parted) == {"S2A a.tif", "S2A_b.tif"}
    assert same(samples(made), samples(server.folder / "scenes"))


def test_a_list_of_names(server: Server, cache: CacheOptions):
    scenes(server.folder)
    (server.folder / "scenes" / "train.txt").write_text("# the first\nS2A a.tif\n\nmore/S2A_c.tif\n")
    made = mirror(f"{server.place}/scenes/train.txt", cache)
    assert {key.partition("_y")[0] for key in samples(made)} == {"S2A a", "more/S2A_c"}


def test_s3(s3: Callable[[], Any], folder: Path, cache: CacheOptions):
    scenes(folder)
    scene(folder / "scenes2" / "S2A_other.tif", 256)
    s3()
    made = mirror("s3://archive/scenes/", cache)
    assert set(made.parted) == {"S2A a.tif", "S2A_b.tif"}
    assert same(samples(made), samples(folder / "scenes"))
    assert len(samples(mirror("s3://archive/scenes/more/S2A_c.tif", cache))) == 1
    assert len(samples(mirror("s3://archive", cache))) == 34
    with pytest.raises(InputError, match=r"s3://archive/none (is not there|has no files)"):
        mirror("s3://archive/none", cache)


def test_lists_and_stac_on_s3(s3: Callable[[], Any], folder: Path, cache: CacheOptions):
    scene(folder / "set" / "data" / "S2A b+c.tif", 1024, 0, **TILED)
    (folder / "set" / "list.txt").write_text("data/S2A b+c.tif\n")
    value = item("one", {"B02": "./data/S2A%20b+c.tif"})
    value["assets"]["B02"]["eo:bands"] = [{"name": "B02"}, {"name": "B03"}]
    value["assets"]["B02"]["raster:bands"] = []
    (folder / "set" / "one.json").write_text(json.dumps(value).replace("%20", " "))
    s3()
    made = mirror("s3://archive/set/list.txt", cache)
    assert list(made.parted) == ["data/S2A b+c.tif"]
    assert len(samples(made)) == 16
    made = mirror("s3://archive/set/one.json", cache)
    assert list(made.parted) == ["data/S2A b+c.tif"]
    assert len(samples(made)) == 16


def test_gs(server: Server, cache: CacheOptions, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("gcsfs")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.place)
    scenes(server.folder)
    made = mirror("gs://archive/scenes", cache)
    assert set(made.parted) == {"S2A a.tif", "S2A_b.tif"}
    assert same(samples(made), samples(server.folder / "scenes"))


def test_a_chip_of_a_large_scene_costs_little(server: Server, cache: CacheOptions):
    """64 px of 16 MB: the header, and the tiles that the chip lies in; a second time nothing."""
    scene(server.folder / "s" / "S2A_a.tif", 2048, **TILED)
    assert (server.folder / "s" / "S2A_a.tif").stat().st_size > 12e6
    source = open_source(mirror(f"{server.place}/s", cache), Options(chip=64))
    assert server.total() < 1.2e6
    item = next(i for i in source.items if i.place[1:3] == (1024, 1024))
    pixels = source.read(item).parts["sentinel2"].pixels
    with rasterio.open(server.folder / "s" / "S2A_a.tif") as file:
        np.testing.assert_array_equal(pixels, file.read(window=((1024, 1088), (1024, 1088))))
    assert server.total() < 2.5e6
    before = len(server.sent)
    again = open_source(mirror(f"{server.place}/s", cache), Options(chip=64))
    np.testing.assert_array_equal(again.read(item).parts["sentinel2"].pixels, pixels)
    assert len(server.sent) == before + 2  # what there is, and whether it has changed


def test_a_server_without_ranges(server: Server, cache: CacheOptions):
    server.ranges = False
    scenes(server.folder)
    made = mirror(f"{server.place}/scenes", cache)
    assert made.parted == {}
    assert same(samples(made), samples(server.folder / "scenes"))


def test_files_that_gdal_wants_others_with_are_copied(server: Server, cache: CacheOptions):
    scenes(server.folder)
    (server.folder / "scenes" / "S2A_b.tif.aux.xml").write_text("<PAMDataset/>")
    assert set(mirror(f"{server.place}/scenes", cache).parted) == {"S2A a.tif"}
    (server.folder / "scenes" / "x.vrt").write_text("<VRTDataset/>")
    assert mirror(f"{server.place}/scenes", cache).parted == {}


def test_large_pictures_in_tiff_are_copied(server: Server, cache: CacheOptions):
    from PIL import Image

    (server.folder / "p").mkdir()
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 255, (700, 700, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(server.folder / "p" / f"{seed}.tif")
    made = mirror(f"{server.place}/p", cache)
    assert len(made.parted) == 2
    assert same(samples(made, Options()), samples(server.folder / "p", Options()))


def test_zips_and_arrays_come_whole(server: Server, cache: CacheOptions, tmp_path: Path):
    import zipfile

    from PIL import Image

    with zipfile.ZipFile(server.folder / "set.zip", "w") as archive:
        for seed in range(3):
            pixels = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            with archive.open(f"a/{seed}.png", "w") as file:
                Image.fromarray(pixels).save(file, "png")
    made = mirror(f"{server.place}/set.zip", cache)
    assert same(samples(made, Options()), samples(server.folder / "set.zip", Options()))
    assert made.path.name == "set.zip"


def test_ingest_by_workers_is_the_same_to_the_byte(server: Server, cache: CacheOptions, tmp_path: Path):
    scenes(server.folder)
    options = Options(chip=64)
    local = shard(server.folder / "scenes", tmp_path / "local", options=options, progress=False)
    made = mirror(f"{server.place}/scenes", cache)
    assert shards_of(shard(made, tmp_path / "made", options=options, workers=2, progress=False)) == shards_of(local)


def test_command(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    scenes(server.folder)
    args = ["shard", f"{server.place}/scenes", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "c"), "--chip", "256"]
    assert main([*args, "--workers", "0", "--dry-run"]) == 0
    assert main([*args, "--workers", "0"]) == 0
    assert "33 samples" in capsys.readouterr().out
    assert main([*args[:-2], "--cache-gb", "0.0001", "--workers", "0"]) == 2
    assert "--cache-gb allows more" in capsys.readouterr().err


def test_a_second_start_fetches_only_what_has_changed(server: Server, cache: CacheOptions):
    scenes(server.folder)
    for seed in range(3):
        scene(server.folder / "scenes" / f"S2A_small{seed}.tif", 64, seed)
    one = open_source(mirror(f"{server.place}/scenes", cache), Options(chip=64)).fingerprint
    server.sent.clear()
    assert open_source(mirror(f"{server.place}/scenes", cache), Options(chip=64)).fingerprint == one
    assert server.total() < 3000
    scene(server.folder / "scenes" / "S2A_small1.tif", 64, 7)
    (server.folder / "scenes" / "S2A_small2.tif").unlink()
    server.sent.clear()
    made = mirror(f"{server.place}/scenes", cache)
    assert open_source(made, Options(chip=64)).fingerprint != one
    assert [(name, count) for name, count in server.sent if count > 3000 and "small" in name] == [
        ("scenes/S2A_small1.tif", (server.folder / "scenes" / "S2A_small1.tif").stat().st_size)
    ]
    assert same(samples(made), samples(server.folder / "scenes"))


def test_a_killed_start_goes_on(server: Server, tmp_path: Path):
    """What was whole is not fetched again; what was half is."""
    for seed in range(6):
        scene(server.folder / "s" / f"S2A_{seed}.tif", 128, seed)
    code = """
import os, sys, threading
from pathlib import Path
from swath.shards.stores.cache import CacheOptions
from swath.shards.sources import mirror
done, lock, replace = [], threading.Lock(), Path.replace
def dying(path, target):
    with lock:
        if len(done) == 3:
            os._exit(9)
        done.append(replace(path, target))
Path.replace = dying
mirror.located(sys.argv[1], CacheOptions(Path(sys.argv[2]), 1 << 30))
"""
    ended = subprocess.run([sys.executable, "-c", code, f"{server.place}/s", str(tmp_path / "cache")], timeout=60)
    assert ended.returncode == 9
    assert len(list((tmp_path / "cache").rglob("*.tif"))) == 3
    server.sent.clear()
    made = mirror(f"{server.place}/s", CacheOptions(tmp_path / "cache", 1 << 30))
    assert same(samples(made), samples(server.folder / "s"))
    fetched = [name for name, count in server.sent if count > 3000]
    assert len(fetched) == 3
    assert not list((made.home / "partial").iterdir())


def test_a_server_that_fails_for_a_while(server: Server, cache: CacheOptions):
    scenes(server.folder)
    for name in ("scenes/", "scenes/S2A a.tif", "scenes/more/S2A_c.tif"):
        server.failing[name] = [500, 503]
    assert same(samples(mirror(f"{server.place}/scenes", cache)), samples(server.folder / "scenes"))
    assert all(not left for left in server.failing.values())


def test_a_server_that_fails_while_chips_are_read_ends_the_run(server: Server, cache: CacheOptions, tmp_path: Path):
    """It is no damaged file, to be skipped; and nothing of it stays: with the server back, it goes on."""
    scenes(server.folder)
    made = mirror(f"{server.place}/scenes", cache)
    source = open_source(made, Options(chip=256))
    server.failing["scenes/S2A_b.tif"] = [500] * 100
    items = [item for item in source.items if item.key.startswith("S2A_b")]
    with pytest.raises(InputError, match=r"scenes/S2A_b\.tif cannot be read.*500"):
        for item in items:
            source.read(item)
    with pytest.raises(InputError, match=r"scenes/S2A_b\.tif cannot be read.*500"):
        shard(made, tmp_path / "out", options=Options(chip=256), max_failed=1.0, progress=False)
    server.failing.clear()
    assert same(samples(made), samples(server.folder / "scenes"))


def test_a_server_that_hangs(server: Server, cache: CacheOptions):
    """A chip's part is asked for again, and not for ever."""
    scenes(server.folder)
    made = located(f"{server.place}/scenes", cache, Patience(attempts=3, first_wait=0, timeout=0.3))
    source = open_source(made, Options(chip=256))
    first = next(item for item in source.items if item.key.startswith("S2A a"))
    server.failing["scenes/S2A a.tif"] = [HANGS, HANGS]
    source.read(first)
    server.failing["scenes/S2A_b.tif"] = [HANGS] * 9
    with pytest.raises(InputError, match=r"S2A_b\.tif cannot be read"):
        for item in source.items:
            source.read(item)
    assert len(server.failing["scenes/S2A_b.tif"]) == 6


def test_a_full_disk(server: Server, cache: CacheOptions, monkeypatch: pytest.MonkeyPatch):
    scenes(server.folder)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="no space left while copying a remote archive"):
            mirror(f"{server.place}/scenes", cache)
    made = mirror(f"{server.place}/scenes", cache)
    source = open_source(made, Options(chip=256))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="no space left while caching"):
            for item in source.items:
                source.read(item)
    assert same(samples(made), samples(server.folder / "scenes"))


def test_a_file_that_changes_meanwhile(server: Server, cache: CacheOptions):
    scenes(server.folder)
    source = open_source(mirror(f"{server.place}/scenes", cache), Options(chip=256))
    scene(server.folder / "scenes" / "S2A_b.tif", 1024, 5, **TILED)
    with pytest.raises(InputError, match=r"S2A_b\.tif has changed while it was read; start again"):
        for item in source.items:
            source.read(item)


def test_a_stand_in_is_no_image_to_others(server: Server, cache: CacheOptions):
    scenes(server.folder)
    made = mirror(f"{server.place}/scenes", cache)
    path = made.top / "S2A_b.tif"
    assert path.stat().st_size == (server.folder / "scenes" / "S2A_b.tif").stat().st_size
    assert path.stat().st_blocks * 512 < 100_000
    with pytest.raises(rasterio.errors.RasterioIOError):
        rasterio.open(path)


@pytest.mark.parametrize("name", ["../up.tif", "a/../../up.tif", "/etc/passwd", "a\\b.tif", "a//b.tif", "x" * 300 + ".tif", "."])
def test_names_that_lead_outside(name: str, server: Server, cache: CacheOptions, tmp_path: Path):
    (server.folder / "list.txt").write_text(f"{name}\n")
    scene(server.folder / "up.tif", 64)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError):
        mirror(f"{server.place}/list.txt", cache)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


def test_links_that_lead_outside_are_left(server: Server, cache: CacheOptions):
    scene(server.folder / "s" / "S2A_a.tif", 64)
    scene(server.folder / "S2A_up.tif", 64)
    links = ("S2A_a.tif", "../S2A_up.tif", "%2e%2e/S2A_up.tif", "/S2A_up.tif", "//example.com/x.tif", "./", "?C=M")
    server.pages["s/"] = "".join(f'<a href="{link}">x</a>' for link in links).encode()
    assert list(samples(mirror(f"{server.place}/s/", cache))) == ["S2A_a"]


def test_keys_that_lead_outside(s3: Callable[[], Any], folder: Path, cache: CacheOptions):
    scene(folder / "s" / "S2A_a.tif", 64)
    client = s3()
    client.put_object(Bucket="archive", Key="s/../../up.tif", Body=b"x")
    with pytest.raises(InputError, match="cannot have that name on disk"):
        mirror("s3://archive/s", cache)


@pytest.mark.parametrize(
    "address",
    ["https://user:swath-secret@host/s", "https://host/s.tif?sig=swath-secret", "ftp://host/s", "https://", "file:///etc/passwd"],
)
def test_addresses_refused(address: str, cache: CacheOptions):
    with pytest.raises(InputError) as caught:
        mirror(address, cache)
    assert "swath-secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_too_large_is_said_before_anything_is_fetched(server: Server, tmp_path: Path):
    for seed in range(3):
        scene(server.folder / "s" / f"S2A_{seed}.tif", 128, seed)
    with pytest.raises(InputError, match=r"3 files of 0\.000\d+ GB must be copied as a whole, 0\.0001 GB are allowed"):
        mirror(f"{server.place}/s", CacheOptions(tmp_path / "cache", 100_000))
    assert max(count for _, count in server.sent) < 3000


def test_other_copies_make_room(server: Server, tmp_path: Path):
    for name in "abc":
        scene(server.folder / name / "S2A_x.tif", 200, ord(name) % 5)
    cache = CacheOptions(tmp_path / "cache", 400_000)
    for name in "ab":  # in processes of their own, since what is in use is not removed
        assert (
            subprocess.run([sys.executable, "-c", _COPY, f"{server.place}/{name}", str(cache.folder)], timeout=60).returncode == 0
        )
    for other in ("0123456789abcdef", "mine"):  # of a person, though it looks alike
        scene(tmp_path / "cache" / other / "x" / "S2A_x.tif", 200)
        (tmp_path / "cache" / other / "lock").touch()
    mirror(f"{server.place}/c", cache)
    assert {path.parent.name for path in (tmp_path / "cache").rglob("*.tif")} == {"b", "c", "x"}
    mirror(f"{server.place}/a", cache)
    assert {path.parent.name for path in (tmp_path / "cache").rglob("*.tif")} == {"a", "c", "x"}


def test_two_processes_at_once_fetch_once(server: Server, tmp_path: Path):
    for seed in range(8):
        scene(server.folder / "s" / f"S2A_{seed}.tif", 64, seed)
    command = [sys.executable, "-c", _COPY, f"{server.place}/s", str(tmp_path / "cache")]
    running = [subprocess.Popen(command) for _ in range(3)]
    assert [one.wait(60) for one in running] == [0, 0, 0]
    assert all(sum(n == f"s/S2A_{seed}.tif" and count > 3000 for n, count in server.sent) == 1 for seed in range(8))


def test_a_file_that_becomes_a_folder(server: Server, cache: CacheOptions):
    scene(server.folder / "s" / "S2A_a.tif", 64)
    (server.folder / "s" / "note").write_text("x")
    mirror(f"{server.place}/s", cache)
    (server.folder / "s" / "note").unlink()
    scene(server.folder / "s" / "note" / "S2A_b.tif", 64, 1)
    assert same(samples(mirror(f"{server.place}/s", cache)), samples(server.folder / "s"))
    (server.folder / "s" / "note" / "S2A_b.tif").unlink()
    (server.folder / "s" / "note").rmdir()
    (server.folder / "s" / "note").write_text("x")
    assert list(samples(mirror(f"{server.place}/s", cache))) == ["S2A_a"]


_COPY = """
import sys
from pathlib import Path
from swath.shards.stores.cache import CacheOptions
from swath.shards.sources.mirror import located
located(sys.argv[1], CacheOptions(Path(sys.argv[2]), 400_000))
"""


def item(name: str, hrefs: dict[str, str], **changes: Any) -> dict[str, Any]:
    assets: dict[str, Any] = {
        band: {"href": href, "roles": ["data"], "eo:bands": [{"name": band}], "raster:bands": [{"nodata": 0, "scale": 1e-4}]}
        for band, href in hrefs.items()
    }
    assets["thumbnail"] = {"href": "https://example.com/t.jpg", "roles": ["thumbnail"]}
    assets["visual"] = {"href": "none.tif", "roles": ["visual"], "eo:bands": [{"name": "B04"}]}
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "geometry": None, "links": [], "assets": assets,
        "properties": {"datetime": "2022-02-10T10:11:41Z", "platform": "sentinel-2a"}, **changes,
    }  # fmt: skip


def test_stac_items_behind_a_catalog(server: Server, cache: CacheOptions):
    """Documents and assets by relative and by whole addresses, in the folder and above it."""
    for number, side in enumerate((1024, 128)):
        for band in ("B02", "B03"):
            scene(server.folder / "data" / f"{number}" / f"{band}.tif", side, number, 1, **TILED)
    one = item("one", {band: f"../../data/0/{band}.tif" for band in ("B03", "B02")})
    two = item("two", {band: f"{server.place}/data/1/{band}.tif" for band in ("B03", "B02")})
    for value in (one, two):
        (server.folder / "stac" / "items").mkdir(parents=True, exist_ok=True)
        (server.folder / "stac" / "items" / f"{value['id']}.json").write_text(json.dumps(value))
    links = [
        {"rel": "root", "href": "catalog.json"},
        {"rel": "item", "href": "./items/one.json"},
        {"rel": "item", "href": f"{server.place}/stac/items/two.json"},
    ]
    catalog = {"type": "Catalog", "stac_version": "1.0.0", "id": "c", "links": links}
    (server.folder / "stac" / "catalog.json").write_text(json.dumps(catalog))
    made = mirror(f"{server.place}/stac/catalog.json", cache)
    assert len(made.parted) == 2
    read = samples(made, Options(chip=128))
    assert len(read) == 65
    assert {name.partition("_y")[0] for name in read} == {"one", "two"}
    for sample in read.values():
        first = sample.parts["sentinel2"].pixels
        assert first.shape == (2, 128, 128) and first.min() >= 200 and first.max() < 1200
    with rasterio.open(server.folder / "data" / "1" / "B03.tif") as file:
        np.testing.assert_array_equal(read["two"].parts["sentinel2"].pixels[1], file.read(1))


def test_a_stac_item_on_disk_with_remote_assets(server: Server, cache: CacheOptions, tmp_path: Path):
    for band in ("B02", "B03"):
        scene(server.folder / f"{band}.tif", 128, 0, 1)
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / "found.json"
    features = [item("one", {band: f"{server.place}/{band}.tif" for band in ("B02", "B03")})]
    path.write_text(json.dumps({"type": "FeatureCollection", "stac_version": "1.0.0", "features": features}))
    assert len(samples(mirror(str(path), cache), Options(chip=64))) == 4
    with pytest.raises(InputError, match="give one document alone whose assets are all remote"):
        open_source(tmp_path / "mine", Options())


def test_stac_assets_twice(server: Server, cache: CacheOptions):
    """Of the same bands as GeoTIFF and as JPEG 2000 in a bucket, the GeoTIFF is taken, and nobody asks for the other."""
    for band in ("B02", "B03"):
        scene(server.folder / f"{band}.tif", 128, 0, 1)
    value = item("one", {"B02": "B02.tif", "B03": "B03.tif"})
    value["assets"] = {
        "B02-jp2": {"href": "s3://nobody/B02.jp2", "eo:bands": [{"name": "B02"}]},
        **value["assets"],
        "B03-jp2": {"href": "s3://nobody/B03.jp2", "eo:bands": [{"name": "B03"}]},
    }
    (server.folder / "one.json").write_text(json.dumps(value))
    source = open_source(mirror(f"{server.place}/one.json", cache), Options())
    assert source.contracts["sentinel2"].names == ("B02", "B03")


@pytest.mark.parametrize(
    ("href", "said"),
    [
        ("http://169.254.169.254/latest/x.tif", "not on the internet"),
        ("http://localhost/x.tif", "not on the internet"),
        ("http://10.0.0.1/x.tif", "not on the internet"),
        ("file:///etc/x.tif", "what can be read is"),
        ("/vsicurl/http://127.0.0.1/x.tif", "."),
        ("https://host/x.tif?sig=swath-secret", "nothing behind"),
        ("https://me:swath-secret@host/x.tif", "never from an address"),
        ("../%2e%2e/%2e%2e/x.tif", "cannot have that name"),
    ],
)
def test_stac_assets_refused(href: str, said: str, server: Server, cache: CacheOptions):
    (server.folder / "one.json").write_text(json.dumps(item("one", {"B02": href})))
    with pytest.raises(InputError, match=said) as caught:
        mirror(f"{server.place}/one.json", cache)
    assert "swath-secret" not in str(caught.value) and "\n" not in str(caught.value)
