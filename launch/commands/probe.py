"""`swath probe`."""

import argparse
from pathlib import Path

from swath.launch.commands import Commands


def add(commands: Commands) -> None:
    p = commands.add_parser("probe", help="how good are frozen features")
    p.add_argument("task", choices=["knn", "linear"])
    p.add_argument("backbone", help="run folder, checkpoint, exported folder or Hub id (ORG/NAME, ORG/NAME@REVISION)")
    p.add_argument("--train", type=Path, required=True)
    p.add_argument("--test", type=Path, required=True)
    p.add_argument("--val", type=Path, help="shards to choose settings on; a part of --train otherwise")
    p.add_argument("--size", type=int, help="pixels to resize chips to (the size that the backbone was trained at)")
    p.add_argument("--json", type=Path)
    p.set_defaults(run=_probe)


def _probe(args: argparse.Namespace) -> int:
    from swath.launch.report import write_report
    from swath.probes.run import probe, table

    result = probe(args.task, args.backbone, args.train, args.test, val=args.val, json_path=args.json, size=args.size)
    print(table(result))
    if (Path(args.backbone) / "metrics.jsonl").exists():
        write_report(Path(args.backbone))
    return 0
