"""Any two (to four) folders of aligned images whose names agree, such as `visible/` and `thermal/`."""

import re
from pathlib import Path, PurePosixPath

from swath.shards.errors import InputError
from swath.shards.layouts.layout import ANYWHERE, Layer, Layout
from swath.shards.layouts.store import Store, open_store
from swath.shards.layouts.tree import Tree
from swath.shards.layouts.walk import IMAGERY
from swath.shards.recipes.registry import register
from swath.shards.sources.source import Options

_SPLITS = ("train", "val", "test")
_MOST = 4
_TITLE = "Aligned images in folders of their own, such as visible/ and thermal/, joined by name"
_LICENCE = "that of your data"


@register("aligned_pairs", _TITLE, _LICENCE)
def aligned_pairs(path: Path, options: Options) -> Tree:
    """`visible/a.png` with `thermal/a.png`; a folder train, val or test, above or below, is the split."""
    folders, above = _folders(open_store(path))
    if not 2 <= len(folders) <= _MOST:
        found = ", ".join(folders) or "none"
        raise InputError(f"{path}: pairs lie in 2 to {_MOST} folders such as visible/ and thermal/; found {found}")
    layers = {_modality(folder): Layer(_files(folder, above), None, None) for folder in folders}
    if len(layers) < len(folders):
        raise InputError(f"{path}: the folders {', '.join(folders)} cannot be told apart as names of modalities; rename one")
    return Tree(Layout("aligned_pairs", _TITLE, _LICENCE, "visible/<name>.png and thermal/<name>.png", layers), path, options)


def _folders(store: Store) -> tuple[list[str], bool]:
    """Names of the folders that the images lie in, below the folders that all share; whether the split's folder is above them."""
    parents = {PurePosixPath(name).parts[:-1] for name, _ in store.walk() if name.lower().endswith(IMAGERY)}
    if not parents:
        return [], False
    first = min(parents)
    depth = next((n for n, part in enumerate(first) if any(len(p) <= n or p[n] != part for p in parents)), len(first))
    above = any(parent[depth : depth + 1] and parent[depth] in _SPLITS for parent in parents)
    below = {tuple(part for part in parent[depth:] if part not in _SPLITS) for parent in parents}
    return sorted({parts[0] if parts else "." for parts in below}), above


def _modality(folder: str) -> str:
    return re.sub(r"[^a-z0-9_-]+", "-", folder.lower()).strip("-_")[:18] or "image"


def _files(folder: str, above: bool) -> str:
    split = rf"(?P<split>{'|'.join(_SPLITS)})"
    stem, end = (rf"(?P<head>{split})/", r"(?P<key>.+)") if above else ("", rf"(?P<key>(?:{split}/)?.+)")
    return rf"{ANYWHERE}{stem}{re.escape(folder)}/{end}\.(?i:jpe?g|png|tiff?)"
