"""`swath export`: a folder that torch, transformers, safetensors and Pillow load without swath (DESIGN §2.9).

It is built in a sibling folder, loaded there by a fresh process that must reproduce the source's features bit for bit, and
only then renamed.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from swath.backbones.base import Context, Features
from swath.hub.card import card, without_paths
from swath.hub.code import AUTO, exported_code
from swath.hub.curves import draw
from swath.hub.history import history
from swath.hub.licences import identifier
from swath.hub.load import Head, Loaded, load_backbone, read_head
from swath.hub.timm import FILE as TIMM
from swath.hub.timm import timm_note, timm_weights
from swath.kernels.dispatch import OPERATORS, use
from swath.pretrain.exported import CONFIG, MODEL_TYPE, OBJECTIVE, WEIGHTS, is_export
from swath.shards.errors import InputError
from swath.shards.files import whole_folder, write_bytes, write_json
from swath.shards.prepare import prepare
from swath.shards.reader import Chips, Stored

_CHECK = Path(__file__).with_name("check.py")


def export(path: Path | str, to: Path | str, *, license: str | None = None, with_decoder: bool = False) -> Path:
    """Export the backbone at `path` (run, checkpoint, export or Hub id) to the folder `to`, which must be new or empty.

    `license` is the identifier that the weights are offered under; an export keeps the one that it has. `with_decoder` keeps the
    rest of the objective beside it, so that others can continue pretraining (`load_objective`).
    """
    to = Path(to)
    require_free(to)
    _require_transformers()
    stated = {} if license is None else {"license": identifier(license)}
    loaded = load_backbone(path)
    loaded.origin = loaded.origin | history(path, loaded.origin) | stated
    return write_export(loaded, to, read_head(path) if with_decoder else None)


def write_export(loaded: Loaded, to: Path, head: Head | None = None) -> Path:
    """Write, verify and rename. Raises InputError where `to` is taken, transformers is missing, or features differ."""
    require_free(to)
    _require_transformers()
    with whole_folder(to, "writing an export") as folder:
        features, tensors = _expected(loaded)
        save_file(tensors, folder.parent / "expected.safetensors")
        _write_files(loaded, folder, features, head)
        _verify(folder, folder.parent)
    return to


def require_free(to: Path) -> None:
    """InputError unless `to` is new or empty."""
    if to.is_dir() and not any(to.iterdir()):
        return
    if to.exists() or to.is_symlink():
        what = "holds an export already" if is_export(to) else "exists and is not empty"
        raise InputError(f"{to} {what}; choose another folder")


def _require_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise InputError("an export is verified with transformers, which is not installed: pip install 'swath[hub]'")


def _write_files(loaded: Loaded, folder: Path, features: Features, head: Head | None) -> None:
    code = exported_code(type(loaded.backbone))
    origin = without_paths(loaded.origin)
    tensors = {f"backbone.{name}": tensor.cpu().contiguous() for name, tensor in loaded.backbone.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = _config(loaded, origin, features)
    if head is not None:
        config["objective"] = {"name": head.name, "options": head.options}
        save_file({name: tensor.contiguous() for name, tensor in head.tensors.items()}, folder / OBJECTIVE)
    write_json(folder / CONFIG, config)
    write_json(folder / "preprocessor_config.json", _processor(loaded))
    for name, text in code.items():
        write_bytes(folder / name, text.encode())
    recipe = yaml.safe_dump(origin.get("config", {}), sort_keys=False, allow_unicode=True)
    write_bytes(folder / "recipe.yaml", recipe.encode())
    if "training" in origin:
        draw(origin["training"], folder)
    readme = card(loaded, origin)
    if (weights := timm_weights(loaded)) is not None:
        save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, folder / TIMM, metadata={"format": "pt"})
        readme += timm_note(loaded)
    write_bytes(folder / "README.md", readme.encode())


def _config(loaded: Loaded, origin: dict[str, Any], features: Features) -> dict[str, Any]:
    height, width = loaded.size
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["SwathModel"],
        "auto_map": {name: AUTO[name] for name in ("AutoConfig", "AutoModel", "AutoBackbone")},
        "dtype": "float32",
        "backbone_name": loaded.name,
        "backbone_options": loaded.options,
        # what is looked for by a projector behind the model, or a dense head
        "hidden_size": loaded.backbone.width,
        "num_hidden_layers": loaded.backbone.depth,
        "num_channels": loaded.contract.channels,
        "patch_size": loaded.backbone.mask_unit,
        "num_prefix_tokens": features.prefix.shape[1],
        "image_size": height if height == width else [height, width],
        "map_channels": {str(stride): level.shape[1] for stride, level in features.maps.items()},
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


def _verify(folder: Path, scratch: Path) -> None:
    """Load the folder in a fresh interpreter that sees no swath, and compare what comes out with the source, bit for bit."""
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


def _expected(loaded: Loaded) -> tuple[Features, dict[str, torch.Tensor]]:
    """What the source makes of random chips of a fixed seed in the contract's unit, and these with it as tensors by name. One
    pixel is not finite."""
    contract, (height, width) = loaded.contract, loaded.size
    random = torch.Generator().manual_seed(0)
    statistics = contract.normalisation
    mean, std = (torch.tensor(v * contract.dates)[:, None, None] for v in (statistics.mean, statistics.std))
    raw = torch.randn(2, contract.channels, height, width, generator=random) * std + mean
    raw[0, 0, 0, 0] = torch.nan
    count = torch.arange(2)
    size = torch.tensor([[height, width]] * 2)
    one = torch.ones(2, dtype=torch.float64)
    stored = Stored(raw, None, size, scale=one, add=0 * one)
    chips = Chips({contract.modality: stored}, id=count, visit=0 * count, label=0 * count)
    prepared = prepare(chips, {contract.modality: contract}, loaded.size)
    pixel_values = prepared.images[contract.modality]
    device = next(loaded.backbone.parameters()).device
    # the folder carries the reference operators
    with torch.inference_mode(), use(**_reference()):
        ctx = Context(wavelength_nm=prepared.wavelength_nm[contract.modality].to(device))
        features = loaded.backbone(pixel_values.to(device), ctx)
    last = torch.cat([features.prefix, features.tokens], dim=1)
    made = {"raw": raw, "pixel_values": pixel_values, "last_hidden_state": last, "pooler_output": features.pooled}
    made |= {f"map_{stride}": level for stride, level in features.maps.items()}
    return features, {name: tensor.cpu().contiguous() for name, tensor in made.items()}
