"""`swath export … --push ORG/NAME`: an exported folder as one commit on the Hub.

The token is read by huggingface_hub, from its store or HF_TOKEN, and is nowhere in swath. A large file that the Hub has is not
sent again, and an export is the same to the byte whenever it is made, so the same command continues an interrupted upload.
"""

import filecmp
import json
import logging
import re
import tempfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from swath.hub.licences import concerns, identifier
from swath.hub.remote import HERE, require_client, require_name, told
from swath.pretrain.exported import CONFIG, WEIGHTS, is_export
from swath.shards.errors import InputError

log = logging.getLogger(__name__)
# What an earlier export may have left in the repository; other files there are nobody's business but their owner's.
_OURS = ("*_swath.py", "swath_*.py", "*.safetensors", "assets/*.png")


def publish(
    backbone: Path | str,
    write: Callable[[Path], Path],
    name: str,
    *,
    to: Path | None = None,
    license: str | None = None,
    private: bool = False,
    revision: str | None = None,
) -> str:
    """Export `backbone` with `write` (to a folder, which it returns) and push that; the address of the commit.

    Without `to` the export lies in a temporary folder for as long as it takes; an exported folder that has its licence is pushed
    as it lies, with whatever its owner has added. With `to`, an export that is there already is pushed if a new one would be the
    same to the byte. Name, licence and token are looked at before anything long begins. Raises InputError.
    """
    require_client("--push")
    require_name(name)
    backbone = Path(backbone)
    stated = _licence(backbone) if is_export(backbone) else None
    wanted = stated if license is None else identifier(license)
    if wanted is None:
        raise InputError("weights without a licence may be used by nobody; --license ID gives one, such as apache-2.0")
    _require_token()
    if to is None and wanted == stated:
        return push(backbone, name, private=private, revision=revision)
    with tempfile.TemporaryDirectory(prefix="swath-push-") as scratch:
        if to is None or is_export(to):
            made = write(Path(scratch) / "export")
            if to is not None and not _same(made, to):
                raise InputError(f"{to} holds another export already; choose another folder")
        else:
            made = write(to)
        return push(to or made, name, private=private, revision=revision)


def _require_token() -> None:
    from huggingface_hub import get_token

    if not get_token():
        raise InputError("there is no token of the Hub; `hf auth login`, or set HF_TOKEN, to one that may write")


def push(folder: Path, name: str, *, private: bool = False, revision: str | None = None) -> str:
    """Make `folder`, an export whose card names a licence, the content of `revision` ("main") of model `name`; the commit's
    address.

    The repository and the branch are made where there are none. All is one commit, which takes away files of an earlier export.
    Raises InputError, also for `private` where the repository is public, and for data that may not be passed on.
    """
    require_client("--push")
    require_name(name)
    if revision is not None and not re.fullmatch(r"\w[\w./-]*", revision, re.ASCII):
        raise InputError(f"--revision {revision!r} is no name of a branch")
    if not is_export(folder):
        raise InputError(f"{folder} is no exported folder ({CONFIG}, {WEIGHTS})")
    if (licence := _licence(folder)) is None:
        raise InputError(f"the card of {folder} names no licence for the weights; --license ID gives one, such as apache-2.0")
    _require_token()
    for line in concerns(licence, _datasets(folder)):
        log.warning("! %s", line)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    card = _card(folder).replace(HERE, f'FOLDER = "{name}"')
    if revision is not None:
        card = card.replace("from_pretrained(FOLDER, ", f'from_pretrained(FOLDER, revision="{revision}", ')
    api = HfApi(library_name="swath")
    with told(f"pushing to {name}"):
        api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.model_info(name).private:
            raise InputError(f"{name} is there already and is public; make it private on its page, or choose another name")
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        files = _files(folder)
        there = api.list_repo_files(name, revision=revision)
        stale = [path for path in there if path not in files and any(fnmatch(path, one) for one in _OURS)]
        added = [
            CommitOperationAdd(path_in_repo=path, path_or_fileobj=card.encode() if path == "README.md" else str(file))
            for path, file in files.items()
        ]
        commit = api.create_commit(
            name,
            [*added, *(CommitOperationDelete(path_in_repo=path) for path in stale)],
            commit_message="Export by swath",
            revision=revision,
        )
    return commit.commit_url


def _files(folder: Path) -> dict[str, Path]:
    """By their names on the Hub; hidden ones stay, and so does what a link points to."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()}
    return {name.as_posix(): path for name, path in found.items() if not any(part.startswith(".") for part in name.parts)}


def _card(folder: Path) -> str:
    return (folder / "README.md").read_text() if (folder / "README.md").is_file() else ""


def _licence(folder: Path) -> str | None:
    """That the metadata of its card names."""
    parts = _card(folder).split("---\n", 2)
    try:
        block = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
    except yaml.YAMLError:
        block = None
    found = block.get("license") if isinstance(block, dict) else None
    return identifier(found) if isinstance(found, str) else None


def _datasets(folder: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads((folder / CONFIG).read_text())["origin"].get("datasets", [])
        return [{"name": str(one["name"]), "licence": str(one["licence"])} for one in found]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / CONFIG} is damaged ({error}); export it again") from None


def _same(one: Path, other: Path) -> bool:
    """All files alike to the byte."""
    names = [{path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} for root in (one, other)]
    return names[0] == names[1] and not any(filecmp.cmpfiles(one, other, list(names[0]), shallow=False)[1:])
