"""`swath probe`: a subcommand for each task, its flags from the task's options."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swath.launch.commands import Commands


def add(commands: Commands) -> None:
    p = commands.add_parser("probe", help="how good the features are, on labelled shards", description="One task per command.")
    parse = p.parse_known_args

    def filled(args: Any = None, namespace: Any = None) -> Any:
        _add_tasks(p)  # imports the tasks, and torch with them: only when a probe is asked for
        return parse(args, namespace)

    p.parse_known_args = filled  # type: ignore[method-assign, assignment]


def _add_tasks(p: argparse.ArgumentParser) -> None:
    from swath.probes.task import tasks

    subcommands = p.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, task in tasks().items():
        q = subcommands.add_parser(name, help=task.help, description=task.help)
        q.add_argument("backbone", help="run folder, checkpoint, exported folder or Hub id (ORG/NAME, ORG/NAME@REVISION)")
        q.add_argument("--train", required=True, metavar="SHARDS")
        q.add_argument("--test", required=True, metavar="SHARDS")
        q.add_argument("--val", metavar="SHARDS", help="to choose settings on; a part of --train otherwise")
        q.add_argument("--size", type=int, help="pixels to resize chips to (the size that the backbone was trained at)")
        q.add_argument("--json", type=Path, help="write the result here, and its pictures beside it")
        q.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of the backbone (auto)")
        q.add_argument("--seed", type=int, default=0, help="of every random choice (0)")
        q.add_argument("--cache", type=Path, metavar="DIR", help="where features are kept (~/.cache/swath/features)")
        q.add_argument("--no-cache", action="store_true", help="compute features anew, and keep none")
        q.add_argument(
            "--pretrained-on", metavar="SHARDS", nargs="+", default=(), help="what the backbone saw, if it does not say so itself"
        )
        hints = typing.get_type_hints(task.options)
        for f in dataclasses.fields(task.options):
            _add_flag(q, f, hints[f.name])
        q.set_defaults(run=_probe, options=[f.name for f in dataclasses.fields(task.options)])


def _add_flag(q: argparse.ArgumentParser, f: "dataclasses.Field[Any]", hint: Any) -> None:
    """--name-of-field; of a list, values with commas between them."""
    flag = f"--{f.name.replace('_', '-')}"
    told: dict[str, Any] = {"dest": f"option_{f.name}", "default": argparse.SUPPRESS}
    told["help"] = f.metadata.get("help", "").replace("%", "%%")
    if hint is bool:
        q.add_argument(flag, action=argparse.BooleanOptionalAction if f.default else "store_true", **told)
        return
    if isinstance(hint, types.UnionType):  # X | None
        hint = next(one for one in typing.get_args(hint) if one is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        q.add_argument(flag, choices=typing.get_args(hint), **told)
    elif typing.get_origin(hint) is tuple:
        q.add_argument(flag, type=_several(typing.get_args(hint)[0]), metavar="A,B,…", **told)
    else:
        q.add_argument(flag, type=hint, metavar=hint.__name__.upper(), **told)


def _several(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def values(text: str) -> tuple[Any, ...]:
        return tuple(kind(word) for word in text.split(",") if word)

    values.__name__ = f"list of {getattr(kind, '__name__', 'values')}"
    return values


def _probe(args: argparse.Namespace) -> int:
    from swath.launch.report import write_report
    from swath.probes.run import probe, table

    options = {name: getattr(args, f"option_{name}") for name in args.options if hasattr(args, f"option_{name}")}
    result = probe(
        args.task, args.backbone, args.train, args.test, val=args.val, json_path=args.json, size=args.size,
        precision=args.precision, seed=args.seed, cache=False if args.no_cache else args.cache or True,
        pretrained_on=args.pretrained_on, **options,
    )  # fmt: skip
    print(table(result))
    if (Path(args.backbone) / "metrics.jsonl").exists():
        write_report(Path(args.backbone))
    return 0
