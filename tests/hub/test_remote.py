"""ORG/NAME[@REVISION] is a backbone: configuration and weights come over, nothing else does, and nothing of it is run."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swath.hub.export import export
from swath.hub.load import load_backbone
from swath.hub.push import push
from swath.launch.cli import main
from swath.shards.errors import InputError
from tests.hub.conftest import environment
from tests.hub.hub_server import TOKEN, HubServer
from tests.hub.made import loaded, save_run

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that was not verified, which is tested elsewhere."""
    made = tmp_path_factory.mktemp("remote")
    run = save_run(loaded(), made / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("swath.hub.export._verify", lambda *args: None)
        return export(run, made / "exported", license="MIT")


def test_a_hub_id_loads_as_the_folder_does(hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    push(folder, "team/vit")
    push(folder, "team/vit", revision="v2")
    images = torch.randn(2, 4, 16, 16)
    with torch.inference_mode():
        expected = loaded().backbone(images).pooled
        for place in ("team/vit", "team/vit@v2", Path("team/vit"), f"team/vit@{hub.repos['team/vit'].branches['v2']}"):
            again = load_backbone(place)
            assert torch.equal(again.backbone(images).pooled, expected) and again.origin["license"] == "mit"
    fetched = {path.name for path in (tmp_path / "home").rglob("snapshots/*/*")}
    assert fetched == {"config.json", "model.safetensors"}, "no code"
    assert not any(path.endswith(".py") for method, path in hub.requests if "/resolve/" in path)


def test_what_lies_here_comes_first(hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "team").mkdir()
    (tmp_path / "team" / "vit").symlink_to(folder)
    assert load_backbone("team/vit").name == "vit_tiny_patch8"
    assert not hub.requests


def test_the_cache_serves_when_the_hub_cannot_be_reached(
    hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    push(folder, "team/vit")
    assert load_backbone("team/vit").origin["step"] == 7
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    count = len(hub.requests)
    assert load_backbone("team/vit").origin["step"] == 7 and len(hub.requests) == count
    with pytest.raises(InputError, match=r"team/other.* cannot be reached, and there is no whole copy in the cache"):
        load_backbone("team/other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    assert load_backbone("team/vit").origin["step"] == 7


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("team/none", r"no folder here.*none that your token may read \(404\)"),
        ("team/vit@v9", r"it has no such revision \(404\)"),
        ("team/a--b", "no name of a model on the Hub"),
        ("team/text", "holds a bert model, not one that `swath export` wrote"),
        ("team/bare", "not a run folder or a whole checkpoint"),
        ("none", "none is not a folder; a backbone is a run folder, a checkpoint, an exported folder or a Hub id"),
    ],
)
def test_what_cannot_be_had_is_one_line(
    hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    place: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    push(folder, "team/vit")
    for name, change in (("team/text", {"config.json": b'{"model_type": "bert"}'}), ("team/bare", {"model.safetensors": None})):
        push(folder, name)
        files = hub.repos[name].commits[hub.repos[name].branches["main"]]
        for path, data in change.items():
            if data is None:
                del files[path]
            else:
                files[path].data = data
    with pytest.raises(InputError, match=message) as caught:
        load_backbone(place)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)


def test_a_private_model_needs_the_token(hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    push(folder, "team/secret", private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match=r"none that your token may read \(401\)"):
        load_backbone("team/secret")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert load_backbone("team/secret").origin["step"] == 7


def test_without_the_client_a_missing_folder_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"runs/mae is no folder here; .*pip install 'swath\[hub\]'"):
        load_backbone("runs/mae")


def test_commands_take_a_hub_id(
    hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the Hub to the Hub again: a copy under another name, to the byte but for its own name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("swath.hub.export._verify", lambda *args: None)
    push(folder, "team/vit")
    assert main(["export", "team/vit", "--push", "team/copy", "--license", "mit"]) == 0
    assert capsys.readouterr().out.startswith(f"pushed: {hub.place}/team/copy/commit/")
    one, two = hub.files("team/vit"), hub.files("team/copy")
    assert one.pop("README.md") == two.pop("README.md").replace(b"team/copy", b"team/vit") and one == two
    assert main(["export", "team/none", "--to", str(tmp_path / "x")]) == 2
    assert main(["probe", "knn", "team/none", "--train", str(tmp_path), "--test", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("no folder here") == 2 and "Traceback" not in said and not (tmp_path / "x").exists()


# What a colleague without swath runs; the name is its argument.
ELSEWHERE = """
import sys, torch
from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.inference_mode():
    print(model(**processor(torch.full((4, 16, 16), 0.25))).pooler_output.double().sum().item())
assert "swath" not in sys.modules
"""


@pytest.mark.slow
def test_the_command_as_a_user_gives_it_and_a_colleague_loads_it(hub: HubServer, tmp_path: Path) -> None:
    run = save_run(loaded(), tmp_path / "run")
    given = os.environ | environment(hub, tmp_path)
    command = [sys.executable, "-m", "swath.launch.cli", "export", str(run), "--push", "team/vit", "--license", "apache-2.0"]
    done = subprocess.run([*command, "--private"], env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"pushed: {hub.place}/team/vit/commit/") and TOKEN not in done.stdout + done.stderr
    assert "! what the weights were trained on is not recorded" in done.stderr
    bare = {name: value for name, value in given.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", ELSEWHERE, "team/vit"]
    done = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.inference_mode():
        expected = loaded().backbone(torch.full((1, 4, 16, 16), (0.25 - 0.2) / 0.07)).pooled.double().sum().item()
    assert float(done.stdout) == pytest.approx(expected, abs=1e-4), "sums of 24 numbers near 1 in fp32"
