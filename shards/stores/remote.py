"""Files behind s3://, gs:// and http(s)://, read with patience: resumed, retried, never waited for without end.

fsspec does the talking; credentials come from where its back ends look by themselves (environment, ~/.aws, ~/.netrc, gcloud,
fsspec's own configuration), never from an address.
"""

import random
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypeVar
from urllib.parse import urlsplit

from swath.shards.errors import InputError

T = TypeVar("T")
BLOCK = 4 << 20
_EXTRAS = {"http": "remote", "https": "remote", "s3": "remote", "gs": "gcs"}
_SECRETS = "credentials come from ~/.netrc (https), the environment or ~/.aws (s3), gcloud (gs), never from an address"
# of the 4xx, those that may pass. 400: aiohttp's word for an answer that is no HTTP; 416: a file has become shorter meanwhile
_LATER = (400, 408, 416, 425, 429)


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for.

    `attempts` in a row that bring less than `min_speed` does in one `timeout`; between them `first_wait` seconds, doubled each
    time up to `longest_wait`, times a random 0.5 to 1 so that ranks do not come back together. `timeout` seconds for a
    connection, for any one answer, and for the window over which `min_speed` (bytes/s) is demanded. One file may take `deadline`
    seconds plus its size at `min_speed`.
    """

    attempts: int = 6
    first_wait: float = 0.5
    longest_wait: float = 30.0
    timeout: float = 30.0
    min_speed: float = 64e3
    deadline: float = 300.0

    def allowed(self, size: int) -> float:
        return self.deadline + size / self.min_speed

    def wait(self, attempt: int, jitter: float) -> float:
        return min(self.longest_wait, self.first_wait * 2 ** (attempt - 1)) * (0.5 + jitter / 2)


@dataclass(frozen=True)
class Facts:
    """What a server says of a file: its bytes, a word that changes with its content (an ETag or a time, else ""), and whether
    it gives parts of it."""

    size: int
    version: str = ""
    parts: bool = True


class Closed(Exception):
    """The store was closed while something was on its way."""


class _Failed(Exception):
    """An answer that came, and is not what it should be."""


def is_remote(place: object) -> bool:
    return isinstance(place, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*:(//|:)", place) is not None


def _checked(place: str) -> str:
    """`place` without its last slash; InputError where it cannot be an address of a folder. A secret in it is not repeated."""
    try:
        parts = urlsplit(place)
        host = parts.hostname
    except ValueError as error:
        raise InputError(f"an address cannot be read ({error}); right would be https://host/folder") from None
    where = f"{parts.scheme}://{host or ''}"
    if parts.scheme not in _EXTRAS or "::" in place:
        raise InputError(f"{where}…: what can be read is a folder, s3://, gs://, https:// or http://")
    if "@" in parts.netloc:
        raise InputError(f"{where}: {_SECRETS}")
    if parts.query or parts.fragment:
        raise InputError(f"{where}{parts.path}: an address has nothing behind ? or #; {_SECRETS}")
    if not host or re.search(r"[\s\x00-\x1f]", place):
        raise InputError(f"{place!r} is no address of a folder; right would be {parts.scheme}://host-or-bucket/folder")
    return place.rstrip("/")


def _open_filesystem(scheme: str, patience: Patience) -> Any:
    """fsspec's, without its caches and without the retries of the layers below, so that ours are the only ones."""
    try:
        import fsspec
        from fsspec.config import conf

        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if scheme in ("http", "https"):
            asked = {**conf.get("http", {}).get("client_kwargs", {}), **conf.get("https", {}).get("client_kwargs", {})}
            options["client_kwargs"] = {"trust_env": True, **asked}  # proxies and ~/.netrc
        if scheme == "s3":
            limits = {"connect_timeout": patience.timeout, "read_timeout": patience.timeout, "retries": {"total_max_attempts": 1}}
            options["config_kwargs"] = {**limits, **conf.get("s3", {}).get("config_kwargs", {})}
        filesystem = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise InputError(f"files at {scheme}:// need {error.name or error}: pip install 'swath[{_EXTRAS[scheme]}]'") from None
    if scheme == "s3":
        filesystem.retries = 1
    return filesystem


