"""Which models ended the process that loaded them: what no guard in a process can see, the next process finds on the disk.

A file for each load that is under way, locked for as long as its process lives. The kernel takes the lock back when a process
dies, in whatever way; so a file that nobody holds is a load that its process did not survive.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog

from embedq_consumer.lifecycle.gates.checks import ModelRejected

__all__ = ["Attempt", "LoadAttempts"]

_DEADLY: Final = 2
"""Deaths after which a model is not tried again. One may be an operator's SIGKILL, or another process that took the memory."""
_MOST_FILES: Final = 1000
"""Files that are kept: those of commands that are long over are the oldest."""

log = structlog.get_logger()


class Attempt:
    """One load under way. Whoever begins it ends it, unless it is about to end the process."""

    def __init__(self, files: tuple[Path, ...], descriptor: int | None) -> None:
        """`files` are its own, locked by `descriptor`, and those of the loads of the same model that their processes died of."""
        self._files = files
        self._descriptor = descriptor

    def end(self) -> None:
        """The load has ended, well or not, and its process lives: all is forgotten."""
        for file in self._files:
            _remove(file)
        if self._descriptor is not None:
            os.close(self._descriptor)


class LoadAttempts:
    """Loads under way and those that ended their process, in a folder that outlives the process. Blocks on the file system.

    A folder that cannot be written counts nothing: then a model that kills its process is tried at every start.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def begin(self, model: str) -> Attempt:
        """Note that a load of what `model` names is under way.

        Raises:
            ModelRejected: it ended the process too often.
        """
        dead = self.refuse_deadly(model)
        file, descriptor = self._file(_key(model))
        return Attempt((*dead, *file), descriptor)

    def refuse_deadly(self, model: str) -> list[Path]:
        """The files of the loads of this model that their processes died of, where they are not too many.

        Raises:
            ModelRejected: they are.
        """
        dead = self._dead(_key(model))
        if len(dead) >= _DEADLY:
            raise ModelRejected(
                f"it ended the process that loaded it {len(dead)} times; it is not tried again before a new command"
            )
        return dead

    def _dead(self, key: str) -> list[Path]:
        """The files of this model that no living process holds."""
        if self._folder is None:
            return []
        return [file for file in self._folder.glob(f"{key}.*") if not _held(file)]

    def _file(self, key: str) -> tuple[tuple[Path, ...], int | None]:
        """A new file and the descriptor that locks it; none where none can be made."""
        if self._folder is None:
            return (), None
        file = self._folder / f"{key}.{uuid.uuid4().hex}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for old in sorted(self._folder.iterdir(), key=_age)[:-_MOST_FILES]:
                _remove(old)
            descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            log.warning("load_not_noted", reason=type(error).__name__)
            return (), None
        return (file,), descriptor


def _key(model: str) -> str:
    return hashlib.sha256(model.encode()).hexdigest()[:32]


def _age(file: Path) -> float:
    with suppress(OSError):
        return file.stat().st_mtime
    return 0.0


def _held(file: Path) -> bool:
    """Whether a living process holds this file. One that is gone meanwhile counts as held: its load has ended."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _remove(file: Path) -> None:
    with suppress(OSError):
        file.unlink()
