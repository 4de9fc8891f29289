"""`swath export`."""

import argparse
from functools import partial
from pathlib import Path

from swath.launch.commands import Commands
from swath.shards.errors import InputError


def add(commands: Commands) -> None:
    p = commands.add_parser("export", help="a folder that transformers loads without swath, here or on the Hub")
    p.add_argument("backbone", help="run folder, checkpoint, exported folder or Hub id (ORG/NAME, ORG/NAME@REVISION)")
    p.add_argument("--to", type=Path, help="the folder to write; with --push a temporary one, unless it is to stay")
    p.add_argument("--license", "--licence", metavar="ID", help="of the weights, such as apache-2.0; --push needs one")
    p.add_argument("--push", metavar="ORG/NAME", help="upload to this model of the Hub, made where there is none")
    p.add_argument("--private", action="store_true", help="make it private, and refuse one that is public")
    p.add_argument("--revision", metavar="BRANCH", help="to push to (main); made where there is none")
    p.add_argument("--with-decoder", action="store_true", help="keep the objective's head: others can continue pretraining")
    p.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    from swath.hub.export import export
    from swath.hub.push import publish

    write = partial(export, args.backbone, license=args.license, with_decoder=args.with_decoder)
    if args.push is not None:
        url = publish(
            args.backbone, write, args.push, to=args.to, license=args.license, private=args.private, revision=args.revision
        )
        print(f"pushed: {url}")
        return 0
    if args.private or args.revision is not None:
        raise InputError("--private and --revision say more of --push ORG/NAME, which is not given")
    if args.to is None:
        raise InputError("nowhere to export to; --to DIR writes a folder, --push ORG/NAME uploads one")
    print(f"exported to {write(args.to)}")
    return 0
