"""Tokenizers and encoders: the thing that is exported (DESIGN §2.5). Importing this registers every backbone here."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"swath.backbones.{_module.name}")
