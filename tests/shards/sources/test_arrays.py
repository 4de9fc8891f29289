import io
import os
import zipfile

import numpy as np
import pytest

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.sources import hdf5, mat
from swath.shards.sources.arrays import open_hdf5, open_mat, open_zarr
from swath.shards.sources.source import Options
from swath.shards.sources.zarrs import Zarr

h5py = pytest.importorskip("h5py")
scipy_io = pytest.importorskip("scipy.io")
zarr = pytest.importorskip("zarr")
RGB = ("red", "green", "blue")


def cube(bands=5, height=13, width=22, dtype="i2"):
    return np.broadcast_to(100 * np.arange(bands)[:, None, None] + np.arange(height)[:, None], (bands, height, width)).astype(
        dtype
    )


def save(path, values, name="data", form=2):
    if path.suffix == ".mat":
        scipy_io.savemat(path, {name: values}, do_compression=True)
    elif path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            file.create_dataset(f"group/{name}", data=values, chunks=True, compression="gzip")
    else:
        group = zarr.create_group(str(path), zarr_format=form)
        group.create_array(name, shape=values.shape, chunks=tuple(min(n, 7) for n in values.shape), dtype=values.dtype)[...] = (
            values
        )
    return path


@pytest.mark.parametrize(
    ("name", "opener", "order"),
    [("a.mat", open_mat, "hwc"), ("a.h5", open_hdf5, "hwc"), ("a.h5", open_hdf5, "chw"), ("a.zarr", open_zarr, "chw")],
)
@pytest.mark.parametrize("form", [2, 3])
def test_cubes_are_cut_into_chips_whatever_their_axes(name, opener, order, form, tmp_path):
    values = cube() if order == "chw" else cube().transpose(1, 2, 0)
    bands = ("a", "b", "c", "d", "e")
    source = opener(save(tmp_path / name, values, form=form), Options(chip=6, stride=7, bands=bands, nodata=107))
    assert [i.place[2][:2] for i in source.items] == [(y, x) for y in (0, 7) for x in (0, 7, 14)]
    sample = source.read(source.items[4])
    (part,) = sample.parts.values()
    assert part.pixels.shape == (5, 6, 6) and str(part.pixels.dtype) == "int16"
    assert (part.pixels == cube()[:, 7:13, 7:13]).all() and part.pixels.flags.c_contiguous
    assert part.valid is not None and (part.valid[0] == 0).all() and (part.valid[1:] == 1).all()
    (contract,) = source.contracts.values()
    assert contract.names == bands and contract.dtype == "int16"


@pytest.mark.parametrize(
    ("name", "opener", "axes", "bands"),
    [
        ("a.mat", open_mat, (2, 3, 1, 0), None), ("a.h5", open_hdf5, (0, 2, 3, 1), None), ("a.h5", open_hdf5, (0, 1, 2, 3), RGB),
        ("a.zarr", open_zarr, (0, 2, 3, 1), RGB), ("a.zarr", open_zarr, (0, 1, 2, 3), None),
    ],
)  # fmt: skip
def test_samples(name, opener, axes, bands, tmp_path):
    values = np.stack([cube(3, 8, 8) + 10_000 * n for n in range(3)])  # (N, C, H, W)
    source = opener(save(tmp_path / name, values.transpose(axes)), Options(bands=bands))
    assert len(source.items) == 3
    for n, item in enumerate(source.items):
        (part,) = source.read(item).parts.values()
        np.testing.assert_array_equal(part.pixels, values[n])


def test_axes_that_could_be_either_are_asked_for(tmp_path):
    for values, said in (
        (np.zeros((2, 9, 9, 9)), "cannot be told"),
        (np.zeros((3, 5, 6)), "cannot be told"),
        (np.zeros((4, 4)), "recipe"),
    ):
        with pytest.raises(InputError, match=said):
            open_hdf5(save(tmp_path / "a.h5", values), Options())
    with pytest.raises(InputError, match="--bands names 2"):
        open_mat(save(tmp_path / "a.mat", cube().transpose(1, 2, 0)), Options(bands=("a", "b")))
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["x"], file["y"] = cube(), cube()
    with pytest.raises(InputError, match=r"x .*y .*recipe"):
        open_hdf5(tmp_path / "b.h5", Options())


def test_label_map_beside_a_mat(tmp_path):
    labels = np.zeros((13, 22))
    labels[:6, :4], labels[5, 5] = 7, 3
    save(tmp_path / "scene.mat", cube().transpose(1, 2, 0))
    save(tmp_path / "scene_gt.mat", labels, "truth")
    source = open_mat(tmp_path, Options(chip=6))
    assert source.classes == ("3", "7")
    sample = source.read(source.items[0])
    assert sample.label == "7" and sample.meta["label_pixels"] == {"3": 1, "7": 24}
    assert source.read(source.items[2]).label is None


