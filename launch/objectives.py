"""swath objectives: which objective trains which family of backbones, and why not the others."""

import inspect
import textwrap

from swath.backbones.base import registry as backbones
from swath.pretrain.objective import pairs, registry
from swath.shards.errors import InputError

WIDTH = 100  # columns of text


def matrix(name: str | None = None) -> dict[str, dict[str, str | None]]:
    """objective → family of backbones → why not, None where the pair can be trained; of one objective if named.

    InputError with the nearest name if there is none.
    """
    if name is not None:
        try:
            registry.entry(name)
        except ValueError as error:
            raise InputError(str(error)) from None
    return {
        objective: {_family(backbone): why for backbone, why in row.items()}
        for objective, row in pairs().items()
        if name in (None, objective)
    }


def _family(backbone: str) -> str:
    """A family is called as its file, which is what its names have in common."""
    return backbones.entry(backbone).build.__module__.rpartition(".")[2]


def table(rows: dict[str, dict[str, str | None]]) -> str:
    """A line per family, a column per objective."""
    families = list(next(iter(rows.values())))
    first = max(map(len, families))
    lines = [" " * first + "".join(f"  {objective}" for objective in rows)]
    for family in families:
        cells = "".join(f"  {'-' if row[family] else 'yes':{len(objective)}}" for objective, row in rows.items())
        lines.append((f"{family:{first}}" + cells).rstrip())
    return "\n".join([*lines, "", "why not: swath objectives NAME"])


def reasons(name: str) -> str:
    """What an objective does, and a line per family: yes, or why not."""
    (row,) = matrix(name).values()
    about = (inspect.getdoc(registry.entry(name).build) or "").partition("\n\n")[0]
    lines = textwrap.wrap(f"{name}: {about}", WIDTH)
    first = max(map(len, row)) + 2
    for family, why in row.items():
        lines += textwrap.wrap(f"{family:{first}}{why or 'yes'}", WIDTH, subsequent_indent=" " * first)
    return "\n".join(lines)
