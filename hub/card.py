"""The model card of an export. Nothing in it names a path or a machine."""

import re
import socket
from typing import Any

import yaml

from swath.hub.load import Loaded

_PATH = re.compile(r"(?:[A-Za-z]:)?[^\s'\"]*[/\\]")


def without_paths(value: Any) -> Any:
    """`value` (of JSON) without folders and host names: a path keeps its last part, and where a run lived is left out."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items() if key not in ("dir", "host", "hostname", "user")}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if isinstance(value, str):
        host = socket.gethostname()
        bare = _PATH.sub("", value.rstrip("/\\"))
        return bare.replace(host, "host") if len(host) > 3 else bare
    return value


def card(loaded: Loaded, origin: dict[str, Any]) -> str:
    """README.md: metadata block, input contract, how to load, where it comes from."""
    contract = loaded.contract
    height, width = loaded.size
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["swath", "earth-observation", "remote-sensing", contract.sensor, loaded.name],
    }
    parameters = sum(p.numel() for p in loaded.backbone.parameters())
    counts = [f"{origin[what]:,} {unit}" for what, unit in (("step", "steps"), ("samples", "samples")) if what in origin]
    trained = f" ({', '.join(counts)})" if counts else ""
    objective = f" ({name})" if (name := origin.get("config", {}).get("objective", {}).get("name")) else ""
    imagery = " ".join(word for word in (contract.sensor, contract.level) if word != "unknown")
    resolution = f", {contract.gsd_m:g} m per pixel" if contract.gsd_m else ""
    nodata = f", nodata {contract.nodata:g}" if contract.nodata is not None else ""
    integers = "" if contract.unit == "digital number" else ", scale=…, add=…"
    shapes = f"({len(contract.bands)}, H, W) or (H, W, {len(contract.bands)})"
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()}
---

# {loaded.name} for {imagery}

An Earth-observation backbone, pretrained with swath{objective}: {parameters / 1e6:,.1f} M parameters, features of width
{loaded.backbone.pooled_width}, trained at {height} × {width} pixels{trained}. The recipe is in `recipe.yaml`.

## Input contract

Modality {contract.modality}, unit **{contract.unit}**{resolution}{nodata}. Bands in this order; the image processor
normalises them by these numbers and refuses another count.

| | band | wavelength (nm) | mean | standard deviation |
|---|---|---|---|---|
{_bands(loaded)}

## Loading

Needs `torch`, `transformers`, `safetensors` and `Pillow`; the code is in this repository.

```python
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(FOLDER, trust_remote_code=True)
inputs = processor(image{integers})  # an array {shapes}, or a list of them
output = model(**inputs)
output.pooler_output  # (B, {loaded.backbone.pooled_width})
output.last_hidden_state  # (B, tokens, {loaded.backbone.width})
```
{_units(loaded)}
Any image size that the patch divides works; positions are interpolated. `swath probe knn FOLDER …` evaluates it.
{_adapted(origin)}
## Limits

The features mean what they meant on imagery of this sensor, level and unit. Other bands, another processing level or other
units are another input: train or adapt on them instead.
"""


def _adapted(origin: dict[str, Any]) -> str:
    if not (lines := origin.get("adapted")):
        return ""
    listed = "\n".join(f"- {line}" for line in lines)
    return f"\n## Adapted\n\nAfter training, by `swath adapt`, without training anything:\n\n{listed}\n"


def _bands(loaded: Loaded) -> str:
    normalisation = loaded.contract.normalisation
    rows = []
    for number, (band, mean, std) in enumerate(zip(loaded.contract.bands, normalisation.mean, normalisation.std, strict=True)):
        name = f"{band.name} ({band.common_name})" if band.common_name not in (None, band.name) else band.name
        wavelength = f"{band.wavelength_nm:g}" if band.wavelength_nm else "–"
        rows.append(f"| {number + 1} | {name} | {wavelength} | {mean:.6g} | {std:.6g} |")
    return "\n".join(rows)


def _units(loaded: Loaded) -> str:
    if loaded.contract.unit == "digital number":
        return ""
    return (
        f"\nValues are {loaded.contract.unit}; for stored integers, pass `scale` and `add` so that "
        f"integer · scale + add is {loaded.contract.unit}.\n"
    )
