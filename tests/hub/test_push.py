"""Pushing: one commit with everything, nothing sent twice, one line for what cannot be, and a token that nobody sees."""

import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from swath.hub.push import publish, push
from swath.hub.remote import HERE
from swath.launch.cli import main
from swath.shards.errors import InputError
from tests.hub.conftest import environment
from tests.hub.hub_server import TOKEN, HubServer

OPEN = [{"name": "eurosat_rgb", "licence": "MIT", "samples": 9}]


def exported(folder: Path, *, license: str | None = "apache-2.0", datasets: list[dict[str, object]] = OPEN) -> Path:
    """What has the looks of an export; its weights are random bytes."""
    (folder / "assets").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "swath", "origin": {"datasets": datasets}}))
    for number, name in enumerate(("model", "objective")):
        data = hashlib.shake_128(bytes([number])).digest(300_000)
        (folder / f"{name}.safetensors").write_bytes(data)
    metadata = "" if license is None else f"license: {license}\n"
    code = f"```python\n{HERE}\nmodel = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)\n```\n"
    (folder / "README.md").write_text(f"---\n{metadata}library_name: transformers\n---\n\n# A backbone\n\n{code}")
    (folder / "swath_vit.py").write_text("x = 1\n")
    (folder / "assets" / "curves.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return exported(tmp_path / "exported")


def local(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def never(to: Path) -> Path:
    raise AssertionError("nothing should be exported")


def test_everything_arrives_in_one_commit(hub: HubServer, folder: Path) -> None:
    (folder / ".cache").mkdir()
    (folder / ".cache" / "mine").write_text("hidden")
    (folder / "linked.txt").symlink_to("/etc/hostname")
    url = push(folder, "team/vit")
    assert url.startswith(f"{hub.place}/team/vit/commit/") and not hub.repos["team/vit"].private
    there, here = hub.files("team/vit"), local(folder)
    assert there.keys() - {".gitattributes"} == here.keys() - {".cache/mine", "linked.txt"}
    assert all(there[name] == here[name] for name in there.keys() - {".gitattributes", "README.md"})
    assert 'FOLDER = "team/vit"\n' in there["README.md"].decode()
    assert len(hub.repos["team/vit"].commits) == 2, "the empty one, and one of ours"
    assert hub.objects.keys() == {hashlib.sha256(here[n]).hexdigest() for n in here if n.endswith((".safetensors", ".png"))}


def test_a_second_push_sends_what_is_new_and_takes_away_what_is_ours(hub: HubServer, folder: Path) -> None:
    (folder / "mine.csv").write_text("1,2\n")
    push(folder, "team/vit")
    (folder / "mine.csv").unlink()
    (folder / "swath_vit.py").rename(folder / "swath_mamba.py")
    (folder / "objective.safetensors").unlink()
    before = dict(hub.received)
    push(folder, "team/vit")
    there = hub.files("team/vit")
    assert {"swath_mamba.py", "mine.csv"} < there.keys() and not {"swath_vit.py", "objective.safetensors"} & there.keys()
    assert dict(hub.received) == before
    push(folder, "team/vit")
    assert len(hub.repos["team/vit"].commits) == 3, "what has not changed makes no commit"


def test_private_is_private_or_refused(hub: HubServer, folder: Path) -> None:
    push(folder, "team/secret", private=True)
    assert hub.repos["team/secret"].private
    push(folder, "team/secret", private=True)
    push(folder, "team/open")
    count = len(hub.repos["team/open"].commits)
    (folder / "swath_vit.py").write_text("x = 2\n")
    with pytest.raises(InputError, match="team/open is there already and is public"):
        push(folder, "team/open", private=True)
    assert len(hub.repos["team/open"].commits) == count


def test_a_revision_is_a_branch_of_its_own(hub: HubServer, folder: Path) -> None:
    push(folder, "team/vit", revision="v2")
    push(folder, "team/vit", revision="v2")
    assert hub.files("team/vit").keys() == {".gitattributes"}
    there = hub.files("team/vit", "v2")
    assert there["swath_vit.py"] == b"x = 1\n"
    assert 'FOLDER = "team/vit"' in (card := there["README.md"].decode()) and 'from_pretrained(FOLDER, revision="v2", ' in card
    with pytest.raises(InputError, match="no name of a branch"):
        push(folder, "team/vit", revision='v2", x="')


PUSH = "import sys; from pathlib import Path; from swath.hub.push import push; print(push(Path(sys.argv[1]), sys.argv[2]))"


def test_an_interrupted_upload_continues(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    """Killed half way through the second large file: nothing is published, and the first is not sent again."""
    first, second = (hashlib.sha256((folder / f"{n}.safetensors").read_bytes()).hexdigest() for n in ("model", "objective"))
    hub.halt_at = second
    command = [sys.executable, "-c", PUSH, str(folder), "team/vit"]
    process = subprocess.Popen(
        command, env=os.environ | environment(hub, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        assert hub.half.wait(60)
        deadline = time.monotonic() + 60
        while first not in hub.objects and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.kill()
        said = process.communicate()[0]
    assert first in hub.objects and second not in hub.objects and 0 < hub.received[second] < 300_000
    assert hub.files("team/vit").keys() == {".gitattributes"} and TOKEN.encode() not in said
    hub.halt_at = None
    before = hub.received[second]
    push(folder, "team/vit")
    assert hub.received[first] == 300_000, "sent once"
    assert hub.received[second] == before + 300_000
    assert {"model.safetensors", "objective.safetensors"} < hub.files("team/vit").keys()


@pytest.mark.parametrize("name", ["vit", "team/", "a/b/c", "team/vit@main", "te am/vit", "../vit", "team/a--b", "team/vit.git"])
def test_a_wrong_name_is_refused_before_anything(hub: HubServer, folder: Path, name: str) -> None:
    with pytest.raises(InputError, match="no name of a model on the Hub; ORG/NAME is"):
        publish(folder, never, name)
    assert not hub.requests


def no_token(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")


def unknown_token(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_unknownunknown")


def gone(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nobody listens


def offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def failing(part: str, status: int) -> Callable[[HubServer, pytest.MonkeyPatch], None]:
    return lambda hub, monkeypatch: hub.fail.update({part: status})


@pytest.mark.parametrize(
    ("name", "break_it", "message"),
    [
        ("team/vit", no_token, "there is no token of the Hub; `hf auth login`, or set HF_TOKEN"),
        ("team/vit", unknown_token, r"does not know your token \(401\)"),
        ("other/vit", None, r"your token may not do this \(403\)"),
        ("nowhere/vit", None, r"no such organisation or model \(404\)"),
        ("team/vit", gone, "the Hub cannot be reached"),
        ("team/vit", offline, "HF_HUB_OFFLINE"),
        ("team/vit", failing("/verify", 400), "the Hub answered 400"),
        ("team/vit", failing("/commit/", 413), "the Hub answered 413 .stand-in says 413"),
        ("team/vit", failing("/lfs/", 403), r"may not do this \(403\)"),
    ],
)
def test_what_goes_wrong_is_one_line(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str,
    break_it: Callable[[HubServer, pytest.MonkeyPatch], None] | None, message: str,
) -> None:  # fmt: skip
    if break_it is not None:
        break_it(hub, monkeypatch)
    with pytest.raises(InputError, match=message) as caught:
        push(folder, name)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    assert all(len(repo.commits) == 1 for repo in hub.repos.values())


def test_without_the_client_the_remedy_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs huggingface_hub, which is not installed: pip install 'swath\[hub\]'"):
        publish(folder, never, "team/vit")


def test_weights_without_a_licence_are_not_pushed(hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = exported(tmp_path / "bare", license=None)
    for arguments, message in (
        ([], "--license ID gives one"),
        (["--license", "apache"], "did you mean apache-2.0"),
        (["--license", "proprietary-x"], "no identifier that the Hub knows"),
    ):
        assert main(["export", str(bare), "--push", "team/vit", *arguments]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert not hub.requests
    assert main(["export", str(bare), "--private", "--to", str(tmp_path / "x")]) == 2
    assert main(["export", str(bare)]) == 2
    assert "--to DIR" in capsys.readouterr().err


def test_what_the_data_say_is_heeded(hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = [{"name": "firerisk", "licence": "CC-BY-NC-4.0", "samples": 9}, {"name": "mine", "licence": "", "samples": 1}]
    push(exported(tmp_path / "nc", datasets=data), "team/nc")
    assert [record.message.split(";")[0] for record in caplog.records if record.name == "swath.hub.push"] == [
        "! firerisk [CC-BY-NC-4.0] is for non-commercial use, which apache-2.0 would not say",
        "! the licence of mine is not stated",
    ]
    data[0]["licence"] = "CC-BY-ND-4.0"
    with pytest.raises(InputError, match=r"firerisk is under CC-BY-ND-4\.0, which forbids to pass on derived works"):
        push(exported(tmp_path / "nd", datasets=data), "team/nd")
    assert "team/nd" not in hub.repos


def test_an_export_that_is_there_is_pushed_if_it_is_the_same(hub: HubServer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()

    def push_it(to: Path | None, license: str = "apache-2.0") -> None:
        publish(run, lambda made: exported(made, license=license), "team/vit", to=to, license=license)

    push_it(tmp_path / "kept")
    push_it(tmp_path / "kept")  # the same command again
    push_it(None)
    assert len(hub.repos["team/vit"].commits) == 2
    with pytest.raises(InputError, match="holds another export already"):
        push_it(tmp_path / "kept", "mit")
    publish(tmp_path / "kept", never, "team/two", license="Apache-2.0")  # as it lies
    publish(tmp_path / "kept", lambda made: exported(made, license="mit"), "team/three", license="mit")  # anew
    assert b"license: mit" in hub.files("team/three")["README.md"]


def test_the_token_is_nowhere(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Not in a log at its most talkative, not in what is printed, not in a file, whether from the store or the environment."""
    caplog.set_level(logging.DEBUG)
    folder = exported(tmp_path / "exported")
    assert main(["export", str(folder), "--push", "team/vit"]) == 0
    hub.fail = {"/commit/": 418}
    (folder / "swath_vit.py").write_text("x = 3\n")
    assert main(["export", str(folder), "--push", "team/vit"]) == 2
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "token").write_text(TOKEN)
    hub.fail = {}
    assert main(["export", str(folder), "--push", "team/vit"]) == 0
    (tmp_path / "home" / "token").unlink()
    out, err = capfd.readouterr()
    assert "pushed: " in out and "answered 418" in err
    assert any("/lfs/" in path for _, path in hub.requests)
    for text in (out, err, caplog.text, *(str(record.__dict__) for record in caplog.records)):
        assert TOKEN not in text
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not any(TOKEN.encode() in data for data in hub.files("team/vit").values())
