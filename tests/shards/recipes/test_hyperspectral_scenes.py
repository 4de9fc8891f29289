import os
from pathlib import Path

import numpy as np
import pytest

from swath.shards.errors import InputError
from swath.shards.recipes.registry import find
from swath.shards.sources.source import Options

scipy_io = pytest.importorskip("scipy.io")
h5py = pytest.importorskip("h5py")
DATA = Path(os.environ.get("SWATH_DATA") or Path(__file__).resolve().parents[3].parent / "shared" / "data") / "hsi"

GIC = {
    "indian_pines": ("Indian_pines_corrected.mat", "indian_pines_corrected", "Indian_pines_gt.mat", "indian_pines_gt", 200),
    "salinas": ("Salinas_corrected.mat", "salinas_corrected", "Salinas_gt.mat", "salinas_gt", 204),
    "salinas_a": ("SalinasA_corrected.mat", "salinasA_corrected", "SalinasA_gt.mat", "salinasA_gt", 204),
    "pavia_university": ("PaviaU.mat", "paviaU", "PaviaU_gt.mat", "paviaU_gt", 103),
    "pavia_centre": ("Pavia.mat", "pavia", "Pavia_gt.mat", "pavia_gt", 102),
}
H, W = 21, 34


def cube(bands, dtype="u2"):
    """Pixel (row, column) of band k (from 0) holds 100 · k + 3 · (column > 16) + (row > 9)."""
    rows, columns = np.mgrid[:H, :W]
    return (100 * np.arange(bands) + (3 * (columns > 16) + (rows > 9))[..., None]).astype(dtype)


def truth():
    labels = np.zeros((H, W), np.uint8)
    labels[:5, :5], labels[5:7, :5], labels[:, 20:] = 2, 9, 1
    return labels


def check_bands(source, item=0):
    pixels = source.read(source.items[item]).parts["hsi"].pixels
    assert len(pixels) == len(source.contracts["hsi"].bands)
    assert (pixels[:, 0, 0] - pixels[0, 0, 0] == 100 * np.arange(len(pixels))).all()
    return pixels


@pytest.mark.parametrize("name", GIC)
@pytest.mark.parametrize("version", ["5", "7.3"])
def test_gic_scenes_of_both_versions(name, version, tmp_path):
    file, key, gt_file, gt_key, bands = GIC[name]
    for path, variable, values in ((file, key, cube(bands)), (gt_file, gt_key, truth())):
        if version == "5":
            scipy_io.savemat(tmp_path / path, {variable: values}, do_compression=True)
        else:  # a user block of 512 bytes, axes reversed
            with h5py.File(tmp_path / path, "w", userblock_size=512) as made:
                made[variable] = values.T
    source = find(name).open(tmp_path, Options(chip=10))
    assert len(source.items) == 6 and source.contracts["hsi"].dtype == "uint16"
    check_bands(source)
    last = source.read(source.items[5])  # rows 10 to 19, columns 20 to 29
    assert (last.parts["hsi"].pixels[0] == 4).all() and last.label == source.classes[0]
    first = source.read(source.items[0])
    assert first.label == source.classes[1]
    assert first.meta["label_pixels"] == {source.classes[1]: 25, source.classes[8]: 10} and first.meta["label_share"] == 0.25
    assert source.read(source.items[1]).meta["window"] == [0, 10, 10, 10] and source.read(source.items[1]).label is None
    assert any("nominal" in note for note in source.notes)


def test_removed_bands_leave_gaps(tmp_path):
    scipy_io.savemat(tmp_path / "Indian_pines_corrected.mat", {"indian_pines_corrected": cube(200)})
    bands = find("indian_pines").open(tmp_path, Options()).contracts["hsi"].bands
    numbers = [int(b.name[1:]) for b in bands]
    assert numbers[102:104] == [103, 109] and numbers[143:146] == [149, 164, 165] and numbers[-1] == 219
    nm = [b.wavelength_nm or 0.0 for b in bands]
    assert nm[0] == 400 and nm[103] - nm[102] == pytest.approx(6 * 2100 / 219, abs=0.2)


def test_other_cubes_and_maps_are_refused(tmp_path):
    scipy_io.savemat(tmp_path / "Indian_pines_corrected.mat", {"indian_pines_corrected": cube(220)})
    with pytest.raises(InputError, match="220 bands"):
        find("indian_pines").open(tmp_path, Options())
    scipy_io.savemat(tmp_path / "PaviaU.mat", {"paviaU": cube(103)})
    scipy_io.savemat(tmp_path / "PaviaU_gt.mat", {"paviaU_gt": np.repeat(np.repeat(truth(), 2, 0), 2, 1)})
    with pytest.raises(InputError, match="label map is 42×68"):
        find("pavia_university").open(tmp_path, Options())
    scipy_io.savemat(tmp_path / "PaviaU_gt.mat", {"paviaU_gt": truth() + 4})
    with pytest.raises(InputError, match="codes"):
        find("pavia_university").open(tmp_path, Options())
    with pytest.raises(InputError, match=r"Salinas_corrected\.mat"):
        find("salinas").open(tmp_path, Options())


