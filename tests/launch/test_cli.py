"""The command line as a user meets it: one clear line and exit code 2 for what they got wrong, never a traceback."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from swath.kernels.dispatch import OPERATORS
from swath.launch.cli import main
from tests.shard_folders import RGB, make_shards

TINY = [
    "backbone.width=48",
    "backbone.depth=1",
    "objective.decoder_width=24",
    "objective.decoder_depth=1",
    "train.global_batch=8",
    "train.max_steps=2",
    "train.precision=fp32",
    "train.threads=1",
    "health.samples=8",
]


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("cli") / "shards")


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    assert main(["pretrain", "mae_vit_tiny", f"data.train={shards}", f"run.dir={run_dir}", *TINY]) == 0
    return run_dir


def test_a_run_leaves_what_it_promises(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and rows[-1]["samples"] == 16
    assert {"step", "samples", "loss", "lr", "seconds"} <= rows[0].keys()
    assert list((trained / "tensorboard").iterdir()) and list((trained / "pictures").glob("*.png"))
    page = (trained / "report.html").read_text()
    for part in ("Curves", "<svg", "Reconstructions", "data:image/png", "Health", "Configuration", "vit_tiny_patch8"):
        assert part in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ), "the report must not load anything"


def test_probe_then_report(trained: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--train", shards, "--test", shards, "--cache", tmp_path / "cache", "--json", tmp_path / "knn.json"]
    code, out, _ = run(capsys, "probe", "knn", trained, *given, "--k", "3", "--precision", "fp32", "--from-scratch", "0",
                       "--preprocessing-table")  # fmt: skip
    assert code == 0 and "accuracy" in out and "backbone (transductive)" in out and "random initialisation" in out
    result = json.loads((tmp_path / "knn.json").read_text())
    assert result["n_test"] == 40 and result["settings"]["k"] == 3 and result["settings"]["precision"] == "fp32"
    assert (tmp_path / "cache").is_dir() and (tmp_path / "knn-confusion.png").exists()
    page = (trained / "report.html").read_text()
    assert "size, by normalisation" in page and page.count(" *</td>") == 1
    assert "Probe: knn" in page and 'alt="neighbours"' in page
    code, _, err = run(capsys, "probe", "retrieve", trained, *given, "--k", "0")
    assert code == 2 and "must be numbers from 1" in err


def test_a_finished_run_is_left_as_it_is(trained: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    code, out, _ = run(capsys, "pretrain", "mae_vit_tiny", f"data.train={shards}", f"run.dir={trained}", *TINY)
    assert code == 0 and "2 steps done" in out and (trained / "metrics.jsonl").read_bytes() == before


def test_every_configuration_error_at_once(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["train.globl_batch=8", "backbone.dpeth=3", "objective.mask_ration=0.5", "train.precision=fp8", "run.seeed=1"]
    code, _, err = run(capsys, "pretrain", "mae_vit_tiny", f"data.train={shards}", f"run.dir={tmp_path / 'r'}", *wrong)
    assert code == 2 and not (tmp_path / "r").exists()
    for nearest in ("train.global_batch", "backbone.depth", "objective.mask_ratio", "run.seed"):
        assert f"did you mean {nearest}?" in err
    assert "train.precision" in err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "data.train: "),
        (["data.train=/nowhere"], "not a folder of shards"),
        (["backbone.name=vit_tiny_patch_8"], "did you mean vit_tiny_patch8?"),
        (["objective.name=mea"], "did you mean mae?"),
        (["train.global_batch=10", "train.micro_batch=3"], "sizes that fit: 1, 2, 5, 10"),
        (["objective.mask_ratio=0.99"], "some must stay, some must go"),
        (["data.size=30"], "not divisible by patch 8; 32"),
        (["train.epochs=0.001", "train.max_steps=null"], "less than one step"),
        (["train.max_steps"], "write key.sub=value"),
        (["backbone.width=50"], "divisible by heads"),
        (["backbone.width=wide"], "backbone.width"),
    ],
)
def test_bad_recipes(
    overrides: list[str], message: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [] if not overrides or "data.train" in overrides[0] else [f"data.train={shards}"]
    code, _, err = run(capsys, "pretrain", "mae_vit_tiny", f"run.dir={tmp_path / 'r'}", *TINY, *data, *overrides)
    assert code == 2 and message in err
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


def test_unknown_recipe_and_broken_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "pretrain", "mae_vit_tyny")
    assert code == 2 and "did you mean mae_vit_tiny?" in err
    (tmp_path / "broken.yaml").write_text("run: [")
    code, _, err = run(capsys, "pretrain", tmp_path / "broken.yaml")
    assert code == 2 and "not YAML" in err and err.count("\n") == 1


def test_another_input_contract_shows_both_sides(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_shards(tmp_path / "bgr", bands=RGB[::-1])
    code, _, err = run(capsys, "probe", "knn", trained, "--train", other, "--test", other)
    assert code == 2 and "band 1: red | blue" in err and "band 3: blue | red" in err and "what would do" in err


def test_what_is_no_backbone(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for what in (tmp_path, tmp_path / "missing"):
        code, _, err = run(capsys, "export", what, "--to", tmp_path / "out")
        assert code == 2 and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_damaged_checkpoint_is_named_and_the_one_before_used(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    given = [f"data.train={shards}", f"run.dir={tmp_path / 'run'}", *TINY, "checkpoint.every=1"]
    assert run(capsys, "pretrain", "mae_vit_tiny", *given)[0] == 0
    (tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json").write_text("{")
    code, out, _ = run(
        capsys, "probe", "knn", tmp_path / "run", "--train", shards, "--test", shards, "--no-cache", "--from-scratch", "1"
    )
    assert code == 0 and "step-00000002 is damaged" in caplog.text
    code, out, _ = run(capsys, "pretrain", "mae_vit_tiny", *given)
    assert code == 0 and "2 steps done" in out
    assert (tmp_path / "run" / "checkpoints" / "step-00000002.damaged").is_dir()


def test_full_disk_while_saving(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step's checkpoint is not there at all, the run says so in one line, and continues once there is space."""
    from swath.pretrain import checkpoint

    given = [f"data.train={shards}", f"run.dir={tmp_path / 'run'}", *TINY]

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", full)
        code, _, err = run(capsys, "pretrain", "mae_vit_tiny", *given)
    assert code == 2 and "no space left" in err
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert run(capsys, "pretrain", "mae_vit_tiny", *given)[0] == 0


