import io
import tarfile

import pytest

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError
from swath.shards.sources.tars import members, read


def write(path, *infos):
    with tarfile.open(path, "w") as tar:
        for info, data in infos:
            tar.addfile(info, io.BytesIO(data))
    return path


def plain(name, data=b"data"):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, data


def test_members_are_listed_in_order_and_read(tmp_path):
    path = write(tmp_path / "a.tar", plain("x/b.1.zarr.zip", b"one"), plain("a.zarr.zip", b"two"), plain("README"))
    found = members(path)
    assert [(m.key, m.suffix) for m in found] == [("x/b", "1.zarr.zip"), ("a", "zarr.zip")]
    assert [read(path, m) for m in found] == [b"one", b"two"]


@pytest.mark.parametrize("name", ["/etc/passwd.x", "../a.x", "a/../../b.x"])
def test_paths_that_lead_outside_are_refused(name, tmp_path):
    with pytest.raises(InputError, match="no plain file"):
        members(write(tmp_path / "a.tar", plain("ok.x"), plain(name)))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_are_refused(kind, tmp_path):
    info = tarfile.TarInfo("a.x")
    info.type, info.linkname = kind, "/etc/passwd"
    with pytest.raises(InputError, match="no plain file"):
        members(write(tmp_path / "a.tar", (info, b"")))


def test_cut_short_and_repeated(tmp_path):
    path = write(tmp_path / "a.tar", plain("a.x", bytes(5000)), plain("b.x", bytes(5000)))
    found = members(path)
    path.write_bytes(path.read_bytes()[:6000])
    with pytest.raises(InputError, match="damaged after a"):
        members(path)
    with pytest.raises(DecodeError, match="cut short"):
        read(path, found[1])
    with pytest.raises(InputError, match="twice"):
        members(write(tmp_path / "b.tar", plain("a.x"), plain("a.x")))
    (tmp_path / "c.tar").write_bytes(b"rubbish" * 200)
    with pytest.raises(InputError, match="cannot be read as a tar"):
        members(tmp_path / "c.tar")