class _Attempts:
    """Counts the failures of one file: `failed` waits, or ends it in one line."""

    def __init__(self, remote: "Remote", address: str, size: int) -> None:
        self.remote, self.address = remote, address
        self.allowed = remote.patience.allowed(size)
        self.started, self.row, self.best = time.monotonic(), 0, 0

    def check(self) -> None:
        """Between blocks: closed, or over the deadline?"""
        if self.remote.stop.is_set():
            raise Closed
        if time.monotonic() - self.started > self.allowed:
            raise self._over(f"took longer than {self.allowed:.0f} s")

    def failed(self, error: Exception, have: int) -> None:
        if isinstance(error, (InputError, Closed)):
            raise error
        status = getattr(error, "status", None) or getattr(error, "code", None)
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            raise InputError(f"{self.address} is not there (404); copy it there, or correct the address") from None
        if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__:
            raise InputError(f"{self.address} may not be read ({_words(error)}); {_SECRETS}") from None
        if isinstance(status, int) and 400 <= status < 500 and status not in _LATER:
            raise InputError(f"{self.address} cannot be read ({_words(error)}); correct the address") from None
        patience = self.remote.patience
        self.row = 1 if have - self.best > patience.min_speed * patience.timeout else self.row + 1
        self.best = max(self.best, have)
        if self.row >= patience.attempts:
            raise self._over(_words(error))
        self.check()
        self.remote.pause(patience.wait(self.row, self.remote.jitter()))

    def _over(self, what: str) -> InputError:
        seconds = time.monotonic() - self.started
        return InputError(
            f"{self.address} cannot be read: {what} ({self.row or 1} attempts in a row, {seconds:.0f} s); "
            "check the network and that copy, then start again: what is in the cache is kept"
        )


