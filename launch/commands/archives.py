"""Commands for archives and shards: scenes, init, shard, index, inspect."""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from swath.launch.commands import Commands
from swath.shards.bands import Unit
from swath.shards.errors import InputError

if TYPE_CHECKING:
    from swath.shards.sources.match import Dates, Pairs
    from swath.shards.sources.source import Options


def add(commands: Commands) -> None:
    p = commands.add_parser("scenes", help="write synthetic Sentinel-2 scenes with land cover")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--count", type=int, default=4)
    p.add_argument("--size", type=int, default=512, help="pixels of 10 m on each side")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dates", type=int, default=1)
    p.add_argument("--sar", action="store_true", help="a VV/VH raster in dB beside each scene")
    p.add_argument("--clouds", action="store_true", help="clouds, and a validity mask beside each scene")
    p.set_defaults(run=_scenes)

    p = commands.add_parser("init", help="look at an archive, and write what it is for you to confirm")
    p.add_argument("archive", type=Path, help="folder or zip")
    p.add_argument("--out", type=Path, default=Path("recipe.yaml"), help="the YAML to write (recipe.yaml)")
    p.set_defaults(run=_init)

    p = commands.add_parser("shard", help="rasters or images to shards")
    p.add_argument("source", type=place, help="folder, zip or address (s3://, gs://, https://), or the YAML of swath init")
    p.add_argument("--yes", action="store_true", help="take the guesses in that YAML as they are")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--recipe", help="a published data set's layout (see swath recipes)")
    p.add_argument("--cache", type=Path, metavar="DIR", help="where a remote archive is copied to (~/.cache/swath/archives)")
    p.add_argument("--cache-gb", type=float, help="how large such copies may be together (64, or half of what is free)")
    p.add_argument("--workers", type=int, default=_cores(), help="processes that decode (one per core)")
    p.add_argument("--dry-run", action="store_true", help="say how many chips, bytes and hours, and write nothing")
    s = p.add_mutually_exclusive_group()
    s.add_argument("--split", type=Path, help="CSV with columns file,class,split")
    s.add_argument("--split-blocks", type=_fractions, metavar="NAME=SHARE,…", help="splits by spatial block: train=0.8,test=0.2")
    p.add_argument("--block-km", type=float, default=50.0, help="side of a block (50)")
    p.add_argument("--buffer-km", type=float, help="distance that splits by block keep, centre to centre (a chip's diagonal)")
    p.add_argument("--aoi", help="GeoJSON file of polygons, or west,south,east,north: where chips must lie")
    p.add_argument("--dates", help="2019-01-01..2019-12-31, or months or years; either end may be left out")
    p.add_argument("--max-cloud", type=float, default=1.0, help="share of cloud above which a chip is left out (1)")
    p.add_argument("--thin", type=float, metavar="KM", help="at most one chip in each cell of so many km")
    p.add_argument("--sample", type=int, metavar="N", help="take N chips, always the same ones")
    p.add_argument("--stratify", choices=["class", "place", "time"], help="the same number of each, for --sample")
    p.add_argument("--drop-duplicates", action="store_true", help="leave out chips with the same pixels as one before")
    p.add_argument("--implausible-ok", action="store_true", help="go on where numbers cannot be what they are said to be")
    p.add_argument("--chip", type=int, help="pixels on each side (64, or whole files where all are small)")
    p.add_argument("--stride", type=int, help="pixels between chips (the chip's size)")
    add_description(p)
    p.add_argument("--with", dest="partner", metavar="FOLDER", help="of another sensor: each sample gets a partner out of it")
    p.add_argument("--join", help="how a partner is found: footprint, key, or table=FILE with columns key,other (footprint)")
    p.add_argument("--paired-only", action="store_true", help="leave out samples that have no partner")
    p.add_argument("--dates-per-sample", type=int, metavar="N", help="series: N acquisitions of one place in each sample")
    p.add_argument("--min-dates", type=int, default=1, help="that a series must have; the others are masked (1)")
    p.add_argument("--within-days", type=float, help="how far a partner may be in time, or the dates of a series")
    p.add_argument("--min-cover", type=float, default=0.5, help="share of a chip that a partner or a date must cover (0.5)")
    p.add_argument("--max-failed", type=float, default=0.01, help="share of files that may be undecodable (0.01)")
    p.add_argument("--max-nodata", type=float, default=0.5, help="share of nodata above which a chip is left out (0.5)")
    p.add_argument("--licence", "--license", help="of the imagery, for model cards; a published data set's own is known")
    p.set_defaults(run=_shard)

    p = commands.add_parser("index", help="rebuild the index of a folder of shards")
    p.add_argument("folder", type=Path)
    p.add_argument("--max-failed", type=float, default=0.0, help="share of samples that may be impossible to index (0)")
    p.set_defaults(run=_index)

    p = commands.add_parser("inspect", help="what a folder of shards holds: text, contact sheets, a map")
    p.add_argument("folder", type=Path, help="shards, or a folder of splits")
    p.add_argument("--out", type=Path, help="folder for the pictures (FOLDER)")
    p.set_defaults(run=_inspect)


