"""The command `swath`. Exit codes: 0 done, 1 our fault, 2 the user's input, 85 stopped by a signal after saving."""

import argparse
import logging
import os
import sys

import swath
from swath.launch.commands import add_all
from swath.shards.errors import Elsewhere, InputError

RANK = int(os.environ.get("RANK", "0"))  # of the processes that torchrun started


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="swath", description=swath.__doc__)
    parser.add_argument("--version", action="version", version=f"swath {swath.__version__}")
    add_all(parser.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    # read when torch is first imported, below; threads that spin while they wait make a shared machine several times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(format=f"rank {RANK}: %(message)s" if RANK else "%(message)s", level=logging.WARNING)
    logging.getLogger("swath").setLevel(logging.WARNING if RANK else logging.INFO)
    parser = _parser()
    args, more = parser.parse_known_args(argv)
    if more and (not hasattr(args, "overrides") or any(word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # key=value after an option
        args.overrides += more
    try:
        return args.run(args)
    except InputError as error:
        if not isinstance(error, Elsewhere):
            print(f"swath {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"swath {args.command}: interrupted; the same command continues", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
