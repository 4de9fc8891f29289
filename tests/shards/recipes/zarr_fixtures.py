"""Zarr v2 zips as SSL4EO-S12 v1.1 and TerraMesh publish them, small; band k of date t of sample n is one constant."""

import io
import tarfile
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

BANDS = {
    "S2L2A": ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"],
    "S2L1C": ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12"],
    "S1GRD": ["vv", "vh"],
    "S1RTC": ["vv", "vh"],
    "DEM": ["DEM"],
}
DTYPES = {"S2L2A": "i2", "S2L1C": "i2", "S1GRD": "f2", "S1RTC": "f2", "DEM": "i2"}
SIDE = 9
NS = 1_600_000_000 * 10**9


def pixels(folder: str, samples: int, dates: int, offset: int = 0) -> np.ndarray:
    """(N, T, C, H, W): 100 · band + 10 · date + sample (B10: 12, as real ones), plus the radiometric offset."""
    bands = BANDS[folder]
    k = 100 * np.arange(1, len(bands) + 1)
    if "B10" in bands:
        k[bands.index("B10")] = 12
    values = np.arange(samples)[:, None, None] + 10 * np.arange(dates)[:, None] + k
    values = values + (offset if folder.startswith("S2") else 0)
    if folder.startswith("S1"):
        values = -values / 64  # dB, exact in float16
    return np.broadcast_to(values[..., None, None], (*values.shape, SIDE, SIDE)).astype(DTYPES[folder])


def write(path: Path, arrays: dict[str, tuple[np.ndarray, tuple[int, ...] | None, dict[str, Any]]]) -> None:
    import zarr
    from zarr.storage import ZipStore

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zips keep the metadata that consolidating replaces
        store = ZipStore(path, mode="w")
        group = zarr.create_group(store, zarr_format=2)
        for name, (values, chunks, attributes) in arrays.items():
            made = group.create_array(name, shape=values.shape, chunks=chunks or values.shape or (), dtype=values.dtype)
            made[...] = values
            made.attrs.update(attributes)
        zarr.consolidate_metadata(store)
        store.close()


def many(path: Path, folder: str, ids: list[str], offset: int = 1000, bands: list[str] | None = None, seed: int = 0) -> None:
    """Layout A: all samples of a file together, chunked by date."""
    values = pixels(folder, len(ids), 4, offset)
    n = len(ids)
    seconds = 1_600_000_000 + np.arange(4 * n).reshape(n, 4) + seed
    arrays: dict[str, Any] = {
        "bands": (values, (n, 1, *values.shape[2:]), {}),
        "band": (np.array(bands or BANDS[folder]), None, {}),
        "sample": (np.array(ids), None, {}),
        "time": (np.arange(4), None, {}),
        "time_": (seconds, None, {"units": "seconds since 1970-01-01", "calendar": "proleptic_gregorian"}),
        "center_lat": (np.linspace(10, 20, n), None, {}),
        "center_lon": (np.linspace(-5, 5, n), None, {}),
        "crs": (np.full(n, 32651), None, {}),
        "sample_id": (np.array([[f"{i}_{t}" for t in range(4)] for i in ids]), None, {}),
    }
    if folder.startswith("S2"):
        mask = np.zeros((n, 4, SIDE, SIDE), np.uint8)
        mask[0, 1, 0, :7] = range(7)
        arrays["cloud_mask"] = (mask, (n, 1, SIDE, SIDE), {})
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, arrays)


def single(folder: str, n: int, dates: int, offset: int, *, of: int = 8, dn: np.ndarray | None = None) -> bytes:
    """Layout B and TerraMesh: one sample, one chunk."""
    values = pixels(folder, of, dates, offset)[n] if dn is None else dn
    arrays: dict[str, Any] = {
        "bands": (values, None, {}),
        "band": (np.array(BANDS[folder]), None, {}),
        "time": (np.arange(dates) * 10**9 + (0 if folder == "DEM" else NS), None, {}),
        "center_lat": (np.array(12.5), None, {}),
        "center_lon": (np.array(-3.25), None, {}),
        "crs": (np.array(32631), None, {}),
    }
    if folder.startswith("S2"):
        mask = np.zeros((dates, SIDE, SIDE), np.uint8)
        mask[0, 0, :7] = range(7)
        arrays["cloud_mask"] = (mask, None, {})
    with tempfile.TemporaryDirectory() as folder_:
        path = Path(folder_) / "sample.zarr.zip"
        write(path, arrays)
        return path.read_bytes()


def tar(path: Path, samples: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as made:
        for key, data in samples.items():
            info = tarfile.TarInfo(f"{key}.zarr.zip")
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
