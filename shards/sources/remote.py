"""Which files a remote archive has: a bucket's listing, an index page, a list of names, or what a STAC document leads to."""

import json
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urljoin, urlsplit

from swath.shards.errors import InputError
from swath.shards.sources.parts import File, Servers
from swath.shards.sources.stac import MAX_BYTES, NOT_DATA, RASTERS, parse_json
from swath.shards.stores.remote import Remote, is_remote

_T = TypeVar("_T")
_S = TypeVar("_S")
_MANY = 2_000_000  # files, documents, lines: beyond it something leads in circles
_DEEP = 32  # folders in one another
_THREADS = 8
_SCENES = (*RASTERS, ".nc")
_FOLDERS = (".safe", ".zarr")  # extensions of folders
_ELSEWHERE = "elsewhere"  # where assets of other servers lie in the copy


@dataclass
class Found:
    """Files by relative name, all of them inside; `texts` are documents that the copy has in other words, by name.

    `entry` is what of the copy is to be opened: "" for all of it, else one of the names.
    """

    files: dict[str, File] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    entry: str = ""


def at_once(work: Callable[[_S], _T], many: Iterable[_S], servers: Servers) -> list[_T]:
    """`work` on all, some at a time; the first error, or an interruption, ends the rest at once."""
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="swath-remote")
    try:
        return list(pool.map(work, many))
    except BaseException:
        servers.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def find_files(address: str, servers: Servers) -> Found:
    """The files at `address`. InputError where there is nothing, or a name that would lead outside of the copy.

    A bucket is listed. HTTP knows no listing: a `.json` or `.geojson` is a STAC document, a `.txt` a list of names beside it, any
    other name with an extension one file (`.SAFE` and `.zarr` are folders), and the rest the index page of a folder.
    """
    remote, name = servers.of(address)
    if remote.scheme in ("http", "https"):
        kind = PurePosixPath(unquote(name)).suffix.lower()
        if name.endswith("/") or not kind or kind in _FOLDERS:
            return _listed(f"{address.rstrip('/')}/", _walk(remote, name), servers)
        files = {name: None}
    else:
        files = {n: facts for n, facts in remote.files(name).items() if not n.endswith("/")}
        if name.rstrip("/") not in files:
            prefix = f"{name.rstrip('/')}/".lstrip("/")
            rest = {n.removeprefix(prefix): File(f"{remote.place}/{n}", facts) for n, facts in files.items()}
            return Found(_checked(rest, address))
    if name.lower().endswith((".json", ".geojson")):
        data = servers.text(address, MAX_BYTES)
        if parse_json(data, address) is not None:
            return _stac(data, address, servers)
    if name.lower().endswith(".txt"):
        return _listed(f"{address.rpartition('/')[0]}/", _lines(servers.text(address, MAX_BYTES), address), servers)
    last = _local_name(address.rpartition("/")[2], remote.scheme)
    entry = "" if last.lower().endswith(_SCENES) else last  # sources want the folder of such
    return Found(_checked({last: File(address, files[name] or servers.facts(address))}, address), entry=entry)


def remote_items(path: Path, servers: Servers) -> Found | None:
    """A STAC document on disk whose assets are all elsewhere, with those; None for any other file."""
    if path.stat().st_size > MAX_BYTES:
        return None
    data = path.read_bytes()
    value = parse_json(data, path)
    assets = [asset["href"] for item in _features(value) for asset in _used(item).values()] if value else []
    return _stac(data, path, servers) if assets and all(is_remote(href) for href in assets) else None


def _walk(remote: Remote, folder: str) -> list[str]:
    """Names, relative to `folder`, that its index page and those of the folders in it link to."""
    top = f"{folder.rstrip('/')}/".lstrip("/")
    waiting, seen, names = [top], {top}, []
    while waiting:
        here = waiting.pop()
        for link in remote.links(here):
            link = re.sub(r"/(\./)+", "/", link)
            if re.search(r"[?#]|^/|//", link) or not link.startswith(here) or link in seen or ".." in unquote(link).split("/"):
                continue  # orders of columns, the folder above, other places
            seen.add(link)
            if link.endswith("/"):
                if link.count("/") - top.count("/") > _DEEP or len(seen) > _MANY:
                    raise InputError(f"{remote.address(link)}: its folders have no end; name one below it")
                waiting.append(link)
            else:
                names.append(link.removeprefix(top))
    return names


def _lines(data: bytes, address: str) -> list[str]:
    try:
        lines = [line.strip() for line in data.decode().splitlines()]
    except UnicodeDecodeError:
        raise InputError(f"{address} is no list of files; write one name in a line, relative to its folder") from None
    return [quote(line) for line in lines if line and not line.startswith("#")]


def _listed(base: str, names: list[str], servers: Servers) -> Found:
    """Files of HTTP by their names, quoted as in an address."""
    scheme = base.partition("://")[0]
    quoted = names if scheme in ("http", "https") else [unquote(name) for name in names]
    facts = at_once(lambda name: servers.facts(base + name), quoted, servers)
    rows = zip(names, quoted, facts, strict=True)
    return Found(_checked({unquote(name): File(base + address, fact) for name, address, fact in rows}, base))


