"""Virtual environments that hold torch, transformers, safetensors and Pillow, what these need, and nothing else.

Installing torch takes minutes, so its files are linked from the environment that runs the tests: for each distribution that
those four need by their own metadata, and for no other, what it has put into site-packages. Another transformers than the one
here is installed by pip, with its own dependencies.
"""

import re
import subprocess
import sys
import venv
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest


def clean_environment(folder: Path, transformers: str | None = None) -> Path:
    """The Python of a new environment in `folder`, with the transformers that is here or one of these versions ("<5").

    Skips the test where pip cannot get that.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    wanted = ["torch", "safetensors", "pillow", "numpy"] + ([] if transformers else ["transformers"])
    for name, found in _needed(wanted).items():
        _link(found, site, name)
    python = folder / "bin" / "python"
    if transformers:
        install = ["-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([sys.executable, *install, f"transformers{transformers}"], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip cannot install transformers{transformers} here: {(done.stderr.strip().splitlines() or [''])[-1]}")
    return python


def _needed(names: list[str]) -> dict[str, Distribution]:
    """The distributions of these names and all that they require here."""
    made: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in made:
            continue
        try:
            made[name] = distribution(name)
        except PackageNotFoundError:  # of another platform
            continue
        for requirement in made[name].requires or ():
            if "extra ==" not in requirement:
                waiting.append(re.split(r"[\s;<>=!~\[(]", requirement, maxsplit=1)[0])
    return made


def _link(found: Distribution, site: Path, name: str) -> None:
    files = found.files
    assert files, f"{name} does not say what it has installed"
    tops = {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}
    for top in tops:
        target = Path(str(found.locate_file(top)))
        if target.exists() and not (site / top).exists():
            (site / top).symlink_to(target)
