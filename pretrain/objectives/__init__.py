"""One file per objective; importing this registers every one here."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"swath.pretrain.objectives.{_module.name}")
