"""`swath export`: a folder that torch, transformers, safetensors and Pillow load without swath (DESIGN §2.9).

It is built in a sibling folder, loaded there by a fresh process that must reproduce the source's features bit for bit, and
only then renamed.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from swath.hub.card import card, without_paths
from swath.hub.code import AUTO, exported_code
from swath.hub.load import CONFIG, MODEL_TYPE, WEIGHTS, Loaded, load_backbone
from swath.kernels.dispatch import OPERATORS, use
from swath.shards.errors import InputError
from swath.shards.files import disk_errors, sync_folder, write_bytes, write_json
from swath.shards.prepare import prepare
from swath.shards.reader import Chips, Stored

_CHECK = Path(__file__).with_name("check.py")


def export(path: Path | str, to: Path | str) -> Path:
    """Export the backbone at `path` (run, checkpoint or export) to the folder `to`, which must be new or empty."""
    to = Path(to)
    _require_free(to)
    _require_transformers()
    return write_export(load_backbone(path), to)


def write_export(loaded: Loaded, to: Path) -> Path:
    """Write, verify and rename. Raises InputError where `to` is taken, transformers is missing, or features differ."""
    _require_free(to)
    _require_transformers()
    with disk_errors("writing an export", to.parent):
        to.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".swath-export-", dir=to.parent))
        try:
            folder = scratch / "export"
            folder.mkdir()
            _write_files(loaded, folder)
            _verify(loaded, folder, scratch)
            sync_folder(folder)
            folder.rename(to)
            sync_folder(to.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return to


def _require_free(to: Path) -> None:
    if to.is_dir() and not any(to.iterdir()):
        return
    if to.exists() or to.is_symlink():
        what = "holds an export already" if (to / CONFIG).is_file() and (to / WEIGHTS).is_file() else "exists and is not empty"
        raise InputError(f"{to} {what}; choose another folder")


def _require_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise InputError("an export is verified with transformers, which is not installed: pip install 'swath[hub]'")


def _write_files(loaded: Loaded, folder: Path) -> None:
    code = exported_code(type(loaded.backbone))
    origin = without_paths(loaded.origin)
    tensors = {f"backbone.{name}": tensor.cpu().contiguous() for name, tensor in loaded.backbone.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, _config(loaded, origin))
    write_json(folder / "preprocessor_config.json", _processor(loaded))
    for name, text in code.items():
        write_bytes(folder / name, text.encode())
    recipe = yaml.safe_dump(origin.get("config", {}), sort_keys=False, allow_unicode=True)
    write_bytes(folder / "recipe.yaml", recipe.encode())
    write_bytes(folder / "README.md", card(loaded, origin).encode())


def _config(loaded: Loaded, origin: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["SwathModel"],
        "auto_map": {name: AUTO[name] for name in ("AutoConfig", "AutoModel")},
        "dtype": "float32",
        "backbone_name": loaded.name,
        "backbone_options": loaded.options,
        "hidden_size": loaded.backbone.width,  # what a projector behind the model looks for
        "num_hidden_layers": loaded.backbone.depth,
        "image_size": list(loaded.size),
        **contracts_of(loaded),
        "origin": origin,
    }


def contracts_of(loaded: Loaded) -> dict[str, Any]:
    """What config.json says of the input: one image, and where its bands are of several modalities the contract of each."""
    one = {"input_contract": loaded.contract.model_dump(mode="json")}
    if len(loaded.contracts) == 1:
        return one
    return one | {"input_contracts": {name: contract.model_dump(mode="json") for name, contract in loaded.contracts.items()}}


def _processor(loaded: Loaded) -> dict[str, Any]:
    return {
        "image_processor_type": "SwathImageProcessor",
        "auto_map": {"AutoImageProcessor": AUTO["AutoImageProcessor"]},
        "size": {"height": loaded.size[0], "width": loaded.size[1]},
        "do_resize": True,
        "input_contract": loaded.contract.model_dump(mode="json"),
    }


def _verify(loaded: Loaded, folder: Path, scratch: Path) -> None:
    """Load the folder in a fresh interpreter that sees no swath, and compare what comes out with the source, bit for bit."""
    save_file(_expected(loaded), scratch / "expected.safetensors")
    seen = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and not (Path(p) / "swath").exists()]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(seen),
        "PYTHONSAFEPATH": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(scratch / "home"),
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, str(_CHECK.resolve()), str(folder.resolve()), str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"the export does not load in a clean process, so it was not kept: {last}")


def _reference() -> dict[str, str]:
    return {name: "reference" for name, operator in OPERATORS.items() if "reference" in operator.implementations}


def _expected(loaded: Loaded) -> dict[str, torch.Tensor]:
    """Random chips of a fixed seed in the contract's unit, and what the source makes of them. One pixel is not finite."""
    contract, (height, width) = loaded.contract, loaded.size
    random = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(v)[:, None, None] for v in (contract.normalisation.mean, contract.normalisation.std))
    raw = torch.randn(2, len(contract.bands), height, width, generator=random) * std + mean
    raw[0, 0, 0, 0] = torch.nan
    count = torch.arange(2)
    size = torch.tensor([[height, width]] * 2)
    one = torch.ones(2, dtype=torch.float64)
    stored = Stored(raw, None, size, scale=one, add=0 * one)
    chips = Chips({contract.modality: stored}, id=count, visit=0 * count, label=0 * count)
    pixel_values = prepare(chips, {contract.modality: contract}, loaded.size).images[contract.modality]
    device = next(loaded.backbone.parameters()).device
    # the folder carries the reference operators
    with torch.inference_mode(), use(**_reference()):
        features = loaded.backbone(pixel_values.to(device))
    last = torch.cat([features.prefix, features.tokens], dim=1)
    made = {"raw": raw, "pixel_values": pixel_values, "last_hidden_state": last, "pooler_output": features.pooled}
    return {name: tensor.cpu().contiguous() for name, tensor in made.items()}
