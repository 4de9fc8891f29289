"""Commands for training: pretrain, launch, objectives, recipes, demo, doctor."""

import argparse
import json
import os
from pathlib import Path

from swath.launch.commands import Commands

STOPPED = 85
SBATCH = ("partition", "account", "qos", "constraint", "exclude")  # options of sbatch that swath launch slurm names itself
RANK = int(os.environ.get("RANK", "0"))  # of the processes that torchrun started


def add(commands: Commands) -> None:
    p = commands.add_parser("pretrain", help="train a recipe, or continue its run")
    p.add_argument("recipe", help="a YAML path, or the name of a shipped recipe (see swath recipes)")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="for instance data.train=shards/train train.epochs=10")
    p.add_argument("--plan", action="store_true", help="train nothing; check it, and print sizes, memory, steps and time")
    p.add_argument("--world-size", type=int, default=1, metavar="N", help="ranks that the plan is for (1)")
    p.add_argument("--ranks-per-node", type=int, metavar="N", help="of the plan, where data.lanes must fit the nodes")
    p.add_argument("--samples-per-second", type=float, metavar="X", help="of all ranks together, for the plan's time")
    p.set_defaults(run=_pretrain)

    _add_launch(commands.add_parser("launch", help="train with many processes here, or as jobs of a SLURM cluster"))

    p = commands.add_parser("demo", help="the whole way on synthetic scenes, in minutes on two cores")
    p.add_argument("--out", type=Path, default=Path("out/demo"))
    p.set_defaults(run=_demo)

    commands.add_parser("doctor", help="what this machine has, and what swath will use").set_defaults(run=_doctor)
    commands.add_parser("recipes", help="shipped recipes, and published data sets of known layout").set_defaults(run=_recipes)

    p = commands.add_parser("objectives", help="which objective trains which backbones, and why not the others")
    p.add_argument("name", nargs="?", help="of an objective, for the reasons")
    p.add_argument("--json", action="store_true", help="as JSON: why not, null where a pair can be trained")
    p.set_defaults(run=_objectives)


def _add_launch(parser: argparse.ArgumentParser) -> None:
    places = parser.add_subparsers(dest="place", required=True, metavar="PLACE")

    p = places.add_parser("local", help="the processes of this machine, started as torchrun does")
    p.add_argument("recipe", help="see swath pretrain")
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.add_argument("--processes", type=int, help="how many (one per GPU, or one)")
    p.set_defaults(run=_launch_local)

    p = places.add_parser("slurm", help="a batch script in the run folder, checked and submitted")
    p.add_argument("recipe", help="see swath pretrain")
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.add_argument("--nodes", type=int, default=1)
    p.add_argument("--gpus-per-node", type=int, default=0, metavar="N", help="one process for each (0: nodes without GPUs)")
    p.add_argument("--processes-per-node", type=int, metavar="N", help="where it is not one for each GPU")
    p.add_argument("--time", required=True, help="limit of one job: 24:00:00, 2-12 (days-hours)")
    p.add_argument("--stop-before", type=int, default=300, metavar="S", help="seconds before the limit at which it saves (300)")
    p.add_argument("--continue", dest="mode", choices=["requeue", "chain"], default="requeue",
                   help="how a run goes on after its job: the same again, or the next, where requeue is disabled")  # fmt: skip
    for name in SBATCH:
        p.add_argument(f"--{name}", help="as for sbatch")
    p.add_argument("--sbatch", action="append", default=[], metavar="OPTION=VALUE", help="any other option of sbatch: mem=100G")
    p.add_argument("--env", action="append", default=[], metavar="NAME", help="a variable that jobs get too; not its value")
    s = p.add_mutually_exclusive_group()
    s.add_argument("--container", type=Path, metavar="IMAGE", help="of Apptainer or Singularity, with swath in it")
    s.add_argument("--venv", type=Path, metavar="DIR", help="seen by all nodes (the Python that runs this command)")
    p.add_argument("--dry-run", action="store_true", help="write and check the script, submit nothing")
    p.set_defaults(run=_launch_slurm)

    p = places.add_parser("status", help="queue, step, speed, last checkpoint, last error")
    p.add_argument("folder", type=Path, metavar="RUN")
    p.set_defaults(run=_launch_status)


def _pretrain(args: argparse.Namespace) -> int:
    from swath.launch.recipes import find
    from swath.launch.report import write_report
    from swath.pretrain.config import read_recipe
    from swath.pretrain.forecast import forecast
    from swath.pretrain.trainer import pretrain

    text, name = find(args.recipe)
    recipe = read_recipe(text, args.overrides, name=name)
    if args.plan:
        print("\n".join(forecast(recipe, args.world_size, args.ranks_per_node).lines(args.samples_per_second)))
        return 0
    result = pretrain(recipe)
    stopped = result.stopped and result.step < result.total
    if RANK == 0 and stopped:
        print(f"stopped after step {result.step} of {result.total}; the same command continues it")
    elif RANK == 0:
        print(f"{result.step} steps done; report: {write_report(result.run)}")
    return STOPPED if stopped else 0


def _launch_local(args: argparse.Namespace) -> int:
    from swath.launch.jobs.local import launch_local

    return launch_local(args.recipe, args.overrides, args.processes)


def _launch_slurm(args: argparse.Namespace) -> int:
    from swath.launch.jobs.slurm import plan, submit, write

    common = [f"{name}={getattr(args, name)}" for name in SBATCH if getattr(args, name) is not None]
    job, recipe = plan(
        args.recipe, args.overrides, nodes=args.nodes, gpus=args.gpus_per_node, processes=args.processes_per_node, time=args.time,
        stop_before=args.stop_before, mode=args.mode, options=[*common, *args.sbatch], env=args.env, container=args.container,
        venv=args.venv,
    )  # fmt: skip
    write(job, recipe)
    print(job.script)
    if not args.dry_run:
        print(f"job {submit(job)} submitted; swath launch status {job.run} says where it stands")
    return 0


def _launch_status(args: argparse.Namespace) -> int:
    from swath.launch.jobs.status import status

    print(status(args.folder))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from swath.launch.demo import demo

    return demo(args.out)


def _doctor(args: argparse.Namespace) -> int:
    from swath.launch.doctor import doctor

    print(doctor())
    return 0


def _objectives(args: argparse.Namespace) -> int:
    from swath.launch.objectives import matrix, reasons, table

    if args.json:
        rows = matrix(args.name)
        print(json.dumps(rows if args.name is None else rows[args.name], indent=2))
    else:
        print(table(matrix()) if args.name is None else reasons(args.name))
    return 0


def _recipes(args: argparse.Namespace) -> int:
    from swath.launch.recipes import listing
    from swath.shards.recipes.registry import recipes

    print(f"to train (swath pretrain NAME):\n{listing()}\n\npublished data sets (swath shard SOURCE --recipe NAME):")
    print("\n".join(f"{name:24} {recipe.title} [{recipe.licence}]" for name, recipe in recipes().items()))
    return 0