def test_shard_refuses_what_it_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    code, _, err = run(capsys, "shard", tmp_path / "empty", "--out", out)
    assert code == 2 and err.count("\n") == 1 and not out.exists()
    code, _, err = run(capsys, "shard", tmp_path / "missing", "--out", out)
    assert code == 2 and err.count("\n") == 1 and not out.exists()
    mixed = tmp_path / "mixed" / "a"
    mixed.mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(mixed / "1.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(mixed / "2.png")
    code, _, err = run(capsys, "shard", tmp_path / "mixed", "--out", out)
    assert code == 2 and "1.png" in err and "2.png" in err and not out.exists()


def test_doctor_recipes_index_inspect(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and "torch" in out and "vit_base_patch16" in out
    taken = {line.split()[0]: line.split()[1] for line in out.splitlines()}
    assert set(OPERATORS) <= set(taken)
    if not torch.cuda.is_available():
        assert taken["selective_scan"] == "cpu" and "not triton: it needs a GPU" in out and "not mamba_ssm: " in out
    code, out, _ = run(capsys, "recipes")
    shown = {line.split()[0] for line in out.splitlines() if line}
    assert code == 0 and {"mae_vit_tiny", "mae_vit_base", "mae_vit_large", "eurosat_ms", "reben"} <= shown


def test_wrong_usage_exits_with_2() -> None:
    for args in ([], ["frobnicate"], ["probe", "knn"]):
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code == 2
