"""The model card of an export. Nothing in it names a path or a machine, a sample or a place on the ground."""

import re
import socket
from collections.abc import Sequence
from typing import Any

import yaml

from swath.hub import curves
from swath.hub.licences import restricts
from swath.hub.load import Loaded
from swath.hub.remote import HERE

_PATH = re.compile(r"(?:[A-Za-z]:)?[^\s'\"]*[/\\]")
_WHOLE = re.compile(r"(?:[A-Za-z]:|\w+:/|~\w*|\.{0,2})[/\\]")  # how what is nothing but a path begins; it may hold blanks

_LEFT_OUT = ("dir", "cache_dir", "host", "hostname", "user")


def without_paths(value: Any) -> Any:
    """`value` (of JSON) without folders and host names: a path keeps its last part, and where a run lived is left out."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items() if key not in _LEFT_OUT}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if isinstance(value, str):
        host = socket.gethostname()
        bare = value.rstrip("/\\")
        bare = re.split(r"[/\\]", bare)[-1] if _WHOLE.match(bare) else _PATH.sub("", bare)
        return bare.replace(host, "host") if len(host) > 3 else bare
    return value


def card(loaded: Loaded, origin: dict[str, Any]) -> str:
    """README.md: metadata block, data and licences, input contract, training, probes, how to load, limits.

    `origin` is the cleaned history of the weights; of it "license", "datasets" and what `swath.hub.history` tells are shown.
    """
    contract, datasets = loaded.contract, origin.get("datasets", [])
    height, width = loaded.size
    published = sorted({_cell(one["name"]) for one in datasets if one["licence"]})
    metadata = {
        **({"license": origin["license"]} if "license" in origin else {}),
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["swath", "earth-observation", "remote-sensing", contract.sensor, loaded.name],
        **({"datasets": published} if published else {}),
    }
    parameters = sum(p.numel() for p in loaded.backbone.parameters())
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

An Earth-observation backbone, {_from(origin)}{objective}: {parameters / 1e6:,.1f} M parameters, features of width
{loaded.backbone.pooled_width}, trained at {height} × {width} pixels.

## Data and licences

{_data(origin)}

## Input contract

Modality {contract.modality}, unit **{contract.unit}**{resolution}{nodata}. Bands in this order; the image processor
normalises them by these numbers and refuses another count.

| | band | wavelength (nm) | mean | standard deviation |
|---|---|---|---|---|
{_bands(loaded)}

## Training

{_training(origin)}

## Evaluation

{_probes(origin)}

## Loading

Needs `torch`, `transformers`, `safetensors` and `Pillow`; the code is in this repository.

```python
from transformers import AutoImageProcessor, AutoModel

{HERE}
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
{_limits(loaded, origin)}"""


def _data(origin: dict[str, Any]) -> str:
    licence = origin.get("license")
    weights = f"The weights are offered under **{licence}**." if licence else (
        "**No licence is stated for the weights**: until their owner states one, nobody has the right to use them."
    )  # fmt: skip
    if not (datasets := origin.get("datasets")):
        return f"{weights} What they were trained on is not recorded here, so neither is its licence."
    rows = [[one["name"], f"{one['samples']:,}", one["licence"] or "not stated", restricts(one["licence"])] for one in datasets]
    return (
        f"{weights} They were trained on the data below, whose licences may restrict the use of the weights further.\n\n"
        + _table(["data set", "samples", "licence", "what it restricts"], rows)
    )


