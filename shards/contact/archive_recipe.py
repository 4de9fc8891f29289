"""The file that `swath init` writes and a person edits: what an archive is, entry by entry, and `swath shard` obeys.

An entry holds `found` (what every file says by itself, shown to be checked) or `value` (what this file says, over the files), the
evidence in `because`, and, where it is a guess, `confirm`: false until a person has looked. `sensor: sentinel2` is short for
`sensor: {value: sentinel2}`.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import yaml
from pydantic import ValidationError, ValidatorFunctionWrapHandler, model_validator

from swath.shards.bands import Band, Strict, Unit
from swath.shards.errors import InputError
from swath.shards.sources.source import Options

_MAX_BYTES = 1 << 18
_MAX_DEPTH = 4
_WIDE = 118  # columns, from which on an entry is written over several lines
_FLOW = 32  # bands, from which on they are no list of lines


T = TypeVar("T")


class Entry(Strict, Generic[T]):
    """`value` counts; `found` does where none is given, and must then be what the files still say."""

    value: T | None = None
    found: T | None = None
    because: str = ""
    confirm: bool = True

    @model_validator(mode="wrap")
    @classmethod
    def _short(cls, data: Any, handler: ValidatorFunctionWrapHandler) -> Self:
        return handler(data if isinstance(data, dict | Entry) else {"value": data})

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.model_fields_set & {"value", "found"}) != 1:
            raise ValueError("an entry holds either found or value")
        return self

    @property
    def given(self) -> bool:
        return "value" in self.model_fields_set


class ArchiveRecipe(Strict):
    """`source` is absolute, or relative to the folder that the file is in. The other entries are the options of `swath shard`.

    `recipe` names the layout of a published data set. What is absent is left to the files and to what `swath shard` does itself.
    """

    source: str
    recipe: Entry[str] | None = None
    sensor: Entry[str] | None = None
    level: Entry[str] | None = None
    bands: Entry[tuple[str, ...]] | None = None
    unit: Entry[Unit] | None = None
    scale: Entry[float] | None = None
    add: Entry[float] | None = None
    nodata: Entry[float] | None = None
    gsd: Entry[float] | None = None
    resampling: Entry[str] | None = None
    chip: Entry[int] | None = None
    stride: Entry[int] | None = None

    @property
    def entries(self) -> dict[str, Entry[Any]]:
        pairs = {name: getattr(self, name) for name in type(self).model_fields if name != "source"}
        return {name: entry for name, entry in pairs.items() if entry is not None}

    @property
    def options(self) -> Options:
        """Of the values that are given, and of nothing that was only found."""
        given: dict[str, Any] = {name: entry.value for name, entry in self.entries.items() if entry.value is not None}
        given.pop("recipe", None)
        if "gsd" in given:
            given["gsd_m"] = given.pop("gsd")
        return Options(**given)

    @property
    def layout(self) -> str | None:
        return None if self.recipe is None else self.recipe.value

    @property
    def unconfirmed(self) -> list[str]:
        """A line for each guess that nobody has confirmed."""
        return [
            f"{name}: {brief(entry.value if entry.given else entry.found)} ({entry.because or 'no evidence given'})"
            for name, entry in self.entries.items()
            if not entry.confirm
        ]


def read_archive_recipe(path: Path) -> ArchiveRecipe:
    """The file, checked: nothing in it is run, and what is not known is refused. InputError lists all that is wrong."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(data) > _MAX_BYTES:
        raise InputError(f"recipe {path} is larger than {_MAX_BYTES >> 10} KiB; `swath init` writes one")
    try:
        _check_plain(path, text)
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"recipe {path} is not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(value, dict) or "source" not in value:
        raise InputError(f"recipe {path} has no entry `source`, the archive; `swath init ARCHIVE` writes such a file")
    try:
        made = ArchiveRecipe.model_validate(value)
    except ValidationError as error:
        raise InputError("\n".join(dict.fromkeys(f"{path}: {_explain(e)}" for e in error.errors()))) from None
    return made.model_copy(update={"source": str(path.absolute().parent / made.source)})


