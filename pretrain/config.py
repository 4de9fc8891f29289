"""A run is one recipe (YAML) plus key.sub=value overrides, checked as a whole before any data moves (DESIGN §3)."""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator

from swath.backbones import base
from swath.pretrain import objective
from swath.shards.errors import InputError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Run(Section):
    """Where the run lives, and the seed of its order and draws."""

    dir: Path
    seed: int = 0


class Augment(Section):
    """Views of a chip. `crop`: range of the crop's share of the area, `ratio` of its width to its height."""

    crop: tuple[float, float] | None = None
    ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: Literal["none", "horizontal", "both"] = "horizontal"
    quarter_turns: bool = False


class DataSet(Section):
    """One data set of a mixture. `weight` is its share of the batches; of all or none, then by the number of samples."""

    path: str
    weight: float | None = Field(default=None, gt=0)


class Data(Section):
    """Shards, and the order in which they are read. `train` is a folder (or s3://, gs://, https:// address) of shards, or a
    list of {path, weight}; `val` one or several. `modalities` of the samples, all by default. `size` is what the backbone sees;
    the chips' own when null, unless train.stages says it. With `clouds` the pixels under clouds and shadows count too. So many
    different damaged samples as `skip_damaged` are gone past. Remote shards are kept in `cache_dir`, up to `cache_gb`;
    with `stage` those of a shared file system too, one copy per node, copied ahead as far as there is room.
    """

    train: tuple[DataSet, ...] = Field(min_length=1)
    val: tuple[str, ...] = ()
    modalities: tuple[str, ...] | None = Field(default=None, min_length=1)
    clouds: bool = False
    size: int | None = Field(default=None, ge=1)
    window: int = Field(default=65536, ge=1)
    lanes: int = Field(default=1, ge=1)
    workers: int = Field(default=1, ge=0)
    skip_damaged: int = Field(default=0, ge=0)
    stage: bool = False
    cache_dir: Path | None = None
    cache_gb: float | None = Field(default=None, gt=0)
    augment: Augment = Augment()

    @field_validator("train", mode="before")
    @classmethod
    def _one_data_set(cls, value: Any) -> Any:
        return ({"path": str(value)},) if isinstance(value, str | Path) else value

    @field_validator("val", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return () if value is None else (str(value),) if isinstance(value, str | Path) else value


class Stage(Section):
    """So many epochs of images of `size` pixels a side, at a rate of their own where one is given."""

    size: int = Field(ge=1)
    epochs: float = Field(gt=0)
    lr_per_256: float | None = Field(default=None, gt=0)


class Train(Section):
    """Learning rates are per 256 samples of the global batch; the run's length is the shorter of epochs and max_steps.

    `stages`, in place of epochs and of data.size, are trained one after the other in one run, each with a warm-up and a decay of
    its own. Learned positions are exact at the size of the last one, whose weights are handed on, and interpolated before.
    `strategy` says how ranks share weights; `zero` is DeepSpeed's stage: moments (1), gradients (2), weights (3) are in parts.
    After `max_bad_steps` in a row that are not finite the run ends, or, `return_on_bad` times, goes back to before them and on
    without their samples. Where a rank is at one thing (data, a collective, a save) for `hang_after` seconds all ranks end.
    `init` is a folder whose weights a new run starts from: another run, a checkpoint, an export or an import.
    """

    init: Path | None = None
    global_batch: int = Field(default=256, ge=1)
    micro_batch: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    stages: tuple[Stage, ...] | None = None
    lr_per_256: float = Field(default=1.5e-4, gt=0)
    min_lr_per_256: float = Field(default=0.0, ge=0)
    warmup_epochs: float = Field(default=0.0, ge=0)
    weight_decay: float = Field(default=0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float | None = Field(default=None, gt=0)
    precision: Literal["fp32", "bf16", "auto"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    strategy: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    zero: Literal[1, 2, 3] = 2
    compile: bool = False
    activation_checkpointing: bool = False
    max_bad_steps: int = Field(default=10, ge=1)
    return_on_bad: int = Field(default=0, ge=0)
    hang_after: float = Field(default=600.0, gt=0)


class Checkpoints(Section):
    """Every `every` steps one is written; the newest `keep` stay, and every `permanent_every`-th step's for good."""

    every: int = Field(default=500, ge=1)
    keep: int = Field(default=2, ge=1)
    permanent_every: int | None = Field(default=None, ge=1)


class Health(Section):
    """Every `every` steps the held-out loss, representation health and pictures, on `samples` fixed samples."""

    every: int = Field(default=500, ge=1)
    samples: int = Field(default=256, ge=2)


class Recipe(Section):
    """The whole configuration. `backbone` and `objective` hold a registered name and that component's own options."""

    run: Run
    data: Data
    backbone: dict[str, Any]
    objective: dict[str, Any]
    train: Train = Train()
    checkpoint: Checkpoints = Checkpoints()
    health: Health = Health()

    def resolved(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


# What may differ when a run is continued (DESIGN §2.8); anything else would make it another run.
MAY_CHANGE = (
    "train.epochs", "train.max_steps", "train.micro_batch", "train.strategy", "train.zero", "train.hang_after",
    "train.return_on_bad", "checkpoint.", "data.workers", "data.skip_damaged", "data.stage", "data.cache_dir", "data.cache_gb",
)  # fmt: skip


def read_recipe(text: str, overrides: list[str], *, name: str) -> Recipe:
    """A recipe from YAML text and `key.sub=value` overrides. InputError lists every problem, each with the nearest name."""
    try:
        raw = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise InputError(f"recipe {name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise InputError(f"recipe {name} must be a mapping of sections, not {type(raw).__name__}")
    for override in overrides:
        _override(raw, override)
    problems: list[str] = []
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        problems += [_explain(list(e["loc"]), e, _known_keys(Recipe)) for e in error.errors()]
        recipe = None
    problems += [] if recipe is None else _contradictions(recipe)
    for section, registry in (("backbone", base.registry), ("objective", objective.registry)):
        options = raw.get(section)
        if isinstance(options, dict):
            problems += component_problems(section, registry, options)
    if recipe is not None and not problems:
        problems += _pair_problems(recipe)
    if problems:
        raise InputError("\n".join(problems))
    assert recipe is not None
    return recipe


def _contradictions(recipe: Recipe) -> list[str]:
    """What is said twice, or only half."""
    problems = []
    if recipe.data.stage and recipe.data.cache_dir is None:
        problems.append("data.cache_dir: data.stage copies shards to a disk of the node; name a folder on it")
    given = {"train.epochs": recipe.train.epochs, "data.size": recipe.data.size} if recipe.train.stages else {}
    twice = "train.stages says it stage by stage; leave out one of them"
    return problems + [f"{key}: {twice}" for key, value in given.items() if value is not None]


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    path = key.split(".")
    if not equals or not all(path):
        raise InputError(f"{override!r} is not an override; write key.sub=value, for instance train.epochs=10")
    place: Any = raw
    for part in path[:-1]:
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
        if not isinstance(place, dict):
            raise InputError(f"override {override!r}: {part} is a value, not a section")
    try:
        place[path[-1]] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"override {override!r}: the value is not YAML; quote it") from None


def component_problems(section: str, registry: base.Registry, options: dict[str, Any]) -> list[str]:
    """Problems of a backbone's or objective's options, its "name" among them, against its own configuration dataclass."""
    name = options.get("name")
    if not isinstance(name, str):
        return [f"{section}.name: needed; one of {', '.join(registry.names())}"]
    try:
        entry = registry.entry(name)
    except ValueError as error:
        return [f"{section}.name: {error}"]
    hints = get_type_hints(entry.config)
    shape: dict[str, Any] = {
        f.name: (hints[f.name], ... if f.default is MISSING and f.name not in GIVEN else None) for f in fields(entry.config)
    }
    model = create_model(name, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **shape)
    given = {k: v for k, v in {**entry.preset, **options}.items() if k != "name"}
    try:
        model.model_validate(given)
    except ValidationError as error:
        return [_explain([section, *e["loc"]], e, [f"{section}.{f}" for f in shape]) for e in error.errors()]
    return []


def _pair_problems(recipe: Recipe) -> list[str]:
    """Why the objective cannot train the backbone, as far as the recipe decides it."""
    options = dict(recipe.backbone)
    task, name = recipe.objective["name"], options.pop("name")
    reason = objective.refused(task, name, options)
    return [] if reason is None else [f"objective.name: {task} cannot train {name}: {reason}"]


# Options that the engine fills in from the data: the number of bands, and the image size.
GIVEN = ("bands", "image_size")


def _explain(where: list[Any], error: Any, known: list[str]) -> str:
    key = ".".join(str(part) for part in where)
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key{base.nearest(key, known)}"
    if error["type"] == "missing":
        return f"{key}: needed, and not given"
    return f"{key}: {error['msg']} (given: {error['input']!r})"


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, info in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys += _known_keys(info.annotation, f"{prefix}{name}.")
    return keys


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def refuse_changes(stored: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """InputError with a diff unless `now` continues `stored`: only the keys of MAY_CHANGE may differ."""
    old, new = flatten(stored), flatten(now)
    changed = [
        f"  {key}: {old.get(key)!r} in the run, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if changed:
        raise InputError(
            f"{folder} holds a run with another configuration; continue it unchanged, or choose another run.dir:\n"
            + "\n".join(changed)
        )