class Remote:
    """The folder `place` (s3://, gs://, http(s)://). `pause` and `jitter` are what tests replace to need no time."""

    def __init__(
        self,
        place: str,
        patience: Patience | None = None,
        *,
        pause: Callable[[float], None] | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.place = _checked(place)
        self.patience = patience or Patience()
        self.stop = threading.Event()
        self.pause, self.jitter = pause or self.wait, jitter
        self.scheme = urlsplit(self.place).scheme
        self._files = _open_filesystem(self.scheme, self.patience)

    def wait(self, seconds: float) -> None:
        """Sleep; Closed at once when `stop` is set."""
        if self.stop.wait(seconds):
            raise Closed

    def address(self, name: str) -> str:
        return f"{self.place}/{name}"

    def size(self, name: str) -> int:
        """Bytes of a file, as the server says. InputError as `stream`."""
        attempts = _Attempts(self, self.address(name), 0)
        while True:
            try:
                if self.scheme not in ("http", "https"):
                    size = self._files.info(self.address(name), timeout=self.patience.timeout)["size"]
                else:
                    with closing(self._get(name, 0)) as answer:
                        size = answer.r.content_length
                if size is None:
                    raise InputError(f"{self.address(name)}: its server does not say how long it is; use a server of plain files")
                return int(size)
            except Exception as error:  # each back end has its own
                attempts.failed(error, 0)

    def facts(self, name: str) -> Facts:
        """Of a file; InputError as `stream`."""
        return self._patiently(self.address(name), 0, lambda: self._facts(name))

    def files(self, folder: str) -> dict[str, Facts]:
        """By name, all files of a bucket below `folder`, or the one file of that name. InputError as `stream`."""
        address = f"{self.address(folder)}".rstrip("/")
        seconds = 10 * self.patience.deadline  # a million names are a thousand answers
        found = self._patiently(address, 0, lambda: self._files.find(address, detail=True, timeout=seconds))
        return {name.partition("/")[2]: _facts_of(info) for name, info in found.items()}

    def links(self, folder: str) -> list[str]:
        """Names, those of folders with a slash at the end, that an index page of HTTP leads to. InputError as `stream`."""
        address = f"{self.address(folder).rstrip('/')}/"
        ask = lambda: self._files.ls(address, detail=False, timeout=self.patience.timeout)  # noqa: E731
        return [link.removeprefix(f"{self.place}/") for link in self._patiently(address, 0, ask)]

    def part(self, name: str, start: int, end: int, version: str = "") -> bytes:
        """Bytes `start` to `end` of a file. InputError as `stream`, and where HTTP says that it is no longer the `version`."""
        seconds = self.patience.timeout + (end - start) / self.patience.min_speed

        def ask() -> bytes:
            if self.scheme not in ("http", "https"):
                data = self._files.cat_file(self.address(name), start=start, end=end, timeout=seconds)
            else:
                with closing(self._get(name, start, end)) as answer:
                    if answer.r.status != 206:
                        raise InputError(f"{self.address(name)}: its server gives no parts of it any more; start again")
                    if version and _version(answer.r.headers) != version:
                        raise InputError(f"{self.address(name)} has changed while it was read; start again")
                    data = b"".join(self._watched(self._body(answer)))
            if len(data) != end - start:
                raise _Failed(f"{len(data)} bytes come instead of {end - start}")
            return data

        return self._patiently(self.address(name), end - start, ask)

    def _facts(self, name: str) -> Facts:
        if self.scheme not in ("http", "https"):
            return _facts_of(self._files.info(self.address(name), timeout=self.patience.timeout))
        try:
            answer = self._get(name, 0, 1)
        except Exception as error:
            if getattr(error, "status", None) != 416:
                raise
            answer = self._get(name, 0)  # an empty file has no first byte
        with closing(answer):
            partial, size = answer.r.status == 206, answer.r.content_length
            if partial:
                total = answer.r.headers.get("Content-Range", "").rpartition("/")[2]
                size = int(total) if total.isdigit() else None
            if size is None:
                raise InputError(f"{self.address(name)}: its server does not say how long it is; use a server of plain files")
            return Facts(size, _version(answer.r.headers), partial)

    def _patiently(self, address: str, size: int, ask: Callable[[], T]) -> T:
        attempts = _Attempts(self, address, size)
        while True:
            try:
                return ask()
            except Exception as error:  # each back end has its own
                attempts.failed(error, 0)

    def stream(self, name: str, *, limit: int, size: int | None = None, digest: str | None = None) -> Iterator[tuple[int, bytes]]:
        """(offset, data) of one file in order; after a failure it goes on where it was, or begins again at offset 0.

        At the end, `size` bytes of SHA-256 `digest` were given, where those are known. InputError, in one line that names the
        file, where it is missing, forbidden, longer than `limit`, or still not right after all attempts; Closed after `stop`.
        """
        attempts = _Attempts(self, self.address(name), size or limit)
        have, hasher = 0, sha256()
        while True:
            try:
                start, blocks = self._request(name, have, size)
                if start != have:
                    have, hasher = 0, sha256()
                with closing(self._watched(blocks)) as watched:
                    for data in watched:
                        attempts.check()
                        if have + len(data) > limit:
                            raise InputError(f"{self.address(name)} is longer than {limit} bytes; correct the address")
                        if size is not None and have + len(data) > size:
                            have, hasher = 0, sha256()
                            raise _Failed(f"it is longer than {size} bytes")
                        hasher.update(data)
                        yield have, data
                        have += len(data)
                if size is not None and have < size:
                    raise _Failed(f"it ends after {have} of {size} bytes")
                if digest is not None and hasher.hexdigest() != digest:
                    have, hasher = 0, sha256()
                    raise _Failed("its bytes do not match the SHA-256 in the manifest")
                return
            except Exception as error:  # each back end has its own
                attempts.failed(error, have)
                if digest is None:  # nothing would tell that the two halves are of one file
                    have, hasher = 0, sha256()

    def _get(self, name: str, start: int, end: int | None = None) -> Any:
        """An HTTP answer from byte `start` on, up to `end`, its body not yet read."""
        import aiohttp

        seconds = self.patience.timeout
        part = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if start or end is not None else {}
        return self._files.open(
            self.address(name),
            block_size=0,  # one stream: not every server knows ranges
            size=1,  # unused by a stream; spares a HEAD request
            headers={"Accept-Encoding": "identity"} | part,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds),
        )

    def _request(self, name: str, start: int, size: int | None) -> tuple[int, Generator[bytes, None, None]]:
        """Where the answer begins (`start`, or 0 from a server that cannot resume), and its blocks."""
        if self.scheme not in ("http", "https"):
            return start, self._ranges(name, start, self.size(name) if size is None else size)
        answer = self._get(name, start)
        return (start if answer.r.status == 206 else 0), self._body(answer)

    def _body(self, answer: Any) -> Generator[bytes, None, None]:
        with closing(answer):
            while data := answer.read(BLOCK):
                yield data

    def _ranges(self, name: str, start: int, size: int) -> Generator[bytes, None, None]:
        for first in range(start, size, BLOCK):
            last = min(first + BLOCK, size)
            seconds = self.patience.timeout + (last - first) / self.patience.min_speed
            data = self._files.cat_file(self.address(name), start=first, end=last, timeout=seconds)
            yield data
            if len(data) < last - first:
                return

    def _watched(self, blocks: Generator[bytes, None, None]) -> Generator[bytes, None, None]:
        """`blocks`, or TimeoutError when too few bytes come in; the time that their reader takes does not count."""
        got, waited = 0, 0.0
        with closing(blocks):
            while True:
                before = time.monotonic()
                data = next(blocks, None)
                if data is None:
                    return
                got, waited = got + len(data), waited + time.monotonic() - before
                if waited > self.patience.timeout:
                    if got < self.patience.min_speed * waited:
                        raise TimeoutError(f"only {got / waited:.0f} bytes/s come in")
                    got, waited = 0, 0.0
                yield data


def _facts_of(info: dict[str, Any]) -> Facts:
    """fsspec's, of S3 or GCS."""
    said = (info.get(key) for key in ("ETag", "etag", "md5Hash", "LastModified", "updated"))
    return Facts(int(info.get("size") or 0), str(next((word for word in said if word), "")))


def _version(headers: Any) -> str:
    return headers.get("ETag") or headers.get("Last-Modified") or ""


def _words(error: Exception) -> str:
    """An error of any back end in one short line."""
    if isinstance(error, TimeoutError) and not str(error):
        return "no answer in time"
    status = getattr(error, "status", None)
    if isinstance(status, int) and status >= 400:
        return f"the server answers {status}"
    return " ".join(str(error).split())[:200] or type(error).__name__
