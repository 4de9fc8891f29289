"""Recipes that ship with swath, by name."""

from importlib import resources
from pathlib import Path

import yaml

from swath.backbones.base import nearest
from swath.shards.errors import InputError


def _shipped() -> dict[str, str]:
    folder = resources.files(__name__)
    return {f.name.removesuffix(".yaml"): f.read_text() for f in folder.iterdir() if f.name.endswith(".yaml")}


def find(recipe: str) -> tuple[str, str]:
    """(YAML text, name) of a shipped recipe or of a path; InputError with the nearest name if it is neither."""
    shipped = _shipped()
    if recipe in shipped:
        return shipped[recipe], recipe
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml") and not path.exists():
        raise InputError(f"no recipe is called {recipe!r}{nearest(recipe, list(shipped))}; `swath recipes` lists them")
    try:
        return path.read_text(), path.stem
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} cannot be read: {getattr(error, 'strerror', error)}") from None


def listing() -> str:
    """One line per shipped recipe: its name and the comment that it starts with."""
    rows = []
    for name, text in sorted(_shipped().items()):
        about = text.partition("\n")[0].lstrip("# ")
        yaml.safe_load(text)
        rows.append(f"{name:24} {about}")
    return "\n".join(rows)
