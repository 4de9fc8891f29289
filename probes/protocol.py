"""What a probe may not have seen: whether pretraining, or the statistics that came of it, looked at test samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from swath.hub.load import Loaded
from swath.shards.errors import InputError
from swath.shards.reader import ShardReader

TOUCHED = ("backbone", "random initialisation", "from scratch")  # rows that rest on the backbone's weights or statistics


def transductive(loaded: Loaded, test: ShardReader, pretrained_on: Sequence[Path | str] = ()) -> tuple[bool | None, str]:
    """(whether pretraining saw samples of `test`, how that is known); None where it cannot be told.

    Sample ids are compared with those of `pretrained_on`, else of the run's own data sets where they can still be read; else the
    checksums of shards that the checkpoint lists. Of weights that a run started from (`train.init`) it does not know the data.
    """
    folders = [str(folder) for folder in pretrained_on] or _trained_on(loaded.origin.get("config", {}))
    readers, unread = [], 0
    for folder in folders:
        try:
            readers.append(ShardReader(folder))
        except InputError:
            if pretrained_on:
                raise
            unread += 1
    shared = sum(overlap(reader, test) for reader in readers)
    if shared:
        return True, f"{shared} sample ids of test are in the data that it was pretrained on"
    listed = {shard[-1] for shard in loaded.shards}
    if same := sum(shard.sha256 in listed for shard in test.manifest.shards):
        return True, f"{same} shards of test are among those that it was pretrained on"
    began = not pretrained_on and (loaded.origin.get("config", {}).get("train") or {}).get("init")
    if folders and not unread and not began:
        return False, "no sample id of test is in the data that it was pretrained on"
    if began and folders and not unread:
        return None, "it started from other weights (train.init), whose data it does not know; --pretrained-on says what all saw"
    return None, "the data that it was pretrained on cannot be read here; --pretrained-on says where they are"


def overlap(one: ShardReader, other: ShardReader) -> int:
    """How many samples of `other` have the id of a sample of `one`."""
    return int(np.isin(other.index.samples["id"], one.index.samples["id"]).sum())


def _trained_on(config: dict[str, Any]) -> list[str]:
    """Addresses of a resolved recipe's data sets."""
    given = config.get("data", {}).get("train") or []
    given = [given] if isinstance(given, str | dict) else given
    return [entry["path"] if isinstance(entry, dict) else str(entry) for entry in given]
