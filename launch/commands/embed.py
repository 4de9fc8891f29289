"""`swath embed` and `swath retrieve`."""

import argparse
import json
from pathlib import Path

from swath.launch.commands import Commands
from swath.launch.commands.archives import add_description, description, place


def add(commands: Commands) -> None:
    p = commands.add_parser("embed", help="features of samples, images or the tiles of scenes, as one Parquet file")
    p.add_argument("backbone", type=Path, help="run folder, checkpoint or exported folder")
    p.add_argument("--data", type=place, required=True, metavar="SHARDS|SCENE", help="shards, a scene, or a folder of some")
    p.add_argument("--to", type=Path, required=True, metavar="FILE.parquet")
    p.add_argument("--tile", type=int, metavar="PX", help="cut into tiles of so many pixels a side (large scenes: as trained)")
    p.add_argument("--overlap", type=int, default=0, metavar="PX", help="that neighbouring tiles share (0)")
    p.add_argument("--size", type=int, metavar="PX", help="pixels to resize to (the size that the backbone was trained at)")
    p.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="of the features in the file")
    p.add_argument("--batch", type=int, default=64, help="tiles at a time (64)")
    p.add_argument("--recipe", help="a published data set's layout (see swath recipes)")
    add_description(p)
    p.set_defaults(run=_embed)

    p = commands.add_parser("retrieve", help="what in a file of features is most like a sample or an image")
    p.add_argument("file", type=Path, metavar="FILE.parquet")
    p.add_argument("--query", nargs="+", required=True, metavar="KEY|ROW|IMAGE", help="a key, the number of a row, or an image")
    p.add_argument("-k", type=int, default=10, help="neighbours of each query (10)")
    p.add_argument("--backbone", type=Path, help="that made the file, for images")
    p.add_argument("--json", action="store_true", help="as JSON")
    add_description(p)
    p.set_defaults(run=_retrieve)


def _embed(args: argparse.Namespace) -> int:
    from swath.probes.embed import embed

    made = embed(
        args.backbone, args.data, args.to, tile=args.tile, overlap=args.overlap, size=args.size, dtype=args.dtype,
        batch=args.batch, options=description(args), recipe=args.recipe,
    )  # fmt: skip
    left_out = [f"{n:,} {why}" for n, why in ((made.empty, "without a valid pixel"), (made.failed, "not decodable")) if n]
    print(f"{args.to}: {made.rows:,} rows of {made.width} features" + (f"; left out: {', '.join(left_out)}" if left_out else ""))
    return 0


def _retrieve(args: argparse.Namespace) -> int:
    from swath.probes.neighbours import retrieve, table

    result = retrieve(args.file, args.query, k=args.k, backbone=args.backbone, options=description(args))
    print(json.dumps(result, indent=1, allow_nan=False) if args.json else table(result))
    return 0
