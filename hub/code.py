"""The Python files of an export: the templates, and the backbone's own modules with their imports made relative.

transformers follows relative imports within one folder, so `swath.backbones.vit` becomes `swath_vit.py` there, and
`swath.kernels.linear` becomes `swath_linear.py`. Of a local folder transformers 4 takes only what the model's file imports
itself, so that names all of them.
"""

import importlib
import inspect
import re
from pathlib import Path

from swath.backbones.base import Backbone
from swath.shards.errors import InputError

AUTO = {
    "AutoConfig": "configuration_swath.SwathConfig",
    "AutoModel": "modeling_swath.SwathModel",
    "AutoBackbone": "modeling_swath.SwathBackbone",
    "AutoImageProcessor": "image_processing_swath.SwathImageProcessor",
}
_MODEL = "modeling_swath.py"
_TEMPLATES = Path(__file__).with_name("templates")
_ENCODER = re.compile(r"^from \S+ import \w+ as Encoder\b.*$", re.MULTILINE)
_CARRIED = re.compile(r"^( *)from (swath\.(?:backbones|kernels)\.\w+) import", re.MULTILINE)
_RELATIVE = re.compile(r"^from \.(\w+) import", re.MULTILINE)
_LEFT = re.compile(r"^ *(?:from|import) (swath\b[\w.]*)", re.MULTILINE)


def exported_code(backbone: type[Backbone]) -> dict[str, str]:
    """{file name: text} of all that an export of `backbone` needs.

    Raises InputError for a backbone that imports more of swath than files of `swath.backbones` and `swath.kernels`.
    """
    files = {path.name: path.read_text() for path in sorted(_TEMPLATES.glob("*.py"))}
    encoder = f"from .{_flat(backbone.__module__)} import {backbone.__name__} as Encoder"
    files[_MODEL] = _ENCODER.sub(encoder, files[_MODEL])
    files[f"{_flat(backbone.__module__)}.py"] = _source(backbone.__module__)
    waiting = list(files)
    while waiting:
        name = waiting.pop()
        for _, module in _CARRIED.findall(files[name]):
            if f"{_flat(module)}.py" not in files:
                files[f"{_flat(module)}.py"] = _source(module)
                waiting.append(f"{_flat(module)}.py")
        files[name] = _CARRIED.sub(lambda found: f"{found[1]}from .{_flat(found[2])} import", files[name])
        if left := _LEFT.findall(files[name]):
            raise InputError(f"{backbone.__name__} cannot be exported: its code imports {', '.join(sorted(set(left)))}")
    files[_MODEL] = files[_MODEL].replace(encoder, "\n".join([encoder, *_all_named(files)]))
    return files


def _all_named(files: dict[str, str]) -> list[str]:
    """Imports for the model's file of every module that it does not import itself."""
    named = set(_RELATIVE.findall(files[_MODEL]))
    others = sorted(name.removesuffix(".py") for name in files if name.startswith("swath_"))
    return [f"from .{name} import __name__ as _{name}  # noqa: F401" for name in others if name not in named]


def _flat(module: str) -> str:
    return f"swath_{module.rpartition('.')[2]}"


def _source(module: str) -> str:
    """An operator travels as its reference: plain torch, the same names."""
    reference = ".reference" if module.startswith("swath.kernels.") else ""
    return inspect.getsource(importlib.import_module(module + reference))
