"""TerraMesh: lock-step tars per modality, `{train,val}/<MODALITY>/{majortom,ssl4eos12}_shard_NNNNNN.tar`."""

from pathlib import Path

from swath.shards.recipes.registry import register
from swath.shards.recipes.zarr_samples import LockStep, lock_step
from swath.shards.sources.source import Options


@register("terramesh", "TerraMesh, up to 7 aligned modalities in Zarr, 264 px", "CC-BY-SA-4.0")
def terramesh(path: Path, options: Options) -> LockStep:
    """S1GRD is only in ssl4eos12 shards, S1RTC only in majortom ones. Their L1C are of both sorts of baseline."""
    return lock_step(
        path, options, dataset="terramesh", title="TerraMesh", dates=1, rule="mixed",
        notes=("TerraMesh mixes scenes with and without the radiometric offset: it is decided sample by sample, by B10",),
    )  # fmt: skip
