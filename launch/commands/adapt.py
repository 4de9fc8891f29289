"""`swath adapt`."""

import argparse
from pathlib import Path

from swath.launch.commands import Commands


def add(commands: Commands) -> None:
    p = commands.add_parser("adapt", help="a backbone for other bands, or for data that its contract refuses")
    p.add_argument("backbone", type=Path, help="run folder, checkpoint or exported folder")
    p.add_argument("--bands", type=_names, metavar="B02,B03,…", help="bands that it is to take, in their order (all)")
    p.add_argument("--map", type=_pairs, default={}, metavar="THEIRS=OURS,…", help="names that the data have for its bands")
    p.add_argument("--accept", type=_names, default=(), metavar="level,…",
                   help="mismatches to let pass: sensor, level, unit, wavelength, normalisation, gsd")  # fmt: skip
    p.add_argument("--data", type=Path, metavar="SHARDS", help="data that must fit: new bands and statistics come from them")
    p.add_argument("--to", type=Path, required=True)
    p.set_defaults(run=_adapt)


def _adapt(args: argparse.Namespace) -> int:
    from swath.hub.adapt import adapt

    made = adapt(args.backbone, args.to, bands=args.bands, rename=args.map, accept=args.accept, data=args.data)
    print("\n".join([f"adapted to {args.to}", *(f"  {line}" for line in made.origin["adapted"])]))
    if "unit" in args.accept and not (args.data and "normalisation" in args.accept):
        print("! another unit, but the weights' statistics: --accept unit,normalisation --data SHARDS takes the data's")
    return 0


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name")
    return names


def _pairs(text: str) -> dict[str, str]:
    pairs = [pair.split("=") for pair in _names(text)]
    if any(len(pair) != 2 or not all(pair) for pair in pairs) or len({pair[0] for pair in pairs}) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not theirs=ours, each of theirs once")
    return {theirs.strip(): ours.strip() for theirs, ours in pairs}
