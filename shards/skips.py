"""Damaged samples that a run goes past: only with a limit, and counted."""

import threading
from collections import Counter

from swath.shards.errors import InputError


class Skips:
    """Counts damaged samples, each once however often the run comes to it. Threads may share it.

    `limit` different samples may be skipped; 0 means that the first one ends the run.
    """

    def __init__(self, limit: int = 0) -> None:
        if limit < 0:
            raise InputError(f"the number of samples that may be skipped is {limit}; it must be 0 or more")
        self.limit = limit
        self._seen: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many different samples were skipped."""
        return len(self._seen)

    def add(self, shard: str, sample: str, why: str) -> None:
        """Skip `sample` of `shard`; InputError that names both once there are more than `limit`."""
        with self._lock:
            if (shard, sample) in self._seen:
                return
            if len(self._seen) < self.limit:
                self._seen[shard, sample] = why
                return
        before = f"{self.limit} others were skipped before, the most that are allowed" if self.limit else "none may be skipped"
        raise InputError(
            f"sample {sample} in shard {shard} is damaged ({why}), and {before}; "
            "copy the shard again, make it again, or allow more skips"
        )

    def report(self) -> dict[str, int]:
        """Skipped samples per shard, by name of the shard."""
        with self._lock:
            return dict(sorted(Counter(shard for shard, _ in self._seen).items()))