def test_hdf5_that_leads_elsewhere_is_refused(tmp_path):
    save(tmp_path / "other.h5", cube())
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["outside"] = h5py.ExternalLink("other.h5", "group/data")
        file["soft"] = h5py.SoftLink("/outside")
        file.create_dataset("raw", (5, 6, 7), "u1", external=[(str(tmp_path / "other.h5"), 0, 210)])
        layout = h5py.VirtualLayout((5, 13, 22), "i2")
        layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "group/data", shape=(5, 13, 22))
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("text", data=np.array(["a"], object), dtype=h5py.string_dtype())
        file.create_dataset("record", data=np.zeros(3, [("a", "i4"), ("b", "f4")]))
        file.create_dataset("bomb", (1 << 20, 1 << 20), "f8", chunks=(1 << 15, 1 << 14), compression="gzip")
    with hdf5.open_file(tmp_path / "a.h5") as file:
        assert hdf5.names(file) == ["bomb", "raw", "virtual"]
        for name, said in (
            ("outside", "is a link"), ("soft", "is a link"), ("raw", "another file"), ("virtual", "another file"),
            ("text", "not plain numbers"), ("record", "not plain numbers"), ("bomb", "one chunk"), ("none", "is not there"),
        ):  # fmt: skip
            with pytest.raises(InputError, match=said):
                hdf5.dataset(file, name)
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file.attrs["pickle"] = "cos\nsystem"
    with pytest.raises(InputError, match="never loaded"):
        hdf5.open_file(tmp_path / "p.h5")


def test_mat_bombs_and_rubbish(tmp_path, monkeypatch):
    path = save(tmp_path / "a.mat", np.zeros((300, 300, 20)))
    assert path.stat().st_size < 30_000
    monkeypatch.setattr(mat, "MAX_BYTES", 1 << 20)
    with pytest.raises(InputError, match="once inflated"):
        mat.load(path, "data")
    data = bytearray(path.read_bytes())
    data[160:170] = os.urandom(10)
    path.write_bytes(data)
    with pytest.raises(InputError):
        mat.load(path, "data")
    path.write_bytes(b"not matlab" * 100)
    with pytest.raises(InputError, match="cannot be read as a MATLAB"):
        mat.shapes(path)


def test_zarr_bombs_pickles_and_damage(tmp_path):
    path = save(tmp_path / "a.zarr", cube(3, 14, 14).astype("i2"))
    chunk = next(p for p in (path / "data").iterdir() if p.name == "0.0.0")
    good, meta = chunk.read_bytes(), (path / "data" / ".zarray").read_text()

    def read():
        source = open_zarr(path, Options(bands=RGB, chip=14))
        return source.read(source.items[0])

    read()
    codec = '"blosc"' if '"blosc"' in meta else '"zstd"'
    head = bytearray(good)
    if codec == '"blosc"':
        head[4:8] = (1 << 30).to_bytes(4, "little")
    else:  # a frame whose content size is four bytes wide, and says 1 GiB
        head[4:9] = bytes([0b10100000]) + (1 << 30).to_bytes(4, "little")
    chunk.write_bytes(bytes(head))
    with pytest.raises(DecodeError, match="declares 1073741824"):
        read()
    chunk.write_bytes(good[:-3])
    with pytest.raises(DecodeError, match="damaged"):
        read()
    chunk.write_bytes(good)
    for bad in (meta.replace(codec, '"pickle"'), meta.replace("<i2", "|O"), meta.replace("14", "999999999999")):
        assert bad != meta
        (path / "data" / ".zarray").write_text(bad)
        with pytest.raises((DecodeError, InputError)):
            read()


def test_zarr_compressed_otherwise_is_named(tmp_path):
    group = zarr.create_group(str(tmp_path / "a.zarr"), zarr_format=2)
    from numcodecs import Zlib

    group.create_array("data", shape=(3, 8, 8), chunks=(3, 8, 8), dtype="u1", compressors=Zlib())[...] = 1
    with pytest.raises(InputError, match=r"zlib.*blosc or zstd"):
        open_zarr(tmp_path / "a.zarr", Options(bands=RGB))


def test_damaged_hdf5_is_a_bad_sample(tmp_path):
    path = save(tmp_path / "a.h5", np.random.default_rng(0).integers(0, 99, (3, 40, 40)).astype("i2"))
    source = open_hdf5(path, Options(bands=RGB, chip=40))
    with h5py.File(path) as file:
        where = file["group/data"].id.get_chunk_info(0).byte_offset
    data = bytearray(path.read_bytes())
    data[where : where + 40] = bytes(40)
    path.write_bytes(data)
    with pytest.raises(DecodeError, match="damaged"):
        source.read(source.items[0])


def test_a_damaged_member_of_a_zipped_sample_is_a_bad_sample():
    """Deflated bytes that are none raise zlib's own error, which is no OSError."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(".zgroup", b"{}" + bytes(1000))
    raw = bytearray(buffer.getvalue())
    start = 30 + len(".zgroup")
    raw[start : start + 8] = b"\xff" * 8
    with pytest.raises(DecodeError, match="is no zip that can be read"):
        Zarr(bytes(raw), "sample 1")
