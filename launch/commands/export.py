"""`swath export`."""

import argparse
from pathlib import Path

from swath.launch.commands import Commands


def add(commands: Commands) -> None:
    p = commands.add_parser("export", help="a folder that transformers loads without swath")
    p.add_argument("backbone", type=Path, help="run folder, checkpoint or exported folder")
    p.add_argument("--to", type=Path, required=True)
    p.add_argument("--with-decoder", action="store_true", help="keep the objective's head: others can continue pretraining")
    p.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    from swath.hub.export import export

    print(f"exported to {export(args.backbone, args.to, with_decoder=args.with_decoder)}")
    return 0