def _training(origin: dict[str, Any]) -> str:
    config, told = origin.get("config", {}), origin.get("training")
    asked: dict[str, Any] = config.get("train", {})
    rows = [
        ("steps", origin.get("step")),
        ("samples seen", origin.get("samples")),
        ("epochs", told and told["epochs"]),
        ("samples per step", asked.get("global_batch")),
        ("learning rate per 256 samples", asked.get("lr_per_256")),
        ("weight decay", asked.get("weight_decay")),
        ("mask ratio", config.get("objective", {}).get("mask_ratio")),
        ("seed", config.get("run", {}).get("seed")),
    ]
    made = "The whole recipe is in `recipe.yaml`.\n\n" + _table(
        ["", ""], [(what, _figure(v)) for what, v in rows if v is not None]
    )
    if not told:
        return made
    loss = next((value for value in reversed(told["looks"]["loss"]) if value is not None), None)
    on = "held-out" if told["held_out"] else "fixed training"
    cost = [f"{_spent(told['hours'])} of steps on {told['device'] or 'an unknown device'} in {told['precision']}"]
    cost += [f"{told['flops']:.3g} floating-point operations"] if told["flops"] else []
    cost += [f"{_figure(told['samples_per_second'])} samples per second"]
    cost += [f"steps skipped as not finite: {told['skipped_steps']}"] if told["skipped_steps"] else []
    made += f"\n\nCompute: {', '.join(cost)}."
    made += f"\n\n![Loss, effective rank, learning rate and gradient norm by step]({curves.FILE})"
    if loss is not None:
        made += f"\n\nLoss on {on} samples at the end: **{_figure(loss)}**."
    looks = told["looks"]
    if len(looks["step"]) > 1:
        health = [(name.replace("_", " "), *(_figure(looks[name][end]) for end in (0, -1))) for name in looks if name != "step"]
        head = ["health of the representation", f"at step {looks['step'][0]:,}", f"at step {looks['step'][-1]:,}"]
        made += "\n\n" + _table(head, health)
    for sign in told["warnings"]:
        made += f"\n\nWarning during training: {sign}."
    return made


_SEEN = {True: " (transductive)", None: " (transductive or not is unknown)", False: ""}


def _probes(origin: dict[str, Any]) -> str:
    probes = origin.get("probes", [])
    if not probes:
        return "No probe has been run on these weights."
    rows = []
    for probe in probes:
        other = probe["step"] != origin.get("step") and probe["step"] is not None
        task = probe["task"] + (f" (of step {probe['step']:,}, not these weights)" if other else "")
        data = " → ".join(dict.fromkeys(probe["datasets"].values()))
        for row in probe["rows"]:
            seen = _SEEN[row.get("transductive", False)]  # which exports of earlier versions do not say
            for metric, value in row["metrics"].items():
                ends = row["interval"].get(metric)
                between = f"{_figure(ends[0])} to {_figure(ends[1])}" if ends else "–"
                rows.append([task, data, row["name"] + seen, metric, _figure(value), between])
    return _table(["probe", "data", "features", "metric", "value", "95 % interval"], rows)


def _limits(loaded: Loaded, origin: dict[str, Any]) -> str:
    lines = []
    if loaded.contract.gsd_m:
        lines.append(f"It has seen ground sampling of {loaded.contract.gsd_m:g} m only.")
    if not any(row for probe in origin.get("probes", []) for row in probe["rows"]):
        lines.append("Nobody has measured here how good its features are for a task; measure on your own before relying on them.")
    if not origin.get("training", {}).get("held_out"):
        lines.append("No held-out loss was recorded.")
    return "\n" + " ".join(lines) + "\n" if lines else ""


def _spent(hours: float) -> str:
    return f"{_figure(hours)} hours" if hours >= 0.1 else f"{_figure(float(hours * 3600))} seconds"


def _table(head: list[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    """One line, without what would end the cell or open HTML."""
    return " ".join(str(value).translate({ord(c): " " for c in "|<>`[]"}).split())


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _adapted(origin: dict[str, Any]) -> str:
    if not (lines := origin.get("adapted")):
        return ""
    listed = "\n".join(f"- {line}" for line in lines)
    return f"\n## Adapted\n\nAfter training, by `swath adapt`, without training anything:\n\n{listed}\n"


def _from(origin: dict[str, Any]) -> str:
    """Who trained it, as far as is known."""
    if (told := origin.get("imported")) is None:
        return "pretrained with swath"
    licence = f" (code under {told['code_licence']})" if told.get("code_licence") else ""
    return f"imported from published {told['kind']} weights{licence}, `{told['file']}`"


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
