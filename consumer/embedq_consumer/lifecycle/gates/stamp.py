"""Whether the files of a model directory are still those that were loaded, told without reading them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

__all__ = ["stamp_of"]

_ADAPTER: Final = "adapter_config.json"
"""Such a directory is half of a model: its base lies elsewhere, and may change there."""


def stamp_of(directory: Path) -> str | None:
    """Hex digits of a hash over the names, sizes, times and inodes of all files; None where they do not tell all of the model.

    Blocks on the file system.
    """
    total = hashlib.sha256()
    try:
        for file in sorted(directory.rglob("*")):
            if file.name == _ADAPTER or (file.is_symlink() and file.is_dir()):
                return None
            state = file.stat()
            name = file.relative_to(directory)
            total.update(
                f"{name} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}\n".encode()
            )
    except OSError:
        return None
    return total.hexdigest()
