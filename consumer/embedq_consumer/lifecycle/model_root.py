"""Where models may lie: what a command's path means, and why it may not be used."""

from __future__ import annotations

from pathlib import Path

from embedq_consumer.lifecycle.checks import ModelRejected


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
        if "\0" in path:
            raise ModelRejected("path: expected a directory name")
        try:
            directory = (self._root / path).resolve()
            is_directory = directory.is_dir()
        except (OSError, RuntimeError) as error:  # a name too long, no permission, a cycle of links
            raise ModelRejected(f"path: expected a directory name ({type(error).__name__})") from error
        if not directory.is_relative_to(self._root):
            raise ModelRejected(f"path: expected a directory below {self._root}")
        if not is_directory:
            raise ModelRejected(f"path: expected a directory, {directory} is not one")
        return directory
