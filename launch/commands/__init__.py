"""The commands of `swath`, one file for each group; a file has `add(commands)`, and is found by itself.

What takes long to import is imported by the function that runs a command, so that `swath --help` is quick.
"""

import argparse
import importlib
import pkgutil
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_all(commands: Commands) -> None:
    """Every command of every file of this folder."""
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        importlib.import_module(f"{__name__}.{name}").add(commands)
