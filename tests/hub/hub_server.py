"""A stand-in of the Hub's HTTP interface on loopback: models, branches, commits, large files, downloads. All in memory.

It answers what huggingface_hub asks for with HF_HUB_DISABLE_XET=1, and checks what the Hub would: tokens, sizes, checksums, that
a commit's large files are there. `requests` are (method, path); `received` counts the bytes of each large file that came in.
"""

import base64
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "standIn" * 5  # may write to `team`; any other token is unknown
LARGE = (".safetensors", ".png")


@dataclass
class File:
    data: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """As git names a blob."""
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repo:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, File]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File]) -> str:
        names = json.dumps([len(self.commits), branch, sorted((path, file.oid) for path, file in files.items())])
        made = hashlib.sha1(names.encode()).hexdigest()
        self.commits[made], self.branches[branch] = files, made
        return made


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.place = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # large files by SHA-256
        self.requests: list[tuple[str, str]] = []
        self.received: Counter[str] = Counter()
        self.halt_at: str | None = None  # of this large file only half is taken, after all others are there
        self.half = threading.Event()
        self.fail: dict[str, int] = {}  # a status to answer where a path contains the key

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        repo = self.repos[name]
        return {path: file.data for path, file in repo.commits[repo.branches[branch]].items()}

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that is killed is what a test is about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self._answer(self._get)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_PUT(self) -> None:
        self._answer(self._put)

    def log_message(self, format: str, *args: object) -> None:
        pass

    # --- requests ---

    def _answer(self, method: Any) -> None:
        path = urlsplit(self.path).path
        self.server.requests.append((self.command, unquote(path)))
        for part, status in self.server.fail.items():
            if part in path:
                self._body()
                return self._send(status, {"error": f"stand-in says {status}"})
        return method([unquote(part) for part in path.strip("/").split("/")])

    def _body(self) -> bytes:
        return b"".join(self._pieces())

    def _pieces(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            piece = self.rfile.read(min(left, 1 << 14))
            if not piece:
                raise ConnectionError("the client went away")
            left -= len(piece)
            yield piece

    def _send(self, status: int, value: Any = None, *, headers: dict[str, str] | None = None, data: bytes | None = None) -> None:
        body = json.dumps(value).encode() if data is None else data
        self.send_response(status)
        for name, text in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, status: int, code: str) -> None:
        self._send(status, {"error": code}, headers={"X-Error-Code": code})

    @property
    def _writer(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _known(self) -> bool:
        """A token that is given must be one; answers if it is not."""
        if self.headers.get("Authorization") is not None and not self._writer:
            self._send(401, {"error": "Invalid username or password."})
            return False
        return True

    def _repo(self, name: str) -> Repo | None:
        """Answers where there is none for this client."""
        if not self._known():
            return None
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self._writer):
            self._missing(404 if self._writer else 401, "RepoNotFound")
            return None
        return repo

    def _commit(self, repo: Repo, revision: str) -> str | None:
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            self._missing(404, "RevisionNotFound")
            return None
        return commit

    # --- reading ---

    def _get(self, parts: list[str]) -> None:
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        if (repo := self._repo(name)) is None:
            return None
        what, revision = (parts[4], parts[5]) if len(parts) > 5 and api else ("info", "main") if api else ("resolve", parts[3])
        if (commit := self._commit(repo, revision)) is None:
            return None
        files = repo.commits[commit]
        if what == "tree":
            assert parse_qs(urlsplit(self.path).query)["recursive"]
            return self._send(200, [self._entry(path, file) for path, file in files.items()])
        if what == "resolve":
            return self._file(commit, files.get("/".join(parts[4:])))
        siblings = [{"rfilename": path} for path in files]
        return self._send(200, {"id": name, "modelId": name, "private": repo.private, "sha": commit, "siblings": siblings})

    def _entry(self, path: str, file: File) -> dict[str, Any]:
        made = {"type": "file", "path": path, "size": len(file.data), "oid": file.oid}
        large = {"oid": file.sha256, "size": len(file.data), "pointerSize": 130}
        return made | ({"lfs": large} if file.large else {})

    def _file(self, commit: str, file: File | None) -> None:
        if file is None:
            return self._missing(404, "EntryNotFound")
        etag = file.sha256 if file.large else file.oid
        large = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(file.data))} if file.large else {}
        return self._send(200, data=file.data, headers={"ETag": f'"{etag}"', "X-Repo-Commit": commit, **large})

    # --- writing ---

    def _post(self, parts: list[str]) -> None:
        body = self._body()
        if not self._writer:
            return self._send(401, {"error": "Invalid username or password."})
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts == ["api", "validate-yaml"]:
            return self._validate(json.loads(body)["content"])
        if parts[0] == "lfs":
            return self._verify(parts[1], json.loads(body))
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else [parts[0], parts[1].removesuffix(".git")])
        if (repo := self._repo(name)) is None:
            return None
        if parts[-1] == "batch":
            return self._batch(json.loads(body))
        action, revision = parts[4], parts[5]
        if action == "branch":
            if revision in repo.branches:
                return self._send(409, {"error": f"Reference already exists: {revision}"})
            repo.branches[revision] = repo.branches["main"]
            return self._send(200, {})
        if (commit := self._commit(repo, revision)) is None:
            return None
        if action == "preupload":
            files = json.loads(body)["files"]
            return self._send(200, {"files": [self._mode(one["path"], repo.commits[commit].get(one["path"])) for one in files]})
        assert action == "commit", action
        return self._take(name, repo, revision, commit, [json.loads(line) for line in body.splitlines()])

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "nowhere":
            return self._send(404, {"error": "Organization not found"})
        if asked["organization"] != "team":
            return self._send(403, {"error": "You don't have the rights to create a model under this namespace"})
        url = {"url": f"{self.server.place}/{name}", "name": name}
        if name in self.server.repos:
            return self._send(409, {"error": "You already created this model repo"} | url)
        repo = self.server.repos[name] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})
        return self._send(200, url)

    def _validate(self, content: str) -> None:
        good = "license: " in content.split("---")[1]
        message = {"message": '"license" is required'}
        return self._send(200 if good else 400, {"errors": [] if good else [message], "warnings": []})

    def _mode(self, path: str, held: File | None) -> dict[str, Any]:
        made = {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}
        return made if held is None else made | {"oid": held.sha256 if held.large else held.oid}

    def _batch(self, asked: dict[str, Any]) -> None:
        def action(one: dict[str, Any]) -> dict[str, Any]:
            href = f"{self.server.place}/lfs/{one['oid']}"
            actions = {"upload": {"href": href, "header": {}}, "verify": {"href": f"{href}/verify", "header": {}}}
            return one | ({} if one["oid"] in self.server.objects else {"actions": actions})

        assert asked["operation"] == "upload" and asked["hash_algo"] == "sha256" and "basic" in asked["transfers"]
        self._send(200, {"transfer": "basic", "objects": [action(one) for one in asked["objects"]]})

    def _put(self, parts: list[str]) -> None:
        oid, data = parts[1], bytearray()
        length = int(self.headers["Content-Length"])
        for piece in self._pieces():
            data += piece
            self.server.received[oid] += len(piece)
            if oid == self.server.halt_at and len(data) * 2 >= length:
                self.server.half.set()
                threading.Event().wait(60)
        if hashlib.sha256(data).hexdigest() != oid:
            return self._send(422, {"error": "the content is not what its SHA-256 says"})
        self.server.objects[oid] = bytes(data)
        return self._send(200, data=b"")

    def _verify(self, oid: str, asked: dict[str, Any]) -> None:
        held = self.server.objects.get(oid)
        good = asked["oid"] == oid and held is not None and len(held) == asked["size"]
        return self._send(200 if good else 422, {} if good else {"error": "no such object"})

    def _take(self, name: str, repo: Repo, branch: str, parent: str, lines: list[dict[str, Any]]) -> None:
        """A commit: all of it or nothing."""
        files = dict(repo.commits[parent])
        assert lines[0]["key"] == "header" and lines[0]["value"]["summary"]
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                held = self.server.objects.get(value["oid"])
                if held is None or len(held) != value["size"]:
                    return self._send(400, {"error": f"{value['path']} has not been uploaded"})
                files[value["path"]] = File(held, True)
            else:
                assert line["key"] == "deletedFile", line
                del files[value["path"]]
        oid = repo.commit(branch, files)
        return self._send(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.place}/{name}/commit/{oid}"})


@contextmanager
def serving() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
