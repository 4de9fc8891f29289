"""The Hub: its names, its errors in one line, and a copy of what a backbone needs. The token stays inside huggingface_hub."""

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swath.pretrain.exported import CONFIG, OBJECTIVE, WEIGHTS
from swath.shards.errors import InputError

HERE = 'FOLDER = "."  # where this lies, or its name on the Hub'  # a line of every card, which a push makes certain
_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@(\S+))?", re.ASCII)
_TRANSPORT = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}


def require_client(purpose: str) -> None:
    """InputError where huggingface_hub is missing; `purpose` is what needs it."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InputError(f"{purpose} needs huggingface_hub, which is not installed: pip install 'swath[hub]'")


def require_name(name: str) -> None:
    """InputError unless `name` is ORG/NAME as the Hub takes it."""
    found = _ID.fullmatch(name)
    if found is None or found[2] is not None or "--" in name or ".." in name or len(name) > 96 or name.endswith((".git", ".")):
        raise InputError(
            f"{name!r} is no name of a model on the Hub; ORG/NAME is, of letters, digits, single '-' and '.', and '_'"
        )


def local(place: Path | str) -> Path:
    """`place` itself where something is there or it cannot be a Hub id; otherwise the copy of ORG/NAME[@REVISION].

    Only configuration and weights are copied, into huggingface_hub's cache, which serves when the Hub cannot be reached. Code
    that lies in the repository is neither copied nor run. Raises InputError.
    """
    found = None if Path(place).exists() else _ID.fullmatch(str(place))
    if found is None:
        return Path(place)
    name, revision = found.groups()
    require_client(f"{place} is no folder here; a model of the Hub")
    from huggingface_hub import snapshot_download

    with told(f"{name}{f'@{revision}' if revision else ''} (no folder here, so it is taken for a model of the Hub)"):
        return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG, WEIGHTS, OBJECTIVE]))


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turns what the client raises about `what` into one line of our own words, in which no token can be."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except InputError:
        raise
    except Exception as raised:
        error: BaseException = raised
        if isinstance(raised, RuntimeError) and raised.__cause__ is not None:  # how the client names the file that failed
            error = raised.__cause__
        answer = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, OfflineModeIsEnabled):
            line = "the Hub is switched off by HF_HUB_OFFLINE"
        elif isinstance(error, LocalEntryNotFoundError):
            line = "the Hub cannot be reached, and there is no whole copy in the cache"
        elif isinstance(error, GatedRepoError):
            line = f"access must be asked for on its page first ({answer})"
        elif isinstance(error, RevisionNotFoundError):
            line = f"it has no such revision ({answer})"
        elif isinstance(error, RepositoryNotFoundError):
            line = f"the Hub has none, or none that your token may read ({answer})"
        elif answer == 401:
            line = "the Hub does not know your token (401); `hf auth login`, or set HF_TOKEN"
        elif answer == 403:
            line = "your token may not do this (403); it needs the right to write there"
        elif answer == 404:
            line = "the Hub has no such organisation or model (404)"
        elif answer is not None:
            line = f"the Hub answered {answer}{_said(error)}; the same command continues"
        elif isinstance(error, HFValidationError):
            line = "that is no name of a model on the Hub; ORG/NAME is"
        elif isinstance(error, ConnectionError | TimeoutError) or _of_transport(error):
            line = f"the Hub cannot be reached ({type(error).__name__}); the same command continues"
        elif isinstance(error, ValueError):  # what the Hub says of the card's metadata, or of a large file
            line = f"the Hub refused: {_clean(str(error))}"
        elif isinstance(error, OSError):
            line = error.strerror or type(error).__name__
        else:
            raise
        raise InputError(f"{what}: {line}") from None


def _of_transport(error: BaseException) -> bool:
    return any(kind.__module__.partition(".")[0] in _TRANSPORT for kind in type(error).__mro__)


def _said(error: BaseException) -> str:
    words = _clean(str(getattr(error, "server_message", None) or ""))
    return f" ({words})" if words else ""


def _clean(text: str) -> str:
    """One short line without anything like a token."""
    from huggingface_hub import get_token

    text = re.sub(r"\bhf_\w+", "…", " ".join(text.split()))
    return text.replace(token, "…")[:300] if (token := get_token()) else text[:300]
