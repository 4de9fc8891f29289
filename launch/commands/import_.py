"""`swath import`."""

import argparse
from pathlib import Path
from typing import Any

import yaml

from swath.launch.commands import Commands
from swath.shards.errors import InputError


def add(commands: Commands) -> None:
    p = commands.add_parser("import", help="a published checkpoint as a folder to probe, export and pretrain from")
    p.add_argument("kind", nargs="?", help="whose code wrote it; --list says which there are")
    p.add_argument("file", nargs="?", type=Path, help=".pth, .pt, .bin or .safetensors")
    p.add_argument("--to", type=Path, metavar="DIR", help="a new folder")
    p.add_argument("--list", action="store_true", help="the kinds that can be imported")
    p.add_argument("--heads", type=int, metavar="N", help="of the encoder, where neither size nor file tells: --option heads=N")
    p.add_argument("--option", action="append", default=[], metavar="KEY=VALUE",
                   help="of the backbone, or objective.KEY of the objective, where the tensors cannot tell")  # fmt: skip
    p.add_argument("--bands", metavar="B02,B03,…", help="what the weights' bands are, in their order")
    p.add_argument("--contract", type=Path, metavar="FILE.json|SHARDS", help="what they were trained under, if not as published")
    p.add_argument("--prefix", default="", help="that the encoder's keys begin with, and others do not")
    p.set_defaults(run=_import)


def _import(args: argparse.Namespace) -> int:
    from swath.hub.contracts import read_contracts
    from swath.hub.importing import import_published
    from swath.hub.kinds import KINDS

    if args.list:
        print("\n".join(f"{name:14} {kind.title}" for name, kind in KINDS.items()))
        return 0
    if args.kind is None or args.file is None or args.to is None:
        raise InputError("needs KIND FILE --to DIR; swath import --list says which kinds there are")
    options: dict[str, Any] = {} if args.heads is None else {"heads": args.heads}
    made = import_published(
        args.kind, args.file, args.to, options=options | dict(_option(text) for text in args.option),
        bands=None if args.bands is None else args.bands.split(","),
        contracts=read_contracts(args.contract) if args.contract else None, prefix=args.prefix,
    )  # fmt: skip
    loaded = made.loaded
    seen = "; ".join(f"{name} {', '.join(contract.names)}" for name, contract in loaded.contracts.items())
    print(f"{loaded.name}: {', '.join(f'{key} {value}' for key, value in loaded.options.items())}")
    print(f"bands: {seen}")
    print(f"objective: {'none, the file has no decoder' if made.task is None else made.task['name']}")
    if made.left_out:
        print(
            f"left out: {', '.join(made.left_out[:5])}{f' and {len(made.left_out) - 5} more' if len(made.left_out) > 5 else ''}"
        )
    for note in made.notes:
        print(f"! {note}")
    print(f"imported to {args.to}")
    return 0


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    try:
        if equals and name:
            return name, yaml.safe_load(value)
    except yaml.YAMLError:
        pass
    raise InputError(f"--option {text!r}: write KEY=VALUE, for instance --option heads=12")
