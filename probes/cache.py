"""Features that have been computed, by the hash of all that decides them; what was used longest ago gives way."""

import io
import logging
import os
import time
from pathlib import Path

import numpy as np

from swath.shards.files import write_bytes

log = logging.getLogger("swath")
LIMIT = 16 << 30  # bytes


def default() -> Path:
    """~/.cache/swath/features."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "swath" / "features"


def load(folder: Path | None, key: str, shape: tuple[int, int]) -> np.ndarray | None:
    """(N, D) float32, or None where it is not there or is not of this `shape`."""
    if folder is None:
        return None
    path = folder / f"{key}.npy"
    try:
        x = np.load(path, allow_pickle=False)
        os.utime(path)  # used now
    except (OSError, ValueError, EOFError):
        return None
    return x if x.shape == shape and x.dtype == np.float32 else None


def keep(folder: Path | None, key: str, x: np.ndarray) -> None:
    """Write it whole or not at all, then make room."""
    if folder is None or x.nbytes > LIMIT:
        return
    buffer = io.BytesIO()
    np.save(buffer, x, allow_pickle=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / f"{key}.npy", buffer.getvalue())
        _make_room(folder)
    except OSError as error:
        log.warning("features are not kept in %s: %s", folder, error.strerror)


def _make_room(folder: Path) -> None:
    for partial in folder.glob(".*.partial"):  # of processes that were killed
        if time.time() - partial.stat().st_mtime > 3600:
            partial.unlink(missing_ok=True)
    found = [(path.stat(), path) for path in folder.glob("*.npy")]
    used = sum(state.st_size for state, _ in found)
    for state, path in sorted(found, key=lambda entry: entry[0].st_mtime):
        if used <= LIMIT:
            return
        path.unlink(missing_ok=True)
        used -= state.st_size