def add_description(p: argparse.ArgumentParser) -> None:
    """What a person says of files that do not say it themselves; `description` reads it."""
    p.add_argument("--bands", help="band names in file order, separated by commas, where the files do not name them")
    p.add_argument("--sensor", help="where it cannot be told from the files")
    p.add_argument("--level", help="processing level, where it cannot be told from the files")
    p.add_argument("--unit", choices=get_args(Unit), help="of the values after scale and offset")
    p.add_argument("--scale", type=float, help="physical value = DN · scale + add; wins over what files say")
    p.add_argument("--add", type=float, help="see --scale; for instance -0.1 for Sentinel-2 from baseline 04.00 on")
    p.add_argument("--nodata", type=float, help="the DN that stands for nodata")
    p.add_argument("--gsd", type=float, help="metres per pixel to resample scenes to")
    p.add_argument("--resampling", default="nearest", help="how: nearest, bilinear, cubic, average (nearest)")


def description(args: argparse.Namespace) -> "Options":
    from swath.shards.sources.source import Options

    bands = tuple(args.bands.split(",")) if args.bands else None
    return Options(
        bands=bands, sensor=args.sensor, level=args.level, unit=args.unit, scale=args.scale,
        add=args.add, nodata=args.nodata, gsd_m=args.gsd, resampling=args.resampling,
    )  # fmt: skip


def _scenes(args: argparse.Namespace) -> int:
    from swath.shards.scenes import write_scenes

    made = write_scenes(
        args.out, count=args.count, size=args.size, seed=args.seed, dates=args.dates, sar=args.sar, clouds=args.clouds,
        progress=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    print(f"{len(made)} scenes in {args.out}")
    return 0


def _init(args: argparse.Namespace) -> int:
    from swath.shards.first_contact import first_contact

    recipe, warnings = first_contact(args.archive, args.out)
    for line in warnings:
        print(f"! {line}")
    print(f"{args.out}: {len(recipe.unconfirmed)} guesses to confirm")
    for line in recipe.unconfirmed:
        print(f"  {line}")
    print(f"then: swath shard {args.out} --out shards")
    return 0


def _shard(args: argparse.Namespace) -> int:
    from swath.shards.first_contact import RECIPE_FILES, confirmed
    from swath.shards.ingest import Blocks, shard
    from swath.shards.ingestion.estimate import estimate
    from swath.shards.ingestion.selection import Selection
    from swath.shards.sources.mirror import located
    from swath.shards.sources.source import Options
    from swath.shards.stores.cache import CacheOptions

    options = replace(description(args), chip=args.chip, stride=args.stride)
    if isinstance(args.source, Path) and args.source.suffix.lower() in RECIPE_FILES:
        if args.recipe is not None or options != Options():
            raise InputError(f"{args.source} says what the archive is; write options such as --bands and --sensor into it")
        args.source, args.recipe, options = confirmed(args.source, yes=args.yes)
    if (join := _join(args)) is not None:
        options = replace(options, join=join)
    selection = Selection(
        aoi=args.aoi, dates=args.dates, max_cloud=args.max_cloud, thin_km=args.thin, sample=args.sample, stratify=args.stratify,
        drop_duplicates=args.drop_duplicates,
    )  # fmt: skip
    given: dict[str, Any] = {
        "options": options, "recipe": args.recipe, "split": args.split, "selection": selection,
        "max_failed": args.max_failed, "max_nodata": args.max_nodata, "workers": args.workers,
    }  # fmt: skip
    if args.split_blocks is not None:
        given["split"] = Blocks(args.split_blocks, args.block_km, args.buffer_km)
    source = located(args.source, CacheOptions(args.cache, None if args.cache_gb is None else int(args.cache_gb * 1e9)))
    if args.dry_run:
        print(estimate(source, **given))
        return 0
    made = shard(source, args.out, implausible_ok=args.implausible_ok, licence=args.licence, **given)
    for name, manifest in made.items():
        skipped = f", {len(manifest.skipped)} not decodable (listed in manifest.json)" if manifest.skipped else ""
        print(f"{args.out / name}: {manifest.samples} samples in {len(manifest.shards)} shards{skipped}")
    return 0


def _join(args: argparse.Namespace) -> "Pairs | Dates | None":
    """What belongs to one sample, where something is asked for."""
    from swath.shards.sources.match import Dates, Pairs

    common = {"within_days": args.within_days, "min_cover": args.min_cover}
    if args.partner is not None and args.dates_per_sample is not None:
        raise InputError("--with and --dates-per-sample cannot be given together")
    if args.partner is not None:
        return Pairs.of(args.partner, args.join or "footprint", paired_only=args.paired_only, **common)
    if args.join is not None or args.paired_only:
        raise InputError("--join and --paired-only say more of --with FOLDER, which is not given")
    if args.dates_per_sample is not None:
        return Dates(args.dates_per_sample, args.min_dates, **common)
    if args.within_days is not None:
        raise InputError("--within-days says more of --with FOLDER or --dates-per-sample N; neither is given")
    return None


def _fractions(text: str) -> dict[str, float]:
    """`train=0.8,test=0.2` as argparse reads it."""
    pairs = [part.partition("=") for part in text.split(",")]
    made = {name.strip(): float(share) for name, _, share in pairs}
    if len(made) < len(pairs):
        raise ValueError(text)
    return made


def _index(args: argparse.Namespace) -> int:
    from swath.shards.reindex import reindex

    manifest = reindex(args.folder, args.max_failed)
    print(f"{args.folder}: {manifest.samples} samples in {len(manifest.shards)} shards indexed")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from swath.shards.inspect import inspect

    print(inspect(args.folder, args.out).text)
    return 0


def place(text: str) -> Path | str:
    """A path, or an address as it is."""
    from swath.shards.stores.remote import is_remote

    return text if is_remote(text) else Path(text)


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
