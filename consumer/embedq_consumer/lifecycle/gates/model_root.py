"""Where models may lie: what a command's path means, and why it may not be used."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from embedq_consumer.lifecycle.gates.checks import ModelRejected

__all__ = ["ModelRoot"]

_HUB_ID: Final = re.compile(r"\w[\w.-]*/[\w.-]+", re.ASCII)
"""What a model of the Hugging Face Hub is called, and what `embedq pull` calls its directory."""


class ModelRoot:
    """The directory below which every model of a command must lie, so that a command reads nothing else."""

    def __init__(self, root: Path) -> None:
        """`root` has its links resolved."""
        self._root = root

    def resolve(self, path: str) -> Path:
        """The directory that a command's path names, whatever links and dots it holds. Blocks on the file system.

        Raises:
            ModelRejected: it is not a directory below the root.
        """
        directory = self._below("path", "directory", path)
        try:
            is_directory = directory.is_dir()
        except OSError as error:
            raise ModelRejected(f"path: expected a directory name ({type(error).__name__})") from error
        if not is_directory:
            hint = f"; `embedq pull {path}` fetches a model of that name" if _HUB_ID.fullmatch(path) else ""
            raise ModelRejected(f"path: expected a directory, {directory} is not one{hint}")
        return directory

    def golden(self, path: str) -> Path:
        """The file of golden texts that a command names. Blocks on the file system.

        Raises:
            ModelRejected: it is not below the root.
        """
        return self._below("golden", "file", path)

    def _below(self, field: str, kind: str, path: str) -> Path:
        if "\0" in path:
            raise ModelRejected(f"{field}: expected a {kind} name")
        try:
            found = (self._root / path).resolve()
        except (OSError, RuntimeError) as error:  # a name too long, no permission, a cycle of links
            raise ModelRejected(f"{field}: expected a {kind} name ({type(error).__name__})") from error
        if not found.is_relative_to(self._root):
            raise ModelRejected(f"{field}: expected a {kind} below {self._root}")
        return found
