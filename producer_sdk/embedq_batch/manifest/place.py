"""Where manifests are."""

from __future__ import annotations

from pathlib import Path
from typing import Final

MANIFEST: Final = "manifest.sqlite"
"""Its name, in a folder whose name ends with `FOLDER`."""
FOLDER: Final = ".embedq"


def beside(path: Path) -> Path:
    """The folder of a file, or of a local store."""
    return path.with_name(f"{path.name}{FOLDER}")


def in_working_folder(name: str) -> Path:
    """The folder of a store that is on another machine: in the working directory, called after it."""
    return Path("".join(each if each.isalnum() or each in "-_." else "-" for each in name) + FOLDER)


def of_collection(address: str, collection: str, name: str) -> Path:
    """The manifest of a store's collection: beside a local store, and in the working directory for a server, called after `name`."""
    if "://" in address:
        return in_working_folder(name) / MANIFEST
    path = Path(address)
    return beside(path.with_name(f"{path.name}-{collection}")) / MANIFEST
