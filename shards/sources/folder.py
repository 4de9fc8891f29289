"""The files below a folder, none of them passed over in silence."""

import os
from dataclasses import dataclass
from pathlib import Path

from swath.shards.errors import InputError

TIFF = (".tif", ".tiff")


@dataclass(frozen=True)
class Files:
    """`paths` of the plain files, sorted, without hidden ones; `links` counts the symbolic links, which are not followed."""

    paths: tuple[Path, ...]
    links: int

    def of(self, *extensions: str) -> list[Path]:
        """Those with one of the (lower-case) extensions."""
        return [path for path in self.paths if path.suffix.lower() in extensions]

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"{self.links} symbolic links are left out; name the folder that they lead to",) if self.links else ()


def files_below(folder: Path) -> Files:
    """All of them; InputError where a folder cannot be read, since what it holds would be missing from the data."""
    found, links = [], 0

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}); allow it, or move it out of {folder}") from None

    for place, folders, names in os.walk(folder, onerror=refuse):
        visible = [name for name in folders if not name.startswith(".")]
        folders[:] = [name for name in visible if not Path(place, name).is_symlink()]
        links += len(visible) - len(folders)
        for name in names:
            path = Path(place, name)
            if name.startswith("."):
                continue
            if path.is_symlink():
                links += 1
            elif path.is_file():
                found.append(path)
    return Files(tuple(sorted(found)), links)