def _check_plain(path: Path, text: str) -> None:
    """No aliases, with which a few lines stand for gigabytes, nothing nested deeply, and no key that stands twice."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise InputError(f"recipe {path} has a YAML alias (*), which is not read; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise InputError(f"recipe {path} is nested deeper than {_MAX_DEPTH} levels; entries are plain values and lists")
    waiting: list[Any] = [yaml.compose(text, Loader=yaml.SafeLoader)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := {name for name in names if names.count(name) > 1}:
                line = node.start_mark.line + 1
                raise InputError(f"recipe {path}: {min(twice)[:40]} stands twice in what begins at line {line}; remove one")
            waiting += [held for _, held in node.value]


def _explain(error: Any) -> str:
    where = [str(part) for part in error["loc"] if not str(part).startswith("function-")]
    name = ".".join(where)
    if error["type"] == "extra_forbidden":
        known = list(ArchiveRecipe.model_fields) if len(where) == 1 else list(Entry.model_fields)
        near = difflib.get_close_matches(where[-1], known, n=1)
        return f"{name}: unknown key; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}")
    return f"{name}: {error['msg'].removeprefix('Value error, ')}"


def brief(value: Any) -> str:
    if not isinstance(value, tuple | list):
        return "null" if value is None else str(value)
    return ", ".join(value[:4]) + (f" … {value[-1]} ({len(value)})" if len(value) > 5 else ", ".join(["", *value[4:]]))


def write_text(recipe: ArchiveRecipe, head: Sequence[str], bands: Sequence[Band] = ()) -> str:
    """YAML for a person: `head` as comments above, what is known of `bands` beside each."""
    lines = [f"# {_one_line(line)}".rstrip() for line in head]
    lines += ["", f"source: {_scalar(recipe.source)}"]
    for name, entry in recipe.entries.items():
        key = "value" if entry.given else "found"
        held = entry.value if entry.given else entry.found
        rest = {"because": entry.because} if entry.because else {}
        mark = [] if entry.confirm else ["confirm: false"]
        if name == "bands" and isinstance(held, tuple | list):
            lines += ["bands:", *_band_lines(key, held, bands)]
            lines += [f"  {k}: {_quoted(v)}" for k, v in rest.items()] + [f"  {m}" for m in mark]
            continue
        parts = [f"{key}: {_scalar(held)}", *(f"{k}: {_quoted(v)}" for k, v in rest.items()), *mark]
        line = f"{name}: {{{', '.join(parts)}}}"
        lines += [line] if len(line) <= _WIDE else [f"{name}:", *(f"  {part}" for part in parts)]
    return "\n".join(lines) + "\n"


def _band_lines(key: str, names: Sequence[str], bands: Sequence[Band]) -> list[str]:
    known = {band.name: band for band in bands}
    if len(names) > _FLOW:
        listed = yaml.safe_dump(list(names), default_flow_style=True, width=_WIDE).rstrip().splitlines()
        return [f"  {key}:", *(f"    {line.strip()}" for line in listed)]
    lines = [f"  {key}:  # in the order of the files"]
    for name in names:
        about = _one_line(_about(known[name])) if name in known else ""
        lines.append(f"    - {_scalar(name):<8}{f'  # {about}' if about else ''}".rstrip())
    return lines


def _about(band: Band) -> str:
    return ", ".join(
        words
        for words in (
            f"{band.wavelength_nm:g} nm" if band.wavelength_nm else "",
            "" if band.common_name in (None, band.name) else band.common_name,
            f"{band.gsd_m:g} m" if band.gsd_m else "",
        )
        if words
    )


def _one_line(text: str) -> str:
    """For a comment: names of files may hold line breaks, and what follows one would be an entry."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff]", "?", text)


def _scalar(value: object) -> str:
    """One line that YAML reads as `value`."""
    if isinstance(value, str) and _one_line(value) != value:
        return _quoted(value)
    return yaml.safe_dump(value, default_flow_style=True, width=1 << 20, allow_unicode=True).removesuffix("...\n").strip()


def _quoted(text: str) -> str:
    return yaml.safe_dump(text, default_style='"', width=1 << 20, allow_unicode=True).strip()