def test_houston_with_lidar_and_both_label_maps(tmp_path):
    train, test = truth(), np.zeros((H, W), np.uint8)
    train[:, 20:], test[:, 20:] = 0, 15
    for name, values in (("HSI", cube(144)), ("LiDAR", np.full((H, W), 7.5)), ("TRLabel", train), ("TSLabel", test)):
        scipy_io.savemat(tmp_path / f"{name}.mat", {name: values})
    source = find("houston_2013").open(tmp_path, Options(chip=10))
    check_bands(source)
    sample = source.read(source.items[2])
    assert sample.label == "running track" and (sample.parts["lidar"].pixels == 7.5).all()
    assert source.contracts["lidar"].unit == "metres"
    assert source.contracts["hsi"].bands[143].wavelength_nm == pytest.approx(1046.1)


def test_muufl_struct(tmp_path):
    labels = np.where(truth() == 2, 1, -1)
    lidar = np.empty((1, 1), object)
    lidar[0, 0] = {"z": np.stack([np.full((H, W), 3.0), np.full((H, W), 9.0)], axis=2)}
    kinds = np.array([["trees"], ["mostly-grass"]], object)
    hsi = {
        "Data": cube(64, "f8"), "Lidar": lidar, "info": {"wavelength": np.linspace(375, 1050, 64)},
        "sceneLabels": {"labels": labels, "Materials_Type": kinds},
    }  # fmt: skip
    scipy_io.savemat(tmp_path / "muufl_gulfport_campus_1_hsi_220_label.mat", {"hsi": hsi}, do_compression=True)
    source = find("muufl_gulfport").open(tmp_path, Options(chip=10))
    check_bands(source)
    sample = source.read(source.items[0])
    assert sample.label == "trees" and sample.meta["label_pixels"] == {"trees": 25}
    assert (sample.parts["lidar"].pixels == np.array([3, 9])[:, None, None]).all()
    assert source.contracts["hsi"].bands[63].wavelength_nm == 1050 and "file's own" in source.notes[0]


def test_jasper_ridge_pixels_lie_column_by_column(tmp_path):
    kept = [n for n in range(1, 225) if not (n <= 3 or 108 <= n <= 112 or 154 <= n <= 166 or n >= 220)]
    rows, columns = np.mgrid[:H, :W]
    values = 200 * np.arange(198)[:, None] + (rows + 0 * columns).ravel(order="F") + 0
    file = tmp_path / "jasperRidge2_R198.mat"
    made = {"Y": values.astype("u2"), "nRow": H, "nCol": W, "SlectBands": np.array(kept)[:, None]}
    scipy_io.savemat(file, made)
    source = find("jasper_ridge").open(tmp_path, Options(chip=10))
    pixels = source.read(source.items[0]).parts["hsi"].pixels
    assert (pixels == 200 * np.arange(198)[:, None, None] + np.arange(10)[:, None]).all()
    scipy_io.savemat(file, made | {"SlectBands": np.array(kept)[::-1, None]})
    with pytest.raises(InputError, match="SlectBands"):
        find("jasper_ridge").open(tmp_path, Options())


@pytest.mark.parametrize(("name", "folder", "bands"), [("salinas_a", "SalinasA", 204), ("jasper_ridge", "JasperRidge", 198)])
def test_real_scenes(name, folder, bands):
    if not (DATA / folder).exists():
        pytest.skip(f"{DATA / folder} is not here; set SWATH_DATA to the folder that holds hsi")
    source = find(name).open(DATA / folder, Options(chip=40))
    samples = [source.read(item) for item in source.items]
    assert {s.parts["hsi"].pixels.shape for s in samples} == {(bands, 40, 40)}
    spectrum = np.mean([s.parts["hsi"].pixels.astype(float) for s in samples], axis=(0, 2, 3))
    step = np.abs(np.diff(spectrum)) / spectrum.mean()
    assert np.median(step) < 0.1, "neighbouring bands are alike"
    if name == "salinas_a":
        labels = {s.label for s in samples}
        assert labels <= set(source.classes) and len(labels) > 1
        assert set().union(*(s.meta["label_pixels"] for s in samples)) == {
            "brocoli_green_weeds_1", "corn_senesced_green_weeds", "lettuce_romaine_4wk", "lettuce_romaine_5wk",
            "lettuce_romaine_6wk", "lettuce_romaine_7wk",
        }  # fmt: skip
