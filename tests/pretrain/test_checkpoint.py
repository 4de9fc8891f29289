"""A checkpoint is whole or not there, and reading one from a stranger runs nothing of theirs."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, TensorProperties

from swath.pretrain import checkpoint
from swath.shards.errors import InputError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        tensors = {"model.a": torch.full((3, 2), float(step)), "model.b": torch.tensor(step, dtype=torch.bfloat16)}
        checkpoint.save(tmp_path, step, tensors, {"step": step}, keep=2, permanent_every=None)
    return tmp_path


def forge(path: Path, payload: bytes) -> None:
    """Replace the metadata and make the checksums agree, as somebody with intent would."""
    (path / "tensors" / ".metadata").write_bytes(payload)
    files = json.loads((path / "files.json").read_text())
    files["tensors/.metadata"] = checkpoint._measure(path / "tensors" / ".metadata")
    (path / "files.json").write_text(json.dumps(files))


def test_round_trip_and_retention(run: Path) -> None:
    assert [p.name for p in sorted((run / "checkpoints").glob("step-*"))] == ["step-00000002", "step-00000003"]
    assert (run / "checkpoints" / "latest").read_text() == "step-00000003"
    state, tensors = checkpoint.read_checkpoint(run, "model.")
    assert state == {"step": 3} and torch.equal(tensors["a"], torch.full((3, 2), 3.0))
    assert tensors["b"].dtype == torch.bfloat16 and tensors["b"] == 3


def test_permanent_ones_stay(tmp_path: Path) -> None:
    for step in range(1, 8):
        checkpoint.save(tmp_path, step, {"a": torch.zeros(1)}, {"step": step}, keep=1, permanent_every=3)
    assert sorted(int(p.name[5:]) for p in (tmp_path / "checkpoints").glob("step-*")) == [3, 6, 7]


def test_a_pickle_that_calls_something_is_refused(run: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {run / 'harm'}",)

    latest = run / "checkpoints" / "step-00000003"
    forge(latest, pickle.dumps(Harm()))
    with pytest.raises(InputError, match="does not belong in a checkpoint's metadata"):
        checkpoint.read_checkpoint(latest)
    assert not (run / "harm").exists()


@pytest.mark.parametrize(
    ("owner", "name", "passes"),
    [(TensorProperties, "create_from_tensor", False), (_MEM_FORMAT_ENCODING, "__reduce_ex__", False),
     (_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT", True)],
)  # fmt: skip
def test_getattr_reaches_members_of_enums_only(run: Path, owner: type, name: str, passes: bool) -> None:
    """So early releases of Python 3.11 pickle them; of anything else it would be a way to whatever an object has."""

    class Reached:
        def __reduce__(self) -> tuple[object, tuple[type, str]]:
            return getattr, (owner, name)

    metadata = pickle.loads((run / "checkpoints" / "step-00000003" / "tensors" / ".metadata").read_bytes())
    metadata.planner_data = Reached()
    latest = run / "checkpoints" / "step-00000003"
    forge(latest, pickle.dumps(metadata))
    if passes:
        checkpoint.read_checkpoint(latest)
    else:
        with pytest.raises(InputError, match=f"getattr of {name} does not belong"):
            checkpoint.read_checkpoint(latest)


def test_a_path_that_leaves_the_folder_is_refused(run: Path) -> None:
    latest = run / "checkpoints" / "step-00000003"
    metadata = pickle.loads((latest / "tensors" / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../../../outside"
    forge(latest, pickle.dumps(metadata))
    with pytest.raises(InputError, match="leaves the checkpoint"):
        checkpoint.read_checkpoint(latest)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no marker", "no list"])
def test_damage_is_found_before_anything_is_opened(damage: str, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    latest = run / "checkpoints" / "step-00000003"
    data = latest / "tensors" / "__0_0.distcp"
    raw = data.read_bytes()
    if damage == "flip":
        data.write_bytes(raw[:-9] + bytes([raw[-9] ^ 4]) + raw[-8:])
    elif damage == "truncate":
        data.write_bytes(raw[: len(raw) // 2])
    elif damage == "remove":
        data.unlink()
    else:
        (latest / {"no marker": "complete", "no list": "files.json"}[damage]).unlink()
    assert checkpoint.find_latest(run) == run / "checkpoints" / "step-00000002"
    assert f"{latest} is damaged" in caplog.text
    assert checkpoint.find_latest(run, mend=True) == run / "checkpoints" / "step-00000002"
    assert not latest.exists() and latest.with_name(latest.name + ".damaged").exists()


def test_other_shapes_are_refused(run: Path) -> None:
    with pytest.raises(InputError, match=r"does not fit this model: model\.a"):
        checkpoint.load_into(run / "checkpoints" / "step-00000003", {"model.a": torch.zeros(2, 2), "model.b": torch.zeros(())})


def test_metadata_holds_no_path_of_this_machine(run: Path) -> None:
    for file in (run / "checkpoints" / "step-00000003").rglob("*"):
        assert not file.is_file() or str(run).encode() not in file.read_bytes()