def _checked(files: dict[str, File], address: str) -> dict[str, File]:
    if not files:
        raise InputError(
            f"{address} has no files that can be listed; give a bucket, an index page, a list of names (.txt) or a STAC document"
        )
    if len(files) > _MANY:
        raise InputError(f"{address} holds more than {_MANY} files; name a folder of it")
    for name in files:
        _inside(name, address)
    return dict(sorted(files.items()))


def _inside(name: str, address: str) -> str:
    parts = name.split("/")
    wrong = any(part in ("", ".", "..") or len(part.encode()) > 200 for part in parts) or len(name.encode()) > 1000
    if wrong or "\\" in name or re.search(r"[\x00-\x1f\x7f]", name):
        raise InputError(f"{address} names a file {name[:120]!r}, which cannot have that name on disk; rename it there")
    return name


def _local_name(name: str, scheme: str) -> str:
    return unquote(name) if scheme in ("http", "https") else name


def _stac(data: bytes, root: str | Path, servers: Servers) -> Found:
    """The document, those that it links to, and the rasters of their items; their addresses become paths in the copy."""
    above = "" if isinstance(root, Path) else root.rpartition("/")[0] + "/"
    host = None if isinstance(root, Path) else urlsplit(root).netloc

    def inside(address: str) -> str:
        scheme, _, rest = address.partition("://")
        here = above and address.startswith(above)
        name = address.removeprefix(above) if here else f"{_ELSEWHERE}/{rest}"
        return _inside(_local_name(name, scheme), str(root))

    top = root.name if isinstance(root, Path) else inside(root)
    values: dict[str, dict[str, Any]] = {}
    wanted: dict[str, str] = {}  # address → name
    waiting: list[tuple[str, str, bytes | None]] = [(str(root), top, data)]
    while waiting:
        here, name, text = waiting.pop()
        value = parse_json(servers.text(here, MAX_BYTES) if text is None else text, here)
        if name in values or value is None:
            continue
        values[name] = value
        if len(values) > _MANY:
            raise InputError(f"{root} leads to more than {_MANY} documents; name a part of it")
        for item in _features(value):
            item["assets"] = _used(item)
            for asset in item["assets"].values():
                address = _joined(here, asset["href"], host, servers)
                wanted[address] = inside(address)
                asset["href"] = _relative(wanted[address], name)
        for link in value["links"] if isinstance(value.get("links"), list) else []:
            if isinstance(link, dict) and link.get("rel") in ("item", "child") and isinstance(link.get("href"), str):
                address = _joined(here, link["href"], host, servers)
                waiting.append((address, inside(address), None))
                link["href"] = _relative(inside(address), name)
    facts = at_once(servers.facts, wanted, servers)
    files = {wanted[address]: File(address, fact) for address, fact in zip(wanted, facts, strict=True)}
    texts = {name: json.dumps(value).encode() for name, value in values.items()}
    if not files:
        raise InputError(f"{root} leads to no assets of {', '.join(RASTERS)} with bands")
    return Found(_checked(files, str(root)), texts, top)


def _features(value: dict[str, Any]) -> list[dict[str, Any]]:
    found = value.get("features") if value.get("type") == "FeatureCollection" else [value]
    rows = found if isinstance(found, list) else []
    return [row for row in rows if isinstance(row, dict) and row.get("type") == "Feature" and isinstance(row.get("assets"), dict)]


def _used(item: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The assets that are rasters with bands; of several files with the same bands one, a GeoTIFF before JPEG 2000."""
    chosen: dict[str, tuple[str, dict[str, Any]]] = {}
    for key, asset in item["assets"].items():
        if not isinstance(asset, dict) or not isinstance(href := asset.get("href"), str):
            continue
        rows, roles = asset.get("bands") or asset.get("eo:bands"), asset.get("roles")
        suffix = PurePosixPath(href.lower().split("?")[0]).suffix
        if suffix not in RASTERS or not isinstance(rows, list) or NOT_DATA & {str(r) for r in roles or ()}:
            continue
        bands = json.dumps([row.get("name") if isinstance(row, dict) else None for row in rows])
        bands = key if "null" in bands else bands
        if bands not in chosen or RASTERS.index(suffix) < RASTERS.index(PurePosixPath(chosen[bands][1]["href"].lower()).suffix):
            chosen[bands] = (key, asset)
    return dict(chosen.values())


def _joined(here: str, href: str, host: str | None, servers: Servers) -> str:
    """The address that `href` in the document `here` means; InputError for one that is not to be asked."""
    scheme, _, rest = here.partition("://")
    address = href if is_remote(href) else f"{scheme}{urljoin(f'http://{rest}', href)[4:]}"
    parts = urlsplit(address)
    if not is_remote(href) and (not is_remote(here) or href.startswith("/vsi") or "://" in href):
        raise InputError(f"{here} has relative and remote references; write them all in one way")
    servers.of(address)
    if host is not None and parts.netloc != host and parts.scheme in ("http", "https") and _is_private(parts.hostname or ""):
        raise InputError(f"{here} leads to {parts.hostname}, which is not on the internet; copy what it has there")
    return address


def _is_private(host: str) -> bool:
    """An address of this machine or of its network; names are not resolved."""
    try:
        return not ip_address(host).is_global
    except ValueError:
        return host == "localhost" or host.endswith((".localhost", ".local", ".internal"))


def _relative(target: str, document: str) -> str:
    return quote(os.path.relpath(target, PurePosixPath(document).parent))
