"""The real client of the Hub against a stand-in on loopback."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.hub_server import TOKEN, HubServer, serving


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The client's endpoint, cache and token are this test's own."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with serving() as server:
        for name, value in environment(server, tmp_path).items():
            monkeypatch.setenv(name, value)
        for name, value in {  # what the client has read from the environment already
            "ENDPOINT": server.place,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.place + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
            "HF_TOKEN_PATH": str(tmp_path / "home" / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield server


def environment(server: HubServer, folder: Path) -> dict[str, str]:
    """What a process must be given to use `server`; the stand-in knows the LFS protocol, not the newer one."""
    return {
        "HF_ENDPOINT": server.place,
        "HF_HOME": str(folder / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
