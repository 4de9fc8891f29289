"""Published data sets by name. A recipe is one file in this folder that registers itself; no list is edited."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from swath.shards.errors import InputError
from swath.shards.sources.source import Options, Source
from swath.shards.sources.torchgeo import PREFIX, open_torchgeo

Open = Callable[[Path, Options], Source]


@dataclass(frozen=True)
class Recipe:
    """How the published layout `name` is opened; `title` and `licence` are one line each for people."""

    name: str
    title: str
    licence: str
    open: Open


_recipes: dict[str, Recipe] = {}


def register(name: str, title: str, licence: str) -> Callable[[Open], Open]:
    """Decorates `open(path, options) -> Source` of a data set in its published layout."""

    def add(function: Open) -> Open:
        assert name not in _recipes, f"recipe {name} is registered twice"
        _recipes[name] = Recipe(name, title, licence, function)
        return function

    return add


@cache
def recipes() -> dict[str, Recipe]:
    """All of them by name, sorted; importing this folder's files registers them."""
    package = importlib.import_module(__package__ or "")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_recipes.items()))


def find(name: str) -> Recipe:
    """`torchgeo:` and the name of a class there is a recipe too. InputError with the nearest name where there is none."""
    if name.startswith(PREFIX):
        return Recipe(name, "read by TorchGeo", "see TorchGeo", partial(open_torchgeo, name.removeprefix(PREFIX)))
    if name not in recipes():
        near = difflib.get_close_matches(name, recipes(), n=1)
        raise InputError(f"no recipe {name!r}; {f'did you mean {near[0]}?' if near else ''} there are: {', '.join(recipes())}")
    return recipes()[name]
